//! The maps in the kernel: reading them ([`PinnedMaps`]), and writing them by the update protocol ([`BpfMaps`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, IterableMap as _, MapData, MapError as AyaMapError, MapInfo, PerCpuArray, PerCpuValues};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use lb_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendSlot, Config, CtEntry, CtKey, Device, DropReason, Event, EventKind,
    FilterBit, Frontend, FrontendKey, FrontendSwap, MapSpec, Name, ProblemRecord, Service, ServiceIndex, ServiceStats,
    Set, SetWord, SizedMap, SocketRecord, SourceRange, State, UdpDests, map_name, map_spec, program_name,
    service_flags,
};
use lb_common::logic::{generation, record};
use lb_core::maps::prefix::Prefix;
use lb_core::maps::{Capacities, Dump, Epoch, MapError, Maps};
use lb_core::reconcile::Usage;
use lb_core::sync::Writes;
use tokio::sync::watch;
use zerocopy::{FromBytes, FromZeros as _, IntoBytes};

use super::batch::{self, read_hash};
use super::grace::GraceThread;
use super::sys::{MappedArray, word_of};

pub(super) type Hash<const K: usize, const V: usize> = HashMap<MapData, [u8; K], [u8; V]>;
type Trie<const K: usize> = LpmTrie<MapData, [u8; K], u32>;

const KEY: usize = size_of::<FrontendKey>();
const FRONTEND: usize = size_of::<Frontend>();
const NAME: usize = size_of::<Name>();
const RECORD: usize = size_of::<SocketRecord>();
const DESTS: usize = size_of::<UdpDests>();
const CLIENT: usize = size_of::<AffinityKey>();
const AFFINITY: usize = size_of::<Affinity>();
const PROBLEM: usize = size_of::<ProblemRecord>();
const STATS: usize = size_of::<ServiceStats>();
pub(super) const DEVICE: usize = size_of::<Device>();
const RANGE: usize = size_of::<SourceRange>();
const ADDR: usize = size_of::<Addr>();
const CT_KEY: usize = size_of::<CtKey>();
const CT_ENTRY: usize = size_of::<CtEntry>();

/// The pinned maps of an agent, opened by path. Every subcommand reads them, and [`BpfMaps`] writes them.
pub struct PinnedMaps {
    pub(super) frontends: Hash<KEY, FRONTEND>,
    pub(super) services: MappedArray<Service>,
    pub(super) slots: MappedArray<BackendSlot>,
    pub(super) backends: MappedArray<Backend>,
    pub(super) node_addrs: Hash<16, 4>,
    filter: MappedArray<u64>,
    pub(super) sockets: MappedArray<SocketRecord>,
    pub(super) sockets_more: Hash<8, RECORD>,
    pub(super) udp_dests: Hash<8, DESTS>,
    pub(super) affinity: Hash<CLIENT, AFFINITY>,
    pub(super) names: Hash<4, NAME>,
    stats: PerCpuArray<MapData, [u8; STATS]>,
    drops: PerCpuArray<MapData, u64>,
    pub(super) config: MappedArray<Config>,
    pub(super) state: MappedArray<State>,
    problems: Hash<4, PROBLEM>,
    pub(super) devices: Hash<4, DEVICE>,
    source_ranges: Trie<RANGE>,
    cluster_cidrs: Trie<ADDR>,
    pub(super) ct: Hash<CT_KEY, CT_ENTRY>,
    pub(super) ct_new: Hash<CT_KEY, CT_ENTRY>,
    capacities: Capacities,
}

pub(super) fn call<'a>(map: &'static str, call: &'static str) -> impl FnOnce(AyaMapError) -> MapError + 'a {
    move |error| MapError::Call {
        map,
        call,
        source: match error {
            AyaMapError::SyscallError(e) => e.io_error,
            other => io::Error::other(other.to_string()),
        },
    }
}

/// Returns the error number of a system call, if the error is of one.
pub(super) fn errno(error: &AyaMapError) -> Option<i32> {
    match error {
        AyaMapError::SyscallError(e) => e.io_error.raw_os_error(),
        _ => None,
    }
}

pub(super) fn is_missing(error: &AyaMapError) -> bool {
    matches!(error, AyaMapError::KeyNotFound) || errno(error) == Some(libc::ENOENT)
}

/// Looks a key up, and returns its value if the key exists.
pub(super) fn lookup<const K: usize, const V: usize>(
    name: &'static str,
    map: &Hash<K, V>,
    key: &[u8; K],
) -> Result<Option<[u8; V]>, MapError> {
    match map.get(key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(call(name, "BPF_MAP_LOOKUP_ELEM")(error)),
    }
}

