//! The network namespaces of this node's pods: one that is gone is its pod's end.

use crate::kubernetes::{
    enrolment::NETNS,
    objects::{Kind, ObjectRef},
    problem::{Finding, Flaw},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

#[derive(Debug)]
pub(super) struct Namespaces {
    /// Other nodes' pods have theirs elsewhere; `None` where it is not known which node this is.
    node_name: Option<Arc<str>>,
    /// The path, and whether it was there when last looked.
    by_pod: BTreeMap<ObjectRef, (PathBuf, bool)>,
}

impl Namespaces {
    pub(super) fn new(node_name: Option<Arc<str>>) -> Self {
        Self {
            node_name,
            by_pod: BTreeMap::new(),
        }
    }

    /// # Errors
    /// The pod is this node's, names a namespace, and that does not exist.
    pub(super) fn check(&mut self, object: &ObjectRef, value: Option<&Value>) -> Result<(), Finding> {
        let Some(path) = value
            .filter(|_| object.kind == Kind::Pod)
            .and_then(|value| self.path(value))
        else {
            self.by_pod.remove(object);
            return Ok(());
        };
        let is_there = path.exists();
        self.by_pod.insert(object.clone(), (path.clone(), is_there));
        if is_there {
            return Ok(());
        }
        Err(Finding::new(
            format!("metadata.annotations.{NETNS}"),
            Flaw::NetnsGone(path),
        ))
    }

    /// Pods whose namespace came or went since it was last looked at.
    pub(super) fn changed(&self) -> impl Iterator<Item = &ObjectRef> {
        self.by_pod
            .iter()
            .filter(|(_, (path, was_there))| path.exists() != *was_there)
            .map(|(pod, _)| pod)
    }

    /// The folders in which they lie.
    pub(super) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.by_pod.values().filter_map(|(path, _)| path.parent())
    }

    fn path(&self, pod: &Value) -> Option<PathBuf> {
        let node = pod.pointer("/spec/nodeName").and_then(Value::as_str);
        let is_ours = node.is_none_or(|node| self.node_name.as_deref().is_none_or(|own| own == node));
        let path = pod.get("metadata")?.get("annotations")?.get(NETNS)?.as_str()?;
        is_ours.then(|| PathBuf::from(path))
    }
}
