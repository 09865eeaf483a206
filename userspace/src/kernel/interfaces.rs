//! The interfaces of a namespace, by which packets may leave it. Read without the kernel's lock for all networking: where
//! many pods come and go, whoever takes it waits for tens of milliseconds.

use crate::net::{Namespace, NamespaceError};
use nix::net::if_::if_nametoindex;
use std::{fs, io};

/// An interface, by the name and index it has in its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum InterfacesError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cannot list interfaces: {FILE} cannot be read")]
    Read { source: io::Error },
}

const FILE: &str = "/proc/thread-self/net/dev";
const LOOPBACK: &str = "lo";

/// All but `lo`, in the kernel's order.
///
/// # Errors
/// The namespace cannot be entered, or `/proc` is not that of the node.
pub fn interfaces(namespace: &Namespace) -> Result<Vec<Interface>, InterfacesError> {
    namespace.run(|| {
        let table = fs::read_to_string(FILE).map_err(|source| InterfacesError::Read { source })?;
        // One that has no index is gone again.
        let found = names(&table).filter_map(|name| {
            let index = if_nametoindex(name).ok()?;
            let name = name.to_owned();
            Some(Interface { name, index })
        });
        Ok(found.collect())
    })?
}

/// Two lines of headings, then a line for each interface: its name, a colon, its counters.
fn names(table: &str) -> impl Iterator<Item = &str> {
    let lines = table.lines().skip(2);
    lines
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
        .filter(|name| *name != LOOPBACK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing::{ip, pod_namespace};

    #[test]
    fn every_interface_is_seen_but_loopback() {
        let Some(pod) = pod_namespace("interfaces") else { return };
        ip(&pod, "link add averylongname15 type bridge");
        let seen = interfaces(&pod).unwrap();
        let names: Vec<_> = seen.iter().map(|interface| &*interface.name).collect();
        assert_eq!(names, ["wire", "eth0", "averylongname15"]);
        for interface in &seen {
            let index = pod.run(|| if_nametoindex(&*interface.name)).unwrap();
            assert_eq!(index, Ok(interface.index));
        }
        ip(&pod, "link del wire");
        assert_eq!(interfaces(&pod).unwrap()[0].name, "averylongname15");
    }

    #[test]
    fn counters_may_touch_the_colon() {
        let table = "Inter-|   Receive\n face |bytes\n    lo: 1 2\n  eth0:123456 7\nvpn-a.1: 0 0\n";
        assert_eq!(names(table).collect::<Vec<_>>(), ["eth0", "vpn-a.1"]);
        assert_eq!(names("").count(), 0);
    }
}
