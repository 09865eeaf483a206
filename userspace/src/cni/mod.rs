//! How a pod of the mesh starts captured: a CNI plugin at the end of the node's chain, which lets no such pod start before
//! the daemon has captured it; the socket on which the daemon answers it; and how it gets onto the node and off it. Not
//! here: who should be captured, and capturing.

pub mod conflist;
pub mod install;
pub mod plugin;
pub mod server;
pub mod spec;
pub mod standing;
pub mod wire;

/// The plugin's `type`, and the name of its binary.
pub const TYPE: &str = "warren-cni";