/// Maps an array of this build's layout into memory.
///
/// # Errors
/// Returns [`MapError::Unexpected`] if the values have another size.
pub(super) fn mapped<T>(name: &'static str, map: &MapData) -> Result<MappedArray<T>, MapError>
where
    T: FromBytes + IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout + Copy,
{
    let info = map.info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
    if info.value_size() as usize != size_of::<T>() {
        return Err(MapError::Unexpected {
            map: name,
            what: "values do not have the size of this build".into(),
        });
    }
    mapped_any(name, map)
}

/// Maps an array of any layout into memory.
pub(super) fn mapped_any<T>(name: &'static str, map: &MapData) -> Result<MappedArray<T>, MapError>
where
    T: FromBytes + IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout + Copy,
{
    let info = map.info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
    MappedArray::new(map.fd().as_fd(), info.max_entries(), info.value_size()).map_err(|source| MapError::Call {
        map: name,
        call: "mmap",
        source,
    })
}

/// Flag of `BPF_MAP_UPDATE_ELEM` (`linux/bpf.h`): insert only.
pub(super) const BPF_NOEXIST: u64 = 1;

impl PinnedMaps {
    /// Opens the maps that are pinned in a directory.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a map is missing, or if the sizes of its keys and values are not those of this build.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        Self::open_each(|name| dir.join(name))
    }

    /// Opens the maps that are pinned at the paths that a function returns for their names.
    ///
    /// # Errors
    /// Returns the errors of [`Self::open`].
    pub(crate) fn open_each(path: impl Fn(&'static str) -> PathBuf) -> Result<Self, MapError> {
        let open = |name: &'static str| MapData::from_pin(path(name)).map_err(call(name, "BPF_OBJ_GET"));
        let entries = |name: &'static str| {
            let info = open(name)?.info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
            Ok::<_, MapError>(info.max_entries())
        };
        macro_rules! hash {
            ($kind:ident, $name:ident) => {
                HashMap::try_from(aya::maps::Map::$kind(open(map_name::$name)?))
                    .map_err(call(map_name::$name, "open"))?
            };
        }
        macro_rules! per_cpu {
            ($name:ident) => {
                PerCpuArray::try_from(aya::maps::Map::PerCpuArray(open(map_name::$name)?))
                    .map_err(call(map_name::$name, "open"))?
            };
        }
        macro_rules! trie {
            ($name:ident) => {
                LpmTrie::try_from(aya::maps::Map::LpmTrie(open(map_name::$name)?))
                    .map_err(call(map_name::$name, "open"))?
            };
        }
        macro_rules! mapped {
            ($name:ident) => {
                mapped(map_name::$name, &open(map_name::$name)?)?
            };
        }
        let mut capacities = Capacities::DEFAULT;
        for map in SizedMap::ALL {
            capacities = capacities.with(*map, entries(map.name())?);
        }
        Ok(Self {
            frontends: hash!(HashMap, FRONTENDS),
            services: mapped!(SERVICES),
            slots: mapped!(BACKEND_SLOTS),
            backends: mapped!(BACKENDS),
            node_addrs: hash!(HashMap, NODE_ADDRS),
            filter: mapped!(FILTER),
            sockets: mapped!(SOCKETS),
            sockets_more: hash!(HashMap, SOCKETS_MORE),
            udp_dests: hash!(HashMap, UDP_FLOWS),
            affinity: hash!(LruHashMap, AFFINITY),
            names: hash!(HashMap, NAMES),
            stats: per_cpu!(STATS),
            drops: per_cpu!(DROPS),
            config: mapped!(CONFIG),
            state: mapped!(STATE),
            problems: hash!(HashMap, NOTICES),
            devices: hash!(HashMap, DEVICES),
            source_ranges: trie!(SOURCE_RANGES),
            cluster_cidrs: trie!(CLUSTER_CIDRS),
            ct: hash!(HashMap, CT),
            ct_new: hash!(LruHashMap, CT_NEW),
            capacities,
        })
    }

    /// Returns the numbers of entries of the maps.
    #[must_use]
    pub fn capacities(&self) -> Capacities {
        self.capacities
    }

    /// Reads all maps of the update protocol.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn dump(&self) -> Result<Dump, MapError> {
        let all = |len: u32| 0..len;
        Ok(Dump {
            frontends: self.frontends()?,
            services: all(self.services.len()).filter_map(|i| self.services.read(i)).collect(),
            slots: all(self.slots.len()).filter_map(|i| self.slots.read(i)).collect(),
            backends: all(self.backends.len()).filter_map(|i| self.backends.read(i)).collect(),
            names: self.names()?,
            source_ranges: self.source_ranges()?,
            cluster_cidrs: self.cluster_cidrs()?,
            node_addrs: self.node_addrs()?,
            filter: self.filter(),
        })
    }

    /// Reads NAMES, by service index.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn names(&self) -> Result<BTreeMap<ServiceIndex, Name>, MapError> {
        read_hash(map_name::NAMES, &self.names)
    }

    /// Reads the name of a service index; `None` if the index is not in use.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn name(&self, service: ServiceIndex) -> Result<Option<Name>, MapError> {
        let name = lookup(map_name::NAMES, &self.names, &service.get().to_ne_bytes())?;
        Ok(name.and_then(|name| Name::read_from_bytes(&name).ok()))
    }

    /// Returns whether NAMES is still the map that is pinned in a directory: a move replaces it by another one.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the pin cannot be opened.
    pub(crate) fn has_names_of(&self, dir: &Path) -> Result<bool, MapError> {
        let name = map_name::NAMES;
        let pinned = MapInfo::from_pin(dir.join(name)).map_err(call(name, "BPF_OBJ_GET"))?;
        let own = self.names.map().info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
        Ok(own.id() == pinned.id())
    }

    /// Reads FRONTENDS.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn frontends(&self) -> Result<BTreeMap<FrontendKey, Frontend>, MapError> {
        read_hash(map_name::FRONTENDS, &self.frontends)
    }

    /// Reads SOURCE_RANGES.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn source_ranges(&self) -> Result<BTreeMap<Prefix<SourceRange>, u32>, MapError> {
        read_trie(map_name::SOURCE_RANGES, &self.source_ranges)
    }

    /// Reads CLUSTER_CIDRS.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn cluster_cidrs(&self) -> Result<BTreeMap<Prefix<Addr>, u32>, MapError> {
        read_trie(map_name::CLUSTER_CIDRS, &self.cluster_cidrs)
    }

    /// Reads the complete records of connected sockets in SOCKETS and SOCKETS_MORE.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn sockets(&self) -> Result<Vec<SocketRecord>, MapError> {
        let mut records: Vec<_> = (0..self.sockets.len()).filter_map(|slot| self.socket(slot)).collect();
        records.extend(
            read_hash::<u64, SocketRecord, 8, RECORD>(map_name::SOCKETS_MORE, &self.sockets_more)?.into_values(),
        );
        Ok(records)
    }

    /// Reads NODE_ADDRS.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn node_addrs(&self) -> Result<BTreeSet<Addr>, MapError> {
        Ok(read_hash::<Addr, u32, 16, 4>(map_name::NODE_ADDRS, &self.node_addrs)?
            .into_keys()
            .collect())
    }

    /// Reads the bits that are set in FILTER.
    fn filter(&self) -> BTreeSet<FilterBit> {
        let words = (0..self.filter.len()).filter_map(|index| Some((index, self.filter.read(index)?)));
        words.flat_map(|(index, word)| FilterBit::all_in(index, word)).collect()
    }

    /// Sets the bits of all addresses of FRONTENDS and NODE_ADDRS in FILTER, before programs that read it are attached: a build
    /// that does not have FILTER may have filled the other maps.
    ///
    /// # Errors
    /// Returns a [`MapError`] if a map cannot be read or written.
    pub(crate) fn fill_filter(&self) -> Result<(), MapError> {
        let addrs = self
            .frontends()?
            .into_keys()
            .map(|key| key.addr)
            .chain(self.node_addrs()?);
        addrs
            .map(FilterBit::from)
            .try_for_each(|bit| self.change_filter(bit, |word| word | bit.mask()))
    }

    /// Changes the entry of FILTER that has a bit, by one store.
    fn change_filter(&self, bit: FilterBit, change: impl FnOnce(u64) -> u64) -> Result<(), MapError> {
        let index = bit.word();
        let word = self.filter.read(index).map(change);
        if word.is_some_and(|word| self.filter.write(index, &word)) {
            return Ok(());
        }
        Err(MapError::OutOfRange {
            map: map_name::FILTER,
            index,
            capacity: self.filter.len(),
        })
    }

    /// Makes NODE_ADDRS equal to `wanted`, and returns the number of addresses that did not fit.
    fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        let name = map_name::NODE_ADDRS;
        let there = self.node_addrs()?.into_iter().map(|addr| (addr, ())).collect();
        let wanted = wanted.iter().map(|addr| (*addr, ())).collect();
        let writes = Writes::between(there, &wanted);
        // Deletions come first, so that a full map has room.
        delete_all(name, &mut self.node_addrs, writes.deletes.iter().map(|addr| addr.bytes))?;
        let new = writes.inserts.iter().map(|(addr, ())| (addr.bytes, [0; 4]));
        insert_all(name, &mut self.node_addrs, new, 0)
    }

    /// Returns UDP_FLOWS: the destinations of unconnected sockets by cookie.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn udp_dests(&self) -> Result<BTreeMap<u64, UdpDests>, MapError> {
        read_hash(map_name::UDP_FLOWS, &self.udp_dests)
    }

    /// Reads AFFINITY.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn affinity(&self) -> Result<BTreeMap<AffinityKey, Affinity>, MapError> {
        read_hash(map_name::AFFINITY, &self.affinity)
    }

    /// Returns the number of entries in use of a map. `filled` has those of the maps that the agent fills.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn used(&self, map: SizedMap, filled: &Usage) -> Result<usize, MapError> {
        match map {
            SizedMap::Services => Ok(filled.services as usize),
            SizedMap::Frontends => Ok(filled.frontends as usize),
            SizedMap::Backends => Ok(filled.backends as usize),
            SizedMap::BackendSlots => Ok(filled.backend_slots as usize),
            SizedMap::Sockets
            | SizedMap::SocketsMore
            | SizedMap::UdpFlows
            | SizedMap::Affinity
            | SizedMap::Conntrack
            | SizedMap::ConntrackNew => self.used_by_programs(map),
        }
    }

    /// Returns the number of entries in use of a map that programs fill; zero for the others.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn used_by_programs(&self, map: SizedMap) -> Result<usize, MapError> {
        match map {
            SizedMap::Services | SizedMap::Frontends | SizedMap::Backends | SizedMap::BackendSlots => Ok(0),
            SizedMap::Sockets => Ok(sockets_used(&self.sockets)),
            SizedMap::SocketsMore => batch::count(map.name(), self.sockets_more.map()),
            SizedMap::UdpFlows => batch::count(map.name(), self.udp_dests.map()),
            SizedMap::Affinity => batch::count(map.name(), self.affinity.map()),
            SizedMap::Conntrack => batch::count(map.name(), self.ct.map()),
            SizedMap::ConntrackNew => batch::count(map.name(), self.ct_new.map()),
        }
    }

    /// Reads an entry of SERVICES; `None` if the index is beyond the end.
    #[must_use]
    pub fn service(&self, index: ServiceIndex) -> Option<Service> {
        self.services.read(index.get())
    }

    /// Reads the record in a slot of SOCKETS, if there is a complete one.
    fn socket(&self, slot: u32) -> Option<SocketRecord> {
        read_socket(&self.sockets, slot)
    }

    /// Returns the counters of a service index, summed over all CPUs.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn stats(&self, service: ServiceIndex) -> Result<ServiceStats, MapError> {
        let values = self
            .stats
            .get(&service.get(), 0)
            .map_err(call(map_name::STATS, "BPF_MAP_LOOKUP_ELEM"))?;
        let mut sum = ServiceStats::default();
        for value in values.iter() {
            let value: ServiceStats = zerocopy::transmute!(*value);
            sum += value;
        }
        Ok(sum)
    }

    /// Returns the counter of a drop reason, summed over all CPUs.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn drops(&self, reason: DropReason) -> Result<u64, MapError> {
        let values = self
            .drops
            .get(&(reason as u32), 0)
            .map_err(call(map_name::DROPS, "BPF_MAP_LOOKUP_ELEM"))?;
        Ok(values.iter().sum())
    }

    /// Reads the state that the agent last wrote; `None` if no agent ever ran.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        self.state.read(0).filter(|state| state.pid != 0)
    }

    /// Writes the state of the agent, for the command line.
    pub fn write_state(&self, state: &State) {
        self.state.write(0, state);
    }

    /// Reads the settings of the programs.
    #[must_use]
    pub fn config(&self) -> Config {
        self.config.read(0).unwrap_or_default()
    }

    /// Sets the kinds of trace events that the programs write, as bits: see [`EventKind::bit`]. The caller must hold the
    /// `TraceLock`.
    pub fn write_events(&self, events: u32) {
        // The agent writes the other half of the word.
        self.config.update_u32(0, offset_of!(Config, events), |_| Some(events));
    }

    /// Returns the problems in NOTICES.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn problems(&self) -> Result<Vec<ProblemRecord>, MapError> {
        let all = read_hash::<u32, ProblemRecord, 4, PROBLEM>(map_name::NOTICES, &self.problems)?;
        Ok(all.into_values().collect())
    }

    /// Replaces the problems in NOTICES, and returns the number of those that did not fit.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn write_problems(&mut self, problems: &[ProblemRecord]) -> Result<usize, MapError> {
        let name = map_name::NOTICES;
        let there = read_hash::<u32, ProblemRecord, 4, PROBLEM>(name, &self.problems)?;
        let wanted = (0_u32..).zip(problems.iter().copied()).collect();
        let writes = Writes::between(there, &wanted);
        // Deletions come first, so that a full map has room.
        delete_all(
            name,
            &mut self.problems,
            writes.deletes.iter().map(|number| number.to_ne_bytes()),
        )?;
        let updates = writes.stores.into_iter().chain(writes.inserts);
        let updates = updates.map(|(number, problem)| {
            let value: [u8; PROBLEM] = zerocopy::transmute!(problem);
            (number.to_ne_bytes(), value)
        });
        insert_all(name, &mut self.problems, updates, 0)
    }
}

