//! Finds a pod's network namespace on the node: by the path that the container runtime named, or by the processes below
//! the pod's cgroup. What is found is held by an open file; no number of a process is trusted for longer than it takes to
//! open it.

use super::{
    error::CaptureError,
    names::{pod_uid, start_time},
};
use crate::{
    kernel::{kubepods_folders, watch},
    net::{HostRoot, Namespace, NamespaceError, Process},
};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Where container runtimes mount the namespaces of pods.
const MOUNTED: [&str; 2] = ["/run/netns", "/var/run/docker/netns"];
/// How many processes of a pod are looked at: the first belong to its sandbox.
const PROCESSES: usize = 256;
/// How deep containers may nest cgroups of their own below the pod's.
const DEPTH: usize = 4;

/// Where a pod's namespace is to be found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Mounted here: a manifest says so.
    Path(PathBuf),
    /// Mounted here on the node: the container runtime said so, to the CNI plugin.
    Runtime { path: PathBuf, uid: Arc<str> },
    /// Nobody said: of the processes of the pod with this UID.
    Processes { uid: Arc<str> },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) | Self::Runtime { path, .. } => write!(f, "{}", path.display()),
            Self::Processes { uid } => write!(f, "the processes of pod {uid}"),
        }
    }
}

/// What leads to a namespace for as long as it is the pod's.
#[derive(Debug)]
pub(super) enum Anchor {
    Path(PathBuf),
    OnNode { root: Arc<HostRoot>, path: PathBuf },
    Process(Process),
}

impl Anchor {
    /// True while it leads to `namespace`, as far as can be seen.
    pub(super) fn leads_to(&self, namespace: &Namespace) -> bool {
        let found = match self {
            Self::Path(path) => fs::metadata(path).map(|facts| (facts.dev(), facts.ino())),
            Self::OnNode { root, path } => root.inode(path),
            Self::Process(process) => process.namespace_inode(),
        };
        match found {
            Ok(inode) => inode == namespace.inode(),
            Err(error) => error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ESRCH),
        }
    }
}

/// A pod's namespace, and what leads there.
pub(super) struct Found {
    pub(super) namespace: Namespace,
    pub(super) anchor: Anchor,
}

impl Found {
    pub(super) fn at_path(path: &Path) -> Result<Self, NamespaceError> {
        Ok(Self {
            namespace: Namespace::open(path)?,
            anchor: Anchor::Path(path.to_owned()),
        })
    }
}

/// How the node is looked at.
#[derive(Debug)]
pub struct Finder {
    root: Arc<HostRoot>,
    proc: PathBuf,
    cgroup: Option<PathBuf>,
    kubepods: Option<PathBuf>,
    /// Where kubelet's pods are, once it is known.
    hierarchies: Mutex<Vec<PathBuf>>,
}

impl Finder {
    /// `proc` shows the node's processes, and its first one the node's files. `cgroup` and `kubepods` as the kernel side
    /// is told.
    ///
    /// # Errors
    /// The node's files cannot be reached.
    pub fn new(proc: &Path, root: &Path, cgroup: Option<PathBuf>, kubepods: Option<PathBuf>) -> io::Result<Self> {
        Ok(Self {
            root: Arc::new(HostRoot::open(root)?),
            proc: proc.to_owned(),
            cgroup,
            kubepods,
            hierarchies: Mutex::default(),
        })
    }

    /// Device and inode of what is mounted at a path of the node.
    ///
    /// # Errors
    /// There is nothing.
    pub fn inode(&self, path: &Path) -> io::Result<(u64, u64)> {
        self.root.inode(path)
    }

    /// The namespaces that are mounted on the node, with their paths there.
    pub(super) fn mounted(&self) -> impl Iterator<Item = PathBuf> {
        let root = Arc::clone(&self.root);
        MOUNTED.into_iter().flat_map(move |folder| {
            let names = root.names(Path::new(folder)).into_iter();
            names.map(move |name| Path::new(folder).join(name))
        })
    }

    pub(super) fn at(&self, path: &Path) -> Result<Found, NamespaceError> {
        Ok(Found {
            namespace: self.root.namespace(path)?,
            anchor: Anchor::OnNode {
                root: Arc::clone(&self.root),
                path: path.to_owned(),
            },
        })
    }

