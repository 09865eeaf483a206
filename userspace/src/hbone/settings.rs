//! Every interval, window and bound of the wire in one value. Not here: who uses them.

use std::time::Duration;

/// What HBONE needs to know of time and space. `Default` is what peers expect (hbone.md).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HboneSettings {
    /// How long a TCP connection to a peer may take.
    pub connect_deadline: Duration,
    /// How long TLS and the HTTP/2 preface may take, on either side.
    pub handshake_deadline: Duration,
    /// How long a client waits for the answer to a CONNECT.
    pub answer_deadline: Duration,
    /// The pause between an answered PING and the next.
    pub ping_interval: Duration,
    /// A connection whose PING is not answered for this long is dead.
    pub ping_timeout: Duration,
    /// A connection without a tunnel closes after this long, on either side.
    pub idle: Duration,
    /// Tunnels that a client opens on one connection, if the peer allows as many.
    pub tunnels_per_connection: usize,
    /// Connections that one pod keeps to one peer. Beyond it tunnels share the least loaded one.
    pub connections_per_peer: usize,
    /// As many connections are dialled to keep new tunnels away from bulk; beyond it they share its connections.
    pub connections_beside_bulk: usize,
    /// A connection with this many tunnels gets a sibling while there are fewer than `spread`.
    pub tunnels_before_spreading: usize,
    /// Over how many connections the tunnels to one peer are spread, so that they use several CPUs.
    pub spread: usize,
    /// Tunnels that a server accepts on one connection. Istio's client opens 100 without asking.
    pub max_concurrent_streams: u32,
    /// Bytes that may be on their way in one tunnel and one direction; with `max_concurrent_streams` it bounds the
    /// memory that readers which do not read can hold.
    pub stream_window: u32,
    /// Bytes of one connection on their way. Larger than all tunnels together, so that tunnels never wait for each other.
    pub connection_window: u32,
    /// The largest DATA frame that we accept, in bytes.
    pub max_frame_size: u32,
    /// Unsent bytes that HTTP/2 keeps for one tunnel.
    pub send_buffer: usize,
    /// Header list that a server accepts, in bytes.
    pub server_header_list: u32,
    /// Header list that a client accepts, in bytes.
    pub client_header_list: u32,
}

impl Default for HboneSettings {
    fn default() -> Self {
        Self {
            connect_deadline: Duration::from_secs(10),
            handshake_deadline: Duration::from_secs(10),
            answer_deadline: Duration::from_secs(20),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle: Duration::from_secs(300),
            tunnels_per_connection: 100,
            connections_per_peer: 512,
            connections_beside_bulk: 32,
            tunnels_before_spreading: 8,
            spread: std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 4),
            max_concurrent_streams: 200,
            stream_window: 1 << 20,
            connection_window: (1 << 31) - 1,
            max_frame_size: 256 << 10,
            send_buffer: 512 << 10,
            server_header_list: 64 << 10,
            client_header_list: 16 << 10,
        }
    }
}

impl HboneSettings {
    /// The same with the periodic intervals (ping, idle) divided by `divisor`. How long an answer may take stays.
    pub fn faster(mut self, divisor: u32) -> Self {
        for interval in [&mut self.ping_interval, &mut self.idle] {
            *interval /= divisor;
        }
        self
    }

    /// A budget for frames that carry next to nothing. Tunnels take such frames off HTTP/2 at once, so that only what
    /// arrives between two of their turns counts; the largest number of small frames that memory can bear.
    pub(super) const DATA_FRAME_BUDGET: usize = 16 << 20;
    /// Streams that the application aborted and for which late frames are still ignored.
    pub(super) const RESET_STREAMS: usize = 1024;
}