/// Deletes entries of a hash; those that are not there count as deleted.
pub(super) fn delete_all<const K: usize, const V: usize>(
    name: &'static str,
    map: &mut Hash<K, V>,
    keys: impl IntoIterator<Item = [u8; K]>,
) -> Result<(), MapError> {
    for key in keys {
        map.remove(&key)
            .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) })
            .map_err(call(name, "BPF_MAP_DELETE_ELEM"))?;
    }
    Ok(())
}

/// Stores entries in a hash, and returns the number of those that did not fit.
pub(super) fn insert_all<const K: usize, const V: usize>(
    name: &'static str,
    map: &mut Hash<K, V>,
    entries: impl IntoIterator<Item = ([u8; K], [u8; V])>,
    flags: u64,
) -> Result<usize, MapError> {
    let mut missing = 0;
    for (key, value) in entries {
        match map.insert(key, value, flags) {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::E2BIG) => missing += 1,
            Err(error) => return Err(call(name, "BPF_MAP_UPDATE_ELEM")(error)),
        }
    }
    Ok(missing)
}

/// Returns the number of slots of SOCKETS in use.
pub(super) fn sockets_used(sockets: &MappedArray<SocketRecord>) -> usize {
    let is_taken = |slot: &u32| sockets.read_word(*slot, 0).is_some_and(|cookie| cookie != 0);
    (0..sockets.len()).filter(is_taken).count()
}

