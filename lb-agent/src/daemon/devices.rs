//! Programs at the node's devices, DEVICES and the reserved source ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Context as _;
use lb_common::abi::{State, device_flags, map_name};
use lb_core::model::{Problem, ProblemKind};
use tokio::sync::watch;
use tracing::info;

use crate::loader::{DeviceError, LoadError, PinPath, TcHooks};
use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::sys;
use crate::node::devices::{Patterns, Served};
use crate::node::links::LinkSnapshot;
use crate::node::ports::{PortRange, Reservation, ReservedPorts};

/// How packets are served at devices.
#[derive(Debug, Clone, Copy)]
pub struct PacketSettings {
    /// Source ports of packets that are sent to other nodes.
    pub snat_ports: PortRange,
    /// Whether programs may be attached by tcx (Linux 6.6 and later); by clsact otherwise.
    pub tcx: bool,
}

/// The programs at devices, updated as devices and addresses change.
pub(super) struct Devices {
    patterns: Patterns,
    snapshots: watch::Receiver<LinkSnapshot>,
    /// The snapshot that was last attached to.
    snapshot: LinkSnapshot,
    hooks: TcHooks,
    ports: SourcePorts,
    /// Addresses of the Node object at the last attachment; `None` before the first.
    node: Option<Vec<IpAddr>>,
    served: BTreeMap<u32, Served>,
    /// Devices with a clsact qdisc that the agent added.
    own_qdiscs: BTreeSet<u32>,
}

impl Devices {
    /// Opens the hooks of the calling thread's network namespace. Nothing is attached yet.
    pub(super) fn open(
        settings: PacketSettings,
        patterns: Patterns,
        maps: &BpfMaps,
        pins: &PinPath,
        snapshots: watch::Receiver<LinkSnapshot>,
    ) -> anyhow::Result<Self> {
        let hooks = TcHooks::open(maps.programs(), pins, settings.tcx)?;
        let own = sys::netns_cookie().context("SO_NETNS_COOKIE")?;
        let before = maps.pinned().state();
        if before.is_some_and(|state| state.netns != own) {
            info!("the pinned links belong to another network namespace and are dropped");
            hooks.remove_links()?;
        }
        let devices = maps.pinned().devices()?.into_iter();
        let own_qdiscs = devices.filter(|(_, device)| device.flags & device_flags::OWN_QDISC != 0);
        Ok(Self {
            patterns,
            snapshots,
            snapshot: LinkSnapshot::default(),
            hooks,
            ports: SourcePorts::new(settings.snat_ports, maps.pinned(), before.as_ref()),
            node: None,
            served: BTreeMap::new(),
            own_qdiscs: own_qdiscs.map(|(index, _)| index).collect(),
        })
    }

    /// Attaches programs to new devices and writes DEVICES; to be called before anything is served at their addresses.
    /// Returns the problems, or `None` if there was nothing to do: no device or address has changed, and no `check` was
    /// requested.
    pub(super) fn attach(&mut self, maps: &mut BpfMaps, node: &[IpAddr], check: bool) -> Option<Vec<Problem>> {
        let changed = self.snapshots.has_changed().unwrap_or(false);
        if !changed && !check && self.node.as_deref() == Some(node) {
            return None;
        }
        let is_first = self.node.is_none();
        self.node = Some(node.to_vec());
        if changed || is_first {
            self.snapshot = self.snapshots.borrow_and_update().clone();
            self.served = self.snapshot.served(&self.patterns);
        }
        let ports = self.ports.apply(maps.pinned());
        // Before the attachment, so that a program finds the entry of its device.
        let mut problems = self.write(maps);
        let before = self.own_qdiscs.clone();
        let failed = self
            .hooks
            .attach(maps.programs_mut(), &self.served, &mut self.own_qdiscs);
        problems.extend(self.problems(failed));
        if self.own_qdiscs != before {
            problems.extend(self.write(maps));
        }
        problems.extend(ports);
        Some(problems)
    }

    /// Detaches programs from devices that are no longer served; to be called after nothing is served at their
    /// addresses. Returns the problems.
    pub(super) fn detach(&mut self, maps: &mut BpfMaps) -> Vec<Problem> {
        let before = self.own_qdiscs.clone();
        let present = self.snapshot.indexes();
        let failed = self.hooks.detach(&self.served, present, &mut self.own_qdiscs);
        let mut problems = self.problems(failed);
        if self.own_qdiscs != before {
            problems.extend(self.write(maps));
        }
        problems
    }

    /// The devices and addresses at the last attachment.
    pub(super) fn snapshot(&self) -> &LinkSnapshot {
        &self.snapshot
    }

    /// Whether the agent reserved the source ports in CONFIG itself, so that `cleanup` may release them.
    pub(super) fn own_ports(&self) -> bool {
        self.ports.own == Some(self.ports.range)
    }

    /// Writes DEVICES, and returns the problems.
    fn write(&mut self, maps: &mut BpfMaps) -> Vec<Problem> {
        let mut devices = self.snapshot.sources(self.node.as_deref().unwrap_or_default());
        self.own_qdiscs.retain(|index| devices.contains_key(index));
        for index in &self.own_qdiscs {
            if let Some(device) = devices.get_mut(index) {
                device.flags |= device_flags::OWN_QDISC;
            }
        }
        match maps.write_devices(&devices) {
            Ok(0) => Vec::new(),
            Ok(missing) => {
                let message = format!("no room for {missing} devices: packets are not forwarded through them");
                vec![problem(map_name::DEVICES, &message)]
            }
            Err(error) => vec![problem(map_name::DEVICES, &error)],
        }
    }

    /// The problems of an attachment or detachment, by name of the device.
    fn problems(&self, result: Result<Vec<DeviceError>, LoadError>) -> Vec<Problem> {
        let failed = match result {
            Ok(failed) => failed,
            Err(error) => return vec![problem("devices", &error)],
        };
        let name = |device| match self.served.get(&device) {
            Some(served) => served.name.clone(),
            None => format!("device {device}"),
        };
        let problems = failed
            .into_iter()
            .map(|DeviceError { device, error }| problem(name(device), &error));
        problems.collect()
    }
}

fn problem(place: impl Into<String>, message: &impl ToString) -> Problem {
    Problem::new(place, message.to_string()).kind(ProblemKind::Node)
}

/// The reservation of the source ports in the kernel, and their range in CONFIG.
struct SourcePorts {
    range: PortRange,
    reserved: ReservedPorts,
    /// The range that the agent added to the kernel's reserved ports; others were reserved before it started.
    own: Option<PortRange>,
}

impl SourcePorts {
    fn new(range: PortRange, maps: &PinnedMaps, before: Option<&State>) -> Self {
        let was_own = before.is_some_and(|state| state.own_ports != 0);
        let own = maps.snat_ports().filter(|_| was_own).map(|old| PortRange {
            first: *old.start(),
            last: *old.end(),
        });
        Self {
            range,
            reserved: ReservedPorts::new(),
            own,
        }
    }

    /// Reserves the ports if necessary, and writes the usable range to CONFIG. Returns the problem, if any.
    fn apply(&mut self, maps: &PinnedMaps) -> Option<Problem> {
        let Self { range, reserved, .. } = self;
        let Reservation { usable, own, problem } = reserved.replace(*range, self.own);
        self.own = own;
        let ports = usable.then_some(self.range.first..=self.range.last);
        if maps.snat_ports() != ports {
            maps.write_snat_ports(ports);
        }
        problem.map(|message| self::problem("net.ipv4.ip_local_reserved_ports", &message))
    }
}
