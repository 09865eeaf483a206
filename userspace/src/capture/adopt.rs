//! What an earlier daemon captured and this one finds: whose it is now.

use super::plan::is_wanted;
use crate::{
    kernel::AdoptedPod,
    mesh::{MeshSnapshot, WorkloadUid},
    net::Namespace,
};
use std::path::PathBuf;

/// Whose pod it is.
pub(super) enum Owner {
    /// It is to be captured, and its capture takes over what is there.
    Wanted(WorkloadUid),
    /// It is there, and nobody wants it captured.
    Unwanted { namespace: Namespace, path: PathBuf },
    /// Its namespace is not to be found: it has ended.
    Ended,
}

/// Looks for the namespace among the pods of the node, then where namespaces are usually mounted.
pub(super) fn owner(snapshot: &MeshSnapshot, node_name: &str, adopted: AdoptedPod) -> Owner {
    let of_pods = snapshot.workloads.values().filter_map(|workload| {
        let wanted = is_wanted(workload, node_name).then(|| workload.uid.clone());
        Some((wanted, workload.netns.clone()?))
    });
    let mounted = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some((None, entry.ok()?.path())));
    for (wanted, path) in of_pods.chain(mounted) {
        let Ok(namespace) = Namespace::open(&path) else {
            continue;
        };
        if namespace.cookie() == adopted.cookie {
            return match wanted {
                Some(workload) => Owner::Wanted(workload),
                None => Owner::Unwanted { namespace, path },
            };
        }
    }
    Owner::Ended
}
