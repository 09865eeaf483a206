//! A network namespace, and running a piece of code inside it.

use super::options;
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};
use std::{
    cell::RefCell,
    fs::File,
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// An open network namespace. It lives at least as long as this value or a clone of it does.
#[derive(Clone)]
pub struct Namespace(Arc<Open>);

struct Open {
    file: File,
    /// Device and inode: what identifies a namespace from outside.
    inode: (u64, u64),
    cookie: u64,
    /// The lowest and the highest.
    ephemeral: (u16, u16),
}

const DEFAULT_EPHEMERAL: (u16, u16) = (32_768, 60_999);

#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("no namespace at {path}")]
    Gone { path: PathBuf },
    #[error("{path} is not a network namespace")]
    NotANamespace { path: PathBuf },
    #[error("cannot open the namespace at {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot enter the namespace")]
    Enter { source: io::Error },
}

thread_local! {
    /// Where this thread is at home, opened at its first visit elsewhere.
    static HOME: RefCell<Option<Namespace>> = const { RefCell::new(None) };
    /// Where this thread is now, if not at home.
    static VISITING: RefCell<Option<Namespace>> = const { RefCell::new(None) };
}

/// True for a file that is some namespace, of whatever kind.
fn is_on_nsfs(file: &File) -> bool {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    nix::sys::statfs::fstatfs(file).is_ok_and(|facts| facts.filesystem_type().0 == NSFS_MAGIC)
}

impl Namespace {
    /// Opens the namespace that is mounted at `path` (as `/run/netns/x` or `/proc/1/ns/net`).
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        Self::from_opened(File::open(path), path)
    }

    /// What was opened, or not, at `path`.
    pub(super) fn from_opened(opened: io::Result<File>, path: &Path) -> Result<Self, NamespaceError> {
        let file = opened.map_err(|source| {
            let path = path.to_owned();
            if source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ESRCH) {
                NamespaceError::Gone { path }
            } else {
                NamespaceError::Open { path, source }
            }
        })?;
        // `ip netns add` makes a plain file before it mounts the namespace there.
        if !is_on_nsfs(&file) {
            return Err(NamespaceError::NotANamespace { path: path.to_owned() });
        }
        Self::from_file(file).map_err(|error| {
            // setns says so of a namespace of another kind.
            if matches!(&error, NamespaceError::Enter { source } if source.raw_os_error() == Some(libc::EINVAL)) {
                NamespaceError::NotANamespace { path: path.to_owned() }
            } else {
                error
            }
        })
    }

    /// The calling thread's namespace.
    pub fn current() -> Result<Self, NamespaceError> {
        Self::from_file(open_own()?)
    }

    fn from_file(file: File) -> Result<Self, NamespaceError> {
        let facts = file.metadata().map_err(|source| NamespaceError::Enter { source })?;
        let mut open = Open {
            file,
            inode: (facts.dev(), facts.ino()),
            cookie: 0,
            ephemeral: DEFAULT_EPHEMERAL,
        };
        let unknown = Self(Arc::new(Open {
            file: open.file.try_clone().map_err(enter)?,
            ..open
        }));
        let seen = unknown.run(|| {
            let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
            Ok((options::netns_cookie(&socket)?, ephemeral_here()))
        })?;
        (open.cookie, open.ephemeral) = seen.map_err(enter)?;
        Ok(Self(Arc::new(open)))
    }

    /// What kernel programs see as the namespace of a socket in here (`bpf_get_netns_cookie`). Never reused.
    pub fn cookie(&self) -> u64 {
        self.0.cookie
    }

    /// Device and inode. The inode number is reused once the namespace is gone.
    pub fn inode(&self) -> (u64, u64) {
        self.0.inode
    }

    /// The ports that `connect` chooses from in here, as they were when the namespace was opened. Never empty.
    pub fn ephemeral_ports(&self) -> RangeInclusive<u16> {
        let (low, high) = self.0.ephemeral;
        low..=high
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// Runs `visit` on the calling thread inside this namespace, and brings the thread back to where it was. `visit` must
    /// not hand the thread to anything else (it cannot await). Two system calls, or none if the thread is there already.
    ///
    /// Aborts the process if the thread cannot be brought back: it would act in the wrong pod from then on.
    pub fn run<T>(&self, visit: impl FnOnce() -> T) -> Result<T, NamespaceError> {
        if VISITING.with_borrow(|now| now.as_ref().is_some_and(|now| now.0.inode == self.0.inode)) {
            return Ok(visit());
        }
        ensure_home()?;
        setns(&self.0.file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NamespaceError::Enter { source: errno.into() })?;
        let _back = Return(VISITING.replace(Some(self.clone())));
        Ok(visit())
    }

    /// Moves the calling thread here for good: threads started by it later are here as well.
    pub fn settle(&self) -> Result<(), NamespaceError> {
        setns(&self.0.file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NamespaceError::Enter { source: errno.into() })?;
        HOME.set(Some(self.clone()));
        VISITING.set(None);
        Ok(())
    }
}

