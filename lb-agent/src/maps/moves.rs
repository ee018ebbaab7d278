//! Moving the content of maps to maps of another size or layout; see [`lb_common::abi::MovePhase`].
//!
//! Maps that only the agent fills are copied before any program reads the copies. The entries of maps that programs fill are
//! copied one by one by the agent call `lb_move`, while programs use both maps.

use std::collections::BTreeSet;
use std::mem::offset_of;
use std::path::Path;

use aya::Ebpf;
use aya::maps::MapData;
use lb_common::abi::{
    Backend, BackendSlot, Config, DropReason, MOVE_MAP, Move, MoveItem, MovePhase, MoveRequest, Service, ServiceIndex,
    SizedMap, SocketRecord, State, map_name, map_spec, program_name,
};
use lb_common::logic::generation;
use lb_core::maps::resize::{base_generation, room, room_for_records, unused_backend, unused_service};
use lb_core::maps::{Capacities, MapError};
use tracing::warn;
use zerocopy::{FromBytes, Immutable, IntoBytes as _, KnownLayout};

use super::bpf::{BPF_NOEXIST, Hash, PinnedMaps, agent_call, call, mapped_any, read_socket};
use super::old::{OldMaps, from_first};
use super::sys::{GraceMap, MappedArray};

/// MOVE, the phase of a move.
pub(crate) struct PhaseMap(MappedArray<Move>);

impl PhaseMap {
    /// Opens the map that is pinned in a directory; `None` if there is none.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn open(dir: &Path) -> Result<Option<Self>, MapError> {
        let path = dir.join(MOVE_MAP);
        if !path.exists() {
            return Ok(None);
        }
        let map = MapData::from_pin(path).map_err(call(MOVE_MAP, "BPF_OBJ_GET"))?;
        Ok(Some(Self(mapped_any(MOVE_MAP, &map)?)))
    }

    /// Returns the phase; `None` if its number is unknown.
    pub(crate) fn get(&self) -> Option<MovePhase> {
        MovePhase::from_u32(self.0.read(0)?.phase)
    }

    /// Stores the phase by one store.
    pub(crate) fn set(&self, phase: MovePhase) {
        self.0.update_u32(0, offset_of!(Move, phase), |_| Some(phase as u32));
    }
}

/// Waits until every program that runs now has ended.
///
/// # Errors
/// Returns [`MapError::Call`] if a system call fails.
pub(crate) fn wait_for_programs() -> Result<(), MapError> {
    let waited = GraceMap::new().and_then(|grace| grace.synchronize());
    waited.map_err(|source| MapError::Call {
        map: "(grace)",
        call: "BPF_MAP_UPDATE_ELEM of an array of maps",
        source,
    })
}

impl OldMaps {
    /// Returns the smallest number of entries that each map can have.
    ///
    /// # Errors
    /// Returns a [`MapError`] if a map cannot be read.
    pub(crate) fn needed(&self) -> Result<Capacities, MapError> {
        let services = self.array::<Service>(map_name::SERVICES)?;
        let services: Vec<_> = (0..services.len()).filter_map(|i| services.read(i)).collect();
        let mut named = 0;
        self.for_each(map_name::NAMES, |index, _| {
            named = named.max(from_first::<u32>(index).saturating_add(1));
            Ok(())
        })?;
        let used_services = (1..).zip(&services).filter(|(_, s)| generation::is_live(s.generation));
        let used_services = used_services.map(|(end, _)| end).max().unwrap_or(0).max(named);
        let sets = services.iter().flat_map(|s| [s.internal, s.external, s.cluster]);
        let slots = sets.map(|set| set.base.saturating_add(set.len.into())).max();
        let backends = self.array::<Backend>(map_name::BACKENDS)?;
        let is_used = |id: &u32| {
            let backend = backends.read(*id);
            backend.is_some_and(|backend| generation::is_live(backend.generation))
        };
        let used_backends = (0..backends.len()).rev().find(is_used).map(|id| id + 1);
        let mut needed = Capacities::uniform(0);
        for &map in SizedMap::ALL {
            let used = match map {
                SizedMap::Services => used_services,
                SizedMap::Backends => used_backends.unwrap_or(0),
                SizedMap::BackendSlots => slots.unwrap_or(0),
                SizedMap::Frontends => self.count(map_name::FRONTENDS)? as u32,
                SizedMap::Sockets
                | SizedMap::SocketsMore
                | SizedMap::UdpFlows
                | SizedMap::Affinity
                | SizedMap::Conntrack
                | SizedMap::ConntrackNew => self.used_by_programs(map)? as u32,
            };
            needed = needed.with(map, room(map, used));
        }
        Ok(needed)
    }

