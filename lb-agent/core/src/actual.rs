//! The agent's record of the content of the maps. It spares reading the maps back at each change, and is built from a
//! dump of them at start.

mod backends;
mod filter;
mod references;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{
    Addr, Backend, BackendRef, BackendSlot, Frontend, FrontendKey, Name, Service, ServiceIndex, SetWord, SizedMap,
    SourceRange, backend_flags, set_flags,
};
use lb_common::logic::generation;

pub(crate) use self::backends::{ActualBackend, BackendMap, Backends};
pub(crate) use self::filter::FilterOwners;
use self::references::References;
use crate::alloc::{Indexes, Range, SlotRanges};
use crate::desired::{DesiredSet, PerSet, with_set_of};
use crate::maps::prefix::Prefix;
use crate::maps::resize::base_generation;
use crate::maps::{Capacities, Dump, Epoch};
use crate::model::{ObjectKey, Protocol};
use crate::names::{PortId, name_of, port_id};
use crate::policy::{Member, Members};
use crate::sync::Synced;

/// The fields of an entry of NAMES that are not part of the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NameFields {
    pub(crate) port: u16,
    pub(crate) generation: u32,
}

impl NameFields {
    /// Reads an entry of NAMES; `None` if it is not the entry of this identity.
    fn of(id: &PortId, name: &Name) -> Option<Self> {
        let Name { port, generation, .. } = *name;
        (*name == name_of(id, port, generation)).then_some(Self { port, generation })
    }
}

/// An entry of SOURCE_RANGES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceRangeState {
    /// The network is admitted.
    Correct,
    /// No longer wanted since a request for a grace period, after which it is removed: a running program may still look
    /// it up.
    Leaving(Epoch),
    /// The entry is wrong.
    Wrong,
}

/// A service index in use.
#[derive(Debug, Clone)]
pub(crate) struct ActualPort {
    pub(crate) index: ServiceIndex,
    /// The entry of SERVICES.
    pub(crate) value: Service,
    /// The entry of NAMES; `None` if that is missing or wrong.
    pub(crate) named: Option<NameFields>,
    /// Content of the slots of each set, in the order of [`crate::desired::SETS`]; `None` if that is wrong, so that the set has to
    /// be written again.
    pub(crate) sets: PerSet<Option<Members>>,
    pub(crate) backends: Backends,
    /// `None` if the fields are empty.
    rare: Option<Box<RareFields>>,
}

/// The fields of an [`ActualPort`] that are empty in nearly all service ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RareFields {
    /// Sets that frontends may still have, and that SERVICES does not have any more; `None` if all frontends have the present ones.
    pub(crate) former_sets: Option<BTreeSet<Range>>,
    /// The entries of SOURCE_RANGES.
    pub(crate) source_ranges: BTreeMap<IpNet, SourceRangeState>,
}

impl RareFields {
    const EMPTY: Self = Self {
        former_sets: None,
        source_ranges: BTreeMap::new(),
    };
}

impl ActualPort {
    /// Creates the record of an index of which only the entries of SERVICES and NAMES are known.
    pub(crate) fn new(index: ServiceIndex, value: Service, named: Option<NameFields>) -> Self {
        Self {
            index,
            value,
            named,
            sets: PerSet::default(),
            backends: Backends::default(),
            rare: None,
        }
    }

    /// Returns the fields that are empty in nearly all service ports.
    pub(crate) fn rare(&self) -> &RareFields {
        static EMPTY: RareFields = RareFields::EMPTY;
        self.rare.as_deref().unwrap_or(&EMPTY)
    }

    /// Changes the fields that are empty in nearly all service ports.
    pub(crate) fn change_rare(&mut self, change: impl FnOnce(&mut RareFields)) {
        let mut rare = self.rare.take().unwrap_or_else(|| Box::new(RareFields::EMPTY));
        change(&mut rare);
        self.rare = Some(rare).filter(|rare| **rare != RareFields::EMPTY);
    }

