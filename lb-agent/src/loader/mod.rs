//! The kernel side of the agent: loads the programs, pins and adopts maps and links. No other module loads with aya.
//!
//! Everything is pinned below `PIN_PATH/vN`, N being the [`VERSION`](lb_common::abi::VERSION) of the layout: maps in `maps/`, links in `links/`. So
//! the data plane continues while no agent runs, and a start takes over the pinned maps and links.

mod attach;
mod moves;
mod pins;
mod tc;
mod undo;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use aya::programs::Program;
use aya::{Ebpf, EbpfError, EbpfLoader};
use lb_common::abi::{
    Capacity, MAPS, MOVE_MAP, MOVING_GLOBAL, MapKind, MapSpec, NODE_NETNS_GLOBAL, NODE_ONLY_GLOBAL, OLD_SUFFIX,
    PinnedMap, SOCKETS_MASK_GLOBAL, SOCKETS_OLD_MASK_GLOBAL, STORES_IN_ORDER_GLOBAL, SizedMap, map_name, map_spec,
    moving, program_name,
};
use lb_core::maps::{Capacities, MapError};
use lb_core::model::Problem;
use tracing::info;

use self::moves::Replaced;
use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::old::pinned_map;
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
    /// A pinned map does not have the layout of its directory: another program has pinned it there.
    #[error("{path}: {what}; `lb-agent cleanup` removes it (and stops serving)")]
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

/// Returns a function that adds a path and the name of a call to the error of that call.
fn failed(path: impl Into<PathBuf>, call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    let path = path.into();
    move |source| LoadError::Call { path, call, source }
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
/// Returns a [`LoadError`] if the pins cannot be used or moved, or if a map or program cannot be loaded.
pub fn load(
    object: &[u8],
    lock: &Lock,
    capacities: &Capacities,
    sockets_served: SocketLb,
) -> Result<BpfMaps, LoadError> {
    let loader = Loader::new(object, lock, sockets_served, EbpfLog::Off)?;
    loader.load(|_| *capacities).map(|loaded| loaded.maps)
}

/// The result of [`Loader::load`].
pub struct Loaded {
    /// The maps and programs.
    pub maps: BpfMaps,
    /// Pinned maps that do not have the requested size.
    pub problems: Vec<Problem>,
    /// Whether no map was pinned before, so that no program uses them.
    pub is_new: bool,
}

/// Loads the programs for one pin path, and replaces maps while the programs serve.
pub struct Loader<'a> {
    object: &'a [u8],
    pins: &'a PinPath,
    /// Cookie of the node's network namespace.
    netns: u64,
    node_only: u32,
    log: u8,
}

impl<'a> Loader<'a> {
    /// Creates a loader of the programs of an object. The network namespace of the calling thread is the node's. `log`: the
    /// lines that the programs log.
    ///
    /// # Errors
    /// Returns [`LoadError::Call`] if the namespace cannot be identified.
    pub fn new(object: &'a [u8], lock: &'a Lock, sockets_served: SocketLb, log: EbpfLog) -> Result<Self, LoadError> {
        let netns = sys::netns_cookie().map_err(failed("(network namespace)", "SO_NETNS_COOKIE"))?;
        Ok(Self {
            object,
            pins: lock.pins(),
            netns,
            node_only: u32::from(sockets_served == SocketLb::Node),
            log: log.level(),
        })
    }

    /// Loads the programs with the pinned maps, or with new maps. `wanted` returns the numbers of entries that the maps are
    /// to have, and gets those of the pinned maps, if there are any. Pinned maps of another size are replaced, and so are the
    /// programs that are attached. No program is attached to a hook that has none.
    ///
    /// # Errors
    /// Returns the errors of [`load`].
    pub fn load(&self, wanted: impl FnOnce(Option<&Capacities>) -> Capacities) -> Result<Loaded, LoadError> {
        let maps_dir = self.pins.create_dirs()?;
        let mut moved = moves::take_over(self)?;
        moves::begin_again(self.pins)?;
        let is_new = !MAPS.iter().any(|map| maps_dir.join(map.name).exists());
        for map in MAPS {
            pinned_size(map, &Capacities::DEFAULT, &maps_dir.join(map.name), Accept::Own)?;
        }
        self.pins.remove_unknown_maps()?;
        let (resized, capacities) = moves::at_start(self, |pinned| with_power_of_two(wanted(pinned)))?;
        moved.add(resized);
        let mut programs = self.load_pinned(&capacities)?;
        let pinned = PinnedMaps::open(&maps_dir)?;
        if moved.has_old_programs {
            pinned.fill_filter()?;
            moves::replace_programs(&mut programs, self.pins)?;
        }
        Ok(Loaded {
            maps: BpfMaps::new(pinned, programs)?,
            problems: moved.problems,
            is_new,
        })
    }

