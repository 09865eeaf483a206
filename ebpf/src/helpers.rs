//! The kernel's helper functions that we call, each behind a safe name.

use crate::context::{Dial, Ops};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_setsockopt,
    bpf_sock_ops_cb_flags_set,
};
use core::ffi::c_void;
use warren_common::tables::{Cookie, Instant};

const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;

/// A context from which the kernel finds a socket, its namespace and its options.
pub trait SocketContext: Copy {
    fn as_void(self) -> *mut c_void;

    #[inline(always)]
    fn namespace(self) -> Cookie {
        // SAFETY: the helper takes this context, or the verifier refuses the program.
        Cookie::new(unsafe { bpf_get_netns_cookie(self.as_void()) })
    }

    #[inline(always)]
    fn cookie(self) -> Cookie {
        // SAFETY: the helper takes this context, or the verifier refuses the program.
        Cookie::new(unsafe { bpf_get_socket_cookie(self.as_void()) })
    }

    /// Sets the mark and forgets the route that was chosen without it. True if it was set.
    #[inline(always)]
    fn set_mark(self, mark: u32) -> bool {
        let mut mark = mark;
        // SAFETY: the option's value is the four bytes of `mark`, alive during the call.
        unsafe { bpf_setsockopt(self.as_void(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) == 0 }
    }
}

impl SocketContext for Ops {
    #[inline(always)]
    fn as_void(self) -> *mut c_void {
        self.0.cast()
    }
}

impl SocketContext for Dial {
    #[inline(always)]
    fn as_void(self) -> *mut c_void {
        self.0.cast()
    }
}

impl Ops {
    /// True if it is bound to no device now.
    #[inline(always)]
    pub fn unbind_device(self) -> bool {
        let mut none = 0_u32;
        // SAFETY: the option's value is an empty name, four zero bytes alive during the call.
        unsafe { bpf_setsockopt(self.as_void(), SOL_SOCKET, SO_BINDTODEVICE, (&raw mut none).cast(), 4) == 0 }
    }

    #[inline(always)]
    pub fn set_callbacks(self, flags: u32) {
        // SAFETY: the helper takes this context; unknown flags are refused, not acted on.
        unsafe { bpf_sock_ops_cb_flags_set(self.0, flags as i32) };
    }
}

#[inline(always)]
pub fn now() -> Instant {
    // SAFETY: reads a clock.
    Instant::new(unsafe { bpf_ktime_get_ns() })
}

/// How deep a cgroup is looked for: kubepods is at level 1 or, where the node is itself a container, a few below.
const CGROUP_LEVELS: i32 = 12;

/// True if the calling process is in that cgroup or below it.
#[inline(always)]
pub fn is_below_cgroup(cgroup: u64) -> bool {
    for level in 0..CGROUP_LEVELS {
        // SAFETY: reads about the current task.
        match unsafe { bpf_get_current_ancestor_cgroup_id(level) } {
            0 => return false,
            ancestor if ancestor == cgroup => return true,
            _ => {}
        }
    }
    false
}
