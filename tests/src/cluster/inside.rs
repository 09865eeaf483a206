//! Programs of the test inside a pod of a cluster on this machine: in its network and its cgroup, with the test's own files.

use super::Namespace;
use crate::{ProcessBuilder, cgroup, netns};
use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

impl Namespace<'_> {
    /// A command that will run in a pod whose node is on this machine.
    ///
    /// # Errors
    /// The pod has no process here.
    pub fn inside(&self, pod: &str, program: &Path) -> Result<ProcessBuilder> {
        let uid = self.kubectl(&["get", "pod", pod, "-o", "jsonpath={.metadata.uid}"])?;
        let (pid, cgroup) = process_of(uid.trim()).with_context(|| format!("no process of {pod} ({uid}) is seen"))?;
        let log = self.log_directory(pod)?;
        Ok(ProcessBuilder::new(program, log)
            .in_namespace(&netns::Namespace::of_process(pid))
            .in_cgroup(&cgroup))
    }
}

/// A process of the pod's containers, and where it is in the hierarchy of cgroup v2. By whatever hierarchy the kubelet
/// uses: in all of them the folder of a pod bears its UID.
fn process_of(uid: &str) -> Result<(u32, PathBuf)> {
    let words = [uid.to_owned(), uid.replace('-', "_")];
    let root = cgroup::v2_root()?;
    let processes = fs::read_dir("/proc")?.flatten();
    let found = processes.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).ok()?;
        let is_of_pod = words.iter().any(|word| cgroups.contains(word));
        let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        is_of_pod.then(|| (pid, root.join(path)))
    });
    // The newest: the first is the sandbox's own.
    found.max_by_key(|(pid, _)| *pid).context("none has it in its cgroups")
}