    /// Replaces maps that do not have the requested size, and the programs at all hooks. The caller has to keep other
    /// threads and itself from using the maps. `needed`: the smallest numbers of entries that the maps can have, in addition
    /// to those that their content requires. Returns the problems; maps that cannot be replaced keep their sizes.
    ///
    /// # Errors
    /// Returns a [`LoadError`] if the programs at the hooks and the pinned maps are not those of `maps` any more. The next
    /// start repairs that, and until then the programs serve.
    pub fn resize(
        &self,
        maps: &mut BpfMaps,
        wanted: &Capacities,
        needed: &Capacities,
    ) -> Result<Vec<Problem>, LoadError> {
        let moved = moves::resize(self, &with_power_of_two(*wanted), needed)?;
        if moved.is_discarded {
            // Some hooks may have programs that use the discarded maps too.
            moves::replace_programs(maps.programs_mut(), self.pins)?;
        } else if moved.has_old_programs {
            self.adopt_pinned(maps, wanted)?;
        }
        Ok(moved.problems)
    }

    /// Replaces maps by empty ones of the requested size, for maps that are empty and that no attached program uses. Returns
    /// the problems; maps that cannot be replaced keep their sizes.
    ///
    /// # Errors
    /// Returns a [`LoadError`] if the pinned maps cannot be opened.
    pub fn recreate(&self, maps: &mut BpfMaps, wanted: &Capacities) -> Result<Vec<Problem>, LoadError> {
        match moves::recreate(self, &maps.pinned().capacities(), &with_power_of_two(*wanted)) {
            Ok(programs) => {
                maps.replace(PinnedMaps::open(&self.pins.maps())?, programs);
                Ok(Vec::new())
            }
            Err(error) => Ok(vec![moves::not_replaced(&error)]),
        }
    }

    /// Puts the maps in force, if those of another layout were until now because they could not be read. To be called when the maps
    /// are complete, before programs are attached.
    ///
    /// # Errors
    /// Returns a [`LoadError`] if a system call fails.
    pub fn put_in_force(&self) -> Result<(), LoadError> {
        moves::put_in_force(self.pins)
    }

    /// Removes the maps of another layout, which could not be read. The programs that used them must have been replaced.
    ///
    /// # Errors
    /// Returns a [`LoadError`] if a system call fails.
    pub fn remove_other_layouts(&self) -> Result<(), LoadError> {
        moves::remove_others(self.pins)
    }

    /// Loads programs that use the pinned maps only, and replaces those at all hooks by them.
    fn adopt_pinned(&self, maps: &mut BpfMaps, capacities: &Capacities) -> Result<(), LoadError> {
        let mut programs = self.load_pinned(capacities)?;
        moves::replace_programs(&mut programs, self.pins)?;
        maps.replace(PinnedMaps::open(&self.pins.maps())?, programs);
        Ok(())
    }

    /// Loads the programs with the pinned maps, and creates those that are not pinned.
    fn load_pinned(&self, capacities: &Capacities) -> Result<Ebpf, LoadError> {
        self.load_with(|name| self.pins.maps().join(name), capacities, None)
    }

    /// Loads the programs that use the pinned maps and the maps that replace them. Creates the latter if they are not pinned.
    fn load_moving(&self, replaced: &Replaced, capacities: &Capacities) -> Result<Ebpf, LoadError> {
        self.load_with(|name| replaced.path(name), capacities, Some(replaced))
    }

    /// Loads the agent call `lb_move` alone, for an interrupted move. The values of the maps may have the lengths of another layout,
    /// which the verifier does not accept for other programs. All maps that the call does not need are new, small and not pinned.
    fn load_move(&self, replaced: &Replaced) -> Result<Ebpf, LoadError> {
        let path = |name| replaced.moves(name).then(|| replaced.path(name));
        let mut programs = self.open(path, &Capacities::uniform(1), Some(replaced))?;
        load_all_but_device_programs(&mut programs, |name| name == program_name::MOVE)?;
        Ok(programs)
    }

