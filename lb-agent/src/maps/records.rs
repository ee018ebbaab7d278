//! SOCKETS, SOCKETS_MORE and UDP_FLOWS for the thread that frees records, with map handles of its own, so that neither it
//! nor the reconciler waits for the other.
//!
//! A socket's own calls write and free its record at any time. So the agent frees a slot in three steps:
//! 1. The slot's cookie becomes [`LEAVING`]: the next calls of the socket use SOCKETS_MORE, and no socket can claim the
//!    slot.
//! 2. A grace period passes, which ends all programs that found the slot theirs before.
//! 3. If none of those programs has written to the slot, it is free. Otherwise the new record stays.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use lb_common::abi::{Backend, SocketRecord, UdpDests, map_name};
use lb_common::logic::record::{self, LEAVING};
use lb_core::maps::MapError;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::batch::read_hash;
use super::bpf::{BPF_NOEXIST, Hash, call, is_missing, lookup, mapped, read_socket};
use super::sys::{self, GraceMap, MappedArray, word_of};

const RECORD: usize = size_of::<SocketRecord>();
const DESTS: usize = size_of::<UdpDests>();

/// The location of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordLocation {
    /// A slot of SOCKETS.
    Slot(u32),
    /// SOCKETS_MORE, under the record's cookie.
    More,
}

/// A record as it was read, and its location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocatedRecord {
    pub(crate) location: RecordLocation,
    pub(crate) record: SocketRecord,
}

/// The records of connected sockets and the destinations of unconnected UDP sockets.
pub(crate) struct Records {
    backends: MappedArray<Backend>,
    sockets: MappedArray<SocketRecord>,
    more: Hash<8, RECORD>,
    more_map: MapData,
    dests: Hash<8, DESTS>,
    grace: GraceMap,
}

impl Records {
    /// Opens the maps that are pinned in a directory.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a map is missing or a system call fails.
    pub(crate) fn open(dir: &Path) -> Result<Self, MapError> {
        let open = |name: &'static str| MapData::from_pin(dir.join(name)).map_err(call(name, "BPF_OBJ_GET"));
        let hash = |name| open(name).map(Map::HashMap);
        Ok(Self {
            backends: mapped(map_name::BACKENDS, &open(map_name::BACKENDS)?)?,
            sockets: mapped(map_name::SOCKETS, &open(map_name::SOCKETS)?)?,
            more: HashMap::try_from(hash(map_name::SOCKETS_MORE)?).map_err(call(map_name::SOCKETS_MORE, "open"))?,
            more_map: open(map_name::SOCKETS_MORE)?,
            dests: HashMap::try_from(hash(map_name::UDP_FLOWS)?).map_err(call(map_name::UDP_FLOWS, "open"))?,
            grace: GraceMap::new().map_err(|source| MapError::Call {
                map: "(grace)",
                call: "BPF_MAP_CREATE of an array of maps",
                source,
            })?,
        })
    }