    /// Records that frontends may have these sets, and others than SERVICES.
    pub(crate) fn add_former_sets(&mut self, ranges: impl IntoIterator<Item = Range>) {
        self.change_rare(|rare| rare.former_sets.get_or_insert_default().extend(ranges));
    }

    /// Returns whether a frontend may lead here: SERVICES was written, and the content of its sets is known.
    pub(crate) fn is_written(&self) -> bool {
        generation::is_live(self.value.generation) && self.is_known()
    }

    /// Returns whether the content of every set is known.
    pub(crate) fn is_known(&self) -> bool {
        self.sets.iter().all(Option::is_some)
    }

    /// Returns the published sets, as far as their content is known, and the backends that are in none of them.
    pub(crate) fn published(&self) -> (PerSet<DesiredSet>, Members) {
        let words = self.value.set_words();
        let sets = [0, 1, 2].map(|i| DesiredSet {
            members: self.sets[i].clone().unwrap_or_default(),
            empty_drops: words[i].flags & set_flags::EMPTY_DROPS != 0,
        });
        let members = self.backends.iter().map(|(member, backend)| Member {
            local: backend.flags & backend_flags::LOCAL != 0,
            ..member
        });
        let draining = members
            .filter(|member| !sets.iter().any(|set| set.members.iter().any(|known| known == *member)))
            .collect();
        (sets.into(), draining)
    }

    /// Returns the slots of each set, in the order of [`crate::desired::SETS`]; `None` if the set is empty or the content of its
    /// slots is unknown.
    pub(crate) fn set_ranges(&self) -> [Option<Range>; 3] {
        let words = self.value.set_words();
        [0, 1, 2].map(|i| {
            let SetWord { base, len, .. } = words[i];
            (self.sets[i].is_some() && len != 0).then_some(Range { base, len })
        })
    }

    /// Returns the ranges of its sets, present and former, without duplicates.
    pub(crate) fn ranges(&self) -> BTreeSet<Range> {
        let present = self.set_ranges().into_iter().flatten();
        present
            .chain(self.rare().former_sets.iter().flatten().copied())
            .collect()
    }
}

/// Entries without an owning service port, left by an agent that died during a change or by writes from outside. Sets
/// with unknown content may still lead to them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Orphans {
    /// Entries of NAMES for indexes that SERVICES does not have.
    pub(crate) names: BTreeSet<ServiceIndex>,
    /// Backends that are live.
    pub(crate) backends: BTreeSet<u32>,
    /// Slots, each a range of its own.
    pub(crate) slots: BTreeSet<Range>,
    /// Entries of SOURCE_RANGES that are not networks, or of indexes that SERVICES does not have. No service uses them.
    pub(crate) source_ranges: BTreeSet<Prefix<SourceRange>>,
}

/// The content of the maps, as far as the agent wrote or adopted it.
#[derive(Debug)]
pub(crate) struct Actual {
    /// Boxed, since a large part of a hash table is empty.
    pub(crate) ports: HashMap<Arc<PortId>, Box<ActualPort>>,
    /// FRONTENDS; written by [`Actual::set_frontend`] only, which records what leads to each service.
    pub(crate) frontends: Synced<FrontendKey, Frontend>,
    /// The frontends that lead to each service index.
    pub(crate) references: References,
    /// CLUSTER_CIDRS.
    pub(crate) cidrs: Synced<Prefix<Addr>, u32>,
    /// NODE_ADDRS.
    pub(crate) node_addrs: BTreeSet<Addr>,
    /// FILTER.
    pub(crate) filter: FilterOwners,
    pub(crate) slots: SlotRanges,
    /// Numbers of service indexes.
    pub(crate) indexes: Indexes,
    /// Backend ids.
    pub(crate) ids: Indexes,
    /// Generation of each index and id in the maps, including those that are not in use.
    pub(crate) service_generations: Vec<u32>,
    pub(crate) backend_generations: Vec<u32>,
}

