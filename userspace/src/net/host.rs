//! The node's own files and namespaces, as a daemon sees them that lives in a container: through a process of the node.

use super::{Namespace, NamespaceError};
use nix::{
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::fstatat,
};
use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The root directory of the node. Paths are resolved below it, absolute symlinks too (`/var/run` is one on most nodes).
#[derive(Debug)]
pub struct HostRoot(File);

impl HostRoot {
    /// `/proc/1/root` where the daemon sees the node's processes, `/` where it is one of them.
    ///
    /// # Errors
    /// There is no such directory, or it may not be looked into.
    pub fn open(root: &Path) -> io::Result<Self> {
        File::open(root).map(Self)
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> io::Result<File> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(openat2(&self.0, path, how).map(File::from)?)
    }

    /// # Errors
    /// There is no such file, or it may not be read.
    pub fn file(&self, path: &Path) -> io::Result<File> {
        self.resolve(path, OFlag::O_RDONLY)
    }

    /// Device and inode of what is mounted at `path`.
    ///
    /// # Errors
    /// There is nothing at `path`.
    pub fn inode(&self, path: &Path) -> io::Result<(u64, u64)> {
        let facts = self.resolve(path, OFlag::O_PATH)?.metadata()?;
        Ok((facts.dev(), facts.ino()))
    }

    /// The names in a directory; none where there is no such directory.
    pub fn names(&self, directory: &Path) -> Vec<OsString> {
        let open = self.resolve(directory, OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let entries = open.and_then(|open| {
            let listed = fs::read_dir(format!("/proc/self/fd/{}", open.as_raw_fd()))?;
            Ok(listed.flatten().map(|entry| entry.file_name()).collect())
        });
        entries.unwrap_or_default()
    }

    /// The namespace mounted at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn namespace(&self, path: &Path) -> Result<Namespace, NamespaceError> {
        Namespace::from_opened(self.file(path), path)
    }
}

/// One process, whatever becomes of its number: once it has ended, nothing is found here any more.
#[derive(Debug)]
pub struct Process {
    directory: File,
    path: PathBuf,
}

impl Process {
    /// # Errors
    /// There is no such process (any more).
    pub fn open(proc: &Path, number: u32) -> io::Result<Self> {
        let path = proc.join(number.to_string());
        let directory = File::open(&path)?;
        Ok(Self { directory, path })
    }

    fn at(&self, name: &str) -> io::Result<File> {
        let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC);
        Ok(openat2(&self.directory, name, how).map(File::from)?)
    }

    /// Its network namespace.
    ///
    /// # Errors
    /// The process has ended.
    pub fn namespace(&self) -> Result<Namespace, NamespaceError> {
        Namespace::from_opened(self.at("ns/net"), &self.path.join("ns/net"))
    }

    /// Device and inode of its network namespace, without entering it.
    ///
    /// # Errors
    /// The process has ended.
    pub fn namespace_inode(&self) -> io::Result<(u64, u64)> {
        let facts = fstatat(&self.directory, "ns/net", AtFlags::empty())?;
        Ok((facts.st_dev, facts.st_ino))
    }

    /// What `/proc/<number>/stat` says.
    ///
    /// # Errors
    /// The process has ended.
    pub fn stat(&self) -> io::Result<String> {
        io::read_to_string(self.at("stat")?)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::pod_namespace, *};
    use std::process::Command;

    #[test]
    fn an_absolute_symlink_of_the_node_stays_on_the_node() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("run/netns")).unwrap();
        fs::create_dir(root.path().join("var")).unwrap();
        fs::write(root.path().join("run/netns/cni-1"), "the node's").unwrap();
        std::os::unix::fs::symlink("/run", root.path().join("var/run")).unwrap();
        let host = HostRoot::open(root.path()).unwrap();
        let file = host.file(Path::new("/var/run/netns/cni-1")).unwrap();
        assert_eq!(io::read_to_string(file).unwrap(), "the node's");
        assert_eq!(host.names(Path::new("/var/run/netns")), ["cni-1"]);
        assert_eq!(host.names(Path::new("/nowhere")), [""; 0]);
    }

    #[test]
    fn a_process_that_has_ended_is_not_its_numbers_next_owner() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIPPED: another process's namespace needs root");
        }
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(Path::new("/proc"), child.id()).unwrap();
        let own = Namespace::current().unwrap();
        assert_eq!(process.namespace().unwrap().inode(), own.inode());
        assert_eq!(process.namespace_inode().unwrap(), own.inode());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.namespace_inode().is_err() && process.namespace().is_err());
    }

    #[test]
    fn a_namespace_is_found_by_the_nodes_path() {
        let Some(pod) = pod_namespace("host-root") else { return };
        let path = format!("/proc/{}/fd/{}", std::process::id(), pod.as_fd().as_raw_fd());
        // A magic link is no path of a node's: what a runtime names is mounted.
        let host = HostRoot::open(Path::new("/")).unwrap();
        assert!(host.namespace(Path::new(&path)).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        let mounted = nix::mount::mount(
            Some(Path::new(&path)),
            file.path(),
            None::<&Path>,
            nix::mount::MsFlags::MS_BIND,
            None::<&Path>,
        );
        mounted.unwrap();
        let found = host.namespace(file.path()).map(|found| found.inode());
        let inode = host.inode(file.path());
        // Detached: a child another test forks holds what is open here until it execs.
        nix::mount::umount2(file.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        assert_eq!(found.unwrap(), pod.inode());
        assert_eq!(inode.unwrap(), pod.inode());
    }
}
