//! The marks that sockets and packets carry, as kernel programs know them. A mark steers, it is never proof of anything.

pub use warren_common::marks::{DAEMON, DELIVER, MASK, RANGE, REFUSE, STEER};
