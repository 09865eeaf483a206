//! The marks that sockets and packets carry. A mark steers, it is never proof of anything.

/// An application's connection that turns round on `lo` into the daemon.
pub const STEER: u32 = 0x111;
/// A connection from the daemon to the application, and the application's answers on it.
pub const DELIVER: u32 = 0x112;
/// A connection that the routing refuses at once.
pub const REFUSE: u32 = 0x113;
/// Covers the three above, and nothing else of ours. Compare with [`RANGE`].
pub const MASK: u32 = 0xff0;
/// What the three have in common under [`MASK`].
pub const RANGE: u32 = 0x110;
/// The daemon's own sockets: never steered.
pub const DAEMON: u32 = 0x539;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_covers_our_marks_and_not_the_daemons() {
        for mark in [STEER, DELIVER, REFUSE] {
            assert_eq!(mark & MASK, RANGE);
        }
        assert_ne!(DAEMON & MASK, RANGE);
    }
}
