//! From one daemon of a node to the next without a gap: the listening sockets of the captured pods go from the daemon that
//! owns the node to its successor, and both accept until the successor says that it serves. Here are the words (`protocol`,
//! pure), the socket that carries them and the descriptors (`wire`), and the ownership itself (`tenure`). Not here: what a
//! daemon stops and starts for it (`app`).

mod protocol;
mod tenure;
mod wire;

pub use protocol::{
    FromPredecessor, FromSuccessor, Given, Giver, Heard, Mismatch, Misstep, PodSockets, Reaction, Taker, VERSION,
    Version,
};
pub use tenure::{Tenure, TenureError};
pub use wire::{Door, Link, LinkError};
