//! What the API server has told so far, kind by kind. Pure: it turns news into calls of the index, remembers which objects a
//! list held, and deletes those that the next list no longer holds. Knows how far into each kind's changes that goes.

use super::watching::News;
use crate::kubernetes::{
    index::Index,
    journal::Reach,
    objects::{Kind, ObjectRef},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use tracing::warn;

/// Per kind of [`super::kinds::all`], what is known.
#[derive(Debug)]
pub(super) struct Told {
    kinds: BTreeMap<Kind, OfKind>,
    reach: Reach,
}

#[derive(Debug, Default)]
struct OfKind {
    /// Grows with each list.
    list: u32,
    /// Namespace and name, and the list that last held it.
    objects: HashMap<(Arc<str>, Arc<str>), u32>,
    complete: bool,
}

impl Default for Told {
    fn default() -> Self {
        let kinds = super::kinds::all().into_iter();
        Self {
            kinds: kinds.map(|place| (place.kind, OfKind::default())).collect(),
            reach: Reach::new(),
        }
    }
}

impl Told {
    /// True once every kind has been listed, or is known not to exist.
    pub(super) fn everything(&self) -> bool {
        self.kinds.values().all(|kind| kind.complete)
    }

    /// The newest version of each kind that was told.
    pub(super) fn reach(&self) -> &Reach {
        &self.reach
    }

    pub(super) fn take(&mut self, kind: Kind, news: News, index: &mut Index) {
        if let News::Is(value) | News::IsGone(value) = &news {
            let version = self.reach.entry(kind).or_default();
            *version = version_of(value).unwrap_or_default().max(*version);
        }
        let known = self.kinds.entry(kind).or_default();
        match news {
            News::ListBegins => known.list += 1,
            News::Is(value) => known.apply(kind, &value, index),
            News::IsGone(value) => {
                if let Some(object) = name(kind, &value) {
                    known.objects.remove(&key(&object));
                    index.delete(&object);
                }
            }
            News::ListEnds => {
                known.complete = true;
                known.forget(kind, |list, newest| list < newest, index);
            }
            News::KindIsMissing => {
                known.complete = true;
                known.forget(kind, |_, _| true, index);
            }
        }
    }
}

impl OfKind {
    fn apply(&mut self, kind: Kind, value: &Value, index: &mut Index) {
        if let Some(object) = name(kind, value) {
            self.objects.insert(key(&object), self.list);
            index.apply(&object, value);
        }
    }

    fn forget(&mut self, kind: Kind, gone: impl Fn(u32, u32) -> bool, index: &mut Index) {
        let newest = self.list;
        self.objects.retain(|(namespace, name), list| {
            let goes = gone(*list, newest);
            if goes {
                index.delete(&ObjectRef {
                    kind,
                    namespace: Arc::clone(namespace),
                    name: Arc::clone(name),
                });
            }
            !goes
        });
    }
}

fn version_of(value: &Value) -> Option<u64> {
    value["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

fn key(object: &ObjectRef) -> (Arc<str>, Arc<str>) {
    (Arc::clone(&object.namespace), Arc::clone(&object.name))
}

/// No API server gives an object without a name; one that does all the same is told of and left out.
fn name(kind: Kind, value: &Value) -> Option<ObjectRef> {
    ObjectRef::read(kind, value)
        .inspect_err(|finding| warn!(kind = kind.word(), "an object without a legible name: {finding}"))
        .ok()
}
