//! The socket options that no crate wraps. One of the few files with `unsafe`.

use std::{
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, AsRawFd},
};

/// The cookie of the network namespace a socket belongs to: what `bpf_get_netns_cookie` returns for it.
pub(super) fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to locals that outlive the call, and `length` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Leaves the choice of the local port to `connect`, which knows the destination: otherwise a port is taken at `bind`
/// for every destination at once, and 28,000 connections use them up.
pub(super) fn choose_port_at_connect(socket: &impl AsFd) -> io::Result<()> {
    set_ip_option(socket, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Narrows that choice. What is not ephemeral in the socket's namespace narrows nothing. From Linux 6.3 on.
pub(super) fn choose_port_among(socket: &impl AsFd, ports: RangeInclusive<u16>) -> io::Result<()> {
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    let (low, high) = ports.into_inner();
    let range = u32::from(low) | u32::from(high) << 16;
    set_ip_option(socket, IP_LOCAL_PORT_RANGE, range.cast_signed())
}

fn set_ip_option(socket: &impl AsFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer is to a local that outlives the call, with its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_IP,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
