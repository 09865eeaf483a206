//! Load between two pods: a server, clients that measure, and the lines they report. Its own protocol, so that nothing of an
//! HTTP server is measured along: the first byte of a connection says what it wants.

use serde::{Deserialize, Serialize};

pub mod bulk;
pub mod connect;
pub mod histogram;
pub mod request;
pub mod server;
pub mod talk;
pub mod traffic;

pub use histogram::{Histogram, Percentiles};
pub use traffic::Traffic;

/// Requests and answers are this long.
pub const FRAME: usize = 1024;

/// Each frame is answered by one.
pub const ECHO: u8 = b'E';
/// As [`ECHO`]; the answer begins with the client's address as the server sees it, ended by a newline.
pub const ADDRESS: u8 = b'A';
/// The server swallows everything, and answers the end with the count as eight bytes, big-endian.
pub const SINK: u8 = b'S';
/// Four more bytes, big-endian, say for how many milliseconds the server sends.
pub const SOURCE: u8 = b'G';

/// What a client prints, as one line of JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Report {
    Bulk {
        bytes: u64,
        seconds: f64,
        gbit_per_s: f64,
    },
    Request(Rate),
    Connect(ConnectRate),
    /// So many connections are open and have answered once; they stay open until standard input ends.
    Hold {
        connections: usize,
    },
}

/// Closed-loop operations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    pub operations: u64,
    pub seconds: f64,
    pub per_second: f64,
    #[serde(flatten)]
    pub latency: Percentiles,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectRate {
    #[serde(flatten)]
    pub rate: Rate,
    pub errors: u64,
    /// Answers that named another client than the one asked for.
    pub wrong_address: u64,
    pub first_error: Option<String>,
}
