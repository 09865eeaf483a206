//! The guard at a pod's way out: what carries a mark of ours was meant to stay inside.

use crate::{Reason, marks};

/// What becomes of a packet that leaves the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    Pass,
    Drop(Reason),
}

/// Asked for every packet: one comparison.
#[inline(always)]
pub const fn guard(mark: u32) -> Guard {
    if marks::is_ours(mark) {
        Guard::Drop(Reason::MarkedPacketLeaving)
    } else {
        Guard::Pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_marked_for_the_inside_leaves() {
        for mark in [marks::STEER, marks::DELIVER, marks::REFUSE, 0x110, 0x11f, 0xabcd_0111] {
            assert_eq!(guard(mark), Guard::Drop(Reason::MarkedPacketLeaving), "{mark:#x}");
        }
        for mark in [0, marks::DAEMON, 0x100, 0x120, 0x1, 0x811] {
            assert_eq!(guard(mark), Guard::Pass, "{mark:#x}");
        }
    }
}
