//! The kernel side of the agent: loads the programs, pins and adopts maps and links. No other module loads with aya.
//!
//! Everything is pinned below `PIN_PATH/vN`, N being [`VERSION`] of the layout: maps in `maps/`, links in `links/`. So
//! the data plane continues while no agent runs, and a start takes over the pinned maps and links.

mod attach;
mod pins;
mod tc;
mod undo;

use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{MapInfo, MapType};
use aya::programs::Program;
use aya::{Ebpf, EbpfError, EbpfLoader};
use lb_common::abi::{
    Capacity, MAPS, MapKind, MapSpec, NODE_NETNS_GLOBAL, NODE_ONLY_GLOBAL, SOCKETS_MASK_GLOBAL, SizedMap, VERSION,
    map_name, map_spec,
};
use lb_core::maps::{Capacities, MapError};
use tracing::{info, warn};

use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::sys;
use crate::node::devices::Layer;

pub use attach::{Attached, Cgroup, Hook, attach, attached};
pub(crate) use attach::{is_root as is_root_cgroup, root as cgroup_root};
pub use pins::{Lock, PinPath, TraceLock};
pub use tc::{DeviceError, DeviceProgram, TcHooks, Way, at_devices, load_device_programs};

/// The object with the kernel programs, from the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf"));

/// The reason why the kernel side cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The pin path cannot be used.
    #[error("{path}: {what}")]
    PinPath {
        /// The path.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// A call on a path failed.
    #[error("{path}: {call}: {source}")]
    Call {
        /// The path.
        path: PathBuf,
        /// The call that failed.
        call: &'static str,
        /// The error of the call.
        source: io::Error,
    },
    /// Another agent uses the pin path.
    #[error("{0}: another agent is running on this pin path")]
    Locked(PathBuf),
    /// The pinned maps have another layout.
    #[error(
        "{path}: {what}; this build cannot take it over: run the build that made it, or `lb-agent cleanup` (which stops \
         serving) first"
    )]
    Layout {
        /// Path of the pinned map.
        path: PathBuf,
        /// The difference.
        what: String,
    },
    /// The object cannot be loaded.
    #[error("the eBPF object cannot be loaded: {0}")]
    Object(#[from] EbpfError),
    /// A program cannot be loaded. The text contains the verifier's log.
    #[error("program {name}: {source}")]
    Program {
        /// Name of the program.
        name: String,
        /// The error, with the verifier's log.
        source: aya::programs::ProgramError,
    },
    /// A map cannot be used.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// The type of a map, as aya names it.
const fn map_type(kind: MapKind) -> MapType {
    match kind {
        MapKind::Array => MapType::Array,
        MapKind::PerCpuArray => MapType::PerCpuArray,
        MapKind::Hash => MapType::Hash,
        MapKind::LruHash => MapType::LruHash,
        MapKind::LpmTrie => MapType::LpmTrie,
        MapKind::RingBuf => MapType::RingBuf,
    }
}

/// Which processes get socket-level load balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SocketLb {
    /// All processes below the cgroup.
    #[default]
    All,
    /// The processes in the node's network namespace. The packet path serves the connections of pods.
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

/// Loads the programs with the pinned maps, or with new maps of the requested capacities. Pinned maps keep their
/// capacities. The network namespace of the calling thread is the node's. No program is attached.
///
/// # Errors
/// Returns a [`LoadError`] if the pins are of another layout, or if a map or program cannot be loaded.
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
    let mut sockets = map_spec::SOCKETS.default_capacity();
    for map in MAPS {
        let path = maps_dir.join(map.name);
        let wanted = match map.capacity {
            Capacity::Fixed(entries) => entries,
            // A mask of the cookie selects the slot of a socket, so the number of slots must be a power of two.
            Capacity::Sized(sized @ SizedMap::Sockets) => capacities[sized].next_power_of_two(),
            Capacity::Sized(sized) => capacities[sized],
        };
        let size = pinned_size(map, wanted, &path)?;
        if map.name == map_name::SOCKETS {
            sockets = size;
        }
        loader.map_max_entries(map.name, size).map_pin_path(map.name, path);
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
    load_all_but_device_programs(&mut programs)?;
    load_device_programs(&mut programs, Layer::Link)?;
    let pinned = PinnedMaps::open(&maps_dir)?;
    Ok(BpfMaps::new(pinned, programs)?)
}

/// Loads the programs for cgroup hooks and the agent calls, so that the verifier checks each.
fn load_all_but_device_programs(programs: &mut Ebpf) -> Result<(), LoadError> {
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

/// Returns the number of entries of a map: that of the pinned map, or `wanted` if it is not pinned.
fn pinned_size(map: &MapSpec, wanted: u32, path: &Path) -> Result<u32, LoadError> {
    let layout = |what| LoadError::Layout {
        path: path.into(),
        what,
    };
    if !path.exists() {
        return Ok(wanted);
    }
    let info = MapInfo::from_pin(path).map_err(|error| layout(format!("is not a map: {error}")))?;
    let is = (
        info.map_type().ok(),
        info.key_size(),
        info.value_size(),
        info.map_flags(),
    );
    let should = (Some(map_type(map.kind)), map.key_size(), map.value_size(), map.flags);
    if is != should {
        return Err(layout(format!(
            "has (type, key size, value size, flags) {is:?}, this build has {should:?}"
        )));
    }
    let size = info.max_entries();
    match map.capacity {
        Capacity::Fixed(_) if size != wanted => {
            return Err(layout(format!("has {size} entries, this build has {wanted}")));
        }
        Capacity::Sized(sized) if size != wanted => warn!(
            "{} is pinned with {size} entries; --{} {wanted} takes effect after `lb-agent cleanup`",
            map.name,
            sized.flag()
        ),
        Capacity::Fixed(_) | Capacity::Sized(_) => {}
    }
    Ok(size)
}

/// A loaded program, for `status` and tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Name in the object.
    pub name: String,
    /// Tag: a hash of the instructions.
    pub tag: u64,
    /// Number of instructions that the verifier processed.
    pub verified: Option<u32>,
    /// Length in bytes after the verifier's rewrite.
    pub size: Option<u32>,
}

/// Returns the verifier's figures of every program. The programs for devices without a link layer are loaded when there is
/// such a device.
///
/// # Errors
/// Returns [`LoadError::Program`] if a program is not loaded.
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

/// Detaches every program and removes every pin, of any version. Returns false if nothing was pinned.
///
/// # Errors
/// Returns [`LoadError::Locked`] while an agent runs, and [`LoadError::Call`] if a system call fails.
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

/// Returns the name of the directory of this build's layout.
fn version_dir() -> String {
    format!("v{VERSION}")
}
