//! Where the kernel's own filesystems are mounted, read from the text of `/proc/mounts`. Pure.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// The root of the cgroup v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` where v1 is beside it.
pub(super) fn cgroup2_root(mounts: &str) -> Option<PathBuf> {
    visible(mounts)
        .find(|mount| mount.kind == "cgroup2")
        .map(|mount| mount.path)
}

/// The roots of v1's hierarchies, where there are any.
pub(super) fn cgroup1_roots(mounts: &str) -> Vec<PathBuf> {
    visible(mounts)
        .filter(|mount| mount.kind == "cgroup")
        .map(|mount| mount.path)
        .collect()
}

struct Mount<'a> {
    path: PathBuf,
    kind: &'a str,
}

/// The mounts that no later one hides.
fn visible(mounts: &str) -> impl Iterator<Item = Mount<'_>> {
    let all: Vec<_> = mounts.lines().filter_map(parse).collect();
    let hidden = |index: usize, path: &Path| all[index + 1..].iter().any(|later| path.starts_with(&later.path));
    let shown: Vec<_> = (0..all.len()).map(|index| !hidden(index, &all[index].path)).collect();
    all.into_iter()
        .zip(shown)
        .filter(|(_, shown)| *shown)
        .map(|(mount, _)| mount)
}

fn parse(line: &str) -> Option<Mount<'_>> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (path, kind) = (fields.next()?, fields.next()?);
    Some(Mount {
        path: unescape(path),
        kind,
    })
}

/// Blanks and backslashes in a path are written as `\040` and the like.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = &tail[3..];
            }
            None => {
                path.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UBUNTU: &str = "\
sysfs /sys sysfs rw,nosuid,nodev,noexec,relatime 0 0
proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0
udev /dev devtmpfs rw,nosuid,relatime,size=3983104k,nr_inodes=995776,mode=755,inode64 0 0
/dev/vda1 / ext4 rw,relatime,discard,errors=remount-ro 0 0
securityfs /sys/kernel/security securityfs rw,nosuid,nodev,noexec,relatime 0 0
cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime,nsdelegate,memory_recursiveprot 0 0
pstore /sys/fs/pstore pstore rw,nosuid,nodev,noexec,relatime 0 0
bpf /sys/fs/bpf bpf rw,nosuid,nodev,noexec,relatime,mode=700 0 0
";
    const FEDORA: &str = "\
/dev/vda4 / btrfs rw,seclabel,relatime,compress=zstd:1,discard=async,space_cache=v2,subvolid=257,subvol=/root 0 0
devtmpfs /dev devtmpfs rw,seclabel,nosuid,size=4096k,nr_inodes=1006427,mode=755,inode64 0 0
sysfs /sys sysfs rw,seclabel,nosuid,nodev,noexec,relatime 0 0
selinuxfs /sys/fs/selinux selinuxfs rw,nosuid,noexec,relatime 0 0
cgroup2 /sys/fs/cgroup cgroup2 rw,seclabel,nosuid,nodev,noexec,relatime,nsdelegate,memory_recursiveprot 0 0
none /sys/fs/bpf bpf rw,nosuid,nodev,noexec,relatime,mode=700 0 0
";
    const HYBRID: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
";

    #[test]
    fn the_v2_hierarchy_is_found_alone_and_beside_v1() {
        for (name, mounts, root) in [
            ("Ubuntu", UBUNTU, Some("/sys/fs/cgroup")),
            ("Fedora", FEDORA, Some("/sys/fs/cgroup")),
            ("hybrid", HYBRID, Some("/sys/fs/cgroup/unified")),
            ("v1 alone", "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", None),
            ("nothing", "", None),
            ("a broken line", "cgroup2\n\n", None),
        ] {
            assert_eq!(cgroup2_root(mounts).as_deref(), root.map(Path::new), "{name}");
        }
        let beside = ["cpu", "memory", "systemd"].map(|name| Path::new("/sys/fs/cgroup").join(name));
        assert_eq!(cgroup1_roots(HYBRID), beside);
        assert!(cgroup1_roots(UBUNTU).is_empty());
    }

    #[test]
    fn a_hierarchy_under_a_later_mount_is_out_of_reach() {
        let hidden = format!("{UBUNTU}tmpfs /sys/fs tmpfs rw 0 0\n");
        assert_eq!(cgroup2_root(&hidden), None);
        let again = format!("{hidden}cgroup2 /run/cgroup\\0402 cgroup2 rw 0 0\n");
        assert_eq!(cgroup2_root(&again).as_deref(), Some(Path::new("/run/cgroup 2")));
    }

    #[test]
    fn a_backslash_that_escapes_nothing_stays() {
        assert_eq!(unescape(r"/a\b\134\04"), PathBuf::from(r"/a\b\\04"));
    }
}
