//! What lies in the directory, and when it last changed. Not here: what it says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

const MAX_DEPTH: usize = 32;

/// Every manifest below a folder, and what of it could not be listed, with the reason.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    pub(super) unlisted: BTreeMap<PathBuf, String>,
}

/// What changes when a file changes. The change time is the kernel's own, `cp -p` does not set it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    pub(super) bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// A manifest by its name; hidden files are none (`..data` of a ConfigMap mount, an editor's swap file).
pub(super) fn is_manifest_name(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden
        && path
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

impl Listing {
    /// Follows links, as ConfigMap mounts need it.
    pub(super) fn of(root: &Path) -> Self {
        let mut listing = Self::default();
        let mut folders = vec![(root.to_owned(), 0)];
        let mut been = BTreeSet::new();
        while let Some((folder, depth)) = folders.pop() {
            let entries = fs::metadata(&folder).and_then(|metadata| {
                // A link that leads back up would never end.
                let new = been.insert((metadata.dev(), metadata.ino()));
                if new { fs::read_dir(&folder).map(Some) } else { Ok(None) }
            });
            match entries {
                Ok(entries) => {
                    for entry in entries.into_iter().flatten().flatten() {
                        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
                        if let Some(folder) = listing.note(entry.path()).filter(|_| !hidden && depth < MAX_DEPTH) {
                            folders.push((folder, depth + 1));
                        }
                    }
                }
                Err(error) => {
                    listing.unlisted.insert(folder, error.to_string());
                }
            }
        }
        listing
    }

    /// Gives back a folder.
    fn note(&mut self, path: PathBuf) -> Option<PathBuf> {
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => return Some(path),
            Ok(metadata) if metadata.is_file() && is_manifest_name(&path) => {
                self.files.insert(path, Stamp::of(&metadata));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.unlisted.insert(path, error.to_string());
            }
        }
        None
    }
}

impl Stamp {
    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// How long ago the file changed; `None` where the clock says it has not yet.
    pub(super) fn age(&self, now: SystemTime) -> Option<Duration> {
        let (seconds, nanos) = self.changed;
        let since_epoch = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
        now.duration_since(SystemTime::UNIX_EPOCH + since_epoch).ok()
    }
}
