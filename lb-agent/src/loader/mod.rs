//! The kernel side of the agent: loads the programs, pins and adopts maps and links. No other module loads with aya.
//!
//! Everything is pinned below `PIN_PATH/vN`, N being [`VERSION`] of the layout: maps in `maps/`, links in `links/`. So
//! the data plane continues while no agent runs, and a start takes over the pinned maps and links.

mod attach;
mod moves;
mod pins;
mod tc;
mod undo;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{MapInfo, MapType};
use aya::programs::Program;
use aya::{Ebpf, EbpfError, EbpfLoader};
use lb_common::abi::{
    Capacity, MAPS, MOVE_MAP, MOVING_GLOBAL, MapKind, MapSpec, NODE_NETNS_GLOBAL, NODE_ONLY_GLOBAL, OLD_SUFFIX,
    SOCKETS_MASK_GLOBAL, SOCKETS_OLD_MASK_GLOBAL, SizedMap, VERSION, map_name, map_spec, moving,
};
use lb_core::maps::{Capacities, MapError};
use lb_core::model::Problem;
use tracing::info;

use self::moves::Replaced;
use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::sys;
use crate::node::devices::Layer;

pub use attach::{Attached, Cgroup, Hook, attach, attached};
pub(crate) use attach::{is_root as is_root_cgroup, root as cgroup_root};
pub use pins::{Lock, PinPath, TraceLock};
pub use tc::{DeviceError, DeviceProgram, TcHooks, Way, at_devices, load_device_programs};

/// The object with the kernel programs, from the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf"));

/// The object with the programs that use the present maps and those that replace them.
static MOVING_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf-moving"));

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

/// Loads the programs with the pinned maps, or with new maps of the requested capacities. Pinned maps of another size are
/// replaced, and so are the programs that are attached. The network namespace of the calling thread is the node's. No program is
/// attached to a hook that has none.
///
/// # Errors
/// Returns a [`LoadError`] if the pins are of another layout, or if a map or program cannot be loaded.
pub fn load(
    object: &[u8],
    lock: &Lock,
    capacities: &Capacities,
    sockets_served: SocketLb,
) -> Result<BpfMaps, LoadError> {
    load_logging(object, lock, capacities, sockets_served, EbpfLog::Off).map(|loaded| loaded.maps)
}

/// The result of [`load_logging`].
pub struct Loaded {
    /// The maps and programs.
    pub maps: BpfMaps,
    /// Pinned maps that do not have the requested size.
    pub problems: Vec<Problem>,
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
) -> Result<Loaded, LoadError> {
    let pins = lock.pins();
    pins.refuse_other_versions()?;
    let maps_dir = pins.create_dirs()?;
    // A mask of the cookie selects the slot of a socket, so the number of slots must be a power of two.
    let sockets = capacities[SizedMap::Sockets].next_power_of_two();
    let capacities = capacities.with(SizedMap::Sockets, sockets);
    let netns = sys::netns_cookie().map_err(|source| LoadError::Call {
        path: "(network namespace)".into(),
        call: "SO_NETNS_COOKIE",
        source,
    })?;
    let loading = Loading {
        object,
        pins,
        netns,
        node_only: u32::from(sockets_served == SocketLb::Node),
        log: log.level(),
    };
    for map in MAPS {
        pinned_size(map, &capacities, &maps_dir.join(map.name))?;
    }
    let moved = moves::resize(&loading, &capacities)?;
    let mut programs = loading.load(&capacities)?;
    if moved.has_old_programs {
        moves::replace_programs(&mut programs, pins)?;
    }
    let pinned = PinnedMaps::open(&maps_dir)?;
    Ok(Loaded {
        maps: BpfMaps::new(pinned, programs)?,
        problems: moved.problems,
    })
}

/// What programs are loaded with, apart from their maps.
struct Loading<'a> {
    object: &'a [u8],
    pins: &'a PinPath,
    /// Cookie of the node's network namespace.
    netns: u64,
    node_only: u32,
    log: u8,
}

