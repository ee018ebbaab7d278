//! Key-by-key synchronization of one map with its wanted content.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

/// The known content of one map, and the keys of failed writes.
///
/// A tree: a hash table of small entries may take twice as much memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced<K, V> {
    entries: BTreeMap<K, V>,
    failed: BTreeMap<K, String>,
}

/// Writes that change a map to its wanted content. Each list is in the order of the keys that were compared.
///
/// Stores and inserts come before deletions, so that an entry that moves never misses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writes<K, V> {
    /// New values of keys that the map has.
    pub stores: Vec<(K, V)>,
    /// Entries with keys that the map does not have.
    pub inserts: Vec<(K, V)>,
    /// Keys that are no longer wanted.
    pub deletes: Vec<K>,
}

impl<K, V> Default for Synced<K, V> {
    fn default() -> Self {
        Self::new(BTreeMap::new())
    }
}

impl<K, V> Synced<K, V> {
    /// Creates the record of a map that has these entries.
    #[must_use]
    pub fn new(entries: BTreeMap<K, V>) -> Self {
        Self {
            entries,
            failed: BTreeMap::new(),
        }
    }

    /// Returns the entries of the map.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<K, V> {
        &self.entries
    }

    /// Returns the keys of failed writes, with the reason.
    #[must_use]
    pub fn failed(&self) -> &BTreeMap<K, String> {
        &self.failed
    }
}

impl<K: Ord, V> Synced<K, V> {
    /// Rebuilds the tree of entries in as few tree nodes as possible: a tree that grew in ascending order is half empty.
    pub(crate) fn compact(&mut self) {
        self.entries = std::mem::take(&mut self.entries).into_iter().collect();
    }
}

impl<K: Ord + Clone, V: PartialEq> Synced<K, V> {
    /// Compares the map with its wanted content at some keys, without writing anything.
    ///
    /// `wanted` receives a key and its present value, and returns the value that the key should have; `None` if it should
    /// have none.
    pub fn plan<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a K>,
        mut wanted: impl FnMut(&K, Option<&V>) -> Option<V>,
    ) -> Writes<K, V>
    where
        K: 'a,
    {
        let mut writes = Writes {
            stores: Vec::new(),
            inserts: Vec::new(),
            deletes: Vec::new(),
        };
        for key in keys {
            let present = self.entries.get(key);
            match (present, wanted(key, present)) {
                (None, None) => {}
                (Some(old), Some(new)) if *old == new => {}
                (Some(_), Some(new)) => writes.stores.push((key.clone(), new)),
                (None, Some(new)) => writes.inserts.push((key.clone(), new)),
                (Some(_), None) => writes.deletes.push(key.clone()),
            }
        }
        writes
    }

    /// Records a successful write, `None` for a deletion. Returns the value before it.
    pub fn set(&mut self, key: K, value: Option<V>) -> Option<V> {
        match value {
            Some(value) => self.entries.insert(key, value),
            None => self.entries.remove(&key),
        }
    }

    /// Records a failed write: the caller compares this key again at the next occasion.
    pub fn set_failed(&mut self, key: K, reason: impl Display) {
        self.failed.insert(key, reason.to_string());
    }

    /// Returns the keys of failed writes, and clears the list.
    pub fn take_failed(&mut self) -> impl Iterator<Item = K> + use<K, V> {
        std::mem::take(&mut self.failed).into_keys()
    }
}

impl<K: Ord + Clone, V: PartialEq + Clone> Writes<K, V> {
    /// Returns the writes that make a map with these entries equal to `wanted`.
    #[must_use]
    pub fn between(there: BTreeMap<K, V>, wanted: &BTreeMap<K, V>) -> Self {
        let keys: BTreeSet<K> = there.keys().chain(wanted.keys()).cloned().collect();
        Synced::new(there).plan(&keys, |key, _| wanted.get(key).cloned())
    }
}

impl<K: Ord, V> Writes<K, V> {
    /// Returns stores and inserts together, by key.
    #[must_use]
    pub fn updates(self) -> (Vec<(K, V)>, Vec<K>) {
        let mut updates = self.stores;
        updates.extend(self.inserts);
        updates.sort_by(|(one, _), (other, _)| one.cmp(other));
        (updates, self.deletes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_has_what_differs_and_nothing_else() {
        let map = Synced::new([(1, 'a'), (2, 'b'), (3, 'c')].into());
        let wanted = |key: &u32, present: Option<&char>| match key {
            1 => present.copied(),
            2 => Some('x'),
            4 => Some('d'),
            _ => None,
        };
        let writes = map.plan(&[1, 2, 3, 4, 5], wanted);
        assert_eq!(
            writes,
            Writes {
                stores: vec![(2, 'x')],
                inserts: vec![(4, 'd')],
                deletes: vec![3],
            }
        );
        assert_eq!(writes.updates(), (vec![(2, 'x'), (4, 'd')], vec![3]));
    }

    #[test]
    fn failed_keys_are_returned_once() {
        let mut map = Synced::new([(1, 'a')].into());
        map.set_failed(2, "no room");
        assert_eq!(map.failed()[&2], "no room");
        assert_eq!(map.take_failed().collect::<Vec<_>>(), [2]);
        assert_eq!(map.take_failed().count(), 0);
        assert_eq!(map.set(1, None), Some('a'));
        assert!(map.entries().is_empty());
    }
}