/// Reads the record in a slot of SOCKETS, if there is a complete one.
pub(super) fn read_socket(sockets: &MappedArray<SocketRecord>, slot: u32) -> Option<SocketRecord> {
    if sockets.read_word(slot, 0)? == 0 {
        return None;
    }
    // A writer changes the sequence before and after it writes. Three tries are enough: sockets are short-lived, not slots.
    (0..3).find_map(|_| {
        let first = sockets.read(slot)?;
        let again = sockets.read(slot)?;
        let whole = record::is_complete(first.sequence) && first == again;
        (whole && first.cookie != 0 && first.cookie != record::LEAVING).then_some(first)
    })
}

/// Reads all entries of a trie. Only the agent changes tries.
fn read_trie<T: FromBytes + Ord, const N: usize>(
    name: &'static str,
    map: &Trie<N>,
) -> Result<BTreeMap<Prefix<T>, u32>, MapError> {
    let entries = map.iter().map(|entry| {
        let (key, value) = entry.map_err(call(name, "BPF_MAP_GET_NEXT_KEY"))?;
        let data = T::read_from_bytes(&key.data()).map_err(|_| MapError::Unexpected {
            map: name,
            what: "keys are not of this build's size".into(),
        })?;
        let len = key.prefix_len();
        Ok((Prefix { data, len }, value))
    });
    entries.collect()
}

