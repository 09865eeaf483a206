//! Namespaces for tests: they need root, vanish with their last handle, and a test without root says that it was skipped.

use super::Namespace;
use nix::sched::{CloneFlags, unshare};
use std::{
    process::Command,
    time::{Duration, Instant},
};

/// A fresh namespace with `lo` up and, on a veth that leads nowhere, 10.9.0.1/24 and fd09::1/64.
pub(crate) fn pod_namespace(test: &str) -> Option<Namespace> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED {test}: network namespaces need root");
        return None;
    }
    let namespace = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        Namespace::current().unwrap()
    })
    .join()
    .unwrap();
    for command in [
        "link set lo up",
        "link add eth0 type veth peer name wire",
        // No link-local addresses, which would come and go by themselves while a test compares.
        "link set eth0 addrgenmode none",
        "link set wire addrgenmode none",
        "link set wire up",
        "link set eth0 up",
        "addr add 10.9.0.1/24 dev eth0",
        "addr add fd09::1/64 dev eth0 nodad",
        "route add default via 10.9.0.254",
        "-6 route add default via fd09::fe",
    ] {
        ip(&namespace, command);
    }
    // The kernel tells the routing of a link that is up a moment later.
    let deadline = Instant::now() + Duration::from_secs(10);
    for wanted in ["local fd09::1 dev eth0", "ff00::/8 dev wire"] {
        while !ip(&namespace, "-6 route show table local").contains(wanted) {
            assert!(Instant::now() < deadline, "no {wanted}");
        }
    }
    Some(namespace)
}

/// Runs `ip ARGUMENTS` inside and gives back what it prints.
pub(crate) fn ip(namespace: &Namespace, arguments: &str) -> String {
    let output = namespace
        .run(|| Command::new("ip").args(arguments.split_whitespace()).output())
        .unwrap()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn sysctl(namespace: &Namespace, name: &str) -> String {
    namespace
        .run(|| std::fs::read_to_string(format!("/proc/sys/{name}")))
        .unwrap()
        .unwrap()
        .trim()
        .to_owned()
}

pub(crate) fn set_sysctl(namespace: &Namespace, name: &str, value: &str) {
    namespace
        .run(|| std::fs::write(format!("/proc/sys/{name}"), value))
        .unwrap()
        .unwrap();
}
