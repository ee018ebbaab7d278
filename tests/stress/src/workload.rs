//! The Services of a run, and their random changes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use fastrand::Rng;
use lb_common::abi::FrontendKey;
use lb_core::model::{Change, Object, ObjectId};

use crate::in_process_agent::NODE;
use crate::objects::{ids, service, service_object, slice, slice_object};

/// A frontend that is looked up. It always exists, and the second byte of the address of its backends is `owner`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) key: FrontendKey,
    pub(crate) owner: u8,
}

const TCP: u8 = 6;
/// Name, address and owner byte of a Service that has its frontend all the time.
const FIXED: (&str, Ipv4Addr, u8) = ("fixed", Ipv4Addr::new(10, 96, 0, 1), 1);
/// Address and owner byte of a frontend that two Services claim in turn.
const CONTESTED: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 96, 0, 2), 2);
/// The Services that claim it.
const CLAIMANTS: [&str; 2] = ["left", "right"];
/// Number of possible backends of each of these three Services; one to eight of them are endpoints at a time.
const BACKENDS: u8 = 16;
/// Number of Services that are not looked up. Each has two entries in FRONTENDS, which they fill to 90 % and more.
const OTHERS: u8 = 66;
/// How many of them exist at a time.
const PRESENT: u8 = 44;
/// Number of additional Services for which FRONTENDS has no room.
const OVERFLOW: usize = 5;

/// A kind of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// Other endpoints of a Service that is looked up: sets are published, backends added and removed.
    Endpoints,
    /// Other Services are added and removed: frontends are inserted and deleted; indexes, ids and slots are used again.
    Services,
    /// The key of a frontend moves from one existing Service to another.
    MoveFrontend,
    /// Settings of a Service change, but not its sets.
    Settings,
    /// More Services are added than FRONTENDS has room for, or they are removed again.
    Overflow,
}

impl ChangeKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 5] = [
        Self::Endpoints,
        Self::Services,
        Self::MoveFrontend,
        Self::Settings,
        Self::Overflow,
    ];

    /// Returns twenty changes in random order. Every kind is among them, the quick ones more often.
    pub(crate) fn round(random: &mut Rng) -> Vec<Self> {
        let mut round = Vec::new();
        for (kind, times) in Self::ALL.into_iter().zip([9, 5, 4, 1, 1]) {
            round.extend([kind].repeat(times));
        }
        random.shuffle(&mut round);
        round
    }

    /// Returns the name of the kind for reports.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoints",
            Self::Services => "services",
            Self::MoveFrontend => "moved frontends",
            Self::Settings => "settings",
            Self::Overflow => "overflows",
        }
    }
}

/// All objects of the source, and the choices for their changes.
pub(crate) struct Workload {
    objects: BTreeMap<ObjectId, Object>,
    random: Rng,
    present: Vec<u8>,
    absent: Vec<u8>,
    overflow: Vec<u8>,
    owner: usize,
    affinity: bool,
}

impl Workload {
    pub(crate) fn new(random: Rng) -> Self {
        let mut new = Self {
            objects: BTreeMap::new(),
            random,
            present: (0..PRESENT).collect(),
            absent: (PRESENT..OTHERS).collect(),
            overflow: Vec::new(),
            owner: 0,
            affinity: false,
        };
        let mut objects = vec![new.fixed()];
        objects.extend(new.claims());
        for at in 0..3 {
            objects.push(new.endpoints(at));
        }
        for number in new.present.clone() {
            objects.extend(new.other(number));
        }
        new.set(objects);
        new
    }

    /// Returns the frontends that are looked up.
    pub(crate) fn targets() -> [Target; 2] {
        [(FIXED.1, FIXED.2), CONTESTED].map(|(address, owner)| Target {
            key: FrontendKey::new(address.into(), 80, TCP),
            owner,
        })
    }

    /// Returns all objects, for the first batch of an agent.
    pub(crate) fn all(&self) -> Vec<Change> {
        self.objects.values().cloned().map(Change::Set).collect()
    }

    /// Returns whether there are more frontends than FRONTENDS has room for.
    pub(crate) fn is_overfull(&self) -> bool {
        !self.overflow.is_empty()
    }

