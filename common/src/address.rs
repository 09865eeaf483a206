//! Addresses as the maps hold them: sixteen bytes in network order, IPv4 as `::ffff:a.b.c.d`, so that both families
//! share every map and every line of code.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The third word of a v4-mapped address, in network order.
const V4_MAPPED: u32 = 0xffff_u32.to_be();

/// The family a connection has on the wire, whatever the family of its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub const fn index(self) -> u32 {
        match self {
            Self::V4 => 0,
            Self::V6 => 1,
        }
    }
}

/// An IP address; IPv4 is v4-mapped. Words rather than bytes, so that the programs copy and compare it by words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Address {
    /// In network order.
    words: [u32; 4],
}

impl Address {
    /// From the word of a kernel context, still in network order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self {
            words: [0, 0, V4_MAPPED, word],
        }
    }

    /// From the words of a kernel context, each still in network order.
    #[inline(always)]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.words;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3],
        ]
    }

    #[inline(always)]
    pub const fn family(&self) -> Family {
        match self.words {
            [0, 0, V4_MAPPED, _] => Family::V4,
            _ => Family::V6,
        }
    }

    /// 127.0.0.0/8 or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        match self.words {
            [0, 0, V4_MAPPED, word] => u32::from_be(word) >> 24 == 127,
            [0, 0, 0, word] => u32::from_be(word) == 1,
            _ => false,
        }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        zerocopy::transmute!(octets)
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        IpAddr::V4(address).into()
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        IpAddr::V6(address).into()
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.octets()).to_canonical()
    }
}

/// A TCP connection as its connecting end names it. Keys the notes that one program leaves for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FourTuple {
    source: Address,
    destination: Address,
    /// Both in network order.
    ports: [u16; 2],
}

impl FourTuple {
    #[inline(always)]
    pub const fn new(source: Address, source_port: u16, destination: Address, destination_port: u16) -> Self {
        Self {
            source,
            destination,
            ports: [source_port.to_be(), destination_port.to_be()],
        }
    }

    #[inline(always)]
    pub const fn source(&self) -> Address {
        self.source
    }

    #[inline(always)]
    pub const fn destination(&self) -> Address {
        self.destination
    }

    #[inline(always)]
    pub const fn destination_port(&self) -> u16 {
        u16::from_be(self.ports[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn both_ways_of_writing_an_ipv4_address_are_one_address() {
        assert_eq!(address("10.1.2.3"), address("::ffff:10.1.2.3"));
        assert_eq!(
            address("10.1.2.3"),
            Address::from_v4_word(u32::from_ne_bytes([10, 1, 2, 3]))
        );
        assert_eq!(
            IpAddr::from(address("::ffff:10.1.2.3")),
            "10.1.2.3".parse::<IpAddr>().unwrap()
        );
        assert_eq!(IpAddr::from(address("fd77::1")), "fd77::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn the_words_of_a_context_are_the_octets_in_order() {
        let octets: Ipv6Addr = "1:203:405:607:809:a0b:c0d:e0f".parse().unwrap();
        let word = |first: usize| u32::from_ne_bytes(octets.octets()[first..first + 4].try_into().unwrap());
        assert_eq!(
            Address::from_v6_words([word(0), word(4), word(8), word(12)]),
            octets.into()
        );
    }

    #[test]
    fn families_and_loopbacks_are_told_apart() {
        for (text, family, loopback) in [
            ("127.0.0.1", Family::V4, true),
            ("127.200.0.9", Family::V4, true),
            ("::ffff:127.0.0.1", Family::V4, true),
            ("::1", Family::V6, true),
            ("::127.0.0.1", Family::V6, false),
            ("10.0.0.1", Family::V4, false),
            ("::", Family::V6, false),
            ("fd77::1", Family::V6, false),
            ("128.0.0.1", Family::V4, false),
        ] {
            assert_eq!(
                (address(text).family(), address(text).is_loopback()),
                (family, loopback),
                "{text}"
            );
        }
    }
}