impl Actual {
    /// Adopts the content of the maps. Any entry may be wrong; wrong entries are recorded as such, so that the next
    /// application of the desired state corrects them.
    ///
    /// An index that is live or named or has source ranges, but has no owner, becomes a service port with a name that
    /// no Service can have. It is then removed as a Service that was deleted.
    pub(crate) fn adopt(dump: &Dump, capacities: Capacities) -> (Self, Orphans) {
        let mut actual = Self {
            ports: HashMap::new(),
            frontends: Synced::new(dump.frontends.clone()),
            references: References::of(&dump.frontends),
            cidrs: Synced::new(dump.cluster_cidrs.clone()),
            node_addrs: dump.node_addrs.clone(),
            filter: FilterOwners::of(dump),
            slots: SlotRanges::new(capacities[SizedMap::BackendSlots]),
            indexes: Indexes::new(capacities[SizedMap::Services]),
            ids: Indexes::new(capacities[SizedMap::Backends]),
            service_generations: dump.services.iter().map(|s| s.generation).collect(),
            backend_generations: dump.backends.iter().map(|b| b.generation).collect(),
        };
        let mut orphans = Orphans::default();
        let mut names: Vec<_> = dump.names.iter().collect();
        // If two have one identity, an agent died between adding a Service again and clearing the first one. Frontends
        // lead to the new one.
        names.sort_by_key(|(index, _)| (!actual.references.lead_to(**index), **index));
        for (index, name) in names {
            let Some(entry) = dump.service(*index) else {
                orphans.names.insert(*index);
                continue;
            };
            let id = port_id(name).filter(|id| !index.is_none() && !actual.ports.contains_key(id));
            let id = id.unwrap_or_else(|| orphan_id(*index));
            let port = ActualPort::new(*index, *entry, NameFields::of(&id, name));
            actual.ports.insert(Arc::new(id), Box::new(port));
        }
        let mut sources = adopt_sources(dump, &mut orphans);
        for (index, entry) in dump.indexed_services() {
            let in_use = generation::is_live(entry.generation) || sources.contains_key(&index);
            if in_use && !dump.names.contains_key(&index) {
                let port = ActualPort::new(index, *entry, None);
                actual.ports.insert(Arc::new(orphan_id(index)), Box::new(port));
            }
        }
        for port in actual.ports.values_mut() {
            actual.indexes.claim(port.index.get());
            let source_ranges = sources.remove(&port.index).unwrap_or_default();
            port.change_rare(|rare| rare.source_ranges = source_ranges);
        }
        actual.adopt_backends(dump, &mut orphans);
        actual.adopt_sets(dump, &mut orphans);
        actual.adopt_sets_in_frontends(dump, &mut orphans);
        (actual, orphans)
    }

    /// Adopts the sets in frontends. An agent that died may have left some that are not those of SERVICES any more.
    fn adopt_sets_in_frontends(&mut self, dump: &Dump, orphans: &mut Orphans) {
        let mut ports: HashMap<ServiceIndex, &mut ActualPort> =
            self.ports.values_mut().map(|port| (port.index, &mut **port)).collect();
        for frontend in dump.frontends.values() {
            let port = ports.get_mut(&frontend.service).filter(|_| !frontend.is_mark());
            let service = port.as_ref().map(|port| port.value).unwrap_or_default();
            let is_present = *frontend == with_set_of(*frontend, &service);
            if is_present {
                continue;
            }
            if let Some(port) = port {
                port.add_former_sets([]);
            }
            orphans.slots.extend(claim_each(&mut self.slots, frontend.set));
        }
    }

