//! Plans: the writes that turn the recorded content of the maps into the desired one. Pure, except that they allocate
//! indexes, ids and slots.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{
    Addr, Backend, BackendRef, BackendSlot, Frontend, FrontendKey, FrontendKind, Service, ServiceIndex, Set, SetWord,
    backend_flags, map_name, map_spec, service_flags, set_flags,
};
use lb_common::logic::generation;

use crate::actual::{Actual, ActualBackend, ActualPort, NameFields, SourceRangeState, backend_of, slot_of};
use crate::alloc::Range;
use crate::desired::{Desired, DesiredPort, SETS};
use crate::maps::MapError;
use crate::maps::prefix::Prefix;
use crate::names::PortId;
use crate::nodes::Nodes;
use crate::policy::{Member, Members};
use crate::sync::Writes;
use crate::writer::Usage;

/// One write, with the content to record after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// NAMES.
    Name(NameFields),
    /// BACKENDS: fills the entry of a new backend.
    Fill(Backend, ActualBackend),
    /// BACKENDS: changes membership or locality.
    Flags((IpAddr, u16), u16),
    /// BACKEND_SLOTS: fills a range that no published set contains yet.
    Slots(Range, Vec<BackendSlot>),
    /// SOURCE_RANGES: admits clients at load-balancer addresses. It comes before the flag that restricts them to
    /// admitted clients.
    AddSourceRange(IpNet),
    /// SERVICES: writes an index that no frontend leads to.
    Service(Service, [Members; 3]),
    /// FRONTENDS: takes the sets out, before SERVICES gets a flag that sockets have to obey: affinity, or source ranges.
    Hide,
    /// SERVICES: writes all fields except the set words.
    Settings(Service),
    /// SERVICES: publishes a new set.
    Publish(Set, SetWord, Members),
    /// FRONTENDS: publishes the sets to sockets. It follows the steps that change SERVICES, and comes before anything that the former
    /// sets lead to goes.
    Frontends,
    /// BACKENDS: withdraws a backend.
    Withdraw((IpAddr, u16)),
    /// SOURCE_RANGES: removes clients after a grace period, since a program that has read the flag may still look for
    /// them.
    RemoveSourceRanges(Vec<IpNet>),
}

/// The steps for one service port, in their order, and the allocations that they need.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// The service index.
    pub(crate) index: ServiceIndex,
    /// Whether the index is newly taken.
    pub(crate) new_index: bool,
    /// Newly taken ranges.
    pub(crate) new_ranges: Vec<Range>,
    /// Newly taken backend ids.
    pub(crate) new_ids: Vec<u32>,
    /// The writes.
    pub(crate) steps: Vec<Step>,
}

impl Plan {
    /// Frees the allocations of a plan of which nothing was written.
    pub(crate) fn cancel(self, actual: &mut Actual) {
        if self.new_index {
            actual.indexes.free(self.index.get());
        }
        self.new_ranges.into_iter().for_each(|range| actual.slots.free(range));
        self.new_ids.into_iter().for_each(|id| actual.ids.free(id));
    }
}

/// Plans the writes of one service port. The plan has no steps if the port is as desired.
///
/// # Errors
/// Returns [`MapError::Full`] if the maps have no room, or [`MapError::Unexpected`] if a set has more members than a
/// set word can hold. Nothing is allocated then.
pub(crate) fn service_port(id: &PortId, want: &DesiredPort, actual: &mut Actual) -> Result<Plan, MapError> {
    // Taken out for the time of planning, which borrows the allocators. A copy would cost more than the plan.
    let have = actual.ports.remove_entry(id);
    let mut plan = Plan::default();
    let result = add_steps(want, have.as_ref().map(|(_, port)| &**port), actual, &mut plan);
    actual.ports.extend(have);
    match result {
        Ok(()) => Ok(plan),
        Err(error) => {
            plan.cancel(actual);
            Err(error)
        }
    }
}

