//! Programs at network devices: tcx links that are pinned and updated in place, like those of the cgroup, or filters of a
//! clsact qdisc if the kernel has no tcx (before 6.6).
//!
//! No state is kept between two calls. Each call reads the attached programs again, since a device may be removed and
//! another one get its index, and other processes may remove programs of lb.

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

use super::{LoadError, PinPath, failed};
use crate::maps::sys;
use crate::node::devices::{Layer, Served};
use crate::node::filters::{FilterSlot, Filters, Side};
use crate::node::links::LinkSnapshot;

/// The mechanism that attaches programs to devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// tcx links, before all other programs.
    Tcx,
    /// Filters of a clsact qdisc, with priority 1.
    Clsact,
}

impl Way {
    /// Name of the mechanism.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// A device that programs could not be attached to or detached from.
#[derive(Debug)]
pub struct DeviceError {
    /// Interface index of the device.
    pub device: u32,
    /// The operation that failed, and its error.
    pub error: LoadError,
}

/// Returns the error of a call that concerns a side of a device; the side is in the place of the path.
fn on_device(side: Side, call: &'static str) -> impl FnOnce(io::Error) -> LoadError {
    failed(format!("({})", side_name(side)), call)
}

/// Returns the word for a side in the names of pinned links.
fn side_name(side: Side) -> &'static str {
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

/// Returns the name of the program for a side of a device.
fn program_for(side: Side, layer: Layer) -> &'static str {
    match (side, layer) {
        (Side::Ingress, Layer::Link) => program_name::INGRESS,
        (Side::Egress, Layer::Link) => program_name::EGRESS,
        (Side::Ingress, Layer::Network) => program_name::INGRESS_L3,
        (Side::Egress, Layer::Network) => program_name::EGRESS_L3,
    }
}

/// Returns the name of the pinned link of a side of a device. The BPF file system does not accept dots in names.
fn pin_name(side: Side, device: u32) -> String {
    format!("{}-{device}", side_name(side))
}

/// Returns side and device of the link with a name.
fn parse_pin_name(file: &str) -> Option<(Side, u32)> {
    let (word, device) = file.split_once('-')?;
    let side = Side::BOTH.into_iter().find(|side| side_name(*side) == word)?;
    Some((side, device.parse().ok()?))
}

/// Returns the pinned link of a side of a device; `None` if there is none, or if it belongs to an earlier device with the
/// index.
fn pinned(path: &Path, device: u32) -> Result<Option<(std::os::fd::OwnedFd, u32)>, LoadError> {
    let link = match sys::obj_get(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(path, "BPF_OBJ_GET")(error)),
    };
    let at = sys::tcx_link(link.as_fd()).map_err(failed(path, "BPF_OBJ_GET_INFO_BY_FD"))?;
    Ok((at.device == device).then_some((link, at.program)))
}

/// Returns the pinned links of devices, including unfinished ones of a start that was killed.
fn pinned_links(dir: &Path) -> Result<Vec<(PathBuf, u32)>, LoadError> {
    let entries = fs::read_dir(dir).map_err(failed(dir, "readdir"))?;
    let mut links = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed(dir, "readdir"))?;
        let file = entry.file_name();
        let link = file.to_str().and_then(parse_pin_name);
        links.extend(link.map(|(_, device)| (entry.path(), device)));
    }
    // Forward translation is detached before reverse translation.
    links.sort_unstable_by(|a, b| b.cmp(a));
    Ok(links)
}