fn enter(source: io::Error) -> NamespaceError {
    NamespaceError::Enter { source }
}

/// `net.ipv4.ip_local_port_range` of the namespace we are in; it counts for IPv6 too.
fn ephemeral_here() -> (u16, u16) {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ends = text.split_whitespace().filter_map(|end| end.parse().ok());
    match (ends.next(), ends.next()) {
        (Some(low), Some(high)) if low <= high => (low, high),
        _ => DEFAULT_EPHEMERAL,
    }
}

fn open_own() -> Result<File, NamespaceError> {
    let path = Path::new("/proc/thread-self/ns/net");
    File::open(path).map_err(|source| NamespaceError::Open {
        path: path.to_owned(),
        source,
    })
}

fn ensure_home() -> Result<(), NamespaceError> {
    /// Where the first thread that asked is at home: most likely all are, and one descriptor serves them.
    static COMMON: OnceLock<Namespace> = OnceLock::new();
    HOME.with_borrow_mut(|home| {
        if home.is_none() {
            let file = open_own()?;
            let facts = file.metadata().map_err(|source| NamespaceError::Enter { source })?;
            let inode = (facts.dev(), facts.ino());
            let own = Namespace(Arc::new(Open {
                file,
                inode,
                cookie: 0,
                ephemeral: DEFAULT_EPHEMERAL,
            }));
            let common = COMMON.get_or_init(|| own.clone());
            *home = Some(if common.inode() == inode { common.clone() } else { own });
        }
        Ok(())
    })
}

/// Goes back to the namespace it holds, or home, also when a visit panics.
struct Return(Option<Namespace>);

impl Drop for Return {
    fn drop(&mut self) {
        let before = self.0.take();
        let result = match &before {
            Some(namespace) => setns(&namespace.0.file, CloneFlags::CLONE_NEWNET),
            None => HOME.with_borrow(|home| match home {
                Some(home) => setns(&home.0.file, CloneFlags::CLONE_NEWNET),
                None => Err(nix::errno::Errno::ENOENT),
            }),
        };
        if let Err(errno) = result {
            tracing::error!(%errno, "a thread cannot leave a pod's network namespace");
            std::process::abort();
        }
        VISITING.set(before);
    }
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "netns {} (cookie {})", self.0.inode.1, self.0.cookie)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::pod_namespace, *};

    fn here() -> u64 {
        std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
    }

    #[test]
    fn a_visit_ends_where_it_began_even_if_it_panics_or_nests() {
        let (Some(a), Some(b)) = (pod_namespace("visit"), pod_namespace("visit")) else {
            return;
        };
        let home = here();
        let inside = a
            .run(|| {
                let inside = here();
                assert_eq!(b.run(here).unwrap(), b.inode().1);
                assert_eq!(here(), inside, "back from the inner visit");
                inside
            })
            .unwrap();
        assert_eq!(inside, a.inode().1);
        assert_eq!(here(), home);
        let visit = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| a.run(|| panic!("in the pod"))));
        assert!(visit.is_err());
        assert_eq!(here(), home);
    }

    #[test]
    fn cookies_tell_namespaces_apart() {
        let (Some(a), Some(b)) = (pod_namespace("cookies"), pod_namespace("cookies")) else {
            return;
        };
        assert_ne!(a.cookie(), b.cookie());
        assert_ne!(a.cookie(), 0);
        assert_eq!(a.run(|| Namespace::current().unwrap().cookie()).unwrap(), a.cookie());
    }

    #[test]
    fn a_path_that_is_no_namespace_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(
            Namespace::open(file.path()),
            Err(NamespaceError::NotANamespace { .. })
        ));
        assert!(matches!(
            Namespace::open(Path::new("/run/netns/no-such")),
            Err(NamespaceError::Gone { .. })
        ));
        if nix::unistd::geteuid().is_root() {
            let mount = Path::new("/proc/self/ns/uts");
            assert!(matches!(
                Namespace::open(mount),
                Err(NamespaceError::NotANamespace { .. })
            ));
        }
    }
}
