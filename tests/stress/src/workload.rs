//! The Services of a run, and the ways in which they change.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use fastrand::Rng;
use lb_agent::model::{Change, Object, ObjectId};
use lb_common::abi::FrontendKey;

use crate::in_process_agent::NODE;
use crate::objects::{ids, service, service_object, slice, slice_object};

/// A frontend that is looked up: always there, and served by backends whose address has `owner` as its second byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) key: FrontendKey,
    pub(crate) owner: u8,
}

const TCP: u8 = 6;
/// One Service has it all the time.
const FIXED: (&str, Ipv4Addr, u8) = ("fixed", Ipv4Addr::new(10, 96, 0, 1), 1);
/// Two Services claim it in turn.
const PASSING: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 96, 0, 2), 2);
const CLAIMANTS: [&str; 2] = ["left", "right"];
/// Backends of each of these three; one to eight of them serve at a time.
const BACKENDS: u8 = 16;
/// Services that nobody looks up: they fill FRONTENDS to 90 % and more, each with two entries.
const OTHERS: u8 = 66;
const PRESENT: u8 = 44;
/// What FRONTENDS cannot hold.
const CROWD: usize = 5;

/// What changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// Other endpoints of the Services that are looked up: sets are published, backends come and go.
    Endpoints,
    /// Other Services come and go: frontends are inserted and deleted, indexes, ids and slots used again.
    Services,
    /// The key of a frontend passes from one living Service to another.
    Pass,
    /// Settings of a Service change beside its sets.
    Settings,
    /// More Services come than FRONTENDS has room for, or they go again.
    Crowd,
}

impl ChangeKind {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Endpoints, Self::Services, Self::Pass, Self::Settings, Self::Crowd];

    /// Twenty changes, of every kind, in any order: those that are quick more often.
    pub(crate) fn round(random: &mut Rng) -> Vec<Self> {
        let mut round = Vec::new();
        for (kind, times) in Self::ALL.into_iter().zip([9, 5, 4, 1, 1]) {
            round.extend([kind].repeat(times));
        }
        random.shuffle(&mut round);
        round
    }

    /// A word for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoints",
            Self::Services => "services",
            Self::Pass => "passed keys",
            Self::Settings => "settings",
            Self::Crowd => "crowds",
        }
    }
}

/// All objects, as the source knows them.
pub(crate) struct Workload {
    objects: BTreeMap<ObjectId, Object>,
    random: Rng,
    present: Vec<u8>,
    absent: Vec<u8>,
    crowd: Vec<u8>,
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
            crowd: Vec::new(),
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

    /// What is looked up.
    pub(crate) fn targets() -> [Target; 2] {
        [(FIXED.1, FIXED.2), PASSING].map(|(address, owner)| Target {
            key: FrontendKey::new(address.into(), 80, TCP),
            owner,
        })
    }

    /// Everything that there is, as a source tells the next agent.
    pub(crate) fn all(&self) -> Vec<Change> {
        self.objects.values().cloned().map(Change::Set).collect()
    }

    /// Whether there is more than FRONTENDS has room for.
    pub(crate) fn is_crowded(&self) -> bool {
        !self.crowd.is_empty()
    }

    /// Something changes.
    pub(crate) fn change(&mut self, kind: ChangeKind) -> Vec<Change> {
        match kind {
            ChangeKind::Endpoints => {
                let at = [0, 0, 1, 2][self.random.usize(..4)];
                let endpoints = self.endpoints(at);
                self.set([endpoints])
            }
            ChangeKind::Services => self.swap_some(),
            ChangeKind::Pass => {
                self.owner = 1 - self.owner;
                let claims = self.claims();
                self.set(claims)
            }
            ChangeKind::Settings => {
                self.affinity = !self.affinity;
                let fixed = self.fixed();
                self.set([fixed])
            }
            ChangeKind::Crowd if self.is_crowded() => self.disperse(),
            ChangeKind::Crowd => {
                for _ in 0..CROWD {
                    let comes = take(&mut self.random, &mut self.absent);
                    self.crowd.push(comes);
                }
                let objects: Vec<_> = self.crowd.clone().into_iter().flat_map(|n| self.other(n)).collect();
                self.set(objects)
            }
        }
    }

    /// The crowd goes.
    pub(crate) fn disperse(&mut self) -> Vec<Change> {
        let gone = std::mem::take(&mut self.crowd);
        self.absent.extend(&gone);
        gone.into_iter().flat_map(|number| self.remove(number)).collect()
    }

    fn fixed(&self) -> Object {
        let mut fixed = service(FIXED.0, FIXED.1, &[("", 80)], 0);
        fixed.affinity_timeout = self.affinity.then_some(30);
        service_object(fixed)
    }

    /// Who has the port that passes: the only one that claims it, or the older of the two.
    fn claims(&mut self) -> [Object; 2] {
        let both = self.random.bool();
        [0, 1].map(|side| {
            let mut ports = vec![("own", [81, 82][side])];
            if side == self.owner || both {
                ports.push(("shared", 80));
            }
            service_object(service(
                CLAIMANTS[side],
                PASSING.0,
                &ports,
                i64::from(side != self.owner),
            ))
        })
    }

    /// New endpoints, never none, of one of the three that are looked up.
    fn endpoints(&mut self, at: usize) -> Object {
        let (name, owner, third, ports): (_, _, _, &[&str]) = match at {
            0 => (FIXED.0, FIXED.2, 0, &[""]),
            side => (CLAIMANTS[side - 1], PASSING.1, side as u8, &["own", "shared"]),
        };
        // Mostly of one size of ranges, so that one Service soon gets the range of another.
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

    /// Up to three go, and as many others come.
    fn swap_some(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        for _ in 0..=self.random.usize(..3) {
            let goes = take(&mut self.random, &mut self.present);
            let comes = take(&mut self.random, &mut self.absent);
            let objects = self.other(comes);
            changes.extend(self.set(objects));
            changes.extend(self.remove(goes));
            self.present.push(comes);
            self.absent.push(goes);
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