    fn adopt_backends(&mut self, dump: &Dump, orphans: &mut Orphans) {
        let mut owners: HashMap<ServiceIndex, BackendMap> = self
            .ports
            .values()
            .map(|port| (port.index, BackendMap::new()))
            .collect();
        for (id, backend) in (0_u32..)
            .zip(&dump.backends)
            .filter(|(_, b)| generation::is_live(b.generation))
        {
            let key = (backend.addr.into(), backend.port);
            let owner = owners.get_mut(&backend.service).filter(|all| !all.contains_key(&key));
            self.ids.claim(id);
            match owner {
                Some(all) if id != 0 && generation::is_sealed(backend) => {
                    let known = ActualBackend {
                        id,
                        flags: backend.flags,
                    };
                    all.insert(key, known);
                }
                _ => {
                    orphans.backends.insert(id);
                }
            }
        }
        for port in self.ports.values_mut() {
            if let Some(all) = owners.get(&port.index) {
                port.backends = Backends::of(all, []);
            }
        }
    }

    fn adopt_sets(&mut self, dump: &Dump, orphans: &mut Orphans) {
        let mut unknown = Vec::new();
        for port in self.ports.values_mut() {
            for (i, word) in port.value.set_words().into_iter().enumerate() {
                let Some(members) = read_set(dump, port, word) else {
                    unknown.push(word);
                    continue;
                };
                if word.len != 0 {
                    let range = Range {
                        base: word.base,
                        len: word.len,
                    };
                    let is_shared = port.set_ranges().contains(&Some(range));
                    if !is_shared && !self.slots.claim(range) {
                        unknown.push(word);
                        continue;
                    }
                }
                port.sets.set(i, Some(members));
            }
        }
        // Nothing is written to these slots until the sets lead elsewhere.
        for word in unknown {
            orphans.slots.extend(claim_each(&mut self.slots, word));
        }
    }

    /// Returns the content of ranges with slots that do not have their service in the maps, with the first slot of each. If an agent
    /// died while it added the services, only the last slots of a range lack theirs.
    pub(crate) fn slots_without_service(&self, dump: &Dump) -> BTreeMap<u32, Vec<BackendSlot>> {
        let mut all = BTreeMap::new();
        for port in self.ports.values() {
            for (range, members) in port.set_ranges().into_iter().zip(port.sets.iter()) {
                let (Some(range), Some(members)) = (range, members) else {
                    continue;
                };
                let slots = dump.slots.iter().skip(range.base as usize);
                if slots.take(range.len.into()).any(|slot| slot.service.is_none()) {
                    let slot = |m: Member| {
                        let id = port.backends.get(m.addr, m.port)?.id;
                        let generation = self.backend_generations[id as usize];
                        Some(slot_of(&m, BackendRef { id, generation }, port.index))
                    };
                    all.insert(range.base, members.iter().filter_map(slot).collect());
                }
            }
        }
        all
    }

    /// Returns the smallest number of entries that each map can have; zero for maps that programs fill.
    pub(crate) fn needed(&self) -> Capacities {
        Capacities::uniform(0)
            .with(SizedMap::Services, self.indexes.end())
            .with(SizedMap::Backends, self.ids.end())
            .with(SizedMap::BackendSlots, self.slots.end())
            .with(SizedMap::Frontends, self.frontends.entries().len() as u32)
    }

    /// Records that the maps have other numbers of entries, with the same content.
    pub(crate) fn resize(&mut self, capacities: Capacities) {
        let [services, backends, slots] =
            [SizedMap::Services, SizedMap::Backends, SizedMap::BackendSlots].map(|map| capacities[map]);
        self.slots.resize(slots);
        self.indexes.resize(services);
        self.ids.resize(backends);
        resize_generations(&mut self.service_generations, services);
        resize_generations(&mut self.backend_generations, backends);
    }

    /// Rebuilds the trees of frontends in as few tree nodes as possible. One tree is freed before the other is rebuilt: the nodes of
    /// both are mixed in memory, and only larger free blocks can be returned to the kernel.
    pub(crate) fn compact(&mut self) {
        self.references = References::default();
        self.frontends.compact();
        self.references = References::of(self.frontends.entries());
    }

    /// Records a frontend that was written, `None` for a deletion.
    pub(crate) fn set_frontend(&mut self, key: FrontendKey, value: Option<Frontend>) {
        let before = self.frontends.set(key, value);
        self.references.change(key, before, value);
        match (before, value) {
            (None, Some(_)) => self.filter.add(key.addr.into()),
            (Some(_), None) => self.filter.remove(key.addr.into()),
            (None, None) | (Some(_), Some(_)) => {}
        }
    }
}