    /// Returns all complete records.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn all(&self) -> Result<Vec<LocatedRecord>, MapError> {
        let slots = (0..self.sockets.len()).filter_map(|slot| {
            let record = read_socket(&self.sockets, slot)?;
            let location = RecordLocation::Slot(slot);
            Some(LocatedRecord { location, record })
        });
        let mut all: Vec<_> = slots.collect();
        let more = read_hash::<u64, SocketRecord, 8, RECORD>(map_name::SOCKETS_MORE, &self.more)?;
        let location = RecordLocation::More;
        all.extend(more.into_values().map(|record| LocatedRecord { location, record }));
        Ok(all)
    }

    /// Returns the destinations of unconnected sockets, by cookie.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn udp_dests(&self) -> Result<BTreeMap<u64, UdpDests>, MapError> {
        read_hash(map_name::UDP_FLOWS, &self.dests)
    }

    /// Returns whether the backend of a record is current.
    pub(crate) fn is_current(&self, record: &SocketRecord) -> bool {
        let backend = self.backends.read(record.backend.id);
        backend.is_some_and(|backend| backend.is_current(record.backend))
    }

    /// Returns whether a record is as it was read.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn is_unchanged(&self, found: &LocatedRecord) -> Result<bool, MapError> {
        match found.location {
            RecordLocation::Slot(slot) => {
                Ok(read_socket(&self.sockets, slot).is_some_and(|now| is_same(&now, &found.record)))
            }
            RecordLocation::More => Ok(self
                .more(found.record.cookie)?
                .is_some_and(|now| now == found.record.as_bytes())),
        }
    }

    /// Frees the records that are as they were read, after a grace period, and returns their number.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails. Records that are not freed are read again by the next
    /// [`Self::all`].
    pub(crate) fn forget(&mut self, stale: &[LocatedRecord]) -> Result<usize, MapError> {
        let mut leaving = Vec::new();
        for found in stale {
            let left = match found.location {
                RecordLocation::Slot(slot) => self.leave(slot, found.record.cookie),
                RecordLocation::More => self.remove(&found.record)?,
            };
            if left {
                leaving.push(*found);
            }
        }
        if leaving.is_empty() {
            return Ok(0);
        }
        // No slot may keep the cookie LEAVING, even if the grace period failed.
        let waited = self.synchronize();
        for LocatedRecord { location, record } in &leaving {
            match location {
                RecordLocation::Slot(slot) if waited.is_ok() => self.free(*slot, record)?,
                RecordLocation::Slot(slot) => drop(self.exchange(*slot, LEAVING, record.cookie)),
                RecordLocation::More => self.count_less(record)?,
            }
        }
        waited?;
        Ok(leaving.len())
    }

    /// Frees the slots that an earlier agent was about to free when it ended.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn free_left_over(&mut self) -> Result<(), MapError> {
        let is_left = |slot: &u32| self.sockets.read(*slot).is_some_and(|record| record.cookie == LEAVING);
        let left: Vec<u32> = (0..self.sockets.len()).filter(is_left).collect();
        if left.is_empty() {
            return Ok(());
        }
        self.synchronize()?;
        left.into_iter().for_each(|slot| self.clear(slot));
        Ok(())
    }

    /// Removes the destinations of an unconnected socket, if the socket has not sent to a service since they were read.
    /// Returns whether they were removed.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn forget_udp_dests(&mut self, cookie: u64, read: &UdpDests) -> Result<bool, MapError> {
        let name = map_name::UDP_FLOWS;
        let key = cookie.to_ne_bytes();
        if lookup(name, &self.dests, &key)?.is_none_or(|now| now != read.as_bytes()) {
            return Ok(false);
        }
        match self.dests.remove(&key) {
            Ok(()) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(call(name, "BPF_MAP_DELETE_ELEM")(error)),
        }
    }

    fn exchange(&self, slot: u32, old: u64, new: u64) -> bool {
        self.sockets
            .compare_exchange(slot, word_of(offset_of!(SocketRecord, cookie)), old, new)
    }

    /// Does the first step: a call that begins later finds the slot neither its own nor free.
    fn leave(&self, slot: u32, cookie: u64) -> bool {
        self.exchange(slot, cookie, LEAVING)
    }

    /// Does the last step, after a grace period: frees the slot, unless its socket wrote to it meanwhile.
    fn free(&self, slot: u32, was: &SocketRecord) -> Result<(), MapError> {
        let Some(now) = self.sockets.read(slot).filter(|now| now.cookie == LEAVING) else {
            // The socket was closed meanwhile.
            return Ok(());
        };
        let rewritten = now.sequence != was.sequence && record::is_complete(now.sequence);
        if rewritten && self.more(was.cookie)?.is_none() {
            self.exchange(slot, LEAVING, was.cookie);
        } else {
            self.clear(slot);
        }
        Ok(())
    }

    /// Frees a slot whose cookie is LEAVING. The sequence changes first, so a socket that claims the slot finds no complete
    /// record there.
    fn clear(&self, slot: u32) {
        let sequence = offset_of!(SocketRecord, sequence);
        self.sockets
            .update_u32(slot, sequence, |sequence| Some(record::opened(sequence)));
        self.exchange(slot, LEAVING, 0);
    }

    /// Reads the record in SOCKETS_MORE under a cookie, if there is one.
    fn more(&self, cookie: u64) -> Result<Option<[u8; RECORD]>, MapError> {
        lookup(map_name::SOCKETS_MORE, &self.more, &cookie.to_ne_bytes())
    }

    fn synchronize(&self) -> Result<(), MapError> {
        self.grace.synchronize().map_err(|source| MapError::Call {
            map: "(grace)",
            call: "BPF_MAP_UPDATE_ELEM",
            source,
        })
    }

    /// Removes a record from SOCKETS_MORE, and returns whether it did. A newer record of the socket is inserted again.
    fn remove(&mut self, stale: &SocketRecord) -> Result<bool, MapError> {
        let name = map_name::SOCKETS_MORE;
        let key = stale.cookie.to_ne_bytes();
        let mut removed = SocketRecord::new_zeroed();
        let there =
            sys::lookup_and_delete(self.more_map.fd().as_fd(), &key, removed.as_mut_bytes()).map_err(|source| {
                MapError::Call {
                    map: name,
                    call: "BPF_MAP_LOOKUP_AND_DELETE_ELEM",
                    source,
                }
            })?;
        if there && removed != *stale {
            let value: [u8; RECORD] = zerocopy::transmute!(removed);
            // If a record exists already, it is even newer. If there is no room, the socket has no record.
            let _ = self.more.insert(key, value, BPF_NOEXIST);
            return Ok(false);
        }
        Ok(there)
    }

    /// Decrements the count of spilled records in the slot of a record that was removed from SOCKETS_MORE, after a grace
    /// period, unless the socket has a record there again. A count that is too high costs the sockets of the slot a lookup
    /// in SOCKETS_MORE; a count that is too low would hide a record.
    fn count_less(&self, removed: &SocketRecord) -> Result<(), MapError> {
        // The key of an MPTCP socket is its address in the kernel, and no slot counts its record.
        if removed.cookie == removed.socket && self.more(removed.cookie)?.is_none() {
            let slot = record::slot(removed.cookie, self.sockets.len().saturating_sub(1));
            let spilled = offset_of!(SocketRecord, spilled);
            self.sockets.update_u32(slot, spilled, |count| count.checked_sub(1));
        }
        Ok(())
    }
}

/// Returns whether two readings of a slot have the same record: the sequence changes with every field except `spilled`.
fn is_same(a: &SocketRecord, b: &SocketRecord) -> bool {
    a.cookie == b.cookie && a.sequence == b.sequence
}
