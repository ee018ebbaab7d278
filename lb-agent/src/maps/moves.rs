//! Moving the content of maps to maps of another size; see [`lb_common::abi::MovePhase`].
//!
//! Maps that only the agent fills are copied before any program reads the copies. The entries of maps that programs fill are
//! copied one by one by the agent call `lb_move`, while programs use both maps.

use std::mem::offset_of;
use std::path::Path;

use aya::Ebpf;
use aya::maps::MapData;
use lb_common::abi::{
    Backend, BackendSlot, MOVE_MAP, Move, MoveItem, MovePhase, MoveRequest, Service, SizedMap, SocketRecord, map_name,
    program_name,
};
use lb_core::maps::resize::room;
use lb_core::maps::{Capacities, MapError};
use tracing::warn;
use zerocopy::{FromBytes, Immutable, IntoBytes as _, KnownLayout};

use super::batch::{Entries, Position};
use super::bpf::{BPF_NOEXIST, Hash, PinnedMaps, agent_call, call, mapped, read_socket};
use super::sys::{GraceMap, MappedArray};

const RECORD: usize = size_of::<SocketRecord>();

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
        Ok(Some(Self(mapped(MOVE_MAP, &map)?)))
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

impl PinnedMaps {
    /// Returns the smallest number of entries that each map can have.
    ///
    /// A free index keeps the generation of its last owner, so that no stale reference to it becomes current. A smaller array
    /// would lose that, so every index that was ever used counts.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn needed(&self) -> Result<Capacities, MapError> {
        let services: Vec<_> = (0..self.services.len()).filter_map(|i| self.services.read(i)).collect();
        let names = self.names()?.into_keys().map(|index| index.get() + 1).max();
        let used_services = (1..).zip(&services).filter(|(_, service)| service.generation != 0);
        let used_services = used_services.map(|(end, _)| end).chain(names).max();
        let sets = services.iter().flat_map(|s| [s.internal, s.external, s.cluster]);
        let slots = sets.map(|set| set.base.saturating_add(set.len.into())).max();
        let was_used = |id: &u32| self.backends.read(*id).is_some_and(|backend| backend.generation != 0);
        let backends = (0..self.backends.len()).rev().find(was_used).map(|id| id + 1);
        let mut needed = Capacities::uniform(0);
        for &map in SizedMap::ALL {
            let used = match map {
                SizedMap::Services => used_services.unwrap_or(0),
                SizedMap::Backends => backends.unwrap_or(0),
                SizedMap::BackendSlots => slots.unwrap_or(0),
                SizedMap::Frontends => self.frontends()?.len() as u32,
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

    /// Copies the maps that only the agent fills to `new`, as far as `is_replaced`. No program may use the new maps yet.
    ///
    /// # Errors
    /// Returns a [`MapError`] if a system call fails or a map has no room.
    pub(crate) fn copy_agent_maps(
        &self,
        new: &mut Self,
        is_replaced: impl Fn(&'static str) -> bool,
    ) -> Result<(), MapError> {
        if is_replaced(map_name::SERVICES) {
            copy_array::<Service>(&self.services, &new.services);
            copy_hash(map_name::NAMES, &self.names, &mut new.names)?;
        }
        if is_replaced(map_name::BACKENDS) {
            copy_array::<Backend>(&self.backends, &new.backends);
        }
        if is_replaced(map_name::BACKEND_SLOTS) {
            copy_array::<BackendSlot>(&self.slots, &new.slots);
        }
        if is_replaced(map_name::FRONTENDS) {
            copy_hash(map_name::FRONTENDS, &self.frontends, &mut new.frontends)?;
        }
        Ok(())
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
        if is_replaced(map_name::CT) {
            let of = |item| move |key: &_, _: &_| MoveRequest::flow(item, zerocopy::transmute!(*key));
            lost += move_hash(programs, map_name::CT, &self.ct, of(MoveItem::Ct))?;
            lost += move_hash(programs, map_name::CT_NEW, &self.ct_new, of(MoveItem::CtNew))?;
        }
        if is_replaced(map_name::AFFINITY) {
            let request = |key: &_| MoveRequest::affinity(zerocopy::transmute!(*key));
            lost += move_hash(programs, map_name::AFFINITY, &self.affinity, |key, _| request(key))?;
        }
        if is_replaced(map_name::SOCKETS) {
            lost += self.move_records(programs)?;
        }
        if is_replaced(map_name::UDP_FLOWS) {
            let of = |item| move |key: &[u8; 8], _: &_| MoveRequest::socket(item, u64::from_ne_bytes(*key));
            lost += move_hash(programs, map_name::UDP_FLOWS, &self.udp_dests, of(MoveItem::UdpDests))?;
            // Programs that found an old entry before it was copied may have written to it afterwards.
            wait_for_programs()?;
            move_hash(
                programs,
                map_name::UDP_FLOWS,
                &self.udp_dests,
                of(MoveItem::LateUdpDests),
            )?;
        }
        if is_replaced(map_name::STATS) {
            for service in self.names()?.into_keys() {
                let old = self.stats(service)?;
                if (old.connections, old.refused) != (0, 0) {
                    move_entry(programs, map_name::STATS, &MoveRequest::counters(service, old))?;
                }
            }
        }
        Ok(lost)
    }

    /// Copies the socket records to the new SOCKETS_MORE, and returns the number of those that found no room.
    fn move_records(&self, programs: &Ebpf) -> Result<usize, MapError> {
        let mut lost = 0;
        for slot in 0..self.sockets.len() {
            if let Some(record) = read_socket(&self.sockets, slot) {
                let request = MoveRequest::socket(MoveItem::Socket, record.cookie);
                lost += usize::from(!move_entry(programs, map_name::SOCKETS, &request)?);
            }
        }
        if lost > 0 {
            warn!(map = map_name::SOCKETS, lost, "entries found no room in the new map");
        }
        let request = |key: &[u8; 8], record: &[u8; RECORD]| {
            let key = u64::from_ne_bytes(*key);
            let record: SocketRecord = zerocopy::transmute!(*record);
            // The key of an MPTCP socket is its address in the kernel.
            let item = if record.socket == key {
                MoveItem::Socket
            } else {
                MoveItem::MptcpSocket
            };
            MoveRequest::socket(item, key)
        };
        Ok(lost + move_hash(programs, map_name::SOCKETS_MORE, &self.sockets_more, request)?)
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

/// Copies the entries of a hash to a map that no program uses.
fn copy_hash<const K: usize, const V: usize>(
    name: &'static str,
    old: &Hash<K, V>,
    new: &mut Hash<K, V>,
) -> Result<(), MapError> {
    let mut entries = Entries::new();
    let mut position = Position::Begin;
    while position != Position::End {
        position = entries.read(name, old, position)?;
        for (key, value) in entries.iter() {
            new.insert(key, value, BPF_NOEXIST)
                .map_err(call(name, "BPF_MAP_UPDATE_ELEM"))?;
        }
    }
    Ok(())
}

/// Copies the entries of a hash while programs use it. Returns the number of entries that found no room.
fn move_hash<const K: usize, const V: usize>(
    programs: &Ebpf,
    name: &'static str,
    old: &Hash<K, V>,
    request: impl Fn(&[u8; K], &[u8; V]) -> MoveRequest,
) -> Result<usize, MapError> {
    let mut entries = Entries::new();
    let mut position = Position::Begin;
    let mut lost = 0;
    while position != Position::End {
        position = entries.read(name, old, position)?;
        for (key, value) in entries.iter() {
            lost += usize::from(!move_entry(programs, name, &request(key, value))?);
        }
    }
    if lost > 0 {
        warn!(map = name, lost, "entries found no room in the new map");
    }
    Ok(lost)
}

/// Runs `lb_move`, and returns whether the new map had room.
fn move_entry(programs: &Ebpf, map: &'static str, request: &MoveRequest) -> Result<bool, MapError> {
    agent_call(programs, program_name::MOVE, request.as_bytes()).map_err(|source| MapError::Call {
        map,
        call: "BPF_PROG_TEST_RUN of lb_move",
        source,
    })
}
