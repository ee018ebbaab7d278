//! Programs at network devices: tcx links that are pinned and updated in place, as those of the cgroup are, or filters of
//! a clsact qdisc where the kernel has no tcx (before 6.6).
//!
//! Nothing is remembered between two calls: what is there is looked at each time, since a device may go and another one
//! come by its index, and others may take away what is not theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{SchedClassifier, loaded_programs};
use aya_obj::generated::bpf_attach_type;
use lb_common::abi::program_name;
use tracing::{debug, info};

use super::{LoadError, PinPath};
use crate::maps::sys;
use crate::node::devices::{Layer, Served};
use crate::node::filters::{Filters, Place, Side};

/// How programs are put at devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By links, before all other programs.
    Tcx,
    /// By filters of priority 1.
    Clsact,
}

impl Way {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// A device that programs could not be put at or taken from.
#[derive(Debug)]
pub struct Trouble {
    /// Its index.
    pub device: u32,
    /// What was tried, and why it failed.
    pub error: LoadError,
}

fn failed(path: impl Into<PathBuf>, call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    let path = path.into();
    move |source| LoadError::Call { path, call, source }
}

/// What an error is said to be of where there is no path.
fn on_device(side: Side, call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    failed(format!("({})", name(side)), call)
}

/// Word for a side, in the names of pinned links.
fn name(side: Side) -> &'static str {
    match side {
        Side::Ingress => "ingress",
        Side::Egress => "egress",
    }
}

fn attach_type(side: Side) -> bpf_attach_type {
    match side {
        Side::Ingress => bpf_attach_type::BPF_TCX_INGRESS,
        Side::Egress => bpf_attach_type::BPF_TCX_EGRESS,
    }
}

/// Name of the program for a side of a device.
fn program_for(side: Side, layer: Layer) -> &'static str {
    match (side, layer) {
        (Side::Ingress, Layer::Link) => program_name::INGRESS,
        (Side::Egress, Layer::Link) => program_name::EGRESS,
        (Side::Ingress, Layer::Network) => program_name::INGRESS_L3,
        (Side::Egress, Layer::Network) => program_name::EGRESS_L3,
    }
}

/// The name that the link of a side of a device is pinned by. The file system takes no dots in names.
fn pin_name(side: Side, device: u32) -> String {
    format!("{}-{device}", name(side))
}

/// Side and device of the link that has this name.
fn of_pin(file: &str) -> Option<(Side, u32)> {
    let (word, device) = file.split_once('-')?;
    let side = Side::BOTH.into_iter().find(|side| name(*side) == word)?;
    Some((side, device.parse().ok()?))
}

/// The link that is pinned for a side of a device; `None` where it is none, or the device is another one since.
fn pinned(path: &Path, device: u32) -> Result<Option<(std::os::fd::OwnedFd, u32)>, LoadError> {
    let link = match sys::obj_get(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(path, "BPF_OBJ_GET")(error)),
    };
    let at = sys::tcx_link(link.as_fd()).map_err(failed(path, "BPF_OBJ_GET_INFO_BY_FD"))?;
    Ok((at.device == device).then_some((link, at.program)))
}

/// Loads the programs for devices of a kind, unless they are loaded.
///
/// # Errors
/// With the verifier's words.
pub fn load_programs(programs: &mut Ebpf, layer: Layer) -> Result<(), LoadError> {
    for name in Side::BOTH.map(|side| program_for(side, layer)) {
        let failed = |source| LoadError::Program {
            name: name.into(),
            source,
        };
        let program = programs.program_mut(name).ok_or_else(|| no_program(name))?;
        let classifier: &mut SchedClassifier = program.try_into().map_err(failed)?;
        if classifier.fd().is_err() {
            classifier.load().map_err(failed)?;
        }
    }
    Ok(())
}

fn no_program(name: &str) -> LoadError {
    LoadError::PinPath {
        path: name.into(),
        what: "the object has no such program".into(),
    }
}

/// A loaded program.
struct Program<'a> {
    name: &'static str,
    fd: BorrowedFd<'a>,
    id: u32,
}

fn program<'a>(programs: &'a Ebpf, name: &'static str) -> Result<Program<'a>, LoadError> {
    let failed = |source| LoadError::Program {
        name: name.into(),
        source,
    };
    let program = programs.program(name).ok_or_else(|| no_program(name))?;
    let classifier: &SchedClassifier = program.try_into().map_err(failed)?;
    let fd = classifier.fd().map_err(failed)?.as_fd();
    let id = classifier.info().map_err(failed)?.id();
    Ok(Program { name, fd, id })
}