/// Adds or replaces an entry of a trie, and returns the number of bytes written.
fn write_trie<const N: usize>(
    spec: &MapSpec,
    map: &mut Trie<N>,
    key: &Key<[u8; N]>,
    value: u32,
) -> Result<u64, MapError> {
    match map.insert(key, value, 0) {
        Ok(()) => Ok((size_of_val(key) + 4) as u64),
        // A full hash returns E2BIG instead.
        Err(error) if errno(&error) == Some(libc::ENOSPC) => Err(MapError::full(spec, spec.default_capacity())),
        Err(error) => Err(call(spec.name, "BPF_MAP_UPDATE_ELEM")(error)),
    }
}

/// Removes an entry of a trie, if it exists, and returns the number of bytes written.
fn delete_from_trie<const N: usize>(
    name: &'static str,
    map: &mut Trie<N>,
    key: &Key<[u8; N]>,
) -> Result<u64, MapError> {
    match map.remove(key) {
        Ok(()) => Ok(size_of_val(key) as u64),
        Err(error) if is_missing(&error) => Ok(0),
        Err(error) => Err(call(name, "BPF_MAP_DELETE_ELEM")(error)),
    }
}

fn range_key(range: Prefix<SourceRange>) -> Key<[u8; RANGE]> {
    Key::new(range.len, zerocopy::transmute!(range.data))
}