    /// Of the pod's processes the oldest in a namespace that has one of its addresses: a container may have made
    /// namespaces of its own, the sandbox was there before. `others` are the node's namespace and the daemon's.
    pub(super) fn of_pod(&self, uid: &str, addresses: &[IpAddr], others: &[(u64, u64)]) -> Result<Found, CaptureError> {
        let mut oldest: BTreeMap<(u64, u64), (u64, Process)> = BTreeMap::new();
        for process in self.processes(uid) {
            let (Ok(inode), Some(begun)) = (
                process.namespace_inode(),
                process.stat().ok().and_then(|stat| start_time(&stat)),
            ) else {
                continue;
            };
            if oldest.get(&inode).is_none_or(|(before, _)| begun < *before) {
                oldest.insert(inode, (begun, process));
            }
        }
        if oldest.is_empty() {
            return Err(CaptureError::NoProcess);
        }
        let mut candidates: Vec<_> = oldest
            .into_iter()
            .filter(|(inode, _)| !others.contains(inode))
            .map(|(_, candidate)| candidate)
            .collect();
        if candidates.is_empty() {
            return Err(CaptureError::NodeNamespace);
        }
        candidates.sort_by_key(|(begun, _)| *begun);
        for (_, process) in candidates {
            let Ok(namespace) = process.namespace() else { continue };
            let own = watch::addresses(&namespace).map_err(|source| CaptureError::Watch { source })?;
            if addresses.iter().any(|address| own.contains(address)) {
                return Ok(self.anchored(namespace, process));
            }
        }
        Err(CaptureError::ForeignNamespace)
    }

    /// The pod's processes, by the first hierarchy that shows any.
    fn processes(&self, uid: &str) -> Vec<Process> {
        let mut hierarchies = self.hierarchies.lock();
        if hierarchies.is_empty() {
            *hierarchies = kubepods_folders(self.cgroup.as_deref(), self.kubepods.as_deref());
        }
        let mut by_hierarchy = hierarchies
            .iter()
            .filter_map(|kubepods| pod_folder(kubepods, uid))
            .map(|cgroup| processes(&self.proc, &cgroup));
        by_hierarchy.find(|found| !found.is_empty()).unwrap_or_default()
    }

    /// Where the runtime mounted it is surer than the process: that may end and be replaced while the pod goes on.
    fn anchored(&self, namespace: Namespace, process: Process) -> Found {
        let mounted = self
            .mounted()
            .find(|path| self.root.inode(path).is_ok_and(|inode| inode == namespace.inode()));
        let anchor = match mounted {
            Some(path) => Anchor::OnNode {
                root: Arc::clone(&self.root),
                path,
            },
            None => Anchor::Process(process),
        };
        Found { namespace, anchor }
    }
}

/// The pod's cgroup: below `kubepods`, or below the folder of its quality of service.
fn pod_folder(kubepods: &Path, uid: &str) -> Option<PathBuf> {
    let is_pod = |path: &Path| {
        path.file_name()
            .and_then(|name| pod_uid(name.to_str()?))
            .is_some_and(|found| found == uid)
    };
    let here = folders(kubepods);
    let direct = here.iter().find(|path| is_pod(path)).cloned();
    direct.or_else(|| {
        let below = here.iter().flat_map(|quality| folders(quality));
        below.into_iter().find(|path| is_pod(path))
    })
}

/// The processes in a cgroup and below, each open and certain to be in there.
fn processes(proc: &Path, cgroup: &Path) -> Vec<Process> {
    let mut found = Vec::new();
    let mut waiting = vec![(cgroup.to_owned(), 0)];
    while let Some((folder, depth)) = waiting.pop() {
        let list = folder.join("cgroup.procs");
        let opened: Vec<_> = numbers(&list)
            .into_iter()
            .take(PROCESSES.saturating_sub(found.len()))
            .filter_map(|number| Some((number, Process::open(proc, number).ok()?)))
            .collect();
        // Listed after it was opened as well, and still alive: then it was this process and no later one of its number.
        let still = numbers(&list);
        found.extend(
            opened
                .into_iter()
                .filter(|(number, process)| still.contains(number) && process.stat().is_ok())
                .map(|(_, process)| process),
        );
        if depth < DEPTH {
            waiting.extend(folders(&folder).into_iter().map(|path| (path, depth + 1)));
        }
    }
    found
}

/// What `cgroup.procs` lists; 0 stands for processes that cannot be seen from here.
fn numbers(list: &Path) -> Vec<u32> {
    let text = fs::read_to_string(list).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.parse().ok())
        .filter(|number| *number != 0)
        .collect()
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests;
