//! A map that only the daemon writes, with a copy of what is in it, so that a whole new content costs only the
//! differences.

use super::{Changes, FullMap, MapError, shared::Shared};
use aya::maps::{HashMap as BpfHashMap, MapData, lpm_trie::LpmTrie};
use std::{collections::HashMap, hash::Hash};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What a map needs to be mirrored; a fake in tests.
pub(super) trait Table<K, V> {
    fn put(&mut self, key: &K, value: &V) -> Result<(), aya::maps::MapError>;
    fn take(&mut self, key: &K) -> Result<(), aya::maps::MapError>;
    fn entries(&self) -> Result<Vec<(K, V)>, aya::maps::MapError>;
}

pub(super) trait Plain: Copy + Eq + FromBytes + IntoBytes + Immutable + 'static {}
impl<T: Copy + Eq + FromBytes + IntoBytes + Immutable + 'static> Plain for T {}

impl<K: Plain, V: Plain> Table<K, V> for BpfHashMap<MapData, Shared<K>, Shared<V>> {
    fn put(&mut self, key: &K, value: &V) -> Result<(), aya::maps::MapError> {
        self.insert(Shared(*key), Shared(*value), 0)
    }

    fn take(&mut self, key: &K) -> Result<(), aya::maps::MapError> {
        self.remove(&Shared(*key))
    }

    fn entries(&self) -> Result<Vec<(K, V)>, aya::maps::MapError> {
        self.iter()
            .map(|entry| entry.map(|(Shared(key), Shared(value))| (key, value)))
            .collect()
    }
}

/// A prefix and how many of its bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Prefix<K> {
    pub(super) bits: u32,
    pub(super) key: K,
}

impl<K: Plain, V: Plain> Table<Prefix<K>, V> for LpmTrie<MapData, Shared<K>, Shared<V>> {
    fn put(&mut self, prefix: &Prefix<K>, value: &V) -> Result<(), aya::maps::MapError> {
        self.insert(&trie_key(prefix), Shared(*value), 0)
    }

    fn take(&mut self, prefix: &Prefix<K>) -> Result<(), aya::maps::MapError> {
        self.remove(&trie_key(prefix))
    }

    fn entries(&self) -> Result<Vec<(Prefix<K>, V)>, aya::maps::MapError> {
        self.iter()
            .map(|entry| {
                let (key, Shared(value)) = entry?;
                let Shared(data) = key.data();
                Ok((
                    Prefix {
                        bits: key.prefix_len(),
                        key: data,
                    },
                    value,
                ))
            })
            .collect()
    }
}

fn trie_key<K: Plain>(prefix: &Prefix<K>) -> aya::maps::lpm_trie::Key<Shared<K>> {
    aya::maps::lpm_trie::Key::new(prefix.bits, Shared(prefix.key))
}

/// A map and what is in it.
pub(super) struct Mirror<K, V, T> {
    name: &'static str,
    size: u32,
    table: T,
    held: HashMap<K, V>,
    refused: u64,
}

impl<K: Copy + Eq + Hash, V: Copy + Eq, T: Table<K, V>> Mirror<K, V, T> {
    /// Takes over what an earlier daemon left in the map.
    pub(super) fn adopt(name: &'static str, size: u32, table: T) -> Result<Self, MapError> {
        let held = table
            .entries()
            .map_err(|error| broken(name, error))?
            .into_iter()
            .collect();
        Ok(Self {
            name,
            size,
            table,
            held,
            refused: 0,
        })
    }

    /// Reads what somebody else may have written.
    pub(super) fn reread(&mut self) -> Result<(), MapError> {
        let held = self.table.entries().map_err(|error| broken(self.name, error))?;
        self.held = held.into_iter().collect();
        Ok(())
    }

    pub(super) fn held(&self) -> &HashMap<K, V> {
        &self.held
    }

    pub(super) fn put(&mut self, key: K, value: V) -> Result<bool, MapError> {
        if self.held.get(&key) == Some(&value) {
            return Ok(false);
        }
        match self.table.put(&key, &value) {
            Ok(()) => {
                self.held.insert(key, value);
                Ok(true)
            }
            Err(error) if is_full(&error) => {
                self.refused += 1;
                Err(MapError::Full {
                    map: self.name,
                    size: self.size,
                })
            }
            Err(error) => Err(broken(self.name, error)),
        }
    }

