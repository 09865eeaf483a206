//! The cgroups that matter: the root of the hierarchy, and the one below which every container lives.

use super::{OpenError, mounts};
use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// How far below the root kubepods is looked for: kind and minikube nest it a few levels.
const KUBEPODS_DEPTH: usize = 5;

/// An open cgroup folder.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) folder: File,
    /// What the kernel calls its id.
    pub(super) id: u64,
}

impl Cgroup {
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        let opened = File::open(path).and_then(|folder| Ok((folder.metadata()?.ino(), folder)));
        match opened {
            Ok((id, folder)) => Ok(Self { folder, id }),
            Err(source) => Err(OpenError::Cgroup {
                path: path.to_owned(),
                source,
            }),
        }
    }
}

/// The root of the cgroup v2 hierarchy, as mounted where the calling process sees it.
pub(super) fn root() -> Result<PathBuf, OpenError> {
    let path = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(path).map_err(|source| OpenError::Cgroup {
        path: path.to_owned(),
        source,
    })?;
    mounts::cgroup2_root(&mounts).ok_or(OpenError::NoCgroup2)
}

/// Where kubelet's pods are, in every hierarchy that shows them: v2 first, then each of v1's. `cgroup` and `kubepods` are
/// what the daemon was told of v2, where it was.
pub fn kubepods_folders(cgroup: Option<&Path>, kubepods: Option<&Path>) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let told = match (kubepods, cgroup) {
        (Some(kubepods), _) => Some(kubepods.to_owned()),
        (None, Some(cgroup)) => find_kubepods(cgroup),
        (None, None) => mounts::cgroup2_root(&mounts).and_then(|root| find_kubepods(&root)),
    };
    let beside = mounts::cgroup1_roots(&mounts);
    told.into_iter()
        .chain(beside.iter().filter_map(|root| find_kubepods(root)))
        .collect()
}

/// The nearest folder below `root` that kubelet made for all pods.
pub(super) fn find_kubepods(root: &Path) -> Option<PathBuf> {
    let mut waiting = VecDeque::from([(root.to_owned(), 0)]);
    while let Some((folder, depth)) = waiting.pop_front() {
        let mut below: Vec<_> = children(&folder).unwrap_or_default();
        below.sort();
        if let Some(found) = below.iter().find(|path| is_kubepods(path)) {
            return Some(found.clone());
        }
        if depth + 1 < KUBEPODS_DEPTH {
            waiting.extend(below.into_iter().map(|path| (path, depth + 1)));
        }
    }
    None
}

fn children(folder: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(fs::read_dir(folder)?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect())
}

/// `kubepods` by the cgroupfs driver, `kubepods.slice` by systemd's, `kubelet-kubepods.slice` below another slice.
fn is_kubepods(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubepods_is_found_where_each_driver_puts_it() {
        for made in [
            "kubepods",
            "kubepods.slice",
            "kubelet.slice/kubelet-kubepods.slice",
            "system.slice/docker-abc.scope/kubelet/kubepods",
        ] {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("system.slice/ssh.service")).unwrap();
            fs::create_dir_all(root.path().join(made).join("kubepods-burstable.slice")).unwrap();
            assert_eq!(find_kubepods(root.path()), Some(root.path().join(made)), "{made}");
        }
    }

    #[test]
    fn a_node_without_kubelet_has_no_kubepods() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("user.slice/user-0.slice")).unwrap();
        fs::write(root.path().join("kubepods"), "a file").unwrap();
        assert_eq!(find_kubepods(root.path()), None);
        assert_eq!(find_kubepods(&root.path().join("nowhere")), None);
    }
}
