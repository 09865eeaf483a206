//! What the mesh tells about itself: metrics, the access log, the log, and the words of a configuration dump.
//! Not here: the servers that hand it out (`admin`).

pub mod access;
pub mod dump;
pub mod gauges;
pub mod labels;
mod lines;
pub mod logging;
pub mod metrics;
mod process;
mod series;
#[cfg(test)]
mod testing;
mod text;

pub use access::AccessEntry;
pub use gauges::{CaOutcome, Gauges, HboneSide, Live, LiveSample};
pub use labels::{ConnectionFacts, Place, Reporter, ResponseFlags, SecurityPolicy};
pub use metrics::{ConnectionMetrics, Metrics};
