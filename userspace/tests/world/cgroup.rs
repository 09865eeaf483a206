//! The cgroup that the worlds of a test process share.

use std::{fs, path::PathBuf, sync::Mutex};

/// The test process in a cgroup of its own, for as long as a world lives.
pub struct Membership {
    pub path: PathBuf,
}

static MEMBERS: Mutex<u32> = Mutex::new(0);

impl Membership {
    pub fn enter() -> Self {
        let root = cgroup2_root();
        let path = root.join(format!("warren-test-{}", std::process::id()));
        let mut members = MEMBERS.lock().unwrap();
        if *members == 0 {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        }
        *members += 1;
        Self { path }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut members = MEMBERS.lock().unwrap();
        *members -= 1;
        if *members == 0 {
            let _ = fs::write(cgroup2_root().join("cgroup.procs"), std::process::id().to_string());
            let _ = fs::remove_dir(&self.path);
        }
    }
}

fn cgroup2_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find(|(_, kind)| *kind == "cgroup2")
        .map(|(path, _)| PathBuf::from(path))
        .unwrap()
}
