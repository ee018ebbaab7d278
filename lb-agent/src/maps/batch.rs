//! Hash maps, read as a whole.
//!
//! `BPF_MAP_GET_NEXT_KEY` starts again at the first bucket if the key that it is given was deleted meanwhile
//! (`htab_map_get_next_key` in `kernel/bpf/hashtab.c`). So a reading by it repeats entries while programs delete, and may
//! never end. `BPF_MAP_LOOKUP_BATCH` reads whole buckets and continues with the next one. A reading by it ends after the
//! last bucket, and has every entry that exists all the time exactly once.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;

use aya::maps::IterableMap as _;
use lb_core::maps::MapError;
use zerocopy::FromBytes;

use super::bpf::Hash;
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
pub(super) struct Entries<const K: usize, const V: usize> {
    keys: Vec<[u8; K]>,
    values: Vec<[u8; V]>,
    count: usize,
}

impl<const K: usize, const V: usize> Entries<K, V> {
    pub(super) fn new() -> Self {
        Self {
            keys: vec![[0; K]; ROOM],
            values: vec![[0; V]; ROOM],
            count: 0,
        }
    }

    /// Returns the entries of the last batch.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8; K], &[u8; V])> {
        self.keys.iter().zip(&self.values).take(self.count)
    }

    /// Reads the entries of the next buckets of a map, and returns the position after them.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call fails.
    pub(super) fn read(&mut self, name: &'static str, map: &Hash<K, V>, from: Position) -> Result<Position, MapError> {
        let bucket = match from {
            Position::Begin => None,
            Position::At(bucket) => Some(bucket),
            Position::End => {
                self.count = 0;
                return Ok(Position::End);
            }
        };
        loop {
            // aya compared the sizes of keys and values with those of the map when it was opened.
            match sys::lookup_batch(map.map().fd().as_fd(), bucket, &mut self.keys, &mut self.values) {
                Ok(Batch { count, next }) => {
                    self.count = count;
                    return Ok(next.map_or(Position::End, Position::At));
                }
                // The bucket has more entries.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    let room = self.keys.len() * 2;
                    self.keys.resize(room, [0; K]);
                    self.values.resize(room, [0; V]);
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

/// Calls a function with every entry of a map.
fn for_each<const K: usize, const V: usize>(
    name: &'static str,
    map: &Hash<K, V>,
    mut each: impl FnMut(&[u8; K], &[u8; V]),
) -> Result<(), MapError> {
    let mut entries = Entries::new();
    let mut position = Position::Begin;
    while position != Position::End {
        position = entries.read(name, map, position)?;
        entries.iter().for_each(|(key, value)| each(key, value));
    }
    Ok(())
}

/// Returns the number of entries of a map.
///
/// # Errors
/// Returns [`MapError::Call`] if the system call fails.
pub(super) fn count<const K: usize, const V: usize>(name: &'static str, map: &Hash<K, V>) -> Result<usize, MapError> {
    let mut count = 0;
    for_each(name, map, |_, _| count += 1)?;
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
    let mut fits = true;
    for_each(name, map, |key, value| {
        match (K::read_from_bytes(key), V::read_from_bytes(value)) {
            (Ok(key), Ok(value)) => {
                all.insert(key, value);
            }
            (Ok(_) | Err(_), _) => fits = false,
        }
    })?;
    if fits {
        return Ok(all);
    }
    Err(MapError::Unexpected {
        map: name,
        what: "keys or values do not have the size of this build".into(),
    })
}
