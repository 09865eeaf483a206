//! Kubernetes objects as the source of desired state: what is read of them, the index that turns them into snapshots, and
//! the sources they come from. What is written back is in `announce`.

pub mod announce;
pub mod api;
pub mod asking;
pub mod bindings;
pub mod client;
pub mod contact;
pub mod enrolment;
mod field;
pub mod index;
pub mod journal;
pub mod manifests;
pub mod objects;
mod policies;
pub mod problem;
pub mod publish;

pub use index::{Index, IndexSettings, NodeSandboxes, Sandbox, Source};
pub use objects::{Kind, ObjectRef};
pub use problem::{Finding, Flaw, Origin, Problem};
pub use publish::Published;
