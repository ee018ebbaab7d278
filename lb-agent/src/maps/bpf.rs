//! The real maps.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError as AyaMapError, PerCpuArray, PerCpuValues};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use lb_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendSlot, Config, Device, DropReason, Event, EventKind, Frontend,
    FrontendKey, FrontendSwap, Name, Notice, Service, ServiceStats, SetWord, SocketRecord, SourceRange, State,
    UdpFlows, capacity, map_name, program_name, service_flags,
};
use lb_common::logic::connect::Set;
use lb_common::logic::{generation, record};
use tokio::sync::watch;
use zerocopy::{FromBytes, FromZeros as _, IntoBytes};

use super::grace::GraceThread;
use super::sys::{MappedArray, word_of};
use lb_core::maps::prefix::Prefix;
use lb_core::maps::{Capacities, Dump, Epoch, MapError, Maps, capacity_flag};

pub(super) type Hash<const K: usize, const V: usize> = HashMap<MapData, [u8; K], [u8; V]>;
type Trie<const K: usize> = LpmTrie<MapData, [u8; K], u32>;

const KEY: usize = size_of::<FrontendKey>();
const NAME: usize = size_of::<Name>();
const RECORD: usize = size_of::<SocketRecord>();
const FLOWS: usize = size_of::<UdpFlows>();
const CLIENT: usize = size_of::<AffinityKey>();
const AFFINITY: usize = size_of::<Affinity>();
const NOTICE: usize = size_of::<Notice>();
const STATS: usize = size_of::<ServiceStats>();
pub(super) const DEVICE: usize = size_of::<Device>();
const RANGE: usize = size_of::<SourceRange>();
const ADDR: usize = size_of::<Addr>();

/// The pinned maps of an agent, opened by path: what every subcommand reads, and what [`BpfMaps`] writes.
pub struct PinnedMaps {
    frontends: Hash<KEY, 8>,
    services: MappedArray<Service>,
    slots: MappedArray<BackendSlot>,
    backends: MappedArray<Backend>,
    node_addrs: Hash<16, 4>,
    sockets: MappedArray<SocketRecord>,
    sockets_more: Hash<8, RECORD>,
    udp_flows: Hash<8, FLOWS>,
    affinity: Hash<CLIENT, AFFINITY>,
    names: Hash<4, NAME>,
    stats: PerCpuArray<MapData, [u8; STATS]>,
    drops: PerCpuArray<MapData, u64>,
    pub(super) config: MappedArray<Config>,
    state: MappedArray<State>,
    notices: Hash<4, NOTICE>,
    pub(super) devices: Hash<4, DEVICE>,
    source_ranges: Trie<RANGE>,
    cluster_cidrs: Trie<ADDR>,
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

/// The system call's error number, where there is one.
pub(super) fn errno(error: &AyaMapError) -> Option<i32> {
    match error {
        AyaMapError::SyscallError(e) => e.io_error.raw_os_error(),
        _ => None,
    }
}

pub(super) fn is_missing(error: &AyaMapError) -> bool {
    matches!(error, AyaMapError::KeyNotFound) || errno(error) == Some(libc::ENOENT)
}

/// The value of a key, if there is one.
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

/// The memory of an array.
pub(super) fn mapped<T>(name: &'static str, map: &MapData) -> Result<MappedArray<T>, MapError>
where
    T: FromBytes + IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout + Copy,
{
    let info = map.info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
    MappedArray::new(map.fd().as_fd(), info.max_entries()).map_err(|source| MapError::Call {
        map: name,
        call: "mmap",
        source,
    })
}

/// `enum` of flags of `BPF_MAP_UPDATE_ELEM` in `linux/bpf.h`: insert only.
pub(super) const BPF_NOEXIST: u64 = 1;

fn full(map: &'static str, capacity: u32) -> MapError {
    MapError::Full {
        map,
        flag: capacity_flag(map),
        capacity,
    }
}

impl PinnedMaps {
    /// Opens the maps that are pinned in a folder.
    ///
    /// # Errors
    /// Where one is missing, or is not as this build lays it out.
    pub fn open(dir: &Path) -> Result<Self, MapError> {
        let open = |name: &'static str| MapData::from_pin(dir.join(name)).map_err(call(name, "BPF_OBJ_GET"));
        let entries = |name: &'static str, map: &MapData| {
            map.info()
                .map(|info| info.max_entries())
                .map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))
        };
        macro_rules! hash {
            ($kind:ident, $name:ident) => {{
                let map = open(map_name::$name)?;
                let size = entries(map_name::$name, &map)?;
                let map = HashMap::try_from(aya::maps::Map::$kind(map)).map_err(call(map_name::$name, "open"))?;
                (map, size)
            }};
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
        let (frontends, frontends_size) = hash!(HashMap, FRONTENDS);
        let (sockets_more, sockets_more_size) = hash!(HashMap, SOCKETS_MORE);
        let (node_addrs, _) = hash!(HashMap, NODE_ADDRS);
        let (udp_flows, udp_flows_size) = hash!(HashMap, UDP_FLOWS);
        let (affinity, affinity_size) = hash!(LruHashMap, AFFINITY);
        let (names, _) = hash!(HashMap, NAMES);
        let (devices, _) = hash!(HashMap, DEVICES);
        let (notices, _) = hash!(HashMap, NOTICES);
        let services: MappedArray<Service> = mapped!(SERVICES);
        let slots: MappedArray<BackendSlot> = mapped!(BACKEND_SLOTS);
        let backends: MappedArray<Backend> = mapped!(BACKENDS);
        let sockets: MappedArray<SocketRecord> = mapped!(SOCKETS);
        let capacities = Capacities {
            services: services.len(),
            frontends: frontends_size,
            backends: backends.len(),
            backend_slots: slots.len(),
            sockets: sockets.len(),
            sockets_more: sockets_more_size,
            udp_flows: udp_flows_size,
            affinity: affinity_size,
            conntrack: entries(map_name::CT, &open(map_name::CT)?)?,
            conntrack_new: entries(map_name::CT_NEW, &open(map_name::CT_NEW)?)?,
        };
        Ok(Self {
            frontends,
            services,
            slots,
            backends,
            node_addrs,
            sockets,
            sockets_more,
            udp_flows,
            affinity,
            names,
            stats: per_cpu!(STATS),
            drops: per_cpu!(DROPS),
            config: mapped!(CONFIG),
            state: mapped!(STATE),
            notices,
            devices,
            source_ranges: trie!(SOURCE_RANGES),
            cluster_cidrs: trie!(CLUSTER_CIDRS),
            capacities,
        })
    }

