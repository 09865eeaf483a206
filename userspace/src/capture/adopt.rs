//! What an earlier daemon captured and this one finds: whose it is now.

use super::{
    finder::{Found, Place},
    node::Node,
    plan::{Scope, Wanted, wanted},
    pod::find,
};
use crate::{
    kernel::{AdoptedPod, watch},
    mesh::{MeshSnapshot, WorkloadUid},
    net::Namespace,
};
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

/// Whose pod it is.
pub(super) enum Owner {
    /// It is to be captured, and its capture takes over what is there.
    Wanted(WorkloadUid),
    /// It is there, and nobody wants it captured.
    Unwanted { found: Found, place: Place },
    /// Its namespace is not to be found: it has ended.
    Ended,
}

/// Looks for the namespaces among the pods of the node, then where namespaces are usually mounted.
pub(super) fn owners(
    node: &Node,
    snapshot: &MeshSnapshot,
    scope: Scope<'_>,
    adopted: Vec<AdoptedPod>,
) -> Vec<(AdoptedPod, Owner)> {
    if adopted.is_empty() {
        return Vec::new();
    }
    let wanted = wanted(snapshot, scope);
    let of_pods: HashMap<u64, WorkloadUid> = wanted
        .values()
        .filter_map(|wanted| Some((find(node, wanted).ok()?.namespace.cookie(), wanted.workload.clone())))
        .collect();
    let mut others: HashMap<u64, (Found, Place)> = HashMap::new();
    let named = snapshot
        .workloads
        .values()
        .filter_map(|workload| workload.netns.clone());
    for path in named.chain(mounted(node)) {
        if let Some(found) = open(node, &path)
            && !of_pods.contains_key(&found.namespace.cookie())
        {
            others
                .entry(found.namespace.cookie())
                .or_insert_with(|| (found, Place::Path(path)));
        }
    }
    let owner = |pod: AdoptedPod| {
        if let Some(workload) = of_pods.get(&pod.cookie) {
            return Owner::Wanted(workload.clone());
        }
        match others.remove(&pod.cookie) {
            Some((found, place)) => match by_address(&wanted, &found) {
                Some(workload) => Owner::Wanted(workload),
                None => Owner::Unwanted { found, place },
            },
            None => Owner::Ended,
        }
    };
    let pods: Vec<_> = adopted.iter().copied().map(owner).collect();
    adopted.into_iter().zip(pods).collect()
}

/// A pod that is wanted may not be found yet: its sandbox has no process at first. It is not let go for that.
fn by_address(wanted: &BTreeMap<WorkloadUid, Wanted>, found: &Found) -> Option<WorkloadUid> {
    let own = watch::addresses(&found.namespace).ok()?;
    let mut pods = wanted.values();
    let pod = pods.find(|pod| pod.addresses.iter().any(|address| own.contains(address)))?;
    Some(pod.workload.clone())
}

/// Those of the namespaces with these inodes that can be found, and belong to no pod that is wanted: what an earlier
/// daemon left undone in them is to be done.
pub(super) fn unfinished(
    node: &Node,
    snapshot: &MeshSnapshot,
    scope: Scope<'_>,
    inodes: &[u32],
) -> Vec<(PathBuf, Namespace)> {
    if inodes.is_empty() {
        return Vec::new();
    }
    let wanted = wanted(snapshot, scope);
    let named = snapshot
        .workloads
        .values()
        .filter_map(|workload| workload.netns.clone());
    let mut found: BTreeMap<u64, (PathBuf, Namespace)> = BTreeMap::new();
    for path in named.chain(mounted(node)) {
        let Some(there) = open(node, &path) else { continue };
        let inode = there.namespace.inode().1;
        if inodes.iter().any(|unfinished| u64::from(*unfinished) == inode) && by_address(&wanted, &there).is_none() {
            found.insert(inode, (path, there.namespace));
        }
    }
    found.into_values().collect()
}

fn open(node: &Node, path: &Path) -> Option<Found> {
    match &node.finder {
        Some(finder) => finder.at(path).ok(),
        None => Found::at_path(path).ok(),
    }
}

fn mounted(node: &Node) -> Vec<PathBuf> {
    match &node.finder {
        Some(finder) => finder.mounted().collect(),
        None => {
            let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        }
    }
}