    pub(super) fn take(&mut self, key: &K) -> Result<bool, MapError> {
        if !self.held.contains_key(key) {
            return Ok(false);
        }
        match self.table.take(key) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(broken(self.name, error)),
        }
        self.held.remove(key);
        Ok(true)
    }

    /// Makes the part of the map that is `ours` hold `wanted` and nothing else. What has to go goes first, to make room.
    /// If it is too small, everything that fits is in it, and the error says so.
    pub(super) fn sync(
        &mut self,
        wanted: &HashMap<K, V>,
        mut ours: impl FnMut(&K) -> bool,
    ) -> Result<Changes, MapError> {
        let mut changes = Changes::default();
        let gone: Vec<K> = self
            .held
            .keys()
            .filter(|key| ours(key) && !wanted.contains_key(*key))
            .copied()
            .collect();
        for key in gone {
            changes.removed += usize::from(self.take(&key)?);
        }
        let mut full = None;
        for (key, value) in wanted {
            match self.put(*key, *value) {
                Ok(written) => changes.written += usize::from(written),
                Err(error @ MapError::Full { .. }) => full = Some(error),
                Err(error) => return Err(error),
            }
        }
        full.map_or(Ok(changes), Err)
    }

    /// How often an entry found no room, if ever.
    pub(super) fn full(&self) -> Option<FullMap> {
        (self.refused > 0).then_some(FullMap {
            map: self.name,
            refused: self.refused,
        })
    }
}

pub(super) fn broken(map: &'static str, error: aya::maps::MapError) -> MapError {
    MapError::Map {
        map,
        source: Box::new(error),
    }
}

fn errno(error: &aya::maps::MapError) -> Option<i32> {
    if let aya::maps::MapError::SyscallError(error) = error {
        error.io_error.raw_os_error()
    } else {
        None
    }
}

/// Hash maps say E2BIG, tries ENOSPC.
fn is_full(error: &aya::maps::MapError) -> bool {
    matches!(errno(error), Some(libc::E2BIG | libc::ENOSPC))
}

fn is_absent(error: &aya::maps::MapError) -> bool {
    matches!(error, aya::maps::MapError::KeyNotFound) || errno(error) == Some(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya::{maps::MapError as AyaError, sys::SyscallError};
    use std::io;

    /// A map of bounded size that remembers what was written.
    #[derive(Default)]
    struct Fake {
        room: usize,
        entries: HashMap<u32, u32>,
        writes: Vec<u32>,
    }

    impl Table<u32, u32> for Fake {
        fn put(&mut self, key: &u32, value: &u32) -> Result<(), AyaError> {
            if self.entries.len() >= self.room && !self.entries.contains_key(key) {
                return Err(AyaError::SyscallError(SyscallError {
                    call: "bpf_map_update_elem",
                    io_error: io::Error::from_raw_os_error(libc::E2BIG),
                }));
            }
            self.entries.insert(*key, *value);
            self.writes.push(*key);
            Ok(())
        }

        fn take(&mut self, key: &u32) -> Result<(), AyaError> {
            self.entries.remove(key).map(drop).ok_or(AyaError::KeyNotFound)
        }

        fn entries(&self) -> Result<Vec<(u32, u32)>, AyaError> {
            Ok(self.entries.iter().map(|(key, value)| (*key, *value)).collect())
        }
    }

    fn mirror(room: usize, entries: &[(u32, u32)]) -> Mirror<u32, u32, Fake> {
        let table = Fake {
            room,
            entries: entries.iter().copied().collect(),
            writes: Vec::new(),
        };
        Mirror::adopt("FAKE", room as u32, table).unwrap()
    }

    #[test]
    fn only_differences_are_written() {
        let mut mirror = mirror(10, &[(1, 10), (2, 20), (3, 30)]);
        let wanted = HashMap::from([(1, 10), (2, 21), (4, 40)]);
        assert_eq!(
            mirror.sync(&wanted, |_| true).unwrap(),
            Changes { written: 2, removed: 1 }
        );
        assert_eq!(mirror.table.entries, wanted);
        mirror.table.writes.sort();
        assert_eq!(mirror.table.writes, [2, 4]);
        assert_eq!(mirror.sync(&wanted, |_| true).unwrap(), Changes::default());
    }

    #[test]
    fn a_full_map_holds_what_fits_and_says_so() {
        let mut mirror = mirror(2, &[(9, 9)]);
        let wanted = HashMap::from([(1, 1), (2, 2), (3, 3)]);
        assert!(matches!(
            mirror.sync(&wanted, |_| true),
            Err(MapError::Full { map: "FAKE", size: 2 })
        ));
        assert_eq!(mirror.table.entries.len(), 2);
        assert!(!mirror.table.entries.contains_key(&9), "what had to go made room");
        assert_eq!(
            mirror.full(),
            Some(FullMap {
                map: "FAKE",
                refused: 1
            })
        );
    }

    #[test]
    fn one_pods_part_leaves_the_others_alone() {
        let mut mirror = mirror(10, &[(10, 1), (11, 1), (20, 2)]);
        mirror.sync(&HashMap::from([(12, 1)]), |key| key / 10 == 1).unwrap();
        assert_eq!(mirror.table.entries, HashMap::from([(12, 1), (20, 2)]));
    }

    #[test]
    fn an_entry_that_somebody_else_removed_is_no_error() {
        let mut mirror = mirror(10, &[(1, 1)]);
        mirror.table.entries.clear();
        assert!(mirror.take(&1).unwrap());
        assert!(!mirror.take(&1).unwrap());
    }
}