    /// Sizes of the maps.
    #[must_use]
    pub fn capacities(&self) -> Capacities {
        self.capacities
    }

    /// Everything that the maps of the update protocol hold.
    ///
    /// # Errors
    /// The system call's.
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
        })
    }

    /// NAMES.
    ///
    /// # Errors
    /// The system call's.
    pub fn names(&self) -> Result<BTreeMap<u32, Name>, MapError> {
        read_hash(map_name::NAMES, &self.names)
    }

    /// Whose a service index is; `None` where it is nobody's.
    ///
    /// # Errors
    /// The system call's.
    pub fn name(&self, service: u32) -> Result<Option<Name>, MapError> {
        let name = lookup(map_name::NAMES, &self.names, &service.to_ne_bytes())?;
        Ok(name.and_then(|name| Name::read_from_bytes(&name).ok()))
    }

    /// FRONTENDS.
    ///
    /// # Errors
    /// The system call's.
    pub fn frontends(&self) -> Result<BTreeMap<FrontendKey, Frontend>, MapError> {
        read_hash(map_name::FRONTENDS, &self.frontends)
    }

    /// SOURCE_RANGES.
    ///
    /// # Errors
    /// The system call's.
    pub fn source_ranges(&self) -> Result<BTreeMap<Prefix<SourceRange>, u32>, MapError> {
        read_trie(map_name::SOURCE_RANGES, &self.source_ranges)
    }

    /// CLUSTER_CIDRS.
    ///
    /// # Errors
    /// The system call's.
    pub fn cluster_cidrs(&self) -> Result<BTreeMap<Prefix<Addr>, u32>, MapError> {
        read_trie(map_name::CLUSTER_CIDRS, &self.cluster_cidrs)
    }

    /// Records of connected sockets, in SOCKETS and SOCKETS_MORE.
    ///
    /// # Errors
    /// The system call's.
    pub fn sockets(&self) -> Result<Vec<SocketRecord>, MapError> {
        let mut records: Vec<_> = (0..self.sockets.len()).filter_map(|slot| self.socket(slot)).collect();
        records.extend(
            read_hash::<u64, SocketRecord, 8, RECORD>(map_name::SOCKETS_MORE, &self.sockets_more)?.into_values(),
        );
        Ok(records)
    }

    /// NODE_ADDRS.
    ///
    /// # Errors
    /// The system call's.
    pub fn node_addrs(&self) -> Result<BTreeSet<Addr>, MapError> {
        Ok(read_hash::<Addr, u32, 16, 4>(map_name::NODE_ADDRS, &self.node_addrs)?
            .into_keys()
            .collect())
    }

    /// Makes NODE_ADDRS hold these; how many did not fit.
    ///
    /// # Errors
    /// The system call's.
    pub fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        let name = map_name::NODE_ADDRS;
        let there = self.node_addrs()?;
        for gone in there.difference(wanted) {
            self.node_addrs
                .remove(&gone.bytes)
                .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) })
                .map_err(call(name, "BPF_MAP_DELETE_ELEM"))?;
        }
        let mut missing = 0;
        for new in wanted.difference(&there) {
            match self.node_addrs.insert(new.bytes, [0; 4], 0) {
                Ok(()) => {}
                Err(error) if errno(&error) == Some(libc::E2BIG) => missing += 1,
                Err(error) => return Err(call(name, "BPF_MAP_UPDATE_ELEM")(error)),
            }
        }
        Ok(missing)
    }

    /// UDP_FLOWS: unconnected sockets by cookie.
    ///
    /// # Errors
    /// The system call's.
    pub fn udp_flows(&self) -> Result<BTreeMap<u64, UdpFlows>, MapError> {
        read_hash(map_name::UDP_FLOWS, &self.udp_flows)
    }

    /// AFFINITY.
    ///
    /// # Errors
    /// The system call's.
    pub fn affinity(&self) -> Result<BTreeMap<AffinityKey, Affinity>, MapError> {
        read_hash(map_name::AFFINITY, &self.affinity)
    }

    /// Slots of SOCKETS that are in use.
    #[must_use]
    pub fn sockets_used(&self) -> usize {
        let taken = |slot: &u32| self.sockets.read(*slot).is_some_and(|record| record.cookie != 0);
        (0..self.sockets.len()).filter(taken).count()
    }

    /// Entries of SOCKETS_MORE.
    ///
    /// # Errors
    /// The system call's.
    pub fn sockets_more_used(&self) -> Result<usize, MapError> {
        count(map_name::SOCKETS_MORE, &self.sockets_more)
    }

    /// Entries of UDP_FLOWS.
    ///
    /// # Errors
    /// The system call's.
    pub fn udp_flows_used(&self) -> Result<usize, MapError> {
        count(map_name::UDP_FLOWS, &self.udp_flows)
    }

    /// Entries of AFFINITY.
    ///
    /// # Errors
    /// The system call's.
    pub fn affinity_used(&self) -> Result<usize, MapError> {
        count(map_name::AFFINITY, &self.affinity)
    }

    /// An entry of SERVICES; `None` beyond the end.
    #[must_use]
    pub fn service(&self, index: u32) -> Option<Service> {
        self.services.read(index)
    }

    /// The record in a slot of SOCKETS, if there is a complete one.
    fn socket(&self, slot: u32) -> Option<SocketRecord> {
        read_socket(&self.sockets, slot)
    }

    /// Counters of a service, over all CPUs.
    ///
    /// # Errors
    /// The system call's.
    pub fn stats(&self, service: u32) -> Result<ServiceStats, MapError> {
        let values = self
            .stats
            .get(&service, 0)
            .map_err(call(map_name::STATS, "BPF_MAP_LOOKUP_ELEM"))?;
        let mut sum = ServiceStats::default();
        for value in values.iter() {
            let ServiceStats { connections, refused } = zerocopy::transmute!(*value);
            sum.connections += connections;
            sum.refused += refused;
        }
        Ok(sum)
    }

    /// Counts of a reason, over all CPUs.
    ///
    /// # Errors
    /// The system call's.
    pub fn drops(&self, reason: DropReason) -> Result<u64, MapError> {
        let values = self
            .drops
            .get(&(reason as u32), 0)
            .map_err(call(map_name::DROPS, "BPF_MAP_LOOKUP_ELEM"))?;
        Ok(values.iter().sum())
    }

    /// What the agent last told of itself; `None` where none ever ran.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        self.state.read(0).filter(|state| state.pid != 0)
    }

    /// Tells the command line about the agent.
    pub fn write_state(&self, state: &State) {
        self.state.write(0, state);
    }

    /// What the programs are told.
    #[must_use]
    pub fn config(&self) -> Config {
        self.config.read(0).unwrap_or_default()
    }

    /// Tells the programs which events to write: bits of kinds, see [`EventKind::bit`]. To be called by who has the
    /// [`crate::loader::TraceLock`].
    pub fn write_events(&self, events: u32) {
        // The other half of the word is the agent's.
        self.config.update_u32(0, offset_of!(Config, events), |_| Some(events));
    }

    /// What the agent could not use.
    ///
    /// # Errors
    /// The system call's.
    pub fn notices(&self) -> Result<Vec<Notice>, MapError> {
        Ok(read_hash::<u32, Notice, 4, NOTICE>(map_name::NOTICES, &self.notices)?
            .into_values()
            .collect())
    }

    /// Replaces what is in NOTICES; how many did not fit.
    ///
    /// # Errors
    /// The system call's.
    pub fn write_notices(&mut self, notices: &[Notice]) -> Result<usize, MapError> {
        let name = map_name::NOTICES;
        let mut fitted = 0;
        for (i, notice) in (0_u32..).zip(notices) {
            let value: [u8; NOTICE] = zerocopy::transmute!(*notice);
            match self.notices.insert(i.to_ne_bytes(), value, 0) {
                Ok(()) => fitted += 1,
                Err(error) if errno(&error) == Some(libc::E2BIG) => break,
                Err(error) => return Err(call(name, "BPF_MAP_UPDATE_ELEM")(error)),
            }
        }
        let stale: Vec<_> = self.notices.keys().filter_map(Result::ok).collect();
        for key in stale
            .into_iter()
            .filter(|key| u32::from_ne_bytes(*key) as usize >= fitted)
        {
            self.notices
                .remove(&key)
                .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) })
                .map_err(call(name, "BPF_MAP_DELETE_ELEM"))?;
        }
        Ok(notices.len() - fitted)
    }
}

