//! CT and CT_NEW for the garbage collector and `conntrack list`, with map handles of their own, so that neither the
//! reconciler nor they wait for each other.

use std::path::Path;

use aya::maps::{HashMap, IterableMap as _, Map, MapData};
use lb_common::abi::{CtEntry, CtKey, map_name};
use lb_core::maps::{Direction, MapError};
use zerocopy::FromBytes as _;

use super::batch::Entries;
use super::bpf::{Hash, call, is_missing, lookup};

pub use super::batch::Position;

const KEY: usize = size_of::<CtKey>();
const ENTRY: usize = size_of::<CtEntry>();

/// CT or CT_NEW.
pub struct CtMap {
    name: &'static str,
    map: Hash<KEY, ENTRY>,
    /// The last batch.
    batch: Entries,
}

/// CT and CT_NEW.
pub struct CtMaps {
    /// CT: established flows.
    pub established: CtMap,
    /// CT_NEW: unreplied flows.
    pub unreplied: CtMap,
}

impl CtMaps {
    /// Opens the maps that are pinned in a directory.
    ///
    /// # Errors
    /// Returns a [`MapError`] if a map is missing, or if the sizes of its keys and values are not those of this build.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        Ok(Self {
            established: CtMap::open(dir, map_name::CT, Map::HashMap)?,
            unreplied: CtMap::open(dir, map_name::CT_NEW, Map::LruHashMap)?,
        })
    }
}

impl CtMap {
    fn open(dir: &Path, name: &'static str, kind: fn(MapData) -> Map) -> Result<Self, MapError> {
        let map = MapData::from_pin(dir.join(name)).map_err(call(name, "BPF_OBJ_GET"))?;
        let batch = Entries::of(name, &map)?;
        Ok(Self {
            name,
            map: HashMap::try_from(kind(map)).map_err(call(name, "open"))?,
            batch,
        })
    }

    /// Returns the name of the map.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Reads the next entries, and returns them and the position after them. An entry that exists all the time is in
    /// exactly one batch.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub fn read(&mut self, from: Position) -> Result<(Vec<Direction>, Position), MapError> {
        let next = self.batch.read(self.name, self.map.map(), from)?;
        let entries = self.batch.iter();
        let entries = entries.filter_map(|(key, entry)| {
            // The map was opened with keys and values of these sizes.
            Some((CtKey::read_from_bytes(key).ok()?, CtEntry::read_from_bytes(entry).ok()?))
        });
        Ok((entries.collect(), next))
    }

    /// Reads all entries.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub fn all(&mut self) -> Result<Vec<Direction>, MapError> {
        let mut all = Vec::new();
        let mut position = Position::Begin;
        while position != Position::End {
            let (found, next) = self.read(position)?;
            all.extend(found);
            position = next;
        }
        Ok(all)
    }

    /// Reads one entry, if it exists.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError> {
        let found = lookup(self.name, &self.map, &zerocopy::transmute!(*key))?;
        Ok(found.map(|bytes| zerocopy::transmute!(bytes)))
    }

    /// Adds or replaces an entry. Only tests do so.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub fn insert(&mut self, key: &CtKey, entry: &CtEntry) -> Result<(), MapError> {
        let (key, value): ([u8; KEY], [u8; ENTRY]) = (zerocopy::transmute!(*key), zerocopy::transmute!(*entry));
        self.map
            .insert(key, value, 0)
            .map_err(call(self.name, "BPF_MAP_UPDATE_ELEM"))
    }

    /// Removes an entry, and returns whether it existed.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub fn remove(&mut self, key: &CtKey) -> Result<bool, MapError> {
        match self.map.remove(&zerocopy::transmute!(*key)) {
            Ok(()) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(call(self.name, "BPF_MAP_DELETE_ELEM")(error)),
        }
    }
}
