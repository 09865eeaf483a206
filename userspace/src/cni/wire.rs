//! What plugin and daemon say to each other: one line of JSON there, one back. The two may be of different versions while
//! an upgrade is under way: fields that are not known are passed over, new ones have defaults.

use serde::{Deserialize, Serialize};
use std::{net::IpAddr, path::PathBuf};

/// Counts changes that an older side cannot pass over.
pub const VERSION: u32 = 1;
/// The longest line that is read.
pub const LONGEST: usize = 16 * 1024;

/// The pod, as the container runtime names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// The sandbox is made: may the pod start?
    Add,
    /// Is the pod still as `Add` left it?
    Check,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub version: u32,
    pub ask: Ask,
    pub pod: PodName,
    /// The sandbox.
    pub container: String,
    /// Where its network namespace is mounted on the node.
    pub netns: PathBuf,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is in the mesh, and its connections are steered.
    Captured,
    /// It is not to be in the mesh.
    Outside,
    /// It should be captured and is not, nor will it be by waiting.
    Failed,
    /// It should be captured, or may be, and is not yet.
    Later,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    pub version: u32,
    pub verdict: Verdict,
    /// Why, for a person.
    #[serde(default)]
    pub message: String,
}

impl Reply {
    pub fn new(verdict: Verdict, message: impl Into<String>) -> Self {
        Self {
            version: VERSION,
            verdict,
            message: message.into(),
        }
    }
}
