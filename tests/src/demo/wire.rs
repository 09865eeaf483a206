//! What went over the wire between the nodes: a packet capture by tcpdump, read as packets, TCP streams and TLS records.
//! Judges nothing; `shows` does.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::apps::program;
use crate::process::Process;
use crate::topology::{Node, WIRE, World};
use crate::wait::{DEADLINE, wait_until};

const TCP: u8 = 6;
/// The discard port: nobody answers there.
const FENCE_PORT: u16 = 9;

/// A running tcpdump on the link between the nodes.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    fences: u32,
}

impl Capture {
    pub fn start(world: &World) -> Result<Self> {
        let file = world.directory().join("wire.pcap");
        let process = world
            .node(Node::A)
            .command(program("tcpdump")?)
            // Written at once and as root: neither a buffer nor another user's rights may hide a packet.
            .args([
                "-i",
                WIRE,
                "--immediate-mode",
                "-U",
                "-n",
                "-s",
                "0",
                "-B",
                "16384",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file)
            .spawn()?;
        process.wait_for_line("listening on", DEADLINE)?;
        Ok(Self {
            process,
            file,
            fences: 0,
        })
    }

    /// How many packets have been captured up to now. Everything sent before the call is among them: a datagram of our
    /// own follows it over the wire, and is waited for.
    pub fn fence(&mut self, world: &World) -> Result<usize> {
        self.fences += 1;
        let text = format!("warren-fence-{}-{}", std::process::id(), self.fences);
        let target = SocketAddr::new(world.node(Node::B).v4.into(), FENCE_PORT);
        world.node(Node::A).namespace.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("make a datagram socket")?;
            socket
                .send_to(text.as_bytes(), target)
                .context("send a datagram over the wire")
                .map(drop)
        })?;
        wait_until("the capture holds all that was sent", DEADLINE, || {
            let packets = self.packets().ok()?;
            let at = packets
                .iter()
                .rposition(|packet| find(&packet.bytes, text.as_bytes()).is_some())?;
            Some(at + 1)
        })
        .with_context(|| self.process.log())
    }

    /// Everything captured up to now.
    pub fn packets(&self) -> Result<Vec<Packet>> {
        let bytes = fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        read_pcap(&bytes)
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// A packet as it was on the wire, and where the parts of it are.
#[derive(Debug, Clone)]
pub struct Packet {
    bytes: Vec<u8>,
    pub tcp: Option<Segment>,
}

/// A TCP segment in a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    sequence: u32,
    is_syn: bool,
    payload: Range<usize>,
}

impl Packet {
    pub fn contains(&self, text: &str) -> bool {
        find(&self.bytes, text.as_bytes()).is_some()
    }

    fn new(bytes: Vec<u8>) -> Self {
        let tcp = segment_of(&bytes);
        Self { bytes, tcp }
    }
}

/// One direction of one TCP connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Stream {
    pub bytes: Vec<u8>,
    /// Whether the capture holds it from its first byte.
    pub is_whole: bool,
}

/// Where a stream comes from, and where it goes to.
pub type Ends = (SocketAddr, SocketAddr);

/// The streams of all TCP connections.
pub fn streams(packets: &[Packet]) -> BTreeMap<Ends, Stream> {
    let mut parts: BTreeMap<Ends, Vec<(&Segment, &[u8])>> = BTreeMap::new();
    for packet in packets {
        if let Some(segment) = &packet.tcp {
            let payload = &packet.bytes[segment.payload.clone()];
            parts
                .entry((segment.from, segment.to))
                .or_default()
                .push((segment, payload));
        }
    }
    parts
        .into_iter()
        .map(|(ends, segments)| (ends, assemble(&segments)))
        .collect()
}

/// Puts the segments in order, once each.
fn assemble(segments: &[(&Segment, &[u8])]) -> Stream {
    let syn = segments.iter().find(|(segment, _)| segment.is_syn);
    let is_whole = syn.is_some();
    let first = match (syn, segments.first()) {
        (Some((segment, _)), _) => segment.sequence.wrapping_add(1),
        (None, Some((segment, _))) => segment.sequence,
        (None, None) => return Stream::default(),
    };
    let mut ordered: Vec<(u32, &[u8])> = segments
        .iter()
        .filter(|(segment, payload)| !payload.is_empty() && !segment.is_syn)
        .map(|(segment, payload)| (segment.sequence.wrapping_sub(first), *payload))
        .collect();
    ordered.sort_by_key(|(offset, _)| *offset);
    let mut bytes: Vec<u8> = Vec::new();
    for (offset, payload) in ordered {
        // What was sent again is already there.
        let known = bytes.len().saturating_sub(offset as usize).min(payload.len());
        bytes.extend_from_slice(&payload[known..]);
    }
    Stream { bytes, is_whole }
}

