//! The cgroup v2 tree of a world: one directory per world, one per node in it, one per place below that. Paths and removal only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::wait::{DEADLINE, wait_until};

/// Where the v2 hierarchy is mounted, from the text of `/proc/mounts`: on hybrid hosts beside the v1 ones.
pub fn v2_root_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

pub fn v2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    v2_root_in(&mounts).context("no cgroup v2 hierarchy is mounted")
}

pub fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("create cgroup {}", path.display()))
}

/// Kills every process in the tree and removes it. A tree that does not exist is fine.
pub fn kill_and_remove(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    // The kernel kills exactly the members of the tree, those that are forked meanwhile included (Linux 5.14).
    fs::write(path.join("cgroup.kill"), "1").with_context(|| format!("kill cgroup {}", path.display()))?;
    let what = format!("the cgroup {} is empty", path.display());
    wait_until(&what, DEADLINE, || remove(path).ok())
}

fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_v2_root_is_found_alone_and_beside_v1() {
        let alone = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        let beside = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(v2_root_in(alone), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(v2_root_in(beside), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(v2_root_in("tmpfs /tmp tmpfs rw 0 0\n"), None);
    }
}
