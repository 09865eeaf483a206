//! What can go wrong below us.

use super::interfaces::InterfacesError;
use std::{io, path::PathBuf};

/// Opening or adopting the pinned state.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("Linux {found} is too old: sk_lookup has no ingress_ifindex before 5.17")]
    KernelTooOld { found: String },
    #[error("cannot tell the version of the kernel")]
    KernelUnknown { source: io::Error },
    #[error("the object file has no program {program}")]
    NoProgram { program: &'static str },
    #[error("no cgroup v2 hierarchy is mounted")]
    NoCgroup2,
    #[error("cannot open the cgroup {path}")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("{path} is not on a bpf filesystem, and none could be mounted there")]
    NoBpffs { path: PathBuf, source: io::Error },
    #[error("cannot use the pin {path}")]
    Pin { path: PathBuf, source: io::Error },
    #[error("cannot load the kernel programs")]
    Load { source: Box<aya::EbpfError> },
    #[error("the kernel does not take program {program}")]
    Program {
        program: &'static str,
        source: Box<aya::programs::ProgramError>,
    },
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Reading or writing a map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The caller must not capture on the strength of what did not fit.
    #[error("map {map} is full at {size} entries")]
    Full { map: &'static str, size: u32 },
    #[error("no pod has number {number}, or it is beyond the {size} that the maps have room for")]
    NoSuchPod { number: u32, size: u32 },
    #[error("the kernel programs have no map {map}")]
    Missing { map: &'static str },
    #[error("map {map} cannot be used")]
    Map {
        map: &'static str,
        source: Box<aya::maps::MapError>,
    },
}

/// Attaching to a pod or detaching from it.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(transparent)]
    Namespace(#[from] crate::net::NamespaceError),
    #[error("the object file has no program {program}")]
    NoProgram { program: &'static str },
    #[error(transparent)]
    Interfaces(#[from] InterfacesError),
    #[error("cannot load the arrival program")]
    Load { source: Box<aya::EbpfError> },
    #[error("the kernel does not take program {program}")]
    Program {
        program: &'static str,
        source: Box<aya::programs::ProgramError>,
    },
    #[error("cannot attach the guard to {interface}")]
    Guard {
        interface: String,
        source: Box<aya::programs::ProgramError>,
    },
    #[error("cannot use the pin {path}")]
    Pin { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Map(#[from] MapError),
}
