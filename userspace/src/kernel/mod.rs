//! Linux below us: programs, maps, links, pins, routes.

mod netlink;
pub mod routes;
pub mod sysctls;

pub use netlink::NetlinkError;