/// The record in a slot of SOCKETS, if there is a complete one.
pub(super) fn read_socket(sockets: &MappedArray<SocketRecord>, slot: u32) -> Option<SocketRecord> {
    if sockets.read_word(slot, 0)? == 0 {
        return None;
    }
    // A writer changes the sequence before and after it; three tries, since sockets are short-lived, not slots.
    (0..3).find_map(|_| {
        let first = sockets.read(slot)?;
        let again = sockets.read(slot)?;
        let whole = record::is_complete(first.sequence) && first == again;
        (whole && first.cookie != 0 && first.cookie != record::LEAVING).then_some(first)
    })
}

/// How many entries a hash has.
fn count<const K: usize, const V: usize>(name: &'static str, map: &Hash<K, V>) -> Result<usize, MapError> {
    map.keys().try_fold(0, |n, key| {
        key.map(|_| n + 1).map_err(call(name, "BPF_MAP_GET_NEXT_KEY"))
    })
}

/// All entries of a hash; none twice, and none missed that was there all the time (nobody but the reconciler inserts
/// or deletes).
pub(super) fn read_hash<K: FromBytes + Ord, V: FromBytes, const KS: usize, const VS: usize>(
    name: &'static str,
    map: &Hash<KS, VS>,
) -> Result<BTreeMap<K, V>, MapError> {
    let mut all = BTreeMap::new();
    for entry in map {
        let (key, value) = entry.map_err(call(name, "BPF_MAP_GET_NEXT_KEY"))?;
        let (Ok(key), Ok(value)) = (K::read_from_bytes(&key), V::read_from_bytes(&value)) else {
            return Err(MapError::Unexpected {
                map: name,
                what: "keys or values are not of this build's size".into(),
            });
        };
        all.insert(key, value);
    }
    Ok(all)
}

