//! What the kernel programs and the daemon share: map keys and values, marks, and the decisions of steering as pure
//! functions from facts to an enum. No allocation, no aya, no unsafe: it is compiled into the programs and tested on the
//! host. What a decision needs from the kernel it asks of a trait, one fact at a time, so that nothing is looked up that
//! does not matter.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod address;
pub mod arrival;
pub mod connect;
pub mod guard;
pub mod marks;
pub mod pod;
pub mod reason;
pub mod tables;

pub use address::{Address, Family, FourTuple};
pub use pod::{PlaintextMode, PodNumber, PodSettings, Ports, Role};
pub use reason::Reason;

/// Stands for the layout of every type that crosses to the kernel, and is part of the pin directory's name: a daemon
/// with another layout starts afresh beside the old state instead of misreading it. Raise it with any change of a map.
pub const LAYOUT_VERSION: u32 = 1;