/// The programs for both sides of devices, in the order of attachment: who translates answers before who asks.
fn sides(programs: &Ebpf, layer: Layer) -> Result<[(Side, Program<'_>); 2], LoadError> {
    let program = |side| Ok::<_, LoadError>((side, program(programs, program_for(side, layer))?));
    Ok([program(Side::Egress)?, program(Side::Ingress)?])
}

/// Puts programs at devices of the network namespace in which this was made, and takes them away.
pub struct TcHooks {
    links: PathBuf,
    way: Way,
    filters: Filters,
    /// What an earlier run may have left by the other way is gone.
    is_tidy: bool,
}

impl TcHooks {
    /// For the network namespace of the calling thread. `tcx`: it may be used where there is any.
    ///
    /// # Errors
    /// The system call's.
    pub fn open(programs: &Ebpf, pins: &PinPath, tcx: bool) -> Result<Self, LoadError> {
        let filters = Filters::open().map_err(failed("(tc)", "netlink"))?;
        let way = if tcx && has_tcx(programs)? {
            Way::Tcx
        } else {
            Way::Clsact
        };
        Ok(Self {
            links: pins.links(),
            way,
            filters,
            is_tidy: false,
        })
    }

    /// How programs are put at devices.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// Puts the programs at devices: where an earlier build's is, ours takes its place in one step. `own_qdiscs` are
    /// those whose clsact qdisc is the agent's. Returns those where that failed. What devices without a link layer need
    /// is loaded when there is the first.
    ///
    /// # Errors
    /// Where the programs cannot be loaded.
    pub fn attach(
        &mut self,
        programs: &mut Ebpf,
        served: &BTreeMap<u32, Served>,
        own_qdiscs: &mut BTreeSet<u32>,
    ) -> Result<Vec<Trouble>, LoadError> {
        let mut troubles = Vec::new();
        for (&device, Served { layer, name }) in served {
            load_programs(programs, *layer)?;
            for (side, program) in sides(programs, *layer)? {
                let result = match self.way {
                    Way::Tcx => self.put_link(device, side, &program),
                    Way::Clsact => self.put_filter(device, side, &program, own_qdiscs),
                };
                match result {
                    Ok(true) => debug!(
                        device = name,
                        side = self::name(side),
                        way = self.way.name(),
                        "attached"
                    ),
                    Ok(false) => {}
                    Err(error) if is_gone(&error) => {}
                    Err(error) => troubles.push(Trouble { device, error }),
                }
            }
        }
        Ok(troubles)
    }

    /// Takes the programs from all devices that are not served; `all` are those that there are. Returns those where that
    /// failed.
    ///
    /// # Errors
    /// Where the folder of links cannot be read.
    pub fn detach(
        &mut self,
        served: &BTreeMap<u32, Served>,
        all: impl IntoIterator<Item = u32>,
        own_qdiscs: &mut BTreeSet<u32>,
    ) -> Result<Vec<Trouble>, LoadError> {
        let mut troubles = Vec::new();
        for (path, device) in self.pinned_links()? {
            let stays = self.way == Way::Tcx && served.contains_key(&device);
            if stays {
                continue;
            }
            match remove_link(&path) {
                Ok(()) => info!(device, "programs are taken from a device that is not served, or gone"),
                Err(error) => troubles.push(Trouble { device, error }),
            }
        }
        // What stands in the way of tcx is of an earlier run, if there is any.
        if self.way == Way::Clsact || !self.is_tidy {
            for device in all {
                let stays = self.way == Way::Clsact && served.contains_key(&device);
                if stays {
                    continue;
                }
                match remove_filters(&mut self.filters, device, own_qdiscs.contains(&device)) {
                    Ok(()) => {
                        own_qdiscs.remove(&device);
                    }
                    Err(error) => troubles.push(Trouble { device, error }),
                }
            }
        }
        self.is_tidy = troubles.is_empty();
        Ok(troubles)
    }

    /// Takes away all links: those of another network namespace, whose devices have indexes of their own.
    ///
    /// # Errors
    /// The system call's.
    pub fn forget(&self) -> Result<(), LoadError> {
        for (path, _) in self.pinned_links()? {
            remove_link(&path)?;
        }
        Ok(())
    }

    /// Pinned links of devices, and what a start that was killed left half done.
    fn pinned_links(&self) -> Result<Vec<(PathBuf, u32)>, LoadError> {
        let entries = fs::read_dir(&self.links).map_err(failed(&self.links, "readdir"))?;
        let mut links = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed(&self.links, "readdir"))?;
            let file = entry.file_name();
            let link = file.to_str().and_then(of_pin);
            links.extend(link.map(|(_, device)| (entry.path(), device)));
        }
        // Who asks goes before who translates answers.
        links.sort_unstable_by(|a, b| b.cmp(a));
        Ok(links)
    }

    /// False where it is there already.
    fn put_link(&self, device: u32, side: Side, program: &Program<'_>) -> Result<bool, LoadError> {
        let path = self.links.join(pin_name(side, device));
        match pinned(&path, device)? {
            Some((_, id)) if id == program.id => return Ok(false),
            Some((link, _)) => {
                sys::link_update(link.as_fd(), program.fd).map_err(failed(&path, "BPF_LINK_UPDATE"))?;
                return Ok(true);
            }
            None => {}
        }
        let link = sys::tcx_create(program.fd, device, attach_type(side))
            .map_err(on_device(side, "BPF_LINK_CREATE of a tcx link"))?;
        // That of a device which is gone, or what somebody else detached.
        if path.exists() {
            remove_link(&path)?;
        }
        sys::obj_pin(link.as_fd(), &path).map_err(failed(&path, "BPF_OBJ_PIN"))?;
        Ok(true)
    }

    /// False where it is there already.
    fn put_filter(
        &mut self,
        device: u32,
        side: Side,
        program: &Program<'_>,
        own_qdiscs: &mut BTreeSet<u32>,
    ) -> Result<bool, LoadError> {
        let there = self
            .filters
            .look(device, side)
            .map_err(on_device(side, "looking at filters"))?;
        if there == Place::Ours(program.id) {
            return Ok(false);
        }
        if there == Place::Empty {
            let is_new = self
                .filters
                .add_qdisc(device)
                .map_err(on_device(side, "adding clsact"))?;
            if is_new {
                own_qdiscs.insert(device);
            }
        }
        self.filters
            .put(device, side, program.name, program.fd)
            .map_err(on_device(side, "adding a filter"))?;
        Ok(true)
    }
}