/// Returns the numbers of entries that the plan of a service port allocates. Frontends are not counted.
pub(crate) fn demand(want: &DesiredPort, have: Option<&ActualPort>) -> Usage {
    let is_known = |member: &Member| have.is_some_and(|have| have.backends.get(member.addr, member.port).is_some());
    let mut backends = BTreeSet::new();
    let mut slots = 0;
    for (i, set) in want.sets.iter().enumerate() {
        let new = set.members.iter().filter(|member| !is_known(member));
        backends.extend(new.map(|member| (member.addr, member.port)));
        let has_range = have.is_some_and(|have| range_of(&set.members, have).is_some());
        let is_shared = want.sets.iter().take(i).any(|other| other.members == set.members);
        if !has_range && !is_shared {
            slots += set.members.len() as u32;
        }
    }
    let draining = want.draining.iter().filter(|member| !is_known(member));
    backends.extend(draining.map(|member| (member.addr, member.port)));
    Usage {
        services: have.is_none().into(),
        frontends: 0,
        backends: backends.len() as u32,
        backend_slots: slots,
    }
}

/// Adds the steps to a plan.
fn add_steps(
    want: &DesiredPort,
    have: Option<&ActualPort>,
    actual: &mut Actual,
    plan: &mut Plan,
) -> Result<(), MapError> {
    // Without `..`, so that the compiler names this place for a new field. `wanted_flags` and `place_sets` read the sets.
    let DesiredPort {
        port,
        created: _,
        flags: port_flags,
        affinity_timeout,
        sets: _,
        draining: _,
        frontends: _,
        source_ranges,
    } = want;
    let index = match have {
        Some(have) => have.index,
        None => {
            let index = actual
                .indexes
                .alloc()
                .ok_or_else(|| MapError::full(&map_spec::SERVICES, actual.service_generations.len() as u32))?;
            plan.new_index = true;
            ServiceIndex::new(index)
        }
    };
    plan.index = index;
    let current = actual.service_generations[index.to_usize()];
    let service_generation = if generation::is_live(current) {
        current
    } else {
        generation::taken(current)
    };

    let named = NameFields {
        port: *port,
        generation: service_generation,
    };
    if have.is_none_or(|have| have.named != Some(named)) {
        plan.steps.push(Step::Name(named));
    }

    let flags = wanted_flags(want);
    let mut backends = BackendRefs::new();
    for (member, flags) in &flags {
        let key = (member.addr, member.port);
        if let Some(known) = have.and_then(|have| have.backends.get(member.addr, member.port)) {
            if known.flags != *flags {
                plan.steps.push(Step::Flags(key, *flags));
            }
            let id = known.id;
            let generation = actual.backend_generations[id as usize];
            backends.insert(key, BackendRef { id, generation });
        } else {
            let id = actual
                .ids
                .alloc()
                .ok_or_else(|| MapError::full(&map_spec::BACKENDS, actual.backend_generations.len() as u32))?;
            plan.new_ids.push(id);
            let generation = generation::taken(actual.backend_generations[id as usize]);
            let entry = backend_of(member, *flags, generation, index);
            plan.steps.push(Step::Fill(entry, ActualBackend { id, flags: *flags }));
            backends.insert(key, BackendRef { id, generation });
        }
    }

    let sets = place_sets(want, have, &backends, actual, plan)?;
    let is_correct =
        |net: &IpNet| have.is_some_and(|have| have.rare().source_ranges.get(net) == Some(&SourceRangeState::Correct));
    let missing = source_ranges.iter().filter(|net| !is_correct(net));
    plan.steps.extend(missing.copied().map(Step::AddSourceRange));
    let value = Service {
        internal: sets[0].0,
        external: sets[1].0,
        cluster: sets[2].0,
        flags: *port_flags,
        affinity_timeout: *affinity_timeout,
        generation: service_generation,
        pad: 0,
        reserved: [0; 3],
    };
    match have {
        None => plan.steps.push(Step::Service(value, sets.map(|(_, members)| members))),
        Some(have) => {
            let unset = |mut service: Service| {
                (service.internal, service.external, service.cluster) = Default::default();
                service
            };
            let has_settings = unset(have.value) != unset(value);
            if have.value.flags == 0 && value.flags != 0 {
                plan.steps.push(Step::Hide);
            }
            if has_settings {
                plan.steps.push(Step::Settings(value));
            }
            // Right after the flag, whatever fails later.
            let stays = |net: &IpNet| source_ranges.binary_search(net).is_ok();
            // If all clients are served from now on, entries that are waiting for removal start a new grace period: a
            // program that has read the flag before must find as many entries as it did.
            let opened = have.value.flags & !*port_flags & service_flags::SOURCE_RANGES != 0;
            let is_leaving = |state: &SourceRangeState| matches!(state, SourceRangeState::Leaving(_)) && !opened;
            let unwanted = have
                .rare()
                .source_ranges
                .iter()
                .filter(|(net, state)| !stays(net) && !is_leaving(state));
            let unwanted: Vec<_> = unwanted.map(|(net, _)| *net).collect();
            if !unwanted.is_empty() {
                plan.steps.push(Step::RemoveSourceRanges(unwanted));
            }
            let words = have.value.set_words();
            let mut has_sets = false;
            for (i, (word, members)) in sets.into_iter().enumerate() {
                if words[i] != word || have.sets[i].is_none() {
                    plan.steps.push(Step::Publish(SETS[i], word, members));
                    has_sets = true;
                }
            }
            if has_settings || has_sets || have.rare().former_sets.is_some() {
                plan.steps.push(Step::Frontends);
            }
            let known = have.backends.members().iter().map(|member| (member.addr, member.port));
            let gone = known.filter(|key| !backends.contains_key(key));
            plan.steps.extend(gone.map(Step::Withdraw));
        }
    }
    Ok(())
}