impl Loading<'_> {
    /// Loads the programs with the pinned maps, and creates those that are not pinned.
    fn load(&self, capacities: &Capacities) -> Result<Ebpf, LoadError> {
        self.load_with(|name| self.pins.maps().join(name), capacities, &[])
    }

    /// Loads the programs that use the pinned maps and the maps that replace them. Creates the latter if they are not pinned.
    fn load_moving(&self, replaced: &Replaced<'_>, capacities: &Capacities) -> Result<Ebpf, LoadError> {
        self.load_with(|name| replaced.path(name), capacities, &replaced.maps)
    }

    fn load_with(
        &self,
        path: impl Fn(&'static str) -> PathBuf,
        capacities: &Capacities,
        replaced: &[&MapSpec],
    ) -> Result<Ebpf, LoadError> {
        let mut loader = EbpfLoader::new();
        let mut sockets = map_spec::SOCKETS.default_capacity();
        for map in MAPS {
            let path = path(map.name);
            let size = pinned_size(map, capacities, &path)?;
            if map.name == map_name::SOCKETS {
                sockets = size;
            }
            loader.map_max_entries(map.name, size).map_pin_path(map.name, path);
        }
        let (mut moving, mut old_sockets) = (0, 1);
        let mut old = Vec::new();
        for map in replaced {
            let Capacity::Sized(sized) = map.capacity else { continue };
            moving |= moving::bit(sized);
            let path = self.pins.maps().join(map.name);
            if map.name == map_name::SOCKETS {
                old_sockets = pinned_size(map, capacities, &path)?;
            }
            old.push((format!("{}{OLD_SUFFIX}", map.name), path));
        }
        for (name, path) in &old {
            loader.map_pin_path(name, path);
        }
        let old_mask = old_sockets - 1;
        if !replaced.is_empty() {
            loader.map_pin_path(MOVE_MAP, self.pins.next().join(MOVE_MAP));
        }
        let mask = sockets - 1;
        loader
            .override_global(SOCKETS_MASK_GLOBAL, &mask, true)
            .override_global(NODE_NETNS_GLOBAL, &self.netns, true)
            .override_global(NODE_ONLY_GLOBAL, &self.node_only, true)
            .override_global(aya_log::LEVEL, &self.log, true);
        let object = if replaced.is_empty() {
            self.object
        } else {
            loader.override_global(MOVING_GLOBAL, &moving, true).override_global(
                SOCKETS_OLD_MASK_GLOBAL,
                &old_mask,
                true,
            );
            MOVING_OBJECT
        };
        let mut programs = loader.load(object)?;
        load_all_but_device_programs(&mut programs)?;
        load_device_programs(&mut programs, Layer::Link)?;
        Ok(programs)
    }
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

/// Type, sizes and flags of a map.
#[derive(Debug, PartialEq)]
struct MapLayout {
    /// `None` if the kernel has a type that aya does not name.
    map_type: Option<MapType>,
    key_size: u32,
    value_size: u32,
    flags: u32,
}

impl fmt::Display for MapLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            (MapKind::Array, "an array"),
            (MapKind::PerCpuArray, "a per-CPU array"),
            (MapKind::Hash, "a hash"),
            (MapKind::LruHash, "an LRU hash"),
            (MapKind::LpmTrie, "an LPM trie"),
            (MapKind::RingBuf, "a ring buffer"),
        ];
        let known = kinds.iter().find(|(kind, _)| Some(map_type(*kind)) == self.map_type);
        let name = known.map_or("a map of another type", |(_, name)| name);
        let Self {
            key_size,
            value_size,
            flags,
            ..
        } = self;
        write!(
            f,
            "{name} with keys of {key_size} bytes, values of {value_size} bytes and flags {flags}"
        )
    }
}

/// Returns the number of entries of a map: that of the pinned map, or that of `capacities` if it is not pinned.
fn pinned_size(map: &MapSpec, capacities: &Capacities, path: &Path) -> Result<u32, LoadError> {
    let wanted = match map.capacity {
        Capacity::Fixed(entries) => entries,
        Capacity::Sized(sized) => capacities[sized],
    };
    let layout = |what| LoadError::Layout {
        path: path.into(),
        what,
    };
    if !path.exists() {
        return Ok(wanted);
    }
    let info = MapInfo::from_pin(path).map_err(|error| layout(format!("is not a map: {error}")))?;
    let is = MapLayout {
        map_type: info.map_type().ok(),
        key_size: info.key_size(),
        value_size: info.value_size(),
        flags: info.map_flags(),
    };
    let should = MapLayout {
        map_type: Some(map_type(map.kind)),
        key_size: map.key_size(),
        value_size: map.value_size(),
        flags: map.flags,
    };
    if is != should {
        return Err(layout(format!("is {is}; this build has {should}")));
    }
    let size = info.max_entries();
    match map.capacity {
        Capacity::Fixed(_) if size != wanted => {
            return Err(layout(format!("has {size} entries, this build has {wanted}")));
        }
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