/// All entries of a trie.
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

/// Adds an entry to a trie, or replaces it; returns how many bytes that was.
fn write_trie<const N: usize>(
    (name, capacity): (&'static str, u32),
    map: &mut Trie<N>,
    key: &Key<[u8; N]>,
    value: u32,
) -> Result<u64, MapError> {
    match map.insert(key, value, 0) {
        Ok(()) => Ok((size_of_val(key) + 4) as u64),
        // Where hashes have E2BIG.
        Err(error) if errno(&error) == Some(libc::ENOSPC) => Err(MapError::Bound { map: name, capacity }),
        Err(error) => Err(call(name, "BPF_MAP_UPDATE_ELEM")(error)),
    }
}

/// Removes an entry of a trie, if it is there; returns how many bytes that was.
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

/// The maps, to be written by the one agent that holds the lock of the pin path.
pub struct BpfMaps {
    pinned: PinnedMaps,
    programs: Ebpf,
    grace: GraceThread,
    written: u64,
}

impl BpfMaps {
    /// From the pinned maps and the loaded programs, of which `lb_frontend_swap` is needed.
    ///
    /// # Errors
    /// Where the grace thread cannot be started.
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

    /// For reading, and for what is not part of the update protocol.
    #[must_use]
    pub fn pinned(&self) -> &PinnedMaps {
        &self.pinned
    }

    /// The same, to be written.
    pub fn pinned_mut(&mut self) -> &mut PinnedMaps {
        &mut self.pinned
    }

    /// The programs, for those that are loaded when they are needed.
    #[must_use]
    pub fn programs_mut(&mut self) -> &mut Ebpf {
        &mut self.programs
    }

    /// The loaded programs.
    #[must_use]
    pub fn programs(&self) -> &Ebpf {
        &self.programs
    }

    /// To be told when grace periods pass.
    #[must_use]
    pub fn grace_watch(&self) -> watch::Receiver<Epoch> {
        self.grace.watch()
    }

    /// Runs a program that is never attached, with a "packet"; whether it could do what that asks for.
    fn run(&self, name: &str, packet: &[u8]) -> io::Result<bool> {
        const XDP_PASS: u32 = 2;
        let program = self.programs.program(name);
        let program: &Xdp = program
            .and_then(|program| program.try_into().ok())
            .ok_or(io::ErrorKind::NotFound)?;
        let options = TestRunOptions {
            data_in: Some(packet),
            ..TestRunOptions::new()
        };
        let result = program.test_run(options).map_err(io::Error::other)?;
        Ok(result.return_value == XDP_PASS)
    }

    /// Writes an event beside those of the programs, where somebody asks for its kind; one that finds no room is
    /// counted, as theirs are.
    ///
    /// # Errors
    /// The system call's.
    pub fn tell(&self, event: &Event) -> Result<(), MapError> {
        let asked = EventKind::from_u8(event.kind).is_some_and(|kind| self.pinned.config().events & kind.bit() != 0);
        if !asked {
            return Ok(());
        }
        // Where there was no room, the program has counted it.
        let told = self.run(program_name::EVENT, event.as_bytes()).map(drop);
        told.map_err(|source| MapError::Call {
            map: map_name::EVENTS,
            call: "BPF_PROG_TEST_RUN of lb_event",
            source,
        })
    }

    /// Sets the counters of a service to zero, on every CPU.
    fn reset_stats(&mut self, index: u32) -> Result<(), MapError> {
        let failed = |source| MapError::Call {
            map: map_name::STATS,
            call: "number of CPUs",
            source,
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| failed(source))?;
        let zero = PerCpuValues::try_from(vec![[0_u8; STATS]; cpus]).map_err(failed)?;
        let written = self.pinned.stats.set(index, zero, 0);
        written.map_err(call(map_name::STATS, "BPF_MAP_UPDATE_ELEM"))
    }

    /// Forgets all clients of a service whose affinity is switched off: switched on again, it begins anew.
    fn forget_clients(&mut self, index: u32) -> Result<(), MapError> {
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

    /// Changes the word of a backend that `offset` is in, by one 8-byte store.
    fn change_backend(&mut self, id: u32, offset: usize, change: impl FnOnce(&mut Backend)) -> Result<(), MapError> {
        let backends = &self.pinned.backends;
        let value = backends.read(id).map(|mut value| {
            change(&mut value);
            value
        });
        let ok = value.is_some_and(|value| backends.write_words(id, &value, [word_of(offset)]));
        self.stored(ok, 8, map_name::BACKENDS, id, self.pinned.backends.len())
    }

    /// Counts what a store of words wrote, or names what was out of range.
    fn stored(&mut self, ok: bool, bytes: usize, map: &'static str, index: u32, capacity: u32) -> Result<(), MapError> {
        if !ok {
            return Err(MapError::OutOfRange { map, index, capacity });
        }
        self.written += bytes as u64;
        Ok(())
    }
}

fn has_affinity(service: &Service) -> bool {
    service.flags & service_flags::AFFINITY != 0
}

/// The words of `Service` that are not set words.
const SERVICE_SETTINGS: std::ops::Range<usize> = word_of(offset_of!(Service, flags))..size_of::<Service>() / 8;

impl Maps for BpfMaps {
    fn capacities(&self) -> Capacities {
        self.pinned.capacities
    }

    fn insert_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        let map = map_name::FRONTENDS;
        let (key_bytes, value_bytes): ([u8; KEY], [u8; 8]) = (zerocopy::transmute!(key), zerocopy::transmute!(value));
        self.pinned
            .frontends
            .insert(key_bytes, value_bytes, BPF_NOEXIST)
            .map_err(|error| match errno(&error) {
                Some(libc::E2BIG) => full(map, self.pinned.capacities.frontends),
                Some(libc::EEXIST) => MapError::Unexpected {
                    map,
                    what: format!("{key:?} is there already"),
                },
                _ => call(map, "BPF_MAP_UPDATE_ELEM")(error),
            })?;
        self.written += (KEY + 8) as u64;
        Ok(())
    }

    fn store_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        let map = map_name::FRONTENDS;
        let request = FrontendSwap {
            key,
            pad: 0,
            value: value.to_word(),
        };
        let call = "BPF_PROG_TEST_RUN of lb_frontend_swap";
        let done = self
            .run(program_name::FRONTEND_SWAP, request.as_bytes())
            .map_err(|source| MapError::Call { map, call, source })?;
        if !done {
            return Err(MapError::Unexpected {
                map,
                what: format!("{key:?} is not there, so it cannot be changed in place"),
            });
        }
        self.written += 8;
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

    fn write_service(&mut self, index: u32, value: Service) -> Result<(), MapError> {
        let ok = self.pinned.services.write(index, &value);
        self.stored(
            ok,
            size_of::<Service>(),
            map_name::SERVICES,
            index,
            self.pinned.services.len(),
        )
    }

    fn write_service_settings(&mut self, index: u32, value: Service) -> Result<(), MapError> {
        let had_affinity = self.pinned.services.read(index).is_some_and(|old| has_affinity(&old));
        let ok = self.pinned.services.write_words(index, &value, SERVICE_SETTINGS);
        self.stored(
            ok,
            SERVICE_SETTINGS.len() * 8,
            map_name::SERVICES,
            index,
            self.pinned.services.len(),
        )?;
        if had_affinity && !has_affinity(&value) {
            self.forget_clients(index)?;
        }
        Ok(())
    }

    fn publish_set(&mut self, index: u32, set: Set, word: SetWord) -> Result<(), MapError> {
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
        let ok = self.pinned.services.write_words(index, &value, [word_of(offset)]);
        self.stored(ok, 8, map_name::SERVICES, index, self.pinned.services.len())
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
        // The last word has generation and seal.
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

    fn write_name(&mut self, index: u32, value: &Name) -> Result<(), MapError> {
        let map = map_name::NAMES;
        let bytes: [u8; NAME] = zerocopy::transmute!(*value);
        self.pinned
            .names
            .insert(index.to_ne_bytes(), bytes, 0)
            .map_err(|error| match errno(&error) {
                Some(libc::E2BIG) => full(map, self.pinned.capacities.services),
                _ => call(map, "BPF_MAP_UPDATE_ELEM")(error),
            })?;
        self.written += (4 + NAME) as u64;
        Ok(())
    }

    fn delete_name(&mut self, index: u32) -> Result<(), MapError> {
        // Somebody else may have named an index that there is not.
        if index < self.pinned.capacities.services {
            self.reset_stats(index)?;
        }
        match self.pinned.names.remove(&index.to_ne_bytes()) {
            Ok(()) => self.written += 4,
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(call(map_name::NAMES, "BPF_MAP_DELETE_ELEM")(error)),
        }
        Ok(())
    }

    fn write_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        let map = (map_name::SOURCE_RANGES, capacity::SOURCE_RANGES);
        self.written += write_trie(map, &mut self.pinned.source_ranges, &range_key(range), 0)?;
        Ok(())
    }

    fn delete_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        let map = map_name::SOURCE_RANGES;
        self.written += delete_from_trie(map, &mut self.pinned.source_ranges, &range_key(range))?;
        Ok(())
    }

    fn write_cluster_cidr(&mut self, cidr: Prefix<Addr>, flags: u32) -> Result<(), MapError> {
        let map = (map_name::CLUSTER_CIDRS, capacity::CLUSTER_CIDRS);
        self.written += write_trie(map, &mut self.pinned.cluster_cidrs, &cidr_key(cidr), flags)?;
        Ok(())
    }

    fn delete_cluster_cidr(&mut self, cidr: Prefix<Addr>) -> Result<(), MapError> {
        let map = map_name::CLUSTER_CIDRS;
        self.written += delete_from_trie(map, &mut self.pinned.cluster_cidrs, &cidr_key(cidr))?;
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