/// Returns all backends of a service port with their flags, sorted.
fn wanted_flags(want: &DesiredPort) -> Vec<(Member, u16)> {
    let mut all: BTreeMap<(IpAddr, u16), (Member, u16)> = BTreeMap::new();
    let sets = SETS
        .iter()
        .zip(want.sets.iter())
        .map(|(set, s)| (set.member_flag(), &s.members));
    for (flag, members) in sets.chain([(0, &want.draining)]) {
        for member in members.iter() {
            let local = if member.local { backend_flags::LOCAL } else { 0 };
            all.entry((member.addr, member.port)).or_insert((member, local)).1 |= flag;
        }
    }
    all.into_values().collect()
}

/// The backends of a plan by address and port, as slots refer to them.
type BackendRefs = BTreeMap<(IpAddr, u16), BackendRef>;

/// A planned set: its word and its members.
type PlannedSet = (SetWord, Members);

/// Finds a range for each set: its present one if the members are the same, that of another set with the same members,
/// or a new one.
fn place_sets(
    want: &DesiredPort,
    have: Option<&ActualPort>,
    backends: &BackendRefs,
    actual: &mut Actual,
    plan: &mut Plan,
) -> Result<[PlannedSet; 3], MapError> {
    let mut placed: [PlannedSet; 3] = Default::default();
    for (i, set) in want.sets.iter().enumerate() {
        let flags = if set.empty_drops { set_flags::EMPTY_DROPS } else { 0 };
        let len = u16::try_from(set.members.len()).map_err(|_| MapError::Unexpected {
            map: map_name::BACKEND_SLOTS,
            what: format!("{} endpoints in one set, {} at most", set.members.len(), u16::MAX),
        })?;
        let known = have
            .and_then(|have| range_of(&set.members, have))
            .map(|range| range.base);
        let new = placed[..i].iter().find(|(_, members)| *members == set.members);
        let base = match (set.members.is_empty(), known.or(new.map(|(word, _)| word.base))) {
            (true, _) => 0,
            (false, Some(base)) => base,
            (false, None) => {
                let range = actual
                    .slots
                    .alloc(len)
                    .ok_or_else(|| MapError::full(&map_spec::BACKEND_SLOTS, actual.slots.capacity()))?;
                plan.new_ranges.push(range);
                let slots = set
                    .members
                    .iter()
                    .map(|m| slot_of(&m, backends[&(m.addr, m.port)], plan.index))
                    .collect();
                plan.steps.push(Step::Slots(range, slots));
                range.base
            }
        };
        placed[i] = (SetWord { base, len, flags }, set.members.clone());
    }
    Ok(placed)
}

/// Returns the slots that have these members already.
fn range_of(members: &Members, have: &ActualPort) -> Option<Range> {
    let mut sets = have.sets.iter().zip(have.set_ranges());
    sets.find_map(|(known, range)| range.filter(|_| known.as_ref() == Some(members)))
}

