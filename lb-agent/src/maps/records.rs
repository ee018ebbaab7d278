//! SOCKETS, SOCKETS_MORE and UDP_FLOWS for those who free them beside the programs: opened once more, so that nobody
//! waits for anybody.
//!
//! A socket's own calls write and free its record at any time. So a slot is freed in three steps: its cookie becomes
//! [`LEAVING`], which sends the socket's next calls to SOCKETS_MORE and lets nobody claim the slot; a grace period ends
//! all programs that found the slot theirs before; then, if none of those has written to it, the slot is free. If one
//! has, what it wrote stands.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use lb_common::abi::{Backend, SocketRecord, UdpFlows, map_name};
use lb_common::logic::generation;
use lb_common::logic::record::{self, LEAVING};
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::bpf::{BPF_NOEXIST, Hash, call, is_missing, lookup, mapped, read_hash, read_socket};
use super::sys::{self, GraceMap, MappedArray, word_of};
use lb_core::maps::MapError;

const RECORD: usize = size_of::<SocketRecord>();
const FLOWS: usize = size_of::<UdpFlows>();

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A slot of SOCKETS.
    Slot(u32),
    /// SOCKETS_MORE, under the record's cookie.
    More,
}

/// A record as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) place: Place,
    pub(crate) record: SocketRecord,
}

/// What sockets are remembered with.
pub(crate) struct Records {
    backends: MappedArray<Backend>,
    sockets: MappedArray<SocketRecord>,
    more: Hash<8, RECORD>,
    more_map: MapData,
    flows: Hash<8, FLOWS>,
    grace: GraceMap,
}

impl Records {
    /// Opens the maps that are pinned in a folder.
    ///
    /// # Errors
    /// Where one is missing, or a system call fails.
    pub(crate) fn open(dir: &Path) -> Result<Self, MapError> {
        let open = |name: &'static str| MapData::from_pin(dir.join(name)).map_err(call(name, "BPF_OBJ_GET"));
        let hash = |name| open(name).map(Map::HashMap);
        Ok(Self {
            backends: mapped(map_name::BACKENDS, &open(map_name::BACKENDS)?)?,
            sockets: mapped(map_name::SOCKETS, &open(map_name::SOCKETS)?)?,
            more: HashMap::try_from(hash(map_name::SOCKETS_MORE)?).map_err(call(map_name::SOCKETS_MORE, "open"))?,
            more_map: open(map_name::SOCKETS_MORE)?,
            flows: HashMap::try_from(hash(map_name::UDP_FLOWS)?).map_err(call(map_name::UDP_FLOWS, "open"))?,
            grace: GraceMap::new().map_err(|source| MapError::Call {
                map: "(grace)",
                call: "BPF_MAP_CREATE of an array of maps",
                source,
            })?,
        })
    }