/// What a server chose in its TLS hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chosen {
    pub version: u16,
    pub suite: u16,
    pub group: u16,
}

impl std::fmt::Display for Chosen {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.version {
            0x0304 => write!(out, "TLS 1.3")?,
            other => write!(out, "TLS version {other:#06x}")?,
        }
        match self.group {
            0x11ec => write!(out, ", X25519MLKEM768")?,
            0x001d => write!(out, ", X25519")?,
            0x0017 => write!(out, ", P-256")?,
            other => write!(out, ", group {other:#06x}")?,
        }
        match self.suite {
            0x1301 => write!(out, ", AES_128_GCM_SHA256"),
            0x1302 => write!(out, ", AES_256_GCM_SHA384"),
            other => write!(out, ", suite {other:#06x}"),
        }
    }
}

/// Checks that the bytes are TLS records from the first to the last, and counts them. The last may be cut off.
pub fn tls_records(bytes: &[u8]) -> Result<usize> {
    let mut at = 0;
    let mut count = 0;
    while at < bytes.len() {
        let header = &bytes[at..bytes.len().min(at + 5)];
        let is_header = match *header {
            // change_cipher_spec, alert, handshake, application_data; the versions that TLS 1.3 writes there.
            [kind, 3, minor, ..] => (20..=23).contains(&kind) && matches!(minor, 1 | 3),
            [kind, ..] => (20..=23).contains(&kind),
            [] => true,
        };
        ensure!(is_header, "byte {at} begins no TLS record: {header:02x?}");
        let [_, _, _, high, low] = *header else { break };
        let length = usize::from(u16::from_be_bytes([high, low]));
        ensure!(length <= (1 << 14) + 256, "a TLS record of {length} bytes at byte {at}");
        at += 5 + length;
        count += 1;
    }
    Ok(count)
}

/// Reads the ServerHello that a TLS 1.3 server's stream begins with.
pub fn server_hello(bytes: &[u8]) -> Option<Chosen> {
    // record header 5, handshake header 4, legacy_version 2, random 32, then the echoed session id.
    if bytes.first() != Some(&22) || bytes.get(5) != Some(&2) {
        return None;
    }
    let mut at = 44 + usize::from(*bytes.get(43)?);
    let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let suite = word(at)?;
    at += 3;
    let end = at + 2 + usize::from(word(at)?);
    at += 2;
    let (mut version, mut group) = (0x0303, 0);
    while at + 4 <= end {
        let (kind, length) = (word(at)?, usize::from(word(at + 2)?));
        match kind {
            43 => version = word(at + 4)?,
            51 => group = word(at + 4)?,
            _ => {}
        }
        at += 4 + length;
    }
    Some(Chosen { version, suite, group })
}

/// Reads tcpdump's file; a packet that is not written to its end yet is left out.
fn read_pcap(bytes: &[u8]) -> Result<Vec<Packet>> {
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .and_then(|four| four.try_into().ok())
            .map(u32::from_ne_bytes)
    };
    match word(0) {
        // Microseconds or nanoseconds, in this machine's byte order.
        Some(0xa1b2_c3d4 | 0xa1b2_3c4d) => {}
        None => return Ok(Vec::new()),
        Some(magic) => bail!("this is no packet capture: it begins with {magic:#x}"),
    }
    ensure!(
        word(20).is_none_or(|link| link & 0xffff == 1),
        "the capture is not of Ethernet"
    );
    let mut packets = Vec::new();
    let mut at = 24;
    while let Some(length) = word(at + 8) {
        let Some(packet) = bytes.get(at + 16..at + 16 + length as usize) else {
            break;
        };
        packets.push(Packet::new(packet.to_vec()));
        at += 16 + length as usize;
    }
    Ok(packets)
}

/// Finds the TCP segment in an Ethernet frame, if it holds one.
fn segment_of(frame: &[u8]) -> Option<Segment> {
    let (source, destination, tcp, end): (IpAddr, IpAddr, usize, usize) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(frame.get(14)? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([*frame.get(16)?, *frame.get(17)?]));
            if *frame.get(23)? != TCP {
                return None;
            }
            (v4(frame, 26)?.into(), v4(frame, 30)?.into(), 14 + header, 14 + total)
        }
        [0x86, 0xdd] => {
            let total = usize::from(u16::from_be_bytes([*frame.get(18)?, *frame.get(19)?]));
            if *frame.get(20)? != TCP {
                return None;
            }
            (v6(frame, 22)?.into(), v6(frame, 38)?.into(), 54, 54 + total)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let sequence = u32::from_be_bytes(frame.get(tcp + 4..tcp + 8)?.try_into().ok()?);
    let header = usize::from(frame.get(tcp + 12)? >> 4) * 4;
    let end = end.min(frame.len());
    Some(Segment {
        from: SocketAddr::new(source, port(tcp)?),
        to: SocketAddr::new(destination, port(tcp + 2)?),
        sequence,
        is_syn: frame.get(tcp + 13)? & 0x02 != 0,
        payload: (tcp + header).min(end)..end,
    })
}

