//! The maps of a snapshot: a clone shares everything with its original, a patch copies one path, and a comparison skips
//! what is shared. In tests every entry that somebody looks at is counted, so that what a change costs can be proved not
//! to grow with the cluster.

use imbl::{OrdMap, ordmap::DiffItem};
use std::{borrow::Borrow, fmt};

/// An ordered map that is cheap to clone, to patch and to compare.
#[derive(Clone)]
pub struct SharedMap<K, V>(OrdMap<K, V>);

/// A key whose values differ between two maps; without a value where the map does not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference<'m, K, V> {
    pub key: &'m K,
    pub old: Option<&'m V>,
    pub new: Option<&'m V>,
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        visit();
        self.0.insert(key, value)
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        visit();
        self.0.remove(key)
    }
}

impl<K: Ord, V> SharedMap<K, V> {
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        visit();
        self.0.get(key)
    }

    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().inspect(|_| visit())
    }

    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True if neither was changed since one was cloned from the other.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        self.0.ptr_eq(&other.0)
    }

    /// What is different in `later`, by key. Visits what is not shared, which is little after few patches.
    pub fn diff<'m>(&'m self, later: &'m Self) -> impl Iterator<Item = Difference<'m, K, V>>
    where
        V: PartialEq,
    {
        self.0.diff(&later.0).map(|item| {
            visit();
            let (key, old, new) = match item {
                DiffItem::Add(key, new) => (key, None, Some(new)),
                DiffItem::Remove(key, old) => (key, Some(old), None),
                DiffItem::Update {
                    old: (key, old),
                    new: (_, new),
                } => (key, Some(old), Some(new)),
            };
            Difference { key, old, new }
        })
    }
}

impl<K: Ord, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self(OrdMap::new())
    }
}

impl<K: Ord + fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(not(test))]
fn visit() {}

#[cfg(test)]
fn visit() {
    VISITED.set(VISITED.get() + 1);
}

#[cfg(test)]
thread_local! {
    static VISITED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// How many entries of such maps this thread looks at in `work`.
#[cfg(test)]
pub(crate) fn visited(work: impl FnOnce()) -> u64 {
    let before = VISITED.get();
    work();
    VISITED.get() - before
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Ordering;

    /// Counts as visited whenever it is compared, so that nothing that happens inside the map is hidden.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Watched(u32);

    impl Ord for Watched {
        fn cmp(&self, other: &Self) -> Ordering {
            visit();
            self.0.cmp(&other.0)
        }
    }

    impl PartialOrd for Watched {
        fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
            Some(self.cmp(other))
        }
    }

    fn map(size: u32) -> SharedMap<Watched, u32> {
        let mut map = SharedMap::default();
        for key in 0..size {
            map.insert(Watched(key * 2), 0);
        }
        map
    }

    #[test]
    fn a_patch_and_its_comparison_cost_next_to_nothing_whatever_the_size() {
        for place in [0, 7, 501, 999] {
            for size in [1_000, 20_000, 100_000] {
                let before = map(size);
                let key = size / 1_000 * 2 * place;
                for what in ["update", "insert", "remove"] {
                    let mut after = before.clone();
                    let mut differences = 0;
                    let cost = visited(|| {
                        match what {
                            "update" => after.insert(Watched(key), 1),
                            "insert" => after.insert(Watched(key + 1), 1),
                            _ => after.remove(&Watched(key)),
                        };
                        differences = before.diff(&after).count();
                    });
                    assert_eq!(differences, 1);
                    assert!(cost < 250, "{what} at {key} of {size}: {cost} comparisons");
                }
            }
        }
    }

    #[test]
    fn differences_say_what_was_and_what_is() {
        let before = map(3);
        let mut after = before.clone();
        assert!(after.ptr_eq(&before));
        after.insert(Watched(1), 9);
        after.insert(Watched(2), 5);
        after.remove(&Watched(4));
        let differences: Vec<_> = before
            .diff(&after)
            .map(|d| (d.key.0, d.old.copied(), d.new.copied()))
            .collect();
        assert_eq!(
            differences,
            [(1, None, Some(9)), (2, Some(0), Some(5)), (4, Some(0), None)]
        );
        assert_eq!(
            before.iter().map(|(key, value)| (key.0, *value)).collect::<Vec<_>>(),
            [(0, 0), (2, 0), (4, 0)]
        );
    }
}
