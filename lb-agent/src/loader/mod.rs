//! The kernel side of the agent: loads the programs, pins and adopts maps and links. The only place where aya loads.
//!
//! Everything is pinned below `PIN_PATH/vN`, N being [`VERSION`] of the layout: maps in `maps/`, links in `links/`. So
//! the data plane works on while no agent runs, and a start takes over what is there.

mod attach;
mod pins;
mod tc;
mod undo;

use std::io;
use std::path::PathBuf;

use aya::maps::{MapInfo, MapType};
use aya::programs::Program;
use aya::{Ebpf, EbpfError, EbpfLoader};
use lb_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendSlot, Config, CtEntry, CtKey, Device, DropReason, Frontend,
    FrontendKey, NODE_NETNS_GLOBAL, NODE_ONLY_GLOBAL, Name, Notice, SOCKETS_MASK_GLOBAL, Service, ServiceStats,
    SocketRecord, SourceRange, State, UdpFlows, VERSION, capacity, map_name,
};
use tracing::{info, warn};

use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::sys;
use crate::node::devices::Layer;
use lb_core::maps::{Capacities, MapError, capacity_flag};

pub use attach::{Attached, Cgroup, Hook, attach, attached};
pub(crate) use attach::{is_root as is_root_cgroup, root as cgroup_root};
pub use pins::{Lock, PinPath, TraceLock};
pub use tc::{AtDevice, TcHooks, Trouble, Way, at_devices, load_programs};

/// The kernel programs, as the build script made them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf"));