fn v4(frame: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into())
}

fn v6(frame: &[u8], at: usize) -> Option<Ipv6Addr> {
    let octets: [u8; 16] = frame.get(at..at + 16)?.try_into().ok()?;
    Some(octets.into())
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// Whether a stream holds `text`, also where packets cut it in two.
pub fn stream_contains(stream: &Stream, text: &str) -> bool {
    find(&stream.bytes, text.as_bytes()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "10.77.1.10:40000";
    const SERVER: &str = "10.77.2.11:15008";

    fn frame(sequence: u32, flags: u8, payload: &[u8]) -> Packet {
        let mut bytes = vec![0; 12];
        bytes.extend([0x08, 0x00, 0x45, 0]);
        bytes.extend((40 + payload.len() as u16).to_be_bytes());
        bytes.extend([0, 0, 0, 0, 64, TCP, 0, 0, 10, 77, 1, 10, 10, 77, 2, 11]);
        bytes.extend(40000_u16.to_be_bytes());
        bytes.extend(15008_u16.to_be_bytes());
        bytes.extend(sequence.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        Packet::new(bytes)
    }

    fn only_stream(packets: &[Packet]) -> Stream {
        let mut streams = streams(packets);
        let ends = (CLIENT.parse().expect("address"), SERVER.parse().expect("address"));
        let stream = streams.remove(&ends).expect("the stream");
        assert!(streams.is_empty());
        stream
    }

    #[test]
    fn a_text_cut_in_two_by_packets_that_come_twice_and_out_of_order_is_found() {
        let start = u32::MAX - 2;
        let packets = [
            frame(start, 0x02, b""),
            frame(start.wrapping_add(6), 0x10, b" world"),
            frame(start.wrapping_add(1), 0x10, b"hello"),
            frame(start.wrapping_add(1), 0x10, b"hello"),
        ];
        let stream = only_stream(&packets);
        assert_eq!(
            stream,
            Stream {
                bytes: b"hello world".to_vec(),
                is_whole: true
            }
        );
        assert!(stream_contains(&stream, "lo wor"));
        assert!(!packets.iter().any(|packet| packet.contains("lo wor")));
    }

    #[test]
    fn a_stream_whose_beginning_was_missed_says_so() {
        assert!(!only_stream(&[frame(77, 0x10, b"x")]).is_whole);
    }

    #[test]
    fn one_byte_of_plaintext_between_tls_records_is_found() {
        let good = [22, 3, 1, 0, 2, 1, 1, 20, 3, 3, 0, 1, 1, 23, 3, 3, 0, 1, 9];
        assert_eq!(tls_records(&good).expect("records"), 3);
        // The last may be on its way still.
        assert_eq!(tls_records(&good[..16]).expect("records"), 2);
        let mut bad = good.to_vec();
        bad.insert(13, b'G');
        assert!(tls_records(&bad).is_err());
        assert!(tls_records(b"GET / HTTP/1.1").is_err());
    }

    #[test]
    fn the_servers_choice_is_read_from_its_hello() {
        let mut hello = vec![22, 3, 3, 0, 60, 2, 0, 0, 56, 3, 3];
        hello.extend([7; 32]);
        hello.extend([0, 0x13, 0x02, 0]);
        let extensions = [0, 51, 0, 6, 0x11, 0xec, 0, 2, 1, 1, 0, 43, 0, 2, 3, 4];
        hello.extend((extensions.len() as u16).to_be_bytes());
        hello.extend(extensions);
        let chosen = server_hello(&hello).expect("a hello");
        assert_eq!(
            chosen,
            Chosen {
                version: 0x0304,
                suite: 0x1302,
                group: 0x11ec
            }
        );
        assert_eq!(chosen.to_string(), "TLS 1.3, X25519MLKEM768, AES_256_GCM_SHA384");
        assert_eq!(server_hello(b"HTTP/1.1 200 OK"), None);
    }

    #[test]
    fn a_packet_that_is_still_being_written_is_left_out() {
        let packet = frame(1, 0x10, b"x").bytes;
        let mut file = Vec::new();
        for word in [0xa1b2_c3d4_u32, 0, 0, 0, 65535, 1] {
            file.extend(word.to_ne_bytes());
        }
        for _ in 0..2 {
            for word in [0, 0, packet.len() as u32, packet.len() as u32] {
                file.extend(word.to_ne_bytes());
            }
            file.extend(&packet);
        }
        assert_eq!(read_pcap(&file).expect("capture").len(), 2);
        assert_eq!(read_pcap(&file[..file.len() - 1]).expect("capture").len(), 1);
        assert!(read_pcap(b"not a capture at all, really").is_err());
    }
}