/// Loads the programs for devices of a kind, unless they are loaded.
///
/// # Errors
/// Returns [`LoadError::Program`] with the verifier's log.
pub fn load_device_programs(programs: &mut Ebpf, layer: Layer) -> Result<(), LoadError> {
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
        what: "the object does not contain the program".into(),
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

/// The programs for both sides of devices in attach order: reverse translation before forward translation.
fn sides(programs: &Ebpf, layer: Layer) -> Result<[(Side, Program<'_>); 2], LoadError> {
    let program = |side| Ok::<_, LoadError>((side, program(programs, program_for(side, layer))?));
    Ok([program(Side::Egress)?, program(Side::Ingress)?])
}

/// Attaches and detaches programs at the devices of one network namespace.
pub struct TcHooks {
    links: PathBuf,
    way: Way,
    filters: Filters,
    /// Programs that an earlier run attached by the other mechanism were removed.
    is_tidy: bool,
}

impl TcHooks {
    /// Creates the handle for the network namespace of the calling thread. With `tcx`, tcx links are used if the kernel has
    /// them.
    ///
    /// # Errors
    /// Returns [`LoadError::Call`] if a system call fails.
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

    /// The mechanism that attaches programs to devices.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// Attaches the programs to devices, and returns the devices for which that failed. A program of an earlier build
    /// is replaced atomically. `own_qdiscs` are the devices with a clsact qdisc that the agent created. The programs
    /// for devices without a link layer are loaded with the first such device.
    ///
    /// # Errors
    /// Returns [`LoadError::Program`] if the programs cannot be loaded.
    pub fn attach(
        &mut self,
        programs: &mut Ebpf,
        served: &BTreeMap<u32, Served>,
        own_qdiscs: &mut BTreeSet<u32>,
    ) -> Result<Vec<DeviceError>, LoadError> {
        let mut errors = Vec::new();
        for (&device, Served { layer, name }) in served {
            load_device_programs(programs, *layer)?;
            for (side, program) in sides(programs, *layer)? {
                let result = match self.way {
                    Way::Tcx => self.attach_tcx(device, side, &program),
                    Way::Clsact => self.attach_filter(device, side, &program, own_qdiscs),
                };
                match result {
                    Ok(true) => debug!(device = name, side = side_name(side), way = self.way.name(), "attached"),
                    Ok(false) => {}
                    Err(error) if is_gone(&error) => {}
                    Err(error) => errors.push(DeviceError { device, error }),
                }
            }
        }
        Ok(errors)
    }

    /// Detaches the programs from all devices that are not served, and returns the devices for which that failed. `all`
    /// are the devices that exist.
    ///
    /// # Errors
    /// Returns [`LoadError::Call`] if the directory of links cannot be read.
    pub fn detach(
        &mut self,
        served: &BTreeMap<u32, Served>,
        all: impl IntoIterator<Item = u32>,
        own_qdiscs: &mut BTreeSet<u32>,
    ) -> Result<Vec<DeviceError>, LoadError> {
        let mut errors = Vec::new();
        for (path, device) in pinned_links(&self.links)? {
            let stays = self.way == Way::Tcx && served.contains_key(&device);
            if stays {
                continue;
            }
            match remove_link(&path) {
                Ok(()) => info!(
                    device,
                    "detached the programs from a device that is not served, or was removed"
                ),
                Err(error) => errors.push(DeviceError { device, error }),
            }
        }
        // Filters that would run before tcx are those of an earlier run.
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
                    Err(error) => errors.push(DeviceError { device, error }),
                }
            }
        }
        self.is_tidy = errors.is_empty();
        Ok(errors)
    }

    /// Removes all links. They belong to another network namespace, which has its own device indexes.
    ///
    /// # Errors
    /// Returns [`LoadError::Call`] if a system call fails.
    pub fn remove_links(&self) -> Result<(), LoadError> {
        for (path, _) in pinned_links(&self.links)? {
            remove_link(&path)?;
        }
        Ok(())
    }

    /// Returns false if the program is attached already.
    fn attach_tcx(&self, device: u32, side: Side, program: &Program<'_>) -> Result<bool, LoadError> {
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
        // The link belongs to a device that was removed, or another process detached it.
        if path.exists() {
            remove_link(&path)?;
        }
        sys::obj_pin(link.as_fd(), &path).map_err(failed(&path, "BPF_OBJ_PIN"))?;
        Ok(true)
    }

    /// Returns false if the program is attached already.
    fn attach_filter(
        &mut self,
        device: u32,
        side: Side,
        program: &Program<'_>,
        own_qdiscs: &mut BTreeSet<u32>,
    ) -> Result<bool, LoadError> {
        let there = self
            .filters
            .at(device, side)
            .map_err(on_device(side, "listing filters"))?;
        if there == FilterSlot::Ours(program.id) {
            return Ok(false);
        }
        if there == FilterSlot::Empty {
            let is_new = self
                .filters
                .add_qdisc(device)
                .map_err(on_device(side, "adding clsact"))?;
            if is_new {
                own_qdiscs.insert(device);
            }
        }
        self.filters
            .attach(device, side, program.name, program.fd)
            .map_err(on_device(side, "adding a filter"))?;
        Ok(true)
    }
}

/// Replaces the programs of lb at all devices by those with the same names: those of pinned links, and the filters in the
/// network namespace of the calling thread.
///
/// # Errors
/// Returns a [`LoadError`] if a system call fails or a program cannot be loaded.
pub(super) fn replace(programs: &mut Ebpf, pins: &PinPath) -> Result<(), LoadError> {
    let names: BTreeMap<u32, String> = loaded_programs()
        .filter_map(|info| {
            let info = info.ok()?;
            Some((info.id(), info.name_as_str()?.to_owned()))
        })
        .collect();
    let mut replacement = |id: u32| -> Result<Option<&'static str>, LoadError> {
        for layer in [Layer::Link, Layer::Network] {
            let of_layer = Side::BOTH.map(|side| program_for(side, layer));
            if let Some(name) = of_layer
                .into_iter()
                .find(|name| names.get(&id).is_some_and(|is| is == name))
            {
                load_device_programs(programs, layer)?;
                return Ok(Some(name));
            }
        }
        Ok(None)
    };
    let mut links = Vec::new();
    for (path, device) in pinned_links(&pins.links())? {
        if let Some((link, id)) = pinned(&path, device)? {
            links.extend(replacement(id)?.map(|name| (path, link, name)));
        }
    }
    let mut filters = Filters::open().map_err(failed("(tc)", "netlink"))?;
    let mut places = Vec::new();
    for device in LinkSnapshot::take(false)
        .map_err(failed("(tc)", "listing devices"))?
        .indexes()
    {
        for side in Side::BOTH {
            if let FilterSlot::Ours(id) = filters.at(device, side).map_err(on_device(side, "listing filters"))? {
                places.extend(replacement(id)?.map(|name| (device, side, name)));
            }
        }
    }
    for (path, link, name) in links {
        match sys::link_update(link.as_fd(), program(programs, name)?.fd) {
            Err(error) if is_of_gone_device(&error) => {}
            result => result.map_err(failed(path, "BPF_LINK_UPDATE"))?,
        }
    }
    for (device, side, name) in places {
        match filters.attach(device, side, name, program(programs, name)?.fd) {
            Err(error) if is_of_gone_device(&error) => {}
            result => result.map_err(on_device(side, "replacing a filter"))?,
        }
    }
    Ok(())
}

