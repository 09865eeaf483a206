//! Sockets in a pod's network namespace: entering it, listening in it, dialling from it. What the bytes mean is not
//! its business.

mod dial;
mod host;
mod inherit;
mod listen;
pub mod marks;
mod namespace;
mod options;
#[cfg(test)]
pub(crate) mod testing;

pub use dial::{DialError, abort, deliver, dial_mesh, dial_plain};
pub use host::{HostRoot, Process};
pub use inherit::InheritError;
pub use listen::{ListenError, Moved, PodListeners, PodPorts, Role, listen};
pub use namespace::{Namespace, NamespaceError};
