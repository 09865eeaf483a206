//! What the daemon leaves on the node's disk for the plugin, to be known without it: which namespaces are in the mesh. It
//! outlives daemon and reboot, and is as old as the daemon's last word.

use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

const NAMESPACES: &str = "namespaces.json";
/// How the plugin reaches the API server.
pub const KUBECONFIG: &str = "kubeconfig";

/// Whether pods of a namespace should be in the mesh, as far as the namespace says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Mesh,
    Outside,
    /// Nobody can say.
    Unknown(String),
}

/// The namespaces of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Labelled, or with a pod that is.
    pub mesh: BTreeSet<String>,
    pub outside: BTreeSet<String>,
}

impl Namespaces {
    /// A namespace that came after the last word of the daemon is not known.
    pub fn standing(&self, namespace: &str) -> Standing {
        if self.mesh.contains(namespace) {
            Standing::Mesh
        } else if self.outside.contains(namespace) {
            Standing::Outside
        } else {
            Standing::Unknown(format!(
                "the namespace {namespace} is new since the daemon was last here"
            ))
        }
    }

    /// # Errors
    /// There is no such file, or none that can be understood.
    pub fn read(state: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(state.join(NAMESPACES))?;
        serde_json::from_str(&text).map_err(io::Error::from)
    }

    /// # Errors
    /// It cannot be written.
    pub fn write(&self, state: &Path) -> io::Result<()> {
        write(state, NAMESPACES, &serde_json::to_vec(self)?)
    }
}

/// Writes a file that only root may read, so that a reader sees the old one or the whole new one.
///
/// # Errors
/// It cannot be written.
pub fn write(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    replace(directory, name, content, 0o600)
}

/// Puts a file in the place of the one of its name, whole.
pub(super) fn replace(directory: &Path, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
    // No ending that a container runtime takes for a configuration.
    let partial = directory.join(format!(".{name}.{}.warren-partial", std::process::id()));
    let written = (|| {
        let mut file = fs::OpenOptions::new();
        let mut file = file.write(true).create(true).truncate(true).mode(mode).open(&partial)?;
        io::Write::write_all(&mut file, content)?;
        file.sync_all()?;
        fs::rename(&partial, directory.join(name))
    })();
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_was_never_seen_is_unknown_not_outside() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("warren");
        assert!(Namespaces::read(&state).is_err());
        let namespaces = Namespaces {
            mesh: ["shop".to_owned()].into(),
            outside: ["default".to_owned()].into(),
        };
        namespaces.write(&state).unwrap();
        let read = Namespaces::read(&state).unwrap();
        assert_eq!(read.standing("shop"), Standing::Mesh);
        assert_eq!(read.standing("default"), Standing::Outside);
        assert!(matches!(read.standing("new"), Standing::Unknown(_)));
        let left: Vec<_> = fs::read_dir(&state)
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, ["namespaces.json"]);
    }
}
