//! The marks that sockets and packets carry. A mark steers, it is never proof of anything: CAP_NET_RAW may set it.

/// An application's connection that turns round on `lo` into the daemon.
pub const STEER: u32 = 0x111;
/// A connection from the daemon to the application, and the application's answers on it.
pub const DELIVER: u32 = 0x112;
/// A connection that the routing refuses at once.
pub const REFUSE: u32 = 0x113;
/// Covers the three above and nothing else of ours; compare with [`RANGE`].
pub const MASK: u32 = 0xff0;
/// What the three have in common under [`MASK`].
pub const RANGE: u32 = 0x110;
/// The daemon's own sockets: never steered.
pub const DAEMON: u32 = 0x539;

/// True for a mark that our routing rules act on: a packet that carries one has no business outside the pod.
pub const fn is_ours(mark: u32) -> bool {
    mark & MASK == RANGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_holds_our_three_marks_and_not_the_daemons() {
        assert!(is_ours(STEER) && is_ours(DELIVER) && is_ours(REFUSE));
        assert!(!is_ours(DAEMON) && !is_ours(0));
    }
}