    fn load_with(
        &self,
        path: impl Fn(&'static str) -> PathBuf,
        capacities: &Capacities,
        replaced: Option<&Replaced>,
    ) -> Result<Ebpf, LoadError> {
        let mut programs = self.open(|name| Some(path(name)), capacities, replaced)?;
        load_all_but_device_programs(&mut programs, |_| true)?;
        load_device_programs(&mut programs, Layer::Link)?;
        Ok(programs)
    }

    /// Opens or creates the maps, and returns the programs, none of which is loaded yet. `path` returns where a map is pinned.
    fn open(
        &self,
        path: impl Fn(&'static str) -> Option<PathBuf>,
        capacities: &Capacities,
        replaced: Option<&Replaced>,
    ) -> Result<Ebpf, LoadError> {
        let accept = if replaced.is_some() {
            Accept::Readable
        } else {
            Accept::Own
        };
        let mut loader = EbpfLoader::new();
        let mut sockets = map_spec::SOCKETS.default_capacity();
        for map in MAPS {
            let path = path(map.name);
            let size = match &path {
                Some(path) => pinned_size(map, capacities, path, accept)?,
                None => wanted_size(map, capacities),
            };
            if map.name == map_name::SOCKETS {
                sockets = size;
            }
            loader.map_max_entries(map.name, size);
            if let Some(path) = path {
                loader.map_pin_path(map.name, path);
            }
        }
        let (mut moving, mut old_sockets) = (0, 1);
        let mut old = Vec::new();
        if let Some(replaced) = replaced {
            for map in &replaced.moved {
                let Capacity::Sized(sized) = map.capacity else { continue };
                moving |= moving::bit(sized);
                let path = replaced.old.join(map.name);
                if map.name == map_name::SOCKETS {
                    old_sockets = pinned_size(map, capacities, &path, accept)?;
                }
                old.push((format!("{}{OLD_SUFFIX}", map.name), path));
            }
            for (name, path) in &old {
                loader.map_pin_path(name, path);
            }
            loader.map_pin_path(MOVE_MAP, replaced.next.join(MOVE_MAP));
        }
        let old_mask = old_sockets - 1;
        let mask = sockets - 1;
        loader
            .override_global(SOCKETS_MASK_GLOBAL, &mask, true)
            .override_global(NODE_NETNS_GLOBAL, &self.netns, true)
            .override_global(NODE_ONLY_GLOBAL, &self.node_only, true)
            .override_global(STORES_IN_ORDER_GLOBAL, &STORES_IN_ORDER, true)
            .override_global(aya_log::LEVEL, &self.log, true);
        let object = if replaced.is_none() {
            self.object
        } else {
            loader.override_global(MOVING_GLOBAL, &moving, true).override_global(
                SOCKETS_OLD_MASK_GLOBAL,
                &old_mask,
                true,
            );
            MOVING_OBJECT
        };
        Ok(loader.load(object)?)
    }
}

/// Value of [`STORES_IN_ORDER_GLOBAL`]: programs run on the processor that the agent was built for.
const STORES_IN_ORDER: u32 = cfg!(target_arch = "x86_64") as u32;

/// Returns these capacities with one of SOCKETS that is a power of two: a mask of the cookie selects the slot of a socket.
fn with_power_of_two(capacities: Capacities) -> Capacities {
    capacities.with(SizedMap::Sockets, capacities[SizedMap::Sockets].next_power_of_two())
}

/// Loads the selected ones of the programs for cgroup hooks and the agent calls, so that the verifier checks each.
fn load_all_but_device_programs(programs: &mut Ebpf, is_selected: impl Fn(&str) -> bool) -> Result<(), LoadError> {
    for (name, program) in programs.programs_mut().filter(|(name, _)| is_selected(name)) {
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

/// The pinned maps that a caller can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accept {
    /// Those of this build's layout.
    Own,
    /// All that this build can read.
    Readable,
}

/// Kind and sizes of a map, for people.
struct Described(PinnedMap);

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(PinnedMap {
            kind,
            key_size,
            value_size,
            flags,
        }) = self;
        let name = kind.map_or("a map of another type", MapKind::text);
        write!(
            f,
            "{name} with keys of {key_size} bytes, values of {value_size} bytes and flags {flags}"
        )
    }
}

/// Returns the number of entries that a new map gets.
fn wanted_size(map: &MapSpec, capacities: &Capacities) -> u32 {
    match map.capacity {
        Capacity::Fixed(entries) => entries,
        Capacity::Sized(sized) => capacities[sized],
    }
}

/// Returns the number of entries of a map: that of the pinned map, or that of `capacities` if it is not pinned.
fn pinned_size(map: &MapSpec, capacities: &Capacities, path: &Path, accept: Accept) -> Result<u32, LoadError> {
    let wanted = wanted_size(map, capacities);
    let layout = |what| LoadError::Layout {
        path: path.into(),
        what,
    };
    if !path.exists() {
        return Ok(wanted);
    }
    let info = MapInfo::from_pin(path).map_err(|error| layout(format!("is not a map: {error}")))?;
    let (is, own) = (pinned_map(&info), PinnedMap::of(map));
    let is_accepted = match accept {
        Accept::Own => is == own,
        Accept::Readable => is.is_readable_as(map),
    };
    if !is_accepted {
        return Err(layout(format!(
            "is {}; this build has {}",
            Described(is),
            Described(own)
        )));
    }
    let size = info.max_entries();
    match (map.capacity, accept) {
        (Capacity::Fixed(_), Accept::Own) if size != wanted => {
            Err(layout(format!("has {size} entries, this build has {wanted}")))
        }
        (Capacity::Fixed(_) | Capacity::Sized(_), _) => Ok(size),
    }
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
/// Returns [`LoadError::Locked`] while an agent runs, [`LoadError::PinPath`] if the directory has something else than pins of lb, and
/// [`LoadError::Call`] if a system call fails.
pub fn cleanup(pins: &PinPath) -> Result<bool, LoadError> {
    if !pins.root().exists() {
        return Ok(false);
    }
    let lock = Lock::take(pins)?;
    // Nothing is removed from a directory that is not lb's, nor changed before that is known.
    lock.pins().other_layouts()?;
    undo::undo(lock.pins())?;
    lock.pins().remove_all()?;
    info!(path = %pins.root().display(), "detached all programs and removed all pins");
    Ok(true)
}
