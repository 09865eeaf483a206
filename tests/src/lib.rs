//! The harness of Warren: two nodes and their pods as network namespaces on one machine, the processes in them, and the
//! tools that load them. Not the product: nothing here is part of `warren`.
//!
//! ```no_run
//! use warren_tests::{Node, PodSpec, World};
//! # fn main() -> anyhow::Result<()> {
//! let world = World::builder("wt-example")
//!     .pod(PodSpec::new("client", Node::A))
//!     .pod(PodSpec::new("server", Node::B))
//!     .start()?;
//! let status = world.pod("client").command("ping").args(["-c", "1", "10.77.2.10"]).spawn()?.wait(warren_tests::DEADLINE)?;
//! assert!(status.success());
//! # Ok(()) }
//! ```

pub mod agent;
pub mod bench;
pub mod cgroup;
pub mod churn;
pub mod cluster;
pub mod congestion;
pub mod demo;
pub mod figures;
pub mod leftovers;
pub mod load;
pub mod manifests;
pub mod mesh;
pub mod netns;
pub mod process;
pub mod scale;
pub mod topology;
pub mod wait;

pub use load::talk::{Conversation, End};
pub use mesh::{Daemon, Mesh};
pub use process::{Process, ProcessBuilder};
pub use topology::{Node, Place, Pod, PodSpec, ServiceSpec, World, WorldBuilder};
pub use wait::{DEADLINE, wait_until};
