//! What the names of cgroups and the texts of /proc say about pods. Pure.

/// The UID of the pod whose cgroup has this name: `pod<uid>` by the cgroupfs driver, `kubepods-burstable-pod<uid>.slice`
/// with underscores by systemd's.
pub(super) fn pod_uid(cgroup: &str) -> Option<String> {
    let uid = match cgroup.strip_suffix(".slice") {
        Some(slice) => {
            let (parents, uid) = slice.rsplit_once("-pod")?;
            // Below kind or a slice of its own, kubelet's root is `kubelet-kubepods`.
            let is_kubelets = parents.split('-').any(|part| part == "kubepods");
            is_kubelets.then(|| uid.replace('_', "-"))?
        }
        None => cgroup.strip_prefix("pod")?.to_owned(),
    };
    let is_uid = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    is_uid.then_some(uid)
}

/// When the process of this `/proc/<number>/stat` began, in ticks since the boot.
pub(super) fn start_time(stat: &str) -> Option<u64> {
    // The name is in parentheses, and may itself hold blanks and parentheses. The third field follows it.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9";

    #[test]
    fn a_pods_cgroup_is_told_by_its_name_with_every_driver() {
        for name in [
            "pod0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9",
            "kubepods-pod0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9.slice",
            "kubepods-besteffort-pod0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9.slice",
            "kubepods-burstable-pod0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9.slice",
            "kubelet-kubepods-besteffort-pod0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9.slice",
        ] {
            assert_eq!(pod_uid(name).as_deref(), Some(UID), "{name}");
        }
        // A static pod's is a hash.
        assert_eq!(
            pod_uid("kubepods-burstable-pod8a9c3c4a5d6e7f8091a2b3c4d5e6f708.slice").as_deref(),
            Some("8a9c3c4a5d6e7f8091a2b3c4d5e6f708")
        );
    }

    #[test]
    fn other_cgroups_are_no_pods() {
        for name in [
            "kubepods",
            "kubepods.slice",
            "besteffort",
            "kubepods-besteffort.slice",
            "pod",
            "pods.slice",
            "machine-podman-pod1.slice",
            "user-podcast.slice",
            "podcast..",
            "pod/../x",
            "cri-containerd-0a1b.scope",
            "0a1b2c3d",
            "",
        ] {
            assert_eq!(pod_uid(name), None, "{name}");
        }
    }

    #[test]
    fn a_start_time_is_read_behind_any_name() {
        let rest = "S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 8675309 1 2 3";
        for name in ["pause", "a) S 1", "( )) "] {
            assert_eq!(start_time(&format!("17 ({name}) {rest}")), Some(8_675_309), "{name}");
        }
        assert_eq!(start_time("17 (x) S 1"), None);
        assert_eq!(start_time(""), None);
    }
}