/// Claims the slots of a set that nothing else has, each as a range of its own.
fn claim_each(slots: &mut SlotRanges, word: SetWord) -> Vec<Range> {
    let all = word.base..word.base.saturating_add(word.len.into());
    all.map(|base| Range { base, len: 1 })
        .filter(|slot| slots.claim(*slot))
        .collect()
}

/// Changes the number of generations, as a move changes those of the entries in the map.
fn resize_generations(generations: &mut Vec<u32>, len: u32) {
    let len = len as usize;
    let first = generations.first().copied().unwrap_or(0);
    let dropped = generations.drain(len.min(generations.len())..);
    let base = base_generation(first, dropped);
    if let Some(first) = generations.first_mut() {
        *first = base;
    }
    generations.resize(len, base);
}

/// Returns the entries of SOURCE_RANGES by service index.
fn adopt_sources(dump: &Dump, orphans: &mut Orphans) -> HashMap<ServiceIndex, BTreeMap<IpNet, SourceRangeState>> {
    let mut all: HashMap<ServiceIndex, BTreeMap<IpNet, SourceRangeState>> = HashMap::new();
    for (range, value) in &dump.source_ranges {
        let index = range.data.service;
        let is_there = dump.service(index).is_some();
        let Some(net) = range.network().filter(|_| is_there) else {
            orphans.source_ranges.insert(*range);
            continue;
        };
        let state = if *value == 0 {
            SourceRangeState::Correct
        } else {
            SourceRangeState::Wrong
        };
        all.entry(index).or_default().insert(net, state);
    }
    all
}

/// Returns the members of a published set, if every slot agrees with a backend of this port.
fn read_set(dump: &Dump, port: &ActualPort, word: SetWord) -> Option<Members> {
    let base = word.base as usize;
    let slots = dump.slots.get(base..base.checked_add(usize::from(word.len))?)?;
    let members: Option<Vec<Member>> = slots
        .iter()
        .map(|slot| {
            let (addr, local) = (IpAddr::from(slot.addr), slot.flags == backend_flags::LOCAL);
            let id = port.backends.get(addr, slot.port)?.id;
            let generation = dump.backends.get(id as usize)?.generation;
            let member = Member {
                addr,
                port: slot.port,
                local,
            };
            let wanted = slot_of(&member, BackendRef { id, generation }, port.index);
            // A build of layout 3 did not write the service.
            let service = if slot.service.is_none() {
                slot.service
            } else {
                port.index
            };
            (*slot == BackendSlot { service, ..wanted }).then_some(member)
        })
        .collect();
    let members = members.filter(|members| members.is_sorted())?;
    let members: Members = members.into_iter().collect();
    let all = port.backends.members();
    Some(if *all == members { all.clone() } else { members })
}

/// Returns the slot of a member.
pub(crate) fn slot_of(member: &Member, backend: BackendRef, service: ServiceIndex) -> BackendSlot {
    BackendSlot {
        addr: Addr::from(member.addr),
        port: member.port,
        flags: if member.local { backend_flags::LOCAL } else { 0 },
        backend,
        service,
    }
}

/// Returns the entry of BACKENDS of a member with these flags.
pub(crate) fn backend_of(member: &Member, flags: u16, generation: u32, service: ServiceIndex) -> Backend {
    let addr = Addr::from(member.addr);
    Backend {
        addr,
        port: member.port,
        flags,
        service,
        generation,
        seal: generation::seal(addr, member.port, service, generation),
    }
}

/// Returns the identity of an index without an owner.
fn orphan_id(index: ServiceIndex) -> PortId {
    PortId {
        service: ObjectKey::new("", &format!("(stray index {index})")),
        port_name: "".into(),
        protocol: Protocol::Tcp,
        ipv6: false,
    }
}

#[cfg(test)]
mod tests;