    /// Makes a change of this kind and returns it.
    pub(crate) fn change(&mut self, kind: ChangeKind) -> Vec<Change> {
        match kind {
            ChangeKind::Endpoints => {
                let at = [0, 0, 1, 2][self.random.usize(..4)];
                let endpoints = self.endpoints(at);
                self.set([endpoints])
            }
            ChangeKind::Services => self.replace_some(),
            ChangeKind::MoveFrontend => {
                self.owner = 1 - self.owner;
                let claims = self.claims();
                self.set(claims)
            }
            ChangeKind::Settings => {
                self.affinity = !self.affinity;
                let fixed = self.fixed();
                self.set([fixed])
            }
            ChangeKind::Overflow if self.is_overfull() => self.end_overflow(),
            ChangeKind::Overflow => {
                for _ in 0..OVERFLOW {
                    let added = take(&mut self.random, &mut self.absent);
                    self.overflow.push(added);
                }
                let objects: Vec<_> = self.overflow.clone().into_iter().flat_map(|n| self.other(n)).collect();
                self.set(objects)
            }
        }
    }

    /// Removes the Services for which FRONTENDS has no room.
    pub(crate) fn end_overflow(&mut self) -> Vec<Change> {
        let removed = std::mem::take(&mut self.overflow);
        self.absent.extend(&removed);
        removed.into_iter().flat_map(|number| self.remove(number)).collect()
    }

    fn fixed(&self) -> Object {
        let mut fixed = service(FIXED.0, FIXED.1, &[("", 80)], 0);
        fixed.affinity_timeout = self.affinity.then_some(30);
        service_object(fixed)
    }

    /// Returns the two Services that claim the moving frontend. Its owner is the only one that claims it, or the older one.
    fn claims(&mut self) -> [Object; 2] {
        let both = self.random.bool();
        [0, 1].map(|side| {
            let mut ports = vec![("own", [81, 82][side])];
            if side == self.owner || both {
                ports.push(("shared", 80));
            }
            service_object(service(
                CLAIMANTS[side],
                CONTESTED.0,
                &ports,
                i64::from(side != self.owner),
            ))
        })
    }

    /// Returns new endpoints, at least one, of one of the three Services that are looked up.
    fn endpoints(&mut self, at: usize) -> Object {
        let (name, owner, third, ports): (_, _, _, &[&str]) = match at {
            0 => (FIXED.0, FIXED.2, 0, &[""]),
            side => (CLAIMANTS[side - 1], CONTESTED.1, side as u8, &["own", "shared"]),
        };
        // Most of these numbers need the same size of range, so that one Service soon gets the range of another.
        let len = self.random.choice([1, 2, 5, 6, 7, 8]).unwrap_or(8);
        let mut numbers: Vec<u8> = (0..BACKENDS).collect();
        self.random.shuffle(&mut numbers);
        let addresses: Vec<_> = numbers[..len]
            .iter()
            .map(|number| Ipv4Addr::new(10, owner, third, *number))
            .collect();
        slice_object(slice(name, ports, NODE, &addresses))
    }

    fn other_name(number: u8) -> String {
        format!("other-{number}")
    }

    fn other(&mut self, number: u8) -> [Object; 2] {
        let name = Self::other_name(number);
        let addresses: Vec<_> = (0..self.random.u8(1..=2))
            .map(|last| Ipv4Addr::new(10, 100 + number, 0, last))
            .collect();
        [
            service_object(service(&name, Ipv4Addr::new(10, 96, 1, number), &[("", 80)], 0)),
            slice_object(slice(&name, &[""], NODE, &addresses)),
        ]
    }

    /// Removes one to three Services, and adds as many others.
    fn replace_some(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for _ in 0..=self.random.usize(..3) {
            let removed = take(&mut self.random, &mut self.present);
            let added = take(&mut self.random, &mut self.absent);
            let objects = self.other(added);
            changes.extend(self.set(objects));
            changes.extend(self.remove(removed));
            self.present.push(added);
            self.absent.push(removed);
        }
        changes
    }

    fn set(&mut self, objects: impl IntoIterator<Item = Object>) -> Vec<Change> {
        let set = |object: Object| {
            self.objects.insert(object.id(), object.clone());
            Change::Set(object)
        };
        objects.into_iter().map(set).collect()
    }

    fn remove(&mut self, number: u8) -> Vec<Change> {
        ids(&Self::other_name(number))
            .into_iter()
            .map(|id| {
                self.objects.remove(&id);
                Change::Remove(id)
            })
            .collect()
    }
}

fn take(random: &mut Rng, from: &mut Vec<u8>) -> u8 {
    from.swap_remove(random.usize(..from.len()))
}