/// Whether the kernel knows tcx links, by asking for one at no device.
fn has_tcx(programs: &Ebpf) -> Result<bool, LoadError> {
    let program = program(programs, program_name::INGRESS)?;
    match sys::tcx_create(program.fd, 0, attach_type(Side::Ingress)) {
        // EINVAL: no such hook, or the kernel was built without it.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(true),
        Err(error) => Err(on_device(Side::Ingress, "BPF_LINK_CREATE of a tcx link")(error)),
        Ok(_) => Ok(true),
    }
}

/// Whether the device has gone meanwhile: the next look at devices will tell.
fn is_gone(error: &LoadError) -> bool {
    matches!(error, LoadError::Call { source, .. } if matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENOLINK)))
}

/// Detaches now, since the kernel ends a link some time after its last pin.
fn remove_link(path: &Path) -> Result<(), LoadError> {
    if let Ok(link) = sys::obj_get(path) {
        sys::link_detach(link.as_fd()).ok();
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path, "unlink")(error)),
        _ => Ok(()),
    }
}

/// Removes lb's filters of a device, and the qdisc if it is lb's and nobody has a filter there.
fn remove_filters(filters: &mut Filters, device: u32, own_qdisc: bool) -> Result<(), LoadError> {
    let mut removed = false;
    for side in Side::BOTH {
        removed |= filters
            .remove(device, side)
            .map_err(on_device(side, "removing a filter"))?;
    }
    if removed {
        info!(device, "filters are taken from a device");
    }
    if own_qdisc {
        filters
            .remove_qdisc(device)
            .map_err(failed("(clsact)", "removing the qdisc"))?;
    }
    Ok(())
}

/// Removes lb's filters of devices of the network namespace of the calling thread.
pub(super) fn remove_all_filters(
    devices: impl IntoIterator<Item = u32>,
    own_qdiscs: &BTreeSet<u32>,
) -> Result<(), LoadError> {
    let mut filters = Filters::open().map_err(failed("(tc)", "netlink"))?;
    for device in devices {
        remove_filters(&mut filters, device, own_qdiscs.contains(&device))?;
    }
    Ok(())
}

/// A program at a side of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AtDevice {
    /// How it came there.
    pub way: Way,
    /// Id of the program.
    pub program: u32,
    /// Tag of the program: a hash of its instructions.
    pub tag: u64,
}

/// What is at devices of the network namespace of the calling thread now: at ingress and egress of each.
///
/// # Errors
/// The system call's.
pub fn at_devices(
    pins: &PinPath,
    devices: impl IntoIterator<Item = u32>,
) -> Result<BTreeMap<u32, [Option<AtDevice>; 2]>, LoadError> {
    let tags: BTreeMap<u32, u64> = loaded_programs()
        .filter_map(|info| info.ok().map(|info| (info.id(), info.tag())))
        .collect();
    let mut filters = Filters::open().map_err(failed("(tc)", "netlink"))?;
    let mut look = |device, side| -> Result<Option<AtDevice>, LoadError> {
        let link = pinned(&pins.links().join(pin_name(side, device)), device)?;
        let (way, program) = match link {
            Some((_, program)) => (Way::Tcx, program),
            None => match filters
                .look(device, side)
                .map_err(on_device(side, "looking at filters"))?
            {
                Place::Ours(program) => (Way::Clsact, program),
                Place::Empty | Place::Foreign => return Ok(None),
            },
        };
        let tag = tags.get(&program).copied().unwrap_or_default();
        Ok(Some(AtDevice { way, program, tag }))
    };
    let mut at = BTreeMap::new();
    for device in devices {
        let [ingress, egress] = Side::BOTH;
        at.insert(device, [look(device, ingress)?, look(device, egress)?]);
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_say_side_and_device() {
        for side in Side::BOTH {
            assert_eq!(of_pin(&pin_name(side, 7)), Some((side, 7)));
        }
        for other in [
            "lb_connect4",
            "lb_connect4-new",
            "ingress",
            "ingress-",
            "ingress-x",
            "other-7",
            "ingress-7-new",
        ] {
            assert_eq!(of_pin(other), None, "{other}");
        }
    }
}
