//! Copies one connection: an application's socket on one side, a tunnel or another socket on the other. Half-close by
//! half-close; a reset on one side becomes a reset on the other. Nothing is allocated while nothing moves.

mod sockets;
mod tunnel;

pub(super) use sockets::SocketRelay;
pub(super) use tunnel::TunnelRelay;

use super::connections::Open;
use crate::hbone::TunnelEnd;
use std::{cell::RefCell, io};

/// Bytes that are read at once, and so the largest DATA frame that we send: what a small message waits for behind each bulk
/// tunnel. Half of it costs a tenth more CPU per byte.
const CHUNK: usize = 256 << 10;
/// Bytes that one turn of one direction moves before others get their turn.
const TURN: usize = 1 << 20;

thread_local! {
    /// What reads go into before it is known how much there is.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// How a copied connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides had said all.
    Completely,
    /// The application's socket broke or was reset.
    Application(io::ErrorKind),
    /// The other socket of a connection without a tunnel broke or was reset.
    Far(io::ErrorKind),
    Tunnel(TunnelEnd),
    /// We ended it; the registry knows why.
    Closed,
}

/// Which way the application's bytes go in the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Application {
    Client,
    Server,
}

impl Application {
    fn count_from(self, open: &Open, bytes: usize) {
        match self {
            Self::Client => open.metrics.received(bytes as u64),
            Self::Server => open.metrics.sent(bytes as u64),
        }
    }

    fn count_to(self, open: &Open, bytes: usize) {
        match self {
            Self::Client => open.metrics.sent(bytes as u64),
            Self::Server => open.metrics.received(bytes as u64),
        }
    }
}