/// Returns whether the kernel has tcx links, by creating one at a device that does not exist.
fn has_tcx(programs: &Ebpf) -> Result<bool, LoadError> {
    let program = program(programs, program_name::INGRESS)?;
    match sys::tcx_create(program.fd, 0, attach_type(Side::Ingress)) {
        // EINVAL: the hook does not exist, or the kernel was built without it.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(true),
        Err(error) => Err(on_device(Side::Ingress, "BPF_LINK_CREATE of a tcx link")(error)),
        Ok(_) => Ok(true),
    }
}

/// Returns whether the device was removed in the meantime. The next listing of devices does not contain it.
fn is_gone(error: &LoadError) -> bool {
    matches!(error, LoadError::Call { source, .. } if is_of_gone_device(source))
}

/// Returns whether an error is of a call on a device that was removed.
fn is_of_gone_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOLINK))
}

/// Detaches a link explicitly, since the kernel releases a link some time after its last pin.
fn remove_link(path: &Path) -> Result<(), LoadError> {
    if let Ok(link) = sys::obj_get(path) {
        sys::link_detach(link.as_fd()).ok();
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path, "unlink")(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes lb's filters of a device, and the qdisc if lb created it and it has no other filter.
fn remove_filters(filters: &mut Filters, device: u32, own_qdisc: bool) -> Result<(), LoadError> {
    let mut removed = false;
    for side in Side::BOTH {
        removed |= filters
            .remove(device, side)
            .map_err(on_device(side, "removing a filter"))?;
    }
    if removed {
        info!(device, "removed the filters of a device");
    }
    if own_qdisc {
        filters
            .remove_qdisc(device)
            .map_err(failed("(clsact)", "removing the qdisc"))?;
    }
    Ok(())
}

/// Removes lb's filters of all devices in the network namespace of the calling thread.
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

/// A program that is attached to a side of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceProgram {
    /// Mechanism that attached it.
    pub way: Way,
    /// Id of the program.
    pub program: u32,
    /// Tag of the program: a hash of its instructions.
    pub tag: u64,
}

/// Returns the programs of lb at the ingress and egress of each device in the network namespace of the calling thread.
///
/// # Errors
/// Returns [`LoadError::Call`] if a system call fails.
pub fn at_devices(
    pins: &PinPath,
    devices: impl IntoIterator<Item = u32>,
) -> Result<BTreeMap<u32, [Option<DeviceProgram>; 2]>, LoadError> {
    let tags: BTreeMap<u32, u64> = loaded_programs()
        .filter_map(|info| info.ok().map(|info| (info.id(), info.tag())))
        .collect();
    let mut filters = Filters::open().map_err(failed("(tc)", "netlink"))?;
    let mut program_at = |device, side| -> Result<Option<DeviceProgram>, LoadError> {
        let link = pinned(&pins.links().join(pin_name(side, device)), device)?;
        let (way, program) = match link {
            Some((_, program)) => (Way::Tcx, program),
            None => match filters.at(device, side).map_err(on_device(side, "listing filters"))? {
                FilterSlot::Ours(program) => (Way::Clsact, program),
                FilterSlot::Empty | FilterSlot::Foreign => return Ok(None),
            },
        };
        let tag = tags.get(&program).copied().unwrap_or_default();
        Ok(Some(DeviceProgram { way, program, tag }))
    };
    let mut at = BTreeMap::new();
    for device in devices {
        let [ingress, egress] = Side::BOTH;
        at.insert(device, [program_at(device, ingress)?, program_at(device, egress)?]);
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pin_names_contain_side_and_device() {
        for side in Side::BOTH {
            assert_eq!(parse_pin_name(&pin_name(side, 7)), Some((side, 7)));
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
            assert_eq!(parse_pin_name(other), None, "{other}");
        }
    }
}
