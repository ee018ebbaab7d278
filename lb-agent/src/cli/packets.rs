//! What `run` does for packets beside the maps of Services: programs at devices, DEVICES, and source ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Context as _;
use clap::Args;
use lb_common::abi::{State, device_flags, map_name};
use tokio::sync::watch;
use tracing::info;

use crate::loader::{LoadError, PinPath, TcHooks, Trouble};
use crate::maps::bpf::{BpfMaps, PinnedMaps};
use crate::maps::sys;
use crate::node::devices::{Patterns, Served};
use crate::node::links::Snapshot;
use crate::node::ports::{PortRange, ReservedPorts, Settled};
use lb_core::model::{Problem, ProblemKind};

/// How packets are served.
#[derive(Debug, Args)]
pub(super) struct PacketArgs {
    /// Ports that packets to other nodes get for a source: kept from the node's own sockets by
    /// net.ipv4.ip_local_reserved_ports
    #[arg(long, value_name = "FIRST-LAST", default_value_t = PortRange::default())]
    snat_ports: PortRange,
    /// Attach to devices by clsact, as before Linux 6.6; for tests
    #[arg(long, hide = true)]
    no_tcx: bool,
}

/// Programs at devices and what they need, kept as the node's devices are.
pub(super) struct Packets {
    patterns: Patterns,
    snapshots: watch::Receiver<Snapshot>,
    /// What was there when it was looked last.
    snapshot: Snapshot,
    hooks: TcHooks,
    ports: SourcePorts,
    /// Addresses of the Node object, when it was looked last; `None` before the first look.
    node: Option<Vec<IpAddr>>,
    served: BTreeMap<u32, Served>,
    /// Devices whose clsact qdisc is the agent's.
    own_qdiscs: BTreeSet<u32>,
    problems: Vec<Problem>,
}

impl Packets {
    /// For the network namespace of the calling thread. Nothing is attached.
    pub(super) fn open(
        args: &PacketArgs,
        patterns: Patterns,
        maps: &BpfMaps,
        pins: &PinPath,
        snapshots: watch::Receiver<Snapshot>,
    ) -> anyhow::Result<Self> {
        let hooks = TcHooks::open(maps.programs(), pins, !args.no_tcx)?;
        let own = sys::netns_cookie().context("SO_NETNS_COOKIE")?;
        let before = maps.pinned().state();
        if before.is_some_and(|state| state.netns != own) {
            info!("what was attached is in another network namespace");
            hooks.forget()?;
        }
        let devices = maps.pinned().devices()?.into_iter();
        let own_qdiscs = devices.filter(|(_, device)| device.flags & device_flags::OWN_QDISC != 0);
        Ok(Self {
            patterns,
            snapshots,
            snapshot: Snapshot::default(),
            hooks,
            ports: SourcePorts::new(args.snat_ports, maps.pinned(), before.as_ref()),
            node: None,
            served: BTreeMap::new(),
            own_qdiscs: own_qdiscs.map(|(index, _)| index).collect(),
            problems: Vec::new(),
        })
    }

    /// Puts programs at devices that are new, before anything is served at their addresses. False where there is nothing
    /// to do: no device or address has changed, and nobody asks to `look`.
    pub(super) fn attach(&mut self, maps: &mut BpfMaps, node: &[IpAddr], look: bool) -> bool {
        let news = self.snapshots.has_changed().unwrap_or(false);
        if !news && !look && self.node.as_deref() == Some(node) {
            return false;
        }
        let is_first = self.node.is_none();
        self.node = Some(node.to_vec());
        if news || is_first {
            self.snapshot = self.snapshots.borrow_and_update().clone();
            self.served = self.snapshot.served(&self.patterns);
        }
        self.problems.clear();
        self.ports.apply(maps.pinned());
        // First, so that a program knows its device.
        self.write(maps);
        let before = self.own_qdiscs.clone();
        let troubles = self
            .hooks
            .attach(maps.programs_mut(), &self.served, &mut self.own_qdiscs);
        self.note(troubles);
        if self.own_qdiscs != before {
            self.write(maps);
        }
        true
    }

    /// Takes programs from devices that are not served any more, after nothing is served at their addresses.
    pub(super) fn detach(&mut self, maps: &mut BpfMaps) {
        let before = self.own_qdiscs.clone();
        let there = self.snapshot.indexes();
        let troubles = self.hooks.detach(&self.served, there, &mut self.own_qdiscs);
        self.note(troubles);
        if self.own_qdiscs != before {
            self.write(maps);
        }
    }

    /// The devices and addresses to which that belongs.
    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// What could not be done.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().chain(&self.ports.problem)
    }

    /// Whether the agent has reserved the ports that CONFIG says, and not somebody before it.
    pub(super) fn own_ports(&self) -> bool {
        self.ports.own == Some(self.ports.range)
    }

    /// Makes DEVICES say what there is now.
    fn write(&mut self, maps: &mut BpfMaps) {
        let mut devices = self.snapshot.sources(self.node.as_deref().unwrap_or_default());
        self.own_qdiscs.retain(|index| devices.contains_key(index));
        for index in &self.own_qdiscs {
            if let Some(device) = devices.get_mut(index) {
                device.flags |= device_flags::OWN_QDISC;
            }
        }
        match maps.pinned_mut().write_devices(&devices) {
            Ok(0) => {}
            Ok(missing) => {
                let message = format!("{missing} devices do not fit: no packet is sent out there");
                self.problems.push(problem(map_name::DEVICES, &message));
            }
            Err(error) => self.problems.push(problem(map_name::DEVICES, &error)),
        }
    }

    fn note(&mut self, troubles: Result<Vec<Trouble>, LoadError>) {
        let troubles = troubles.unwrap_or_else(|error| {
            self.problems.push(problem("devices", &error));
            Vec::new()
        });
        for Trouble { device, error } in troubles {
            let name = self.served.get(&device).map(|served| served.name.clone());
            let name = name.unwrap_or_else(|| format!("device {device}"));
            self.problems.push(problem(name, &error));
        }
    }
}

fn problem(place: impl Into<String>, message: &impl ToString) -> Problem {
    Problem::new(place, message.to_string()).kind(ProblemKind::Node)
}

/// The range of source ports, on its way into the kernel.
struct SourcePorts {
    range: PortRange,
    reserved: ReservedPorts,
    /// What was reserved by the agent, and not by somebody before it.
    own: Option<PortRange>,
    problem: Option<Problem>,
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
            problem: None,
        }
    }

    /// Sees to it that the ports are reserved, and tells the programs.
    fn apply(&mut self, maps: &PinnedMaps) {
        let Self { range, reserved, .. } = self;
        let Settled { usable, own, problem } = reserved.settle(*range, self.own);
        self.own = own;
        self.problem = problem.map(|message| self::problem("net.ipv4.ip_local_reserved_ports", &message));
        let ports = usable.then_some(self.range.first..=self.range.last);
        if maps.snat_ports() != ports {
            maps.write_snat_ports(ports);
        }
    }
}