/// Why the kernel side cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The pin path cannot be used.
    #[error("{path}: {what}")]
    PinPath {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A call on a path failed.
    #[error("{path}: {call}: {source}")]
    Call {
        /// The path.
        path: PathBuf,
        /// What was tried.
        call: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Another agent uses the pin path.
    #[error("{0}: another agent is running on this pin path")]
    Locked(PathBuf),
    /// The pinned maps are of another layout.
    #[error(
        "{path}: {what}; this build cannot take it over: run the build that made it, or `lb-agent cleanup` (which stops \
         serving) first"
    )]
    Layout {
        /// What is pinned.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
    /// The object cannot be loaded.
    #[error("the eBPF object cannot be loaded: {0}")]
    Object(#[from] EbpfError),
    /// A program cannot be loaded: the verifier's words are part of it.
    #[error("program {name}: {source}")]
    Program {
        /// Its name.
        name: String,
        /// Why.
        source: aya::programs::ProgramError,
    },
    /// A map cannot be used.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// What a map must be like.
struct Layout {
    name: &'static str,
    map_type: MapType,
    key: usize,
    value: usize,
    flags: u32,
    /// Number of entries, where it is not a flag.
    fixed: Option<u32>,
}

const MMAPABLE: u32 = 1 << 10;
const NO_PREALLOC: u32 = 1;

/// All maps, as `lb-ebpf/src/maps.rs` declares them; a test compares the two.
fn layouts() -> Vec<Layout> {
    let map = |name, map_type, key, value, flags, fixed| Layout {
        name,
        map_type,
        key,
        value,
        flags,
        fixed,
    };
    let mapped = |name, value, fixed| map(name, MapType::Array, 4, value, MMAPABLE, fixed);
    let hash = |name, key, value, flags, fixed| map(name, MapType::Hash, key, value, flags, fixed);
    // A key begins with the length of its prefix.
    let trie = |name, data, fixed| map(name, MapType::LpmTrie, 4 + data, 4, NO_PREALLOC, fixed);
    vec![
        hash(
            map_name::FRONTENDS,
            size_of::<FrontendKey>(),
            size_of::<Frontend>(),
            0,
            None,
        ),
        mapped(map_name::SERVICES, size_of::<Service>(), None),
        mapped(map_name::BACKEND_SLOTS, size_of::<BackendSlot>(), None),
        mapped(map_name::BACKENDS, size_of::<Backend>(), None),
        hash(
            map_name::NODE_ADDRS,
            size_of::<Addr>(),
            4,
            0,
            Some(capacity::NODE_ADDRS),
        ),
        mapped(map_name::SOCKETS, size_of::<SocketRecord>(), None),
        hash(map_name::SOCKETS_MORE, 8, size_of::<SocketRecord>(), NO_PREALLOC, None),
        hash(map_name::UDP_FLOWS, 8, size_of::<UdpFlows>(), NO_PREALLOC, None),
        map(
            map_name::AFFINITY,
            MapType::LruHash,
            size_of::<AffinityKey>(),
            size_of::<Affinity>(),
            0,
            None,
        ),
        hash(map_name::NAMES, 4, size_of::<Name>(), NO_PREALLOC, None),
        map(
            map_name::STATS,
            MapType::PerCpuArray,
            4,
            size_of::<ServiceStats>(),
            0,
            None,
        ),
        map(map_name::DROPS, MapType::PerCpuArray, 4, 8, 0, Some(DropReason::COUNT)),
        map(
            map_name::EVENTS,
            MapType::RingBuf,
            0,
            0,
            0,
            Some(capacity::EVENTS_BYTES),
        ),
        mapped(map_name::CONFIG, size_of::<Config>(), Some(1)),
        mapped(map_name::STATE, size_of::<State>(), Some(1)),
        hash(
            map_name::NOTICES,
            4,
            size_of::<Notice>(),
            NO_PREALLOC,
            Some(capacity::NOTICES),
        ),
        hash(map_name::CT, size_of::<CtKey>(), size_of::<CtEntry>(), 0, None),
        map(
            map_name::CT_NEW,
            MapType::LruHash,
            size_of::<CtKey>(),
            size_of::<CtEntry>(),
            0,
            None,
        ),
        hash(
            map_name::DEVICES,
            4,
            size_of::<Device>(),
            NO_PREALLOC,
            Some(capacity::DEVICES),
        ),
        trie(
            map_name::SOURCE_RANGES,
            size_of::<SourceRange>(),
            Some(capacity::SOURCE_RANGES),
        ),
        trie(
            map_name::CLUSTER_CIDRS,
            size_of::<Addr>(),
            Some(capacity::CLUSTER_CIDRS),
        ),
    ]
}

/// Number of entries that the flags ask for.
fn asked(capacities: &Capacities, map: &str) -> u32 {
    match map {
        map_name::FRONTENDS => capacities.frontends,
        map_name::BACKENDS => capacities.backends,
        map_name::BACKEND_SLOTS => capacities.backend_slots,
        map_name::SOCKETS => capacities.sockets,
        map_name::SOCKETS_MORE => capacities.sockets_more,
        map_name::UDP_FLOWS => capacities.udp_flows,
        map_name::AFFINITY => capacities.affinity,
        map_name::CT => capacities.conntrack,
        map_name::CT_NEW => capacities.conntrack_new,
        _ => capacities.services,
    }
}

/// Whose sockets are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SocketLb {
    /// Those of all processes below the cgroup.
    #[default]
    All,
    /// Those of the node's network namespace; pods' connections are left to the packet path.
    Node,
}

/// Lines that the programs log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EbpfLog {
    /// None: the verifier removes the code of every line.
    #[default]
    Off,
    /// Calls and packets that are refused or dropped.
    Warn,
    /// Every decision about a Service.
    Debug,
}

impl EbpfLog {
    /// Returns the value of `AYA_LOG_LEVEL`: the highest level of a line that is logged.
    const fn level(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Warn => aya_log::Level::Warn as u8,
            Self::Debug => aya_log::Level::Debug as u8,
        }
    }
}

/// Loads the programs, with the maps that are pinned or new ones of the sizes that are asked for. Pinned maps keep
/// their size. The calling thread's network namespace is the node's. Nothing is attached.
///
/// # Errors
/// See [`LoadError`].
pub fn load(
    object: &[u8],
    lock: &Lock,
    capacities: &Capacities,
    sockets_served: SocketLb,
) -> Result<BpfMaps, LoadError> {
    load_logging(object, lock, capacities, sockets_served, EbpfLog::Off)
}

