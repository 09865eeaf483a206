//! Reading the contexts that the kernel hands to a program. Every field is read by one assembly load at a constant
//! offset: LLVM would merge the reads of an array into wider ones ("invalid bpf_context access"), and sink the branches
//! of `if v4 {…} else {…}` into one load through a computed pointer ("dereference of modified ctx ptr").

use aya_ebpf::bindings::{__sk_buff, bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops};
use core::{arch::asm, mem::offset_of, ptr};
use warren_common::{Address, Family, FourTuple};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

/// Loads the word at a constant offset of a context.
#[inline(always)]
fn word<const OFFSET: usize, T>(context: *mut T) -> u32 {
    let word: u64;
    // SAFETY: callers pass the context the program was called with and the offset of a field; the verifier checks both.
    unsafe {
        asm!("{word} = *(u32 *)({context} + {offset})", word = out(reg) word, context = in(reg) context, offset = const OFFSET, options(nostack, readonly, preserves_flags));
    }
    word as u32
}

macro_rules! field {
    ($type:ident, $context:expr, $field:ident) => {
        word::<{ offset_of!($type, $field) }, $type>($context)
    };
    ($type:ident, $context:expr, $field:ident, $index:literal) => {
        word::<{ offset_of!($type, $field) + 4 * $index }, $type>($context)
    };
}

macro_rules! address {
    ($type:ident, $context:expr, $family:expr, $v4:ident, $v6:ident) => {
        if $family == AF_INET {
            Address::from_v4_word(field!($type, $context, $v4))
        } else {
            Address::from_v6_words([
                field!($type, $context, $v6, 0),
                field!($type, $context, $v6, 1),
                field!($type, $context, $v6, 2),
                field!($type, $context, $v6, 3),
            ])
        }
    };
}

/// A full socket behind a context, if there is one.
#[derive(Clone, Copy)]
pub struct Socket(*mut bpf_sock);

impl Socket {
    #[inline(always)]
    pub fn mark(self) -> u32 {
        field!(bpf_sock, self.0, mark)
    }

    #[inline(always)]
    pub fn is_bound_to_device(self) -> bool {
        field!(bpf_sock, self.0, bound_dev_if) != 0
    }
}

/// What a `sock_ops` program is told.
#[derive(Clone, Copy)]
pub struct Ops(pub *mut bpf_sock_ops);

impl Ops {
    #[inline(always)]
    pub fn operation(self) -> u32 {
        field!(bpf_sock_ops, self.0, op)
    }

    /// The first arguments of the operation follow its number.
    #[inline(always)]
    pub fn arguments(self) -> [u32; 2] {
        [
            word::<{ offset_of!(bpf_sock_ops, __bindgen_anon_1) }, _>(self.0),
            word::<{ offset_of!(bpf_sock_ops, __bindgen_anon_1) + 4 }, _>(self.0),
        ]
    }

    #[inline(always)]
    pub fn callbacks(self) -> u32 {
        field!(bpf_sock_ops, self.0, bpf_sock_ops_cb_flags)
    }

    #[inline(always)]
    pub fn socket_family(self) -> Family {
        if field!(bpf_sock_ops, self.0, family) == AF_INET {
            Family::V4
        } else {
            Family::V6
        }
    }

    #[inline(always)]
    pub fn remote(self) -> (Address, u16) {
        let family = field!(bpf_sock_ops, self.0, family);
        // Network order, in the upper half.
        let port = u32::from_be(field!(bpf_sock_ops, self.0, remote_port)) as u16;
        (address!(bpf_sock_ops, self.0, family, remote_ip4, remote_ip6), port)
    }

    #[inline(always)]
    pub fn local(self) -> (Address, u16) {
        let family = field!(bpf_sock_ops, self.0, family);
        let port = field!(bpf_sock_ops, self.0, local_port) as u16;
        (address!(bpf_sock_ops, self.0, family, local_ip4, local_ip6), port)
    }

    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        // SAFETY: the context is the kernel's; a volatile read of its pointer field stays the one load it is.
        let socket = unsafe { ptr::read_volatile(&raw const (*self.0).__bindgen_anon_2.sk) };
        if socket.is_null() { None } else { Some(Socket(socket)) }
    }
}

/// What a `cgroup/connect4` or `connect6` program is told.
#[derive(Clone, Copy)]
pub struct Dial(pub *mut bpf_sock_addr);

impl Dial {
    #[inline(always)]
    pub fn is_tcp(self) -> bool {
        field!(bpf_sock_addr, self.0, protocol) == IPPROTO_TCP
    }

    /// `connect4` may read one form of the address and `connect6` the other.
    #[inline(always)]
    pub fn destination(self, family: Family) -> Address {
        match family {
            Family::V4 => Address::from_v4_word(field!(bpf_sock_addr, self.0, user_ip4)),
            Family::V6 => Address::from_v6_words([
                field!(bpf_sock_addr, self.0, user_ip6, 0),
                field!(bpf_sock_addr, self.0, user_ip6, 1),
                field!(bpf_sock_addr, self.0, user_ip6, 2),
                field!(bpf_sock_addr, self.0, user_ip6, 3),
            ]),
        }
    }

    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        // SAFETY: the context is the kernel's; a volatile read of its pointer field stays the one load it is.
        let socket = unsafe { ptr::read_volatile(&raw const (*self.0).__bindgen_anon_1.sk) };
        if socket.is_null() { None } else { Some(Socket(socket)) }
    }
}

/// What an `sk_lookup` program is told. "Local" is the destination of the packet.
#[derive(Clone, Copy)]
pub struct Lookup(pub *mut bpf_sk_lookup);

impl Lookup {
    #[inline(always)]
    pub fn is_tcp(self) -> bool {
        field!(bpf_sk_lookup, self.0, protocol) == IPPROTO_TCP
    }

    #[inline(always)]
    pub fn interface(self) -> u32 {
        field!(bpf_sk_lookup, self.0, ingress_ifindex)
    }

    #[inline(always)]
    pub fn tuple(self) -> FourTuple {
        let family = field!(bpf_sk_lookup, self.0, family);
        let remote_port = u16::from_be(field!(bpf_sk_lookup, self.0, remote_port) as u16);
        FourTuple::new(
            address!(bpf_sk_lookup, self.0, family, remote_ip4, remote_ip6),
            remote_port,
            address!(bpf_sk_lookup, self.0, family, local_ip4, local_ip6),
            field!(bpf_sk_lookup, self.0, local_port) as u16,
        )
    }
}

/// The mark of a packet.
#[inline(always)]
pub fn packet_mark(packet: *mut __sk_buff) -> u32 {
    field!(__sk_buff, packet, mark)
}
