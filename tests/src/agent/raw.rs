//! Hand-made SYNs in shapes that a parser of fixed offsets overlooks, and what comes back for them.

use super::Shape;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

const TCP: u8 = 6;
const SYN: u8 = 2;
/// ETH_P_ALL in network order.
const EVERYTHING: i32 = 0x0300;
const IPPROTO_RAW: i32 = 255;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Sends one SYN and gives back the TCP flags of every segment that answers it within `time`.
pub(super) fn syn(from: SocketAddr, to: SocketAddr, shape: Shape, time: Duration) -> io::Result<Vec<u8>> {
    let ears = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(EVERYTHING)))?;
    ears.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mouth = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?;
    let segment = segment(from, to);
    for packet in packets(from.ip(), to.ip(), shape, &segment)? {
        let mut bare = to;
        bare.set_port(0);
        mouth.send_to(&packet, &bare.into())?;
    }
    let (mut flags, end) = (Vec::new(), Instant::now() + time);
    let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
    while Instant::now() < end {
        let Ok(count) = ears.recv(&mut buffer) else { continue };
        let packet: Vec<u8> = buffer[..count]
            .iter()
            // SAFETY: the kernel wrote the first `count` bytes.
            .map(|byte| unsafe { byte.assume_init() })
            .collect();
        flags.extend(answer(&packet, from, to));
    }
    Ok(flags)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

fn segment(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut tcp = Vec::with_capacity(24);
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(0x1234_5678_u32.to_be_bytes());
    tcp.extend(0_u32.to_be_bytes());
    tcp.extend([6 << 4, SYN]);
    tcp.extend(64240_u16.to_be_bytes());
    tcp.extend([0, 0, 0, 0]);
    // MSS 1460
    tcp.extend([2, 4, 5, 0xb4]);
    let length = u16::try_from(tcp.len()).unwrap_or(0);
    let mut pseudo = [octets(from.ip()), octets(to.ip())].concat();
    pseudo.extend([0, TCP]);
    pseudo.extend(length.to_be_bytes());
    pseudo.extend(&tcp);
    let sum = checksum(&pseudo).to_be_bytes();
    tcp[16..18].copy_from_slice(&sum);
    tcp
}

fn packets(from: IpAddr, to: IpAddr, shape: Shape, segment: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let v6 = |next: u8, payload: &[u8]| {
        let mut packet = vec![6 << 4, 0, 0, 0];
        packet.extend(u16::try_from(payload.len()).unwrap_or(0).to_be_bytes());
        packet.extend([next, 64]);
        packet.extend([octets(from), octets(to)].concat());
        packet.extend(payload);
        packet
    };
    match (from.is_ipv4(), shape) {
        (true, Shape::Plain) => Ok(vec![v4(from, to, segment, 0, false)]),
        // The ports are in the first fragment, the flags in the second.
        (true, Shape::Fragments) => Ok(vec![
            v4(from, to, &segment[..8], 0, true),
            v4(from, to, &segment[8..], 1, false),
        ]),
        (false, Shape::Plain) => Ok(vec![v6(TCP, segment)]),
        (false, Shape::DestinationOptions) => {
            let options = [TCP, 0, 1, 4, 0, 0, 0, 0];
            Ok(vec![v6(DESTINATION_OPTIONS, &[&options[..], segment].concat())])
        }
        (false, Shape::Fragments) => {
            let part = |offset: u16, more: u16, bytes: &[u8]| {
                let mut header = vec![TCP, 0];
                header.extend(((offset << 3) | more).to_be_bytes());
                header.extend(0x00c0_ffee_u32.to_be_bytes());
                header.extend(bytes);
                v6(FRAGMENT, &header)
            };
            Ok(vec![part(0, 1, &segment[..8]), part(1, 0, &segment[8..])])
        }
        (true, Shape::DestinationOptions) => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn v4(from: IpAddr, to: IpAddr, payload: &[u8], offset: u16, more: bool) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend(u16::try_from(20 + payload.len()).unwrap_or(0).to_be_bytes());
    packet.extend(0x77aa_u16.to_be_bytes());
    packet.extend((offset | if more { 0x2000 } else { 0 }).to_be_bytes());
    packet.extend([64, TCP, 0, 0]);
    packet.extend([octets(from), octets(to)].concat());
    let sum = checksum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet.extend(payload);
    packet
}

/// The flags of a segment from `to`'s port to `from`'s.
fn answer(packet: &[u8], from: SocketAddr, to: SocketAddr) -> Option<u8> {
    let (tcp, source) = match packet.first()? >> 4 {
        4 if *packet.get(9)? == TCP => (packet.get(usize::from(packet[0] & 15) * 4..)?, packet.get(12..16)?),
        6 if *packet.get(6)? == TCP => (packet.get(40..)?, packet.get(8..24)?),
        _ => return None,
    };
    let ports = [to.port().to_be_bytes(), from.port().to_be_bytes()].concat();
    (source == octets(to.ip()) && tcp.get(..4)? == ports).then(|| tcp.get(13).copied())?
}
