//! HBONE: tunnels through HTTP/2 CONNECT over mutual TLS, with peers on the wire (`hbone.md` has it word by word). Not
//! here: who may call whom, and the applications' own connections (`proxy`).
//!
//! ```text
//! pool ── client ─┐                      ┌─ server ── Incoming
//!                 handshake, keepalive, stream
//! ```

pub mod client;
mod goodbye;
pub mod handshake;
pub mod headers;
mod keepalive;
pub mod pool;
mod readahead;
pub mod server;
pub mod settings;
pub mod stream;

pub use client::ConnectionEnd;
pub use handshake::HandshakeError;
pub use headers::RequestRefusal;
pub use pool::{Dial, Dialled, PeerKey, Pool, PoolError, Request};
pub use server::{Caller, Event, Incoming, Server};
pub use settings::HboneSettings;
pub use stream::{Tunnel, TunnelEnd};

#[cfg(test)]
mod hostile;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