fn cidr_key(cidr: Prefix<Addr>) -> Key<[u8; ADDR]> {
    Key::new(cidr.len, cidr.data.bytes)
}

/// The maps for writing, by the one agent that holds the lock of the pin path.
pub struct BpfMaps {
    pub(super) pinned: PinnedMaps,
    programs: Ebpf,
    grace: GraceThread,
    written: u64,
}

impl BpfMaps {
    /// Combines the pinned maps and the loaded programs, of which the agent calls are needed.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the grace thread cannot be started.
    pub fn new(pinned: PinnedMaps, programs: Ebpf) -> Result<Self, MapError> {
        let grace = GraceThread::start().map_err(|source| MapError::Call {
            map: "(grace)",
            call: "BPF_MAP_CREATE of an array of maps",
            source,
        })?;
        Ok(Self {
            pinned,
            programs,
            grace,
            written: 0,
        })
    }

    /// Continues with maps of other sizes and with the programs that use them.
    pub(crate) fn replace(&mut self, pinned: PinnedMaps, programs: Ebpf) {
        self.pinned = pinned;
        self.programs = programs;
    }

    /// Returns the maps for reading.
    #[must_use]
    pub fn pinned(&self) -> &PinnedMaps {
        &self.pinned
    }

    /// Returns the maps for writes that are not part of the update protocol.
    pub fn pinned_mut(&mut self) -> &mut PinnedMaps {
        &mut self.pinned
    }

    /// Returns the programs, to load those that are loaded on demand.
    #[must_use]
    pub fn programs_mut(&mut self) -> &mut Ebpf {
        &mut self.programs
    }

    /// Returns the loaded programs.
    #[must_use]
    pub fn programs(&self) -> &Ebpf {
        &self.programs
    }

    /// Returns a receiver of the newest epoch that a grace period has passed.
    #[must_use]
    pub fn grace_watch(&self) -> watch::Receiver<Epoch> {
        self.grace.watch()
    }

    /// Runs an agent call with a "packet", and returns whether it could do what the packet requests.
    pub(super) fn run(&self, name: &str, packet: &[u8]) -> io::Result<bool> {
        agent_call(&self.programs, name, packet)
    }

    /// Writes a trace event of the agent, if CONFIG requests its kind. An event that does not fit is counted in DROPS, like
    /// those of the programs.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub fn report_event(&self, event: &Event) -> Result<(), MapError> {
        let asked = EventKind::from_u8(event.kind).is_some_and(|kind| self.pinned.config().events & kind.bit() != 0);
        if !asked {
            return Ok(());
        }
        // If there was no room, the program has counted the event.
        let result = self.run(program_name::EVENT, event.as_bytes()).map(drop);
        result.map_err(|source| MapError::Call {
            map: map_name::EVENTS,
            call: "BPF_PROG_TEST_RUN of lb_event",
            source,
        })
    }

    /// Sets the counters of a service index to zero on every CPU.
    fn reset_stats(&mut self, index: ServiceIndex) -> Result<(), MapError> {
        let failed = |source| MapError::Call {
            map: map_name::STATS,
            call: "number of CPUs",
            source,
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| failed(source))?;
        let zero = PerCpuValues::try_from(vec![[0_u8; STATS]; cpus]).map_err(failed)?;
        let written = self.pinned.stats.set(index.get(), zero, 0);
        written.map_err(call(map_name::STATS, "BPF_MAP_UPDATE_ELEM"))
    }

    /// Removes all clients of a service whose affinity is switched off, so that affinity starts empty if it is switched on
    /// again.
    fn forget_clients(&mut self, index: ServiceIndex) -> Result<(), MapError> {
        let map = map_name::AFFINITY;
        for key in self.pinned.affinity()?.into_keys().filter(|key| key.service == index) {
            let key: [u8; CLIENT] = zerocopy::transmute!(key);
            self.pinned
                .affinity
                .remove(&key)
                .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) })
                .map_err(call(map, "BPF_MAP_DELETE_ELEM"))?;
        }
        Ok(())
    }

    /// Changes the word of a backend at a byte offset, by one 8-byte store.
    fn change_backend(&mut self, id: u32, offset: usize, change: impl FnOnce(&mut Backend)) -> Result<(), MapError> {
        let backends = &self.pinned.backends;
        let value = backends.read(id).map(|mut value| {
            change(&mut value);
            value
        });
        let ok = value.is_some_and(|value| backends.write_words(id, &value, [word_of(offset)]));
        self.stored(ok, 8, map_name::BACKENDS, id, self.pinned.backends.len())
    }

    /// Adds to the bytes written, or returns the error of an index out of range.
    fn stored(&mut self, ok: bool, bytes: usize, map: &'static str, index: u32, capacity: u32) -> Result<(), MapError> {
        if !ok {
            return Err(MapError::OutOfRange { map, index, capacity });
        }
        self.written += bytes as u64;
        Ok(())
    }
}

