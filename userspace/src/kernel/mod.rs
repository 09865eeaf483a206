//! Linux below us: programs, maps, links, pins, routes.

mod netlink;
pub mod routes;
pub mod sockets;
pub mod sysctls;
mod tables;
mod trace;
pub mod watch;

pub use netlink::NetlinkError;
