//! Who owns a node: one daemon at a time holds a lock beside the hand-over socket. It goes from a daemon to its successor as
//! a descriptor, so there is no moment at which nobody has it; a daemon that dies loses it.

use super::Link;
use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// The right to capture pods and to write to the kernel. Held for as long as any process has the descriptor open: whoever
/// writes to the node owns it until its last step has ended.
#[derive(Debug)]
pub struct Tenure {
    lock: File,
    /// To the daemon that gave it, which may go on as soon as it is closed: not before the tenure is dropped.
    _predecessor: Option<Arc<Link>>,
}

#[derive(Debug, thiserror::Error)]
#[error("the lock {path}, which only the daemon that owns the node holds, cannot be used")]
pub struct TenureError {
    pub path: PathBuf,
    pub source: io::Error,
}

impl Tenure {
    /// `None` if another daemon has it.
    ///
    /// # Errors
    /// The file cannot be made or locked.
    pub fn take(socket: &Path) -> Result<Option<Self>, TenureError> {
        let path = lock_of(socket);
        let locked = (|| {
            if let Some(folder) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
            }
            let file = OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            Self::lock(file, &path)
        })();
        locked.map_err(|source| TenureError { path, source })
    }

    /// `None` as well if an owner has removed the file since it was opened: the next to come would lock another one.
    fn lock(file: File, path: &Path) -> io::Result<Option<Self>> {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let own = file.metadata()?;
        let is_there = fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino()));
        Ok(is_there.then_some(Self {
            lock: file,
            _predecessor: None,
        }))
    }

    /// What the predecessor gave in this conversation.
    pub fn given(descriptor: OwnedFd, predecessor: Option<Arc<Link>>) -> Self {
        Self {
            lock: descriptor.into(),
            _predecessor: predecessor,
        }
    }

    /// Takes socket and lock off the node, when nothing of Warren is to be left.
    pub fn remove(self, socket: &Path) {
        let _ = fs::remove_file(socket);
        let _ = fs::remove_file(lock_of(socket));
    }
}

impl AsFd for Tenure {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

fn lock_of(socket: &Path) -> PathBuf {
    socket.with_extension("lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_owner_at_a_time_and_its_successor_is_it_without_a_moment_between() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/handover.sock");
        let owner = Tenure::take(&socket).unwrap().expect("nobody has it");
        assert!(Tenure::take(&socket).unwrap().is_none());
        let successor = Tenure::given(owner.as_fd().try_clone_to_owned().unwrap(), None);
        drop(owner);
        assert!(Tenure::take(&socket).unwrap().is_none());
        drop(successor);
        assert!(Tenure::take(&socket).unwrap().is_some());
    }

    #[test]
    fn a_lock_that_its_owner_has_removed_is_nobodys() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("handover.sock");
        let owner = Tenure::take(&socket).unwrap().expect("nobody has it");
        // Opened by one who waits, before the owner removes it and lets go.
        let path = lock_of(&socket);
        let opened = File::open(&path).unwrap();
        owner.remove(&socket);
        assert!(Tenure::lock(opened, &path).unwrap().is_none());
        assert!(Tenure::take(&socket).unwrap().is_some());
    }
}