/// Runs an agent call with a "packet", and returns whether it could do what the packet requests.
pub(super) fn agent_call(programs: &Ebpf, name: &str, packet: &[u8]) -> io::Result<bool> {
    const XDP_ABORTED: u32 = 0;
    const XDP_PASS: u32 = 2;
    let program = programs.program(name);
    let program: &Xdp = program
        .and_then(|program| program.try_into().ok())
        .ok_or(io::ErrorKind::NotFound)?;
    let options = TestRunOptions {
        data_in: Some(packet),
        ..TestRunOptions::new()
    };
    match program.test_run(options).map_err(io::Error::other)?.return_value {
        XDP_PASS => Ok(true),
        XDP_ABORTED => Err(io::Error::other("the program rejects the request")),
        _ => Ok(false),
    }
}

fn has_affinity(service: &Service) -> bool {
    service.flags & service_flags::AFFINITY != 0
}

/// The words of [`Service`] that are not set words.
const SERVICE_SETTINGS: std::ops::Range<usize> = word_of(offset_of!(Service, flags))..size_of::<Service>() / 8;

impl Maps for BpfMaps {
    fn capacities(&self) -> Capacities {
        self.pinned.capacities
    }

    fn insert_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        let map = map_name::FRONTENDS;
        let (key_bytes, value_bytes): ([u8; KEY], [u8; FRONTEND]) =
            (zerocopy::transmute!(key), zerocopy::transmute!(value));
        self.pinned
            .frontends
            .insert(key_bytes, value_bytes, BPF_NOEXIST)
            .map_err(|error| match errno(&error) {
                Some(libc::E2BIG) => MapError::full(&map_spec::FRONTENDS, self.pinned.capacities[SizedMap::Frontends]),
                Some(libc::EEXIST) => MapError::Unexpected {
                    map,
                    what: format!("{key:?} exists already"),
                },
                _ => call(map, "BPF_MAP_UPDATE_ELEM")(error),
            })?;
        self.written += (KEY + FRONTEND) as u64;
        Ok(())
    }

    fn store_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        let map = map_name::FRONTENDS;
        let request = FrontendSwap {
            key,
            pad: 0,
            value: value.to_words(),
        };
        let call = "BPF_PROG_TEST_RUN of lb_frontend_swap";
        let done = self
            .run(program_name::FRONTEND_SWAP, request.as_bytes())
            .map_err(|source| MapError::Call { map, call, source })?;
        if !done {
            return Err(MapError::Unexpected {
                map,
                what: format!("{key:?} does not exist, so it cannot be changed in place"),
            });
        }
        self.written += FRONTEND as u64;
        Ok(())
    }

    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), MapError> {
        match self.pinned.frontends.remove(&zerocopy::transmute!(key)) {
            Ok(()) => self.written += KEY as u64,
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(call(map_name::FRONTENDS, "BPF_MAP_DELETE_ELEM")(error)),
        }
        Ok(())
    }

    fn write_service(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError> {
        let ok = self.pinned.services.write(index.get(), &value);
        self.stored(
            ok,
            size_of::<Service>(),
            map_name::SERVICES,
            index.get(),
            self.pinned.services.len(),
        )
    }

    fn write_service_settings(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError> {
        let services = &self.pinned.services;
        let had_affinity = services.read(index.get()).is_some_and(|old| has_affinity(&old));
        let ok = services.write_words(index.get(), &value, SERVICE_SETTINGS);
        self.stored(
            ok,
            SERVICE_SETTINGS.len() * 8,
            map_name::SERVICES,
            index.get(),
            self.pinned.services.len(),
        )?;
        if had_affinity && !has_affinity(&value) {
            self.forget_clients(index)?;
        }
        Ok(())
    }

    fn publish_set(&mut self, index: ServiceIndex, set: Set, word: SetWord) -> Result<(), MapError> {
        let mut value = Service::new_zeroed();
        let offset = match set {
            Set::Internal => {
                value.internal = word;
                offset_of!(Service, internal)
            }
            Set::External => {
                value.external = word;
                offset_of!(Service, external)
            }
            Set::Cluster => {
                value.cluster = word;
                offset_of!(Service, cluster)
            }
        };
        let ok = self.pinned.services.write_words(index.get(), &value, [word_of(offset)]);
        self.stored(ok, 8, map_name::SERVICES, index.get(), self.pinned.services.len())
    }

    fn write_slots(&mut self, base: u32, slots: &[BackendSlot]) -> Result<(), MapError> {
        for (index, slot) in (base..).zip(slots) {
            let ok = self.pinned.slots.write(index, slot);
            self.stored(
                ok,
                size_of::<BackendSlot>(),
                map_name::BACKEND_SLOTS,
                index,
                self.pinned.slots.len(),
            )?;
        }
        Ok(())
    }

    fn fill_backend(&mut self, id: u32, value: Backend) -> Result<(), MapError> {
        // The last word has generation and seal, and is stored last.
        let ok = self.pinned.backends.write(id, &value);
        self.stored(
            ok,
            size_of::<Backend>(),
            map_name::BACKENDS,
            id,
            self.pinned.backends.len(),
        )
    }

    fn write_backend_flags(&mut self, id: u32, flags: u16) -> Result<(), MapError> {
        self.change_backend(id, offset_of!(Backend, flags), |value| value.flags = flags)
    }

    fn withdraw_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError> {
        self.change_backend(id, offset_of!(Backend, generation), |value| {
            value.generation = generation;
            value.seal = generation::seal(value.addr, value.port, value.service, generation);
        })
    }

    fn write_name(&mut self, index: ServiceIndex, value: &Name) -> Result<(), MapError> {
        let map = map_name::NAMES;
        let bytes: [u8; NAME] = zerocopy::transmute!(*value);
        self.pinned
            .names
            .insert(index.get().to_ne_bytes(), bytes, 0)
            .map_err(|error| match errno(&error) {
                Some(libc::E2BIG) => MapError::full(&map_spec::NAMES, self.pinned.capacities[SizedMap::Services]),
                _ => call(map, "BPF_MAP_UPDATE_ELEM")(error),
            })?;
        self.written += (4 + NAME) as u64;
        Ok(())
    }

    fn delete_name(&mut self, index: ServiceIndex) -> Result<(), MapError> {
        // Another process may have added a name with an index out of range.
        if index.get() < self.pinned.capacities[SizedMap::Services] {
            self.reset_stats(index)?;
        }
        match self.pinned.names.remove(&index.get().to_ne_bytes()) {
            Ok(()) => self.written += 4,
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(call(map_name::NAMES, "BPF_MAP_DELETE_ELEM")(error)),
        }
        Ok(())
    }

    fn write_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        let map = &map_spec::SOURCE_RANGES;
        self.written += write_trie(map, &mut self.pinned.source_ranges, &range_key(range), 0)?;
        Ok(())
    }

    fn delete_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        let map = map_name::SOURCE_RANGES;
        self.written += delete_from_trie(map, &mut self.pinned.source_ranges, &range_key(range))?;
        Ok(())
    }

    fn write_cluster_cidr(&mut self, cidr: Prefix<Addr>, flags: u32) -> Result<(), MapError> {
        let map = &map_spec::CLUSTER_CIDRS;
        self.written += write_trie(map, &mut self.pinned.cluster_cidrs, &cidr_key(cidr), flags)?;
        Ok(())
    }

    fn delete_cluster_cidr(&mut self, cidr: Prefix<Addr>) -> Result<(), MapError> {
        let map = map_name::CLUSTER_CIDRS;
        self.written += delete_from_trie(map, &mut self.pinned.cluster_cidrs, &cidr_key(cidr))?;
        Ok(())
    }

    fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        self.pinned.write_node_addrs(wanted)
    }

    fn set_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        self.pinned.change_filter(bit, |word| word | bit.mask())?;
        self.written += 8;
        Ok(())
    }

    fn clear_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        self.pinned.change_filter(bit, |word| word & !bit.mask())?;
        self.written += 8;
        Ok(())
    }

    fn grace_begin(&mut self) -> Epoch {
        self.grace.begin()
    }

    fn grace_passed(&self) -> Epoch {
        self.grace.passed()
    }

    fn grace_wait(&mut self, epoch: Epoch) -> Result<(), MapError> {
        self.grace.wait(epoch)
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn dump(&self) -> Result<Dump, MapError> {
        self.pinned.dump()
    }
}
