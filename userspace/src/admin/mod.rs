//! What the daemon shows over HTTP: its state on 15000 (localhost only), metrics on 15020, readiness on 15021. The state
//! itself belongs to others, who hand in closures that read it; nothing here holds a copy.

mod readiness;
mod server;
mod state;
#[cfg(test)]
mod tests;

pub use readiness::{Readiness, ReadinessSite};
pub use server::{Answer, BindError, Listen, Site, bind, serve};
pub use state::{AdminSite, AdminState, MetricsSite};
