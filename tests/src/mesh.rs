//! The mesh in a world: one controller, one `warren node` per node, and what they say about themselves. Starts the real
//! binary; decides nothing about pods.

mod builder;
mod daemon;

pub use builder::MeshBuilder;
pub use daemon::Daemon;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::Process;
use crate::topology::{Node, World};

/// The daemon's own ports, in its node's namespace.
pub const ADMIN_PORT: u16 = 15000;
pub const METRICS_PORT: u16 = 15020;
pub const READY_PORT: u16 = 15021;
/// The controller's.
pub const CA_PORT: u16 = 15012;

/// A controller and two daemons.
#[derive(Debug)]
pub struct Mesh {
    daemons: [Daemon; 2],
    controller: Process,
    directory: PathBuf,
}

impl Mesh {
    /// With default flags.
    pub fn start(world: &World) -> Result<Self> {
        Self::builder().start(world)
    }

    pub fn builder() -> MeshBuilder {
        MeshBuilder::default()
    }

    pub fn daemon(&self, node: Node) -> &Daemon {
        &self.daemons[usize::from(node.number() - 1)]
    }

    pub fn daemon_mut(&mut self, node: Node) -> &mut Daemon {
        &mut self.daemons[usize::from(node.number() - 1)]
    }

    pub fn controller(&mut self) -> &mut Process {
        &mut self.controller
    }

    /// The CA's directory.
    pub fn ca_directory(&self) -> &Path {
        &self.directory
    }

    /// All three processes live on after this one, until the world is cleared.
    pub fn detach(&mut self) {
        self.controller.detach();
        self.daemons.iter_mut().for_each(Daemon::detach);
    }
}

/// A binary of this workspace: `WARREN_BIN` for `warren`, for others the one beside that, else beside the running one, else
/// of the other profile.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(warren) = std::env::var_os("WARREN_BIN").map(PathBuf::from) {
        let beside = warren.with_file_name(name);
        if name == "warren" {
            return Ok(warren);
        } else if beside.exists() {
            return Ok(beside);
        }
    }
    let me = std::env::current_exe().context("find the running binary")?;
    let profile = me
        .ancestors()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name == "debug" || name == "release")
        })
        .context("the running binary is below neither target/debug nor target/release")?;
    let target = profile.parent().context("target/ has a parent")?;
    let mut candidates = vec![
        profile.join(name),
        target.join("release").join(name),
        target.join("debug").join(name),
    ];
    candidates.retain(|path| path.exists());
    match candidates.into_iter().next() {
        Some(path) => Ok(path),
        None => bail!(
            "no binary `{name}` below {}: build it first (`cargo xtask build`)",
            target.display()
        ),
    }
}
