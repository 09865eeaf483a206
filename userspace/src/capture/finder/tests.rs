//! Pods as the kernel shows them: real cgroups, processes and namespaces.

use super::*;
use crate::net::testing::{ip, pod_namespace};
use std::{
    process::{Child, Command},
    time::Duration,
};

const UID: &str = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";
const ADDRESS: &str = "10.9.0.1";

/// A kubepods folder of its own in the v2 hierarchy, and processes in it.
struct Node {
    root: PathBuf,
    children: Vec<Child>,
    finder: Finder,
}

impl Node {
    fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED {test}: cgroups need root");
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let Some(v2) = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|path| mounts.lines().any(|line| line.contains(&format!(" {path} cgroup2 "))))
        else {
            eprintln!("SKIPPED {test}: there is no cgroup v2 hierarchy");
            return None;
        };
        let root = Path::new(v2).join(format!("wt-find-{test}-{}", std::process::id()));
        fs::create_dir_all(root.join("kubepods")).unwrap();
        let finder = Finder::new(Path::new("/proc"), Path::new("/"), Some(root.clone()), None).unwrap();
        Some(Self {
            root,
            children: Vec::new(),
            finder,
        })
    }

    /// A process in `cgroup` and `namespace` (the test's own if `None`).
    fn run(&mut self, cgroup: &str, namespace: Option<&Namespace>) -> u32 {
        let folder = self.root.join(cgroup);
        fs::create_dir_all(&folder).unwrap();
        let start = || Command::new("sleep").arg("600").spawn().unwrap();
        let child = match namespace {
            Some(namespace) => namespace.run(start).unwrap(),
            None => start(),
        };
        fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
        let number = child.id();
        self.children.push(child);
        number
    }

    fn find(&self, uid: &str) -> Result<Found, CaptureError> {
        let own = Namespace::current().unwrap().inode();
        self.finder.of_pod(uid, &[ADDRESS.parse().unwrap()], &[own])
    }

    fn end(&mut self) {
        for child in &mut self.children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.children.clear();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
        remove(&self.root);
    }
}

fn remove(folder: &Path) {
    for below in folders(folder) {
        remove(&below);
    }
    let _ = fs::remove_dir(folder);
}

#[test]
fn a_pods_namespace_is_found_by_its_processes_with_either_cgroup_driver() {
    for (test, cgroup) in [
        ("cgroupfs", format!("kubepods/besteffort/pod{UID}/0123abcd")),
        ("guaranteed", format!("kubepods/pod{UID}/0123abcd")),
        (
            "systemd",
            format!(
                "kubepods/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-containerd-01.scope",
                UID.replace('-', "_")
            ),
        ),
    ] {
        let (Some(mut node), Some(pod)) = (Node::new(test), pod_namespace(test)) else {
            return;
        };
        assert!(matches!(node.find(UID), Err(CaptureError::NoProcess)), "{test}");
        node.run(&cgroup, Some(&pod));
        let found = node.find(UID).unwrap();
        assert_eq!(found.namespace.inode(), pod.inode(), "{test}");
        assert!(found.anchor.leads_to(&found.namespace));
        let other = UID.replace('0', "1");
        assert!(matches!(node.find(&other), Err(CaptureError::NoProcess)), "{test}");
        node.end();
        assert!(
            !found.anchor.leads_to(&found.namespace),
            "{test}: its last process ended"
        );
    }
}

#[test]
fn a_namespace_that_a_container_made_for_itself_is_not_taken_for_the_pods() {
    // Not in the order of their numbers, which would tell as well.
    let (Some(mut node), Some(inner), Some(pod)) = (Node::new("inner"), pod_namespace("inner"), pod_namespace("inner"))
    else {
        return;
    };
    node.run(&format!("kubepods/pod{UID}/sandbox"), Some(&pod));
    // The kernel tells when a process began in hundredths of a second.
    std::thread::sleep(Duration::from_millis(20));
    // It gives itself the pod's address; it is younger all the same.
    node.run(&format!("kubepods/pod{UID}/app"), Some(&inner));
    assert_eq!(node.find(UID).unwrap().namespace.inode(), pod.inode());
    ip(&pod, "addr del 10.9.0.1/24 dev eth0");
    assert_eq!(node.find(UID).unwrap().namespace.inode(), inner.inode());
    ip(&inner, "addr del 10.9.0.1/24 dev eth0");
    assert!(matches!(node.find(UID), Err(CaptureError::ForeignNamespace)));
}

#[test]
fn a_pod_on_its_hosts_network_has_no_namespace_of_its_own() {
    let Some(mut node) = Node::new("host") else { return };
    node.run(&format!("kubepods/pod{UID}/app"), None);
    assert!(matches!(node.find(UID), Err(CaptureError::NodeNamespace)));
}

#[test]
fn a_process_that_left_the_pods_cgroup_does_not_lead_to_its_namespace() {
    let (Some(mut node), Some(pod)) = (Node::new("left"), pod_namespace("left")) else {
        return;
    };
    let number = node.run(&format!("kubepods/pod{UID}/app"), Some(&pod));
    let other = UID.replace('0', "1");
    let elsewhere = node.root.join(format!("kubepods/pod{other}/app"));
    fs::create_dir_all(&elsewhere).unwrap();
    fs::write(elsewhere.join("cgroup.procs"), number.to_string()).unwrap();
    assert!(matches!(node.find(UID), Err(CaptureError::NoProcess)));
    assert_eq!(node.find(&other).unwrap().namespace.inode(), pod.inode());
}
