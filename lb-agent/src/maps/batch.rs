//! Hash maps, read as a whole.
//!
//! `BPF_MAP_GET_NEXT_KEY` starts again at the first bucket if the key that it is given was deleted meanwhile
//! (`htab_map_get_next_key` in `kernel/bpf/hashtab.c`). So a reading by it repeats entries while programs delete, and may
//! never end. `BPF_MAP_LOOKUP_BATCH` reads whole buckets and continues with the next one. A reading by it ends after the
//! last bucket, and has every entry that exists all the time exactly once.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;

use aya::maps::{IterableMap as _, MapData};
use lb_core::maps::MapError;
use zerocopy::FromBytes;

use super::bpf::{Hash, call};
use super::sys::{self, Batch};

/// Number of entries of a batch, unless a bucket has more.
const ROOM: usize = 1024;

/// The position of a reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Position {
    /// Before the first bucket.
    #[default]
    Begin,
    /// Before a bucket, by its number.
    At(u32),
    /// After the last bucket.
    End,
}

/// Keys and values of one batch.
pub(super) struct Entries {
    key_size: usize,
    value_size: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
    count: usize,
}

impl Entries {
    /// Creates an empty batch of a map, whose keys and values have the sizes that the kernel reports.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub(super) fn of(name: &'static str, map: &MapData) -> Result<Self, MapError> {
        let info = map.info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
        let (key_size, value_size) = (info.key_size() as usize, info.value_size() as usize);
        Ok(Self {
            key_size,
            value_size,
            keys: vec![0; ROOM * key_size],
            values: vec![0; ROOM * value_size],
            count: 0,
        })
    }

    /// Returns the entries of the last batch.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let keys = self.keys.chunks_exact(self.key_size);
        keys.zip(self.values.chunks_exact(self.value_size)).take(self.count)
    }

    /// Reads the entries of the next buckets of the map, and returns the position after them.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub(super) fn read(&mut self, name: &'static str, map: &MapData, from: Position) -> Result<Position, MapError> {
        let bucket = match from {
            Position::Begin => None,
            Position::At(bucket) => Some(bucket),
            Position::End => {
                self.count = 0;
                return Ok(Position::End);
            }
        };
        let sizes = [self.key_size, self.value_size];
        loop {
            match sys::lookup_batch(map.fd().as_fd(), sizes, bucket, &mut self.keys, &mut self.values) {
                Ok(Batch { count, next }) => {
                    self.count = count;
                    return Ok(next.map_or(Position::End, Position::At));
                }
                // The bucket has more entries.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    self.keys.resize(self.keys.len() * 2, 0);
                    self.values.resize(self.values.len() * 2, 0);
                }
                Err(source) => {
                    return Err(MapError::Call {
                        map: name,
                        call: "BPF_MAP_LOOKUP_BATCH",
                        source,
                    });
                }
            }
        }
    }
}

/// Calls a function with the bytes of every entry of a map.
///
/// # Errors
/// Returns [`MapError::Call`] if the system call fails, and the errors of the function.
pub(super) fn for_each(
    name: &'static str,
    map: &MapData,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), MapError>,
) -> Result<(), MapError> {
    let mut entries = Entries::of(name, map)?;
    let mut position = Position::Begin;
    while position != Position::End {
        position = entries.read(name, map, position)?;
        entries.iter().try_for_each(|(key, value)| each(key, value))?;
    }
    Ok(())
}

/// Returns the number of entries of a map.
///
/// # Errors
/// Returns [`MapError::Call`] if the system call fails.
pub(super) fn count(name: &'static str, map: &MapData) -> Result<usize, MapError> {
    let mut count = 0;
    for_each(name, map, |_, _| {
        count += 1;
        Ok(())
    })?;
    Ok(count)
}

/// Returns all entries of a map.
///
/// # Errors
/// Returns [`MapError::Call`] if the system call fails, and [`MapError::Unexpected`] if `K` or `V` are not of the size of
/// the map's keys or values.
pub(super) fn read_hash<K: FromBytes + Ord, V: FromBytes, const KS: usize, const VS: usize>(
    name: &'static str,
    map: &Hash<KS, VS>,
) -> Result<BTreeMap<K, V>, MapError> {
    let mut all = BTreeMap::new();
    for_each(name, map.map(), |key, value| {
        let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) else {
            return Err(MapError::Unexpected {
                map: name,
                what: "keys or values do not have the size of this build".into(),
            });
        };
        all.insert(key, value);
        Ok(())
    })?;
    Ok(all)
}