    /// All records that are complete.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn all(&self) -> Result<Vec<Found>, MapError> {
        let slots = (0..self.sockets.len()).filter_map(|slot| {
            let record = read_socket(&self.sockets, slot)?;
            let place = Place::Slot(slot);
            Some(Found { place, record })
        });
        let mut all: Vec<_> = slots.collect();
        let more = read_hash::<u64, SocketRecord, 8, RECORD>(map_name::SOCKETS_MORE, &self.more)?;
        let place = Place::More;
        all.extend(more.into_values().map(|record| Found { place, record }));
        Ok(all)
    }

    /// Unconnected sockets by cookie.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn flows(&self) -> Result<BTreeMap<u64, UdpFlows>, MapError> {
        read_hash(map_name::UDP_FLOWS, &self.flows)
    }

    /// Whether the backend that a record names is still there.
    pub(crate) fn is_current(&self, record: &SocketRecord) -> bool {
        let backend = self.backends.read(record.backend);
        backend.is_some_and(|backend| generation::is_current(backend.generation, record.generation))
    }

    /// Whether a record is as it was found.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn is_unchanged(&self, found: &Found) -> Result<bool, MapError> {
        match found.place {
            Place::Slot(slot) => Ok(read_socket(&self.sockets, slot).is_some_and(|now| is_same(&now, &found.record))),
            Place::More => Ok(self
                .more(found.record.cookie)?
                .is_some_and(|now| now == found.record.as_bytes())),
        }
    }

    /// Forgets sockets whose records are as they were found; waits for a grace period. Returns how many it forgot.
    ///
    /// # Errors
    /// The system call's; what is left is found once more.
    pub(crate) fn forget(&mut self, stale: &[Found]) -> Result<usize, MapError> {
        let mut leaving = Vec::new();
        for found in stale {
            let left = match found.place {
                Place::Slot(slot) => self.leave(slot, found.record.cookie),
                Place::More => self.remove(&found.record)?,
            };
            if left {
                leaving.push(*found);
            }
        }
        if leaving.is_empty() {
            return Ok(0);
        }
        // Whether or not it passes, no slot may be left half-way.
        let waited = self.synchronize();
        for Found { place, record } in &leaving {
            match place {
                Place::Slot(slot) if waited.is_ok() => self.free(*slot, record)?,
                Place::Slot(slot) => drop(self.exchange(*slot, LEAVING, record.cookie)),
                Place::More => self.count_less(record)?,
            }
        }
        waited?;
        Ok(leaving.len())
    }

    /// Frees slots that an agent which died was about to free.
    ///
    /// # Errors
    /// The system call's.
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

    /// Forgets an unconnected socket, if it has not sent anything to a service since it was read.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn forget_flows(&mut self, cookie: u64, read: &UdpFlows) -> Result<bool, MapError> {
        let name = map_name::UDP_FLOWS;
        let key = cookie.to_ne_bytes();
        if lookup(name, &self.flows, &key)?.is_none_or(|now| now != read.as_bytes()) {
            return Ok(false);
        }
        match self.flows.remove(&key) {
            Ok(()) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(call(name, "BPF_MAP_DELETE_ELEM")(error)),
        }
    }

    fn exchange(&self, slot: u32, old: u64, new: u64) -> bool {
        self.sockets
            .compare_exchange(slot, word_of(offset_of!(SocketRecord, cookie)), old, new)
    }

    /// First step: no call that begins from now on finds the slot its own, or free.
    fn leave(&self, slot: u32, cookie: u64) -> bool {
        self.exchange(slot, cookie, LEAVING)
    }

    /// Last step, after a grace period: the slot is free, unless its socket has written to it meanwhile.
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

    /// Makes a slot that leaves free. The sequence first: who claims it finds no complete record there.
    fn clear(&self, slot: u32) {
        let sequence = offset_of!(SocketRecord, sequence);
        self.sockets
            .update_u32(slot, sequence, |sequence| Some(record::opened(sequence)));
        self.exchange(slot, LEAVING, 0);
    }

    /// What SOCKETS_MORE has under a cookie.
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

    /// Removes a record from SOCKETS_MORE; a newer one of the same socket is put back.
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
            // Where one is there already it is newer still; where there is no room, the socket has no record.
            let _ = self.more.insert(key, value, BPF_NOEXIST);
            return Ok(false);
        }
        Ok(there)
    }

    /// After a grace period: the slot of a socket that was removed from SOCKETS_MORE counts one less, unless the socket
    /// has a record there again. A slot that counts too many costs its sockets a look into SOCKETS_MORE; one that counts
    /// too few would hide a record.
    fn count_less(&self, removed: &SocketRecord) -> Result<(), MapError> {
        // The key of an MPTCP socket is its address in the kernel, and no slot counts it.
        if removed.cookie == removed.socket && self.more(removed.cookie)?.is_none() {
            let slot = record::slot(removed.cookie, self.sockets.len().saturating_sub(1));
            let spilled = offset_of!(SocketRecord, spilled);
            self.sockets.update_u32(slot, spilled, |count| count.checked_sub(1));
        }
        Ok(())
    }
}

/// Of one slot: the sequence changes with everything but the number of records elsewhere.
fn is_same(a: &SocketRecord, b: &SocketRecord) -> bool {
    a.cookie == b.cookie && a.sequence == b.sequence
}
