//! CT and CT_NEW for those who read them as a whole, and remove what is over, beside the programs: opened once more, so
//! that nobody waits for anybody.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use lb_common::abi::{CtEntry, CtKey, map_name};
use zerocopy::FromBytes as _;

use super::bpf::{Hash, call, is_missing, lookup};
use super::sys::{self, Batch};
use lb_core::maps::{Direction, MapError};

const KEY: usize = size_of::<CtKey>();
const ENTRY: usize = size_of::<CtEntry>();

/// Entries of a batch, unless a bucket has more.
const ROOM: usize = 1024;

/// CT or CT_NEW.
pub struct FlowMap {
    name: &'static str,
    entries: Hash<KEY, ENTRY>,
    map: MapData,
    /// Where batches are read to.
    keys: Vec<[u8; KEY]>,
    values: Vec<[u8; ENTRY]>,
}

/// Both.
pub struct FlowMaps {
    /// Flows that were answered.
    pub answered: FlowMap,
    /// Those that were not.
    pub new: FlowMap,
}

impl FlowMaps {
    /// Opens the maps that are pinned in a folder.
    ///
    /// # Errors
    /// Where one is missing, or is not as this build lays it out.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        Ok(Self {
            answered: FlowMap::open(dir, map_name::CT, Map::HashMap)?,
            new: FlowMap::open(dir, map_name::CT_NEW, Map::LruHashMap)?,
        })
    }
}

/// Where a reading of a map as a whole stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Position {
    /// Before everything.
    #[default]
    Begin,
    /// In the middle.
    At(u32),
    /// After everything.
    End,
}

impl FlowMap {
    fn open(dir: &Path, name: &'static str, kind: fn(MapData) -> Map) -> Result<Self, MapError> {
        let open = || MapData::from_pin(dir.join(name)).map_err(call(name, "BPF_OBJ_GET"));
        Ok(Self {
            name,
            // This compares the sizes of keys and values.
            entries: HashMap::try_from(kind(open()?)).map_err(call(name, "open"))?,
            map: open()?,
            keys: vec![[0; KEY]; ROOM],
            values: vec![[0; ENTRY]; ROOM],
        })
    }

    /// Name of the map.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The next entries, and where they end. None that is there all the time is missing, in one call or another.
    ///
    /// # Errors
    /// The system call's.
    pub fn read(&mut self, from: Position) -> Result<(Vec<Direction>, Position), MapError> {
        let from = match from {
            Position::Begin => None,
            Position::At(bucket) => Some(bucket),
            Position::End => return Ok((Vec::new(), Position::End)),
        };
        let Batch { count, next } = loop {
            match sys::lookup_batch(self.map.fd().as_fd(), from, &mut self.keys, &mut self.values) {
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    let room = self.keys.len() * 2;
                    self.keys.resize(room, [0; KEY]);
                    self.values.resize(room, [0; ENTRY]);
                }
                result => break result.map_err(|source| self.failed("BPF_MAP_LOOKUP_BATCH", source))?,
            }
        };
        let found = self.keys.iter().zip(&self.values).take(count);
        let found = found.filter_map(|(key, value)| {
            let key = CtKey::read_from_bytes(key).ok()?;
            Some((key, CtEntry::read_from_bytes(value).ok()?))
        });
        Ok((found.collect(), next.map_or(Position::End, Position::At)))
    }

    /// All entries.
    ///
    /// # Errors
    /// The system call's.
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

    /// An entry, if it is there.
    ///
    /// # Errors
    /// The system call's.
    pub fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError> {
        let found = lookup(self.name, &self.entries, &zerocopy::transmute!(*key))?;
        Ok(found.map(|bytes| zerocopy::transmute!(bytes)))
    }

    /// Adds an entry, or replaces it: for tests.
    ///
    /// # Errors
    /// The system call's.
    pub fn insert(&mut self, key: &CtKey, entry: &CtEntry) -> Result<(), MapError> {
        let (key, value): ([u8; KEY], [u8; ENTRY]) = (zerocopy::transmute!(*key), zerocopy::transmute!(*entry));
        self.entries
            .insert(key, value, 0)
            .map_err(call(self.name, "BPF_MAP_UPDATE_ELEM"))
    }

    /// Removes an entry; whether it was there.
    ///
    /// # Errors
    /// The system call's.
    pub fn remove(&mut self, key: &CtKey) -> Result<bool, MapError> {
        match self.entries.remove(&zerocopy::transmute!(*key)) {
            Ok(()) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(call(self.name, "BPF_MAP_DELETE_ELEM")(error)),
        }
    }

    fn failed(&self, call: &'static str, source: io::Error) -> MapError {
        MapError::Call {
            map: self.name,
            call,
            source,
        }
    }
}