/// Loads the programs as [`load`] does. `log`: the lines that they log.
///
/// # Errors
/// Returns the errors of [`load`].
pub fn load_logging(
    object: &[u8],
    lock: &Lock,
    capacities: &Capacities,
    sockets_served: SocketLb,
    log: EbpfLog,
) -> Result<BpfMaps, LoadError> {
    let pins = lock.pins();
    pins.refuse_other_versions()?;
    let maps_dir = pins.create_dirs()?;
    let mut loader = EbpfLoader::new();
    let mut sockets = capacities.sockets.next_power_of_two();
    for layout in layouts() {
        let path = maps_dir.join(layout.name);
        let wanted = match layout.name {
            map_name::SOCKETS => sockets,
            name => layout.fixed.unwrap_or_else(|| asked(capacities, name)),
        };
        let size = match pinned_size(&layout, &path)? {
            None => wanted,
            Some(size) if size == wanted => size,
            Some(_) if layout.fixed.is_some() => {
                let what = format!("is pinned with another number of entries than {wanted}");
                return Err(LoadError::Layout { path, what });
            }
            Some(size) => {
                warn!(
                    "{} is pinned with {size} entries; --{} {wanted} takes effect after `lb-agent cleanup`",
                    layout.name,
                    capacity_flag(layout.name)
                );
                size
            }
        };
        if layout.name == map_name::SOCKETS {
            sockets = size;
        }
        loader
            .map_max_entries(layout.name, size)
            .map_pin_path(layout.name, path);
    }
    let mask = sockets - 1;
    let netns = sys::netns_cookie().map_err(|source| LoadError::Call {
        path: "(network namespace)".into(),
        call: "SO_NETNS_COOKIE",
        source,
    })?;
    let node_only = u32::from(sockets_served == SocketLb::Node);
    let mut programs = loader
        .override_global(SOCKETS_MASK_GLOBAL, &mask, true)
        .override_global(NODE_NETNS_GLOBAL, &netns, true)
        .override_global(NODE_ONLY_GLOBAL, &node_only, true)
        .override_global(aya_log::LEVEL, &log.level(), true)
        .load(object)?;
    load_all(&mut programs)?;
    load_programs(&mut programs, Layer::Link)?;
    let pinned = PinnedMaps::open(&maps_dir)?;
    Ok(BpfMaps::new(pinned, programs)?)
}

/// Loads every program but those at devices; the verifier sees each.
fn load_all(programs: &mut Ebpf) -> Result<(), LoadError> {
    for (name, program) in programs.programs_mut() {
        let result = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => continue,
        };
        result.map_err(|source| LoadError::Program {
            name: name.into(),
            source,
        })?;
    }
    Ok(())
}

/// Number of entries of a pinned map; `None` where it is not pinned.
fn pinned_size(layout: &Layout, path: &std::path::Path) -> Result<Option<u32>, LoadError> {
    if !path.exists() {
        return Ok(None);
    }
    let info = MapInfo::from_pin(path).map_err(|error| LoadError::Layout {
        path: path.into(),
        what: format!("is no map: {error}"),
    })?;
    let is = (
        info.map_type().ok(),
        info.key_size(),
        info.value_size(),
        info.map_flags(),
    );
    let should = (
        Some(layout.map_type),
        layout.key as u32,
        layout.value as u32,
        layout.flags,
    );
    if is != should {
        return Err(LoadError::Layout {
            path: path.into(),
            what: format!("has (type, key size, value size, flags) {is:?}, this build has {should:?}"),
        });
    }
    Ok(Some(info.max_entries()))
}

/// A loaded program, for `status` and tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Name in the object.
    pub name: String,
    /// Tag: a hash of its instructions.
    pub tag: u64,
    /// Instructions that the verifier walked through.
    pub verified: Option<u32>,
    /// Length in bytes after the verifier's rewrite.
    pub size: Option<u32>,
}

/// What the verifier said of every program. Those for devices without a link layer are loaded when there is such a
/// device.
///
/// # Errors
/// Where a program is not loaded.
pub fn verified(programs: &Ebpf) -> Result<Vec<Verified>, LoadError> {
    programs
        .programs()
        .map(|(name, program)| {
            let info = program.info().map_err(|source| LoadError::Program {
                name: name.into(),
                source,
            })?;
            Ok(Verified {
                name: name.into(),
                tag: info.tag(),
                verified: info.verified_instruction_count(),
                size: info.size_translated(),
            })
        })
        .collect()
}

/// Detaches every program and removes every pin, of any version. False where there was nothing.
///
/// # Errors
/// [`LoadError::Locked`] while an agent runs, or the system call's.
pub fn cleanup(pins: &PinPath) -> Result<bool, LoadError> {
    if !pins.root().exists() {
        return Ok(false);
    }
    let lock = Lock::take(pins)?;
    undo::undo(lock.pins())?;
    lock.pins().remove_all()?;
    info!(path = %pins.root().display(), "detached all programs and removed all pins");
    Ok(true)
}

/// The folder of this build's layout.
fn version_dir() -> String {
    format!("v{VERSION}")
}
