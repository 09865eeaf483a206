//! Who owns a node: one daemon at a time holds a lock beside the hand-over socket. It goes from a daemon to its successor as
//! a descriptor, so there is no moment at which nobody has it; a daemon that dies loses it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

/// The right to capture pods and to write to the kernel. Held for as long as any process has the descriptor open.
#[derive(Debug)]
pub struct Tenure(File);

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
            match file.try_lock() {
                Ok(()) => Ok(Some(Self(file))),
                Err(TryLockError::WouldBlock) => Ok(None),
                Err(TryLockError::Error(error)) => Err(error),
            }
        })();
        locked.map_err(|source| TenureError { path, source })
    }

    /// What the predecessor gave.
    pub fn given(descriptor: OwnedFd) -> Self {
        Self(descriptor.into())
    }

    /// Takes lock and socket off the node, when nothing of Warren is to be left.
    pub fn remove(socket: &Path) {
        let _ = fs::remove_file(socket);
        let _ = fs::remove_file(lock_of(socket));
    }
}

impl AsFd for Tenure {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
        let successor = Tenure::given(owner.as_fd().try_clone_to_owned().unwrap());
        drop(owner);
        assert!(Tenure::take(&socket).unwrap().is_none());
        drop(successor);
        assert!(Tenure::take(&socket).unwrap().is_some());
    }
}