    /// Returns the numbers of entries of the maps, with room in SOCKETS_MORE for all socket records, which a move copies there.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn capacities_with_room_for_records(&self) -> Result<Capacities, MapError> {
        let mut needed = Capacities::uniform(0);
        for map in [SizedMap::Sockets, SizedMap::SocketsMore] {
            needed = needed.with(map, room(map, self.used_by_programs(map)? as u32));
        }
        let same = self.capacities();
        let more = same[SizedMap::SocketsMore].max(room_for_records(&needed));
        Ok(same.with(SizedMap::SocketsMore, more))
    }

    /// Copies the maps that only the agent fills to `new`, as far as `is_replaced`. No program may use the new maps yet.
    ///
    /// # Errors
    /// Returns a [`MapError`] if a system call fails or a map has no room.
    pub(crate) fn copy_agent_maps(
        &self,
        new: &mut PinnedMaps,
        is_replaced: impl Fn(&'static str) -> bool,
    ) -> Result<(), MapError> {
        if is_replaced(map_name::SERVICES) {
            let old = self.array::<Service>(map_name::SERVICES)?;
            copy_array(&old, &new.services);
            let change_first = |service: &mut Service, base| service.generation = base;
            add_unused(&old, &new.services, |s| s.generation, change_first, unused_service);
        }
        if is_replaced(map_name::NAMES) {
            self.copy_hash(map_name::NAMES, &mut new.names)?;
        }
        if is_replaced(map_name::BACKENDS) {
            let old = self.array::<Backend>(map_name::BACKENDS)?;
            copy_array(&old, &new.backends);
            let change_first = |backend: &mut Backend, base| *backend = unused_backend(base);
            add_unused(&old, &new.backends, |b| b.generation, change_first, unused_backend);
        }
        if is_replaced(map_name::BACKEND_SLOTS) {
            copy_array(&self.array::<BackendSlot>(map_name::BACKEND_SLOTS)?, &new.slots);
        }
        if is_replaced(map_name::FRONTENDS) {
            self.copy_hash(map_name::FRONTENDS, &mut new.frontends)?;
        }
        // These two may have more entries than this build has room for. The agent writes both again from the node.
        if is_replaced(map_name::NODE_ADDRS) {
            until_full(self.copy_hash(map_name::NODE_ADDRS, &mut new.node_addrs))?;
        }
        if is_replaced(map_name::DEVICES) {
            until_full(self.copy_hash(map_name::DEVICES, &mut new.devices))?;
        }
        if is_replaced(map_name::CONFIG) {
            copy_array(&self.array::<Config>(map_name::CONFIG)?, &new.config);
        }
        if is_replaced(map_name::STATE) {
            copy_array(&self.array::<State>(map_name::STATE)?, &new.state);
        }
        Ok(())
    }

    /// Copies the entries of a hash to a map that no program uses.
    fn copy_hash<const K: usize, const V: usize>(
        &self,
        name: &'static str,
        new: &mut Hash<K, V>,
    ) -> Result<(), MapError> {
        self.for_each(name, |key, value| {
            let (key, value): ([u8; K], [u8; V]) = (from_first(key), from_first(value));
            new.insert(key, value, BPF_NOEXIST)
                .map_err(call(name, "BPF_MAP_UPDATE_ELEM"))
        })
    }

    /// Copies the entries of the maps that programs fill to the new maps, as far as `is_replaced`. `programs` are those that use
    /// both. Entries that were copied before are left alone, so this can be repeated.
    ///
    /// Returns the number of entries for which the new maps had no room.
    ///
    /// # Errors
    /// Returns a [`MapError`] if a system call fails.
    pub(crate) fn move_entries(
        &self,
        programs: &Ebpf,
        is_replaced: impl Fn(&'static str) -> bool,
    ) -> Result<usize, MapError> {
        let mut lost = 0;
        // Maps that belong together are replaced together.
        if is_replaced(map_name::CT) {
            let of = |item| move |key: &[u8], _: &[u8]| MoveRequest::flow(item, from_first(key));
            lost += self.move_hash(programs, map_name::CT, of(MoveItem::Ct))?;
            lost += self.move_hash(programs, map_name::CT_NEW, of(MoveItem::CtNew))?;
        }
        if is_replaced(map_name::AFFINITY) {
            let request = |key: &[u8], _: &[u8]| MoveRequest::affinity(from_first(key));
            lost += self.move_hash(programs, map_name::AFFINITY, request)?;
        }
        if is_replaced(map_name::SOCKETS) {
            lost += self.move_records(programs)?;
        }
        if is_replaced(map_name::UDP_FLOWS) {
            let of = |item| move |key: &[u8], _: &[u8]| MoveRequest::socket(item, from_first(key));
            lost += self.move_hash(programs, map_name::UDP_FLOWS, of(MoveItem::UdpDests))?;
            // Programs that found an old entry before it was copied may have written to it afterwards.
            wait_for_programs()?;
            self.move_hash(programs, map_name::UDP_FLOWS, of(MoveItem::LateUdpDests))?;
        }
        if is_replaced(map_name::STATS) {
            let mut indexes = BTreeSet::new();
            if self.has(&map_spec::NAMES) {
                self.for_each(map_name::NAMES, |index, _| {
                    indexes.insert(from_first::<u32>(index));
                    Ok(())
                })?;
            } else {
                indexes.extend(0..self.capacity(map_name::STATS).unwrap_or(0));
            }
            for service in indexes.into_iter().map(ServiceIndex::new) {
                let old = self.stats(service)?;
                if (old.connections, old.refused) != (0, 0) {
                    move_entry(programs, map_name::STATS, &MoveRequest::counters(service, old))?;
                }
            }
        }
        if is_replaced(map_name::DROPS) {
            let reasons = self.capacity(map_name::DROPS).unwrap_or(0).min(DropReason::CAPACITY);
            for reason in 0..reasons {
                let old = self.drops(reason)?;
                if old != 0 {
                    move_entry(programs, map_name::DROPS, &MoveRequest::drops(reason, old))?;
                }
            }
        }
        Ok(lost)
    }

    /// Copies the socket records to the new SOCKETS_MORE, and returns the number of those that found no room.
    fn move_records(&self, programs: &Ebpf) -> Result<usize, MapError> {
        let mut lost = 0;
        let sockets = self.array::<SocketRecord>(map_name::SOCKETS)?;
        for slot in 0..sockets.len() {
            if let Some(record) = read_socket(&sockets, slot) {
                let request = MoveRequest::socket(MoveItem::Socket, record.cookie);
                lost += usize::from(!move_entry(programs, map_name::SOCKETS, &request)?);
            }
        }
        if lost > 0 {
            warn!(map = map_name::SOCKETS, lost, "entries found no room in the new map");
        }
        let request = |key: &[u8], record: &[u8]| {
            let (key, record): (u64, SocketRecord) = (from_first(key), from_first(record));
            // The key of an MPTCP socket is its address in the kernel.
            let item = if record.socket == key {
                MoveItem::Socket
            } else {
                MoveItem::MptcpSocket
            };
            MoveRequest::socket(item, key)
        };
        Ok(lost + self.move_hash(programs, map_name::SOCKETS_MORE, request)?)
    }

    /// Copies the entries of a hash while programs use it. Returns the number of entries that found no room.
    fn move_hash(
        &self,
        programs: &Ebpf,
        name: &'static str,
        request: impl Fn(&[u8], &[u8]) -> MoveRequest,
    ) -> Result<usize, MapError> {
        let mut lost = 0;
        self.for_each(name, |key, value| {
            lost += usize::from(!move_entry(programs, name, &request(key, value))?);
            Ok(())
        })?;
        if lost > 0 {
            warn!(map = name, lost, "entries found no room in the new map");
        }
        Ok(lost)
    }
}

/// Ignores the error of an insertion into a full map.
fn until_full(copied: Result<(), MapError>) -> Result<(), MapError> {
    match copied {
        Err(MapError::Call { source, .. }) if source.raw_os_error() == Some(libc::E2BIG) => Ok(()),
        other => other,
    }
}

/// Copies the values of an array as far as both have them.
fn copy_array<T: FromBytes + zerocopy::IntoBytes + Immutable + KnownLayout + Copy>(
    old: &MappedArray<T>,
    new: &MappedArray<T>,
) {
    for index in 0..old.len().min(new.len()) {
        if let Some(value) = old.read(index) {
            new.write(index, &value);
        }
    }
}

/// Stores the generation of unused entries in entry 0 of a new array, and in the entries that the old one does not have; see
/// [`base_generation`].
fn add_unused<T: FromBytes + zerocopy::IntoBytes + Immutable + KnownLayout + Copy>(
    old: &MappedArray<T>,
    new: &MappedArray<T>,
    generation: impl Fn(&T) -> u32,
    change_first: impl Fn(&mut T, u32),
    unused: impl Fn(u32) -> T,
) {
    let Some(mut first) = old.read(0) else { return };
    let dropped = (new.len()..old.len()).filter_map(|index| old.read(index));
    let base = base_generation(generation(&first), dropped.map(|entry| generation(&entry)));
    if base == 0 {
        return;
    }
    change_first(&mut first, base);
    new.write(0, &first);
    for index in old.len()..new.len() {
        new.write(index, &unused(base));
    }
}

/// Runs `lb_move`, and returns whether the new map had room.
fn move_entry(programs: &Ebpf, map: &'static str, request: &MoveRequest) -> Result<bool, MapError> {
    agent_call(programs, program_name::MOVE, request.as_bytes()).map_err(|source| MapError::Call {
        map,
        call: "BPF_PROG_TEST_RUN of lb_move",
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn only_a_full_map_is_no_error() {
        let failed = |number| {
            Err(MapError::Call {
                map: map_name::DEVICES,
                call: "BPF_MAP_UPDATE_ELEM",
                source: io::Error::from_raw_os_error(number),
            })
        };
        assert!(until_full(Ok(())).is_ok());
        assert!(until_full(failed(libc::E2BIG)).is_ok());
        assert!(until_full(failed(libc::ENOMEM)).is_err());
    }
}