/// The inputs of the plan of FRONTENDS, in addition to the record of the maps.
pub(crate) struct FrontendScope<'a> {
    pub(crate) desired: &'a Desired,
    /// Whether the source has delivered everything at least once.
    pub(crate) is_complete: bool,
    /// Service ports of an earlier run that keep their content.
    pub(crate) restored: &'a BTreeSet<Arc<PortId>>,
    /// Service ports that the maps have no room for.
    pub(crate) no_room: &'a BTreeSet<Arc<PortId>>,
}

impl FrontendScope<'_> {
    /// Returns whether a frontend of an earlier run stays, whichever Service claims it, because the source is incomplete.
    /// `restored`: indexes of restored ports that are not desired.
    fn is_restored(&self, key: FrontendKey, value: Frontend, restored: &BTreeSet<ServiceIndex>) -> bool {
        if self.is_complete {
            return false;
        }
        match FrontendKind::from_u8(value.kind) {
            Some(FrontendKind::Address) => key == FrontendKey::address_mark(key.addr),
            // Unless it is a node's address: this node's own addresses are known even before the source is complete.
            Some(FrontendKind::ExternalAddress) => {
                key == FrontendKey::address_mark(key.addr) && !self.desired.nodes().has_address(key.addr)
            }
            Some(_) => restored.contains(&value.service),
            None => false,
        }
    }

    /// Returns whether a frontend keeps its present service port because the port that it passes to could not be written.
    /// The next attempt may succeed, and until then the frontend must not miss. If the maps have no room, it is deleted:
    /// its present service port may be what takes the room.
    fn is_awaited(&self, key: FrontendKey, value: Frontend, actual: &Actual) -> bool {
        let claimant = self
            .desired
            .frontend(&key, |id| (!self.no_room.contains(id)).then(Default::default));
        let serves = |port: &ActualPort| port.index == value.service && port.is_written();
        claimant.is_some() && (value.is_mark() || actual.ports.values().any(|port| serves(port)))
    }
}

/// Plans the writes that make these frontends lead to their service ports.
pub(crate) fn frontends(
    keys: &BTreeSet<FrontendKey>,
    scope: &FrontendScope<'_>,
    actual: &Actual,
) -> Writes<FrontendKey, Frontend> {
    let undesired = scope.restored.iter().filter(|id| scope.desired.port(id).is_none());
    let restored: BTreeSet<ServiceIndex> = undesired
        .filter_map(|id| actual.ports.get(id))
        .map(|port| port.index)
        .collect();
    actual.frontends.plan(keys, |key, have| {
        let have = have.copied();
        let service_of = |id: &PortId| {
            let port = actual.ports.get(id)?;
            if port.is_written() {
                return Some((port.index, port.value));
            }
            // A frontend stays with its service port, and keeps its set, even if a write of that port failed.
            let stays = have.filter(|have| have.service == port.index || have.is_mark());
            stays.map(|have| (port.index, service_with_sets(have.set)))
        };
        match (have, scope.desired.frontend(key, service_of)) {
            (Some(old), want) if want != have && scope.is_restored(*key, old, &restored) => have,
            (Some(old), None) if scope.is_awaited(*key, old, actual) => have,
            (_, want) => want,
        }
    })
}

/// Returns a service that gives its frontends this set.
fn service_with_sets(set: SetWord) -> Service {
    Service {
        internal: set,
        external: set,
        cluster: set,
        ..Service::default()
    }
}

/// Plans the writes of CLUSTER_CIDRS at these keys. Until the source is complete it may have more Nodes to deliver, so
/// present flags stay.
pub(crate) fn cidrs(
    keys: &BTreeSet<Prefix<Addr>>,
    nodes: &Nodes,
    is_complete: bool,
    actual: &Actual,
) -> Writes<Prefix<Addr>, u32> {
    actual.cidrs.plan(keys, |cidr, have| {
        let stays = if is_complete { None } else { have.copied() };
        let want = nodes.flags(cidr);
        want.map(|flags| flags | stays.unwrap_or(0)).or(stays)
    })
}

#[cfg(test)]
mod tests;
