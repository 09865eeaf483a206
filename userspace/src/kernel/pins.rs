//! Where things are pinned. One folder per layout version, in it `maps/`, `links/` (the node's) and `pods/<number>/`.

use super::{AttachError, OpenError};
use aya::programs::links::FdLink;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};
use warren_common::{LAYOUT_VERSION, PodNumber};

/// Where bpffs belongs if nobody mounted it.
const BPFFS: &str = "/sys/fs/bpf";

#[derive(Debug, Clone)]
pub(super) struct Pins {
    root: PathBuf,
    version: PathBuf,
}

impl Pins {
    /// Makes the folders, and mounts bpffs if `root` is not on one: at its usual place if `root` is below that, else at
    /// `root` itself.
    pub(super) fn open(root: &Path) -> Result<Self, OpenError> {
        if !is_on_bpffs(root) {
            let mount_point = if root.starts_with(BPFFS) {
                Path::new(BPFFS)
            } else {
                root
            };
            mount_bpffs(mount_point).map_err(|source| OpenError::NoBpffs {
                path: root.to_owned(),
                source,
            })?;
        }
        let pins = Self {
            root: root.to_owned(),
            version: root.join(version_name()),
        };
        for folder in [pins.maps(), pins.links(), pins.pods()] {
            make_folder(&folder).map_err(|source| OpenError::Pin { path: folder, source })?;
        }
        Ok(pins)
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.version.join("maps")
    }

    fn links(&self) -> PathBuf {
        self.version.join("links")
    }

    fn pods(&self) -> PathBuf {
        self.version.join("pods")
    }

    /// A link of the node's.
    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    pub(super) fn pod(&self, pod: PodNumber) -> PathBuf {
        self.pods().join(pod.get().to_string())
    }

    pub(super) fn arrive(&self, pod: PodNumber) -> PathBuf {
        self.pod(pod).join("arrive")
    }

    pub(super) fn guard(&self, pod: PodNumber, interface: u32) -> PathBuf {
        self.pod(pod).join(format!("guard-{interface}"))
    }

    /// The pods that have a folder.
    pub(super) fn pinned_pods(&self) -> io::Result<Vec<PodNumber>> {
        Ok(fs::read_dir(self.pods())?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .map(PodNumber::new)
            .collect())
    }

    /// Removes every layout's folder, and the root where it is not a mount.
    pub(super) fn remove(&self) -> io::Result<()> {
        for layout in self.other_layouts()? {
            remove_folder(&layout)?;
        }
        remove_folder(&self.version)?;
        match fs::remove_dir(&self.root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(%error, root = %self.root.display(), "the empty folder of pins stays");
                Ok(())
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Folders of daemons with another layout.
    pub(super) fn other_layouts(&self) -> io::Result<Vec<PathBuf>> {
        Ok(fs::read_dir(&self.root)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| is_version(path) && *path != self.version)
            .collect())
    }
}

fn version_name() -> String {
    format!("v{LAYOUT_VERSION}")
}

fn is_version(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix('v'))
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Removes a folder and what is pinned in it; what was pinned there alone is detached.
pub(super) fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a pin; detaches a link that is held by nobody else.
pub(super) fn unpin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Asks the nearest ancestor that exists.
fn is_on_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .and_then(|ancestor| statfs(ancestor).ok())
        .is_some_and(|facts| facts.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_bpffs(at: &Path) -> io::Result<()> {
    // On sysfs the folder is there already, and none can be made.
    if !at.exists() {
        make_folder(at)?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), at, Some("bpf"), flags, Some("mode=0700")).map_err(io::Error::from)
}

pub(super) fn pin(link: FdLink, path: &Path) -> Result<(), AttachError> {
    link.pin(path)
        .map(drop)
        .map_err(|error| pin_error(path)(io::Error::other(error)))
}

pub(super) fn pin_error(path: &Path) -> impl Fn(io::Error) -> AttachError {
    let path: PathBuf = path.to_owned();
    move |source| AttachError::Pin {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_layouts_count_as_layouts() {
        for (name, expected) in [
            ("v1", true),
            ("v27", true),
            ("v", false),
            ("vx", false),
            ("maps", false),
            ("1", false),
        ] {
            assert_eq!(is_version(&Path::new("/pins").join(name)), expected, "{name}");
        }
    }
}
