//! The system calls that have no safe name: opening a pinned link, asking about it, giving it another program; waiting
//! for a ring of trace lines.

#![allow(unsafe_code, reason = "system calls without a safe wrapper")]

use aya_log::EbpfLogger;
use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// What a link is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// The cgroup's id; 0 once it is gone.
    Cgroup {
        id: u64,
    },
    /// The namespace's inode; 0 once it is gone.
    Namespace {
        inode: u32,
    },
    /// The interface's index in its namespace; 0 once it is gone.
    Interface {
        index: u32,
    },
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkFacts {
    pub(super) program: u32,
    pub(super) target: Target,
}

#[repr(C)]
struct ObjectGet {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoByFd {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// The beginning of `struct bpf_link_info`, with room for the longest of its variants that we read.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    variant: [u32; 12],
}

/// The attribute's fields must all be initialised and any pointer in them valid.
fn bpf<T>(command: libc::c_long, attribute: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most the size given, which is the attribute's; pointers inside it were made
    // by the callers below from values that live during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attribute),
            mem::size_of::<T>(),
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attribute = ObjectGet {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &mut attribute)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks about an open link.
pub(super) fn link_facts(link: BorrowedFd<'_>) -> io::Result<LinkFacts> {
    let mut info = LinkInfo::default();
    let mut attribute = InfoByFd {
        fd: link.as_raw_fd() as u32,
        length: mem::size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attribute)?;
    let [first, second, ..] = info.variant;
    let target = match info.kind {
        3 => Target::Cgroup {
            id: u64::from(second) << 32 | u64::from(first),
        },
        5 => Target::Namespace { inode: first },
        11 => Target::Interface { index: first },
        _ => Target::Other,
    };
    Ok(LinkFacts {
        program: info.program,
        target,
    })
}

/// Puts another program in the place of the link's, without a moment between.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attribute = LinkUpdate {
        link: link.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        flags: 0,
        old_program: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attribute).map(drop)
}

/// Waits for lines in a ring, on the runtime of the caller.
pub(super) fn watch_ring<L: log::Log>(ring: EbpfLogger<L>) -> io::Result<AsyncFd<EbpfLogger<L>>> {
    // SAFETY: the logger owns its map's descriptor and keeps it as long as it lives.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)
}
