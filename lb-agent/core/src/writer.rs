//! The writer of the maps: carries out plans in the order of the update protocol, records each successful write, and
//! reuses indexes, ids and slots only after a grace period.
//!
//! Order on creation: NAMES, BACKENDS, BACKEND_SLOTS, SOURCE_RANGES, SERVICES, FILTER, FRONTENDS. On removal: FRONTENDS, a
//! grace period, then the rest. A change of sets is published to SERVICES, then to FRONTENDS, before a backend is withdrawn. The
//! writer records the content of the maps after each write that succeeded. It repeats a failed write at the next occasion, and
//! the result is the same wherever the agent dies.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use lb_common::abi::{Addr, FilterBit, Frontend, FrontendKey, Service, ServiceIndex, SetWord, SizedMap, map_spec};
use lb_common::logic::generation;
use tracing::{debug, warn};

use crate::actual::{Actual, ActualPort, BackendMap, Backends, Orphans, SourceRangeState};
use crate::alloc::Range;
use crate::desired::{Desired, DesiredPort, SETS, Touched, with_set_of};
use crate::maps::prefix::Prefix;
use crate::maps::{Capacities, Dump, Epoch, MapError, Maps};
use crate::model::{Problem, ProblemKind};
use crate::names::{PortId, name_of};
use crate::places;
use crate::plan::{self, Plan, Step};
use crate::policy::Members;
use crate::state::{LARGE_BATCH, State};
use crate::sync::Writes;

/// Something that is out of use, but that a running program may still read.
#[derive(Debug)]
enum PendingFree {
    /// A slot range: free after the grace period.
    Range(Range),
    /// A withdrawn backend: its id is free after the grace period.
    Backend(u32),
    /// A service port that no frontend leads to: cleared after the grace period.
    Port(Box<ActualPort>),
    /// Source ranges of a service port: removed after the grace period.
    SourceRanges(Arc<PortId>),
    /// A bit of FILTER that no address has: cleared after the grace period.
    FilterBit(FilterBit),
}

/// How much of the maps is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Service indexes.
    pub services: u32,
    /// Frontends, including the marks of service addresses.
    pub frontends: u32,
    /// Backends.
    pub backends: u32,
    /// Slots in the ranges of sets.
    pub backend_slots: u32,
}

impl Usage {
    /// Returns the numbers of entries in use by the content of the maps alone. Those that wait for a grace period before they
    /// are free do not count.
    #[must_use]
    pub fn of(dump: &Dump) -> Self {
        let live = |generation: &u32| generation::is_live(*generation);
        let words = dump.services.iter().flat_map(Service::set_words);
        // Sets with the same members share one range.
        let ranges: BTreeSet<_> = words
            .map(|word| (word.base, word.len))
            .filter(|(_, len)| *len != 0)
            .collect();
        Self {
            services: dump
                .services
                .iter()
                .map(|service| service.generation)
                .filter(live)
                .count() as u32,
            frontends: dump.frontends.len() as u32,
            backends: dump
                .backends
                .iter()
                .map(|backend| backend.generation)
                .filter(live)
                .count() as u32,
            // After a write from outside the ranges may overlap.
            backend_slots: ranges
                .iter()
                .fold(0, |sum: u32, (_, len)| sum.saturating_add((*len).into())),
        }
    }

    /// Returns these numbers by map, with zero for maps that programs fill.
    #[must_use]
    pub const fn entries(&self) -> Capacities {
        let Self {
            services,
            frontends,
            backends,
            backend_slots,
        } = *self;
        Capacities::uniform(0)
            .with(SizedMap::Services, services)
            .with(SizedMap::Frontends, frontends)
            .with(SizedMap::Backends, backends)
            .with(SizedMap::BackendSlots, backend_slots)
    }
}

/// The one writer of the maps that hold Services, and its record of their content.
pub(crate) struct Writer<M> {
    maps: M,
    actual: Actual,
    /// In the order of the grace periods.
    pending_free: VecDeque<(Epoch, PendingFree)>,
    /// Bits of FILTER that no address has, with the request for the grace period after which they are cleared.
    unused_bits: BTreeMap<FilterBit, Epoch>,
    /// Grace period after the last deletion of a frontend: no insertion before it has passed.
    last_deletion: Option<Epoch>,
    /// Service ports that could not be written, with the reason. The writer repeats them at every occasion.
    failed_ports: BTreeMap<Arc<PortId>, String>,
    /// Service ports of an earlier run that the source has not delivered yet, or not their endpoints. They keep their
    /// content until the source is complete.
    restored: BTreeSet<Arc<PortId>>,
    /// Entries without an owner. They stay until it is certain that nothing leads to them.
    orphans: Orphans,
    /// Whether no batch was written yet: the first one compares everything that an earlier run left.
    first_apply: bool,
    withdrawals: u64,
}

impl<M: Maps> Writer<M> {
    /// Adopts the content of the maps. Blocks for one grace period, since an agent that died may have freed something
    /// just before.
    ///
    /// # Errors
    /// If the maps cannot be read, or the grace period fails.
    pub(crate) fn adopt(mut maps: M) -> Result<Self, MapError> {
        let epoch = maps.grace_begin();
        maps.grace_wait(epoch)?;
        let dump = maps.dump()?;
        let (actual, orphans) = Actual::adopt(&dump, maps.capacities());
        // A build that does not have FILTER may have written the rest.
        for bit in actual.filter.bits().filter(|bit| !dump.filter.contains(bit)) {
            maps.set_filter_bit(bit)?;
        }
        // Those of layout 3 do not have their service, without which programs do not use the sets in frontends.
        for (base, slots) in actual.slots_without_service(&dump) {
            maps.write_slots(base, &slots)?;
        }
        let unused: Vec<_> = actual
            .filter
            .bits()
            .filter(|bit| actual.filter.is_unused(*bit))
            .collect();
        let mut writer = Self {
            maps,
            restored: actual.ports.keys().cloned().collect(),
            orphans,
            actual,
            pending_free: VecDeque::new(),
            unused_bits: BTreeMap::new(),
            last_deletion: None,
            failed_ports: BTreeMap::new(),
            first_apply: true,
            withdrawals: 0,
        };
        unused.into_iter().for_each(|bit| writer.free_unused_bit(bit));
        Ok(writer)
    }

    /// Makes NODE_ADDRS equal to `wanted`, and returns the number of addresses that did not fit.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub(crate) fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        for addr in wanted {
            if !self.actual.node_addrs.contains(addr) {
                self.set_filter_bit((*addr).into())?;
                self.actual.filter.add((*addr).into());
                self.actual.node_addrs.insert(*addr);
            }
        }
        let missing = self.maps.write_node_addrs(wanted)?;
        let gone: Vec<_> = self.actual.node_addrs.difference(wanted).copied().collect();
        for addr in gone {
            self.actual.node_addrs.remove(&addr);
            self.actual.filter.remove(addr.into());
            self.free_unused_bit(addr.into());
        }
        Ok(missing)
    }

    /// Sets a bit of FILTER, unless it is set.
    fn set_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        if !self.actual.filter.is_set(bit) {
            self.maps.set_filter_bit(bit)?;
            self.actual.filter.set(bit);
        }
        Ok(())
    }

    /// Clears a bit of FILTER after a grace period, if no address has it.
    fn free_unused_bit(&mut self, bit: FilterBit) {
        if self.actual.filter.is_unused(bit) {
            let epoch = self.free_later(PendingFree::FilterBit(bit));
            self.unused_bits.insert(bit, epoch);
        }
    }

    /// Writes the changes of a batch. `completed`: whether the source became complete with it.
    pub(crate) fn write_batch(&mut self, state: &State, mut touched: Touched, completed: bool) {
        for id in &touched.ports {
            // The source delivered it and removed it again.
            if state.desired().port(id).is_none() {
                self.restored.remove(id);
            }
        }
        if completed {
            self.restored.clear();
        }
        if self.first_apply || completed {
            self.first_apply = false;
            touched.ports.extend(self.actual.ports.keys().cloned());
            touched.frontends.extend(self.actual.frontends.entries().keys());
            touched.cidrs.extend(self.actual.cidrs.entries().keys());
            touched
                .cidrs
                .extend(state.desired().nodes().cidrs().map(|(cidr, _)| cidr));
        }
        let is_large = touched.frontends.len() >= LARGE_BATCH;
        self.write(state, touched);
        if is_large {
            self.actual.compact();
        }
    }

    /// Makes the maps agree with the desired state in the touched keys and in those that failed before.
    pub(crate) fn write(&mut self, state: &State, mut touched: Touched) {
        self.free_pending();
        self.remove_orphaned_source_ranges();
        let mut no_room = BTreeSet::new();
        touched.ports.extend(std::mem::take(&mut self.failed_ports).into_keys());
        let retried: Vec<_> = self.actual.frontends.take_failed().collect();
        touched.frontends.extend(&retried);
        touched.cidrs.extend(self.actual.cidrs.take_failed());
        // Before anything that makes programs look up whether a source is inside the cluster.
        self.write_cidrs(state, &touched.cidrs);
        let mut oldest_first: Vec<_> = touched.ports.iter().collect();
        oldest_first.sort_by_cached_key(|id| state.desired().age_rank(id));
        for id in oldest_first {
            let Some(want) = self.wanted(state.desired(), id) else {
                continue;
            };
            let result = match plan::service_port(id, &want, &mut self.actual) {
                Err(error @ MapError::Full { .. }) if !self.pending_free.is_empty() => {
                    debug!(%id, %error, "waiting for a grace period that frees room");
                    self.drain_pending(Self::free_pending)
                        .and_then(|()| plan::service_port(id, &want, &mut self.actual))
                }
                other => other,
            };
            let result = result.and_then(|plan| self.execute(id, plan));
            if let Err(error) = result {
                self.failed_ports.insert(Arc::clone(id), error.to_string());
                if matches!(error, MapError::Full { .. }) {
                    self.empty_unknown_sets(id);
                    no_room.insert(Arc::clone(id));
                }
            }
            // From now on they may lead to this port; if the write failed, they may have to lead elsewhere.
            touched.frontends.extend(want.frontends.iter().map(|(key, _)| *key));
        }
        let scope = plan::FrontendScope {
            desired: state.desired(),
            is_complete: state.is_complete(),
            restored: &self.restored,
            no_room: &no_room,
        };
        let mut writes = plan::frontends(&touched.frontends, &scope, &self.actual);
        let entries = self.actual.frontends.entries().len() + writes.inserts.len();
        if entries > self.maps.capacities()[SizedMap::Frontends] as usize {
            writes
                .inserts
                .sort_by_cached_key(|(key, _)| state.desired().frontend_age_rank(key));
        }
        self.write_frontends(writes);
        // Some may not be wanted any more.
        for key in retried {
            if !self.actual.frontends.failed().contains_key(&key) {
                self.free_unused_bit(key.addr.into());
            }
        }
        self.remove_ports(state.desired(), &touched.ports);
        self.withdraw_orphans(state);
    }

    /// Frees entries after their grace period, and repeats failed writes.
    pub(crate) fn reclaim(&mut self, state: &State) {
        let passed = self.maps.grace_passed();
        let ready = self.pending_free.front().is_some_and(|(epoch, _)| *epoch <= passed);
        let Actual { frontends, cidrs, .. } = &self.actual;
        let failed = !(self.failed_ports.is_empty() && frontends.failed().is_empty() && cidrs.failed().is_empty());
        if ready || failed {
            self.write(state, Touched::default());
        }
    }

    /// Waits until nothing is left to be freed, except for what fails repeatedly.
    ///
    /// # Errors
    /// If a grace period fails.
    pub(crate) fn settle(&mut self, state: &State) -> Result<(), MapError> {
        self.drain_pending(|writer| writer.reclaim(state))
    }

    /// Waits for the grace periods of `pending_free` and calls `free` after each wait.
    fn drain_pending(&mut self, mut free: impl FnMut(&mut Self)) -> Result<(), MapError> {
        // Clearing a service port withdraws its backends, and their ids need a second grace period.
        for _ in 0..4 {
            let Some((epoch, _)) = self.pending_free.back() else {
                break;
            };
            let epoch = *epoch;
            self.maps.grace_wait(epoch)?;
            free(self);
        }
        Ok(())
    }

    /// Returns the problems of writes that failed.
    pub(crate) fn problems(&self, desired: &Desired) -> Vec<Problem> {
        let ports = self.failed_ports.iter().map(|(id, why)| {
            let message = format!("the maps are not up to date: {why}");
            let problem = Problem::new(places::of_port(id), message);
            problem.of(&id.service).kind(ProblemKind::Map)
        });
        let frontends = self.actual.frontends.failed().iter().map(|(key, why)| {
            let owner = desired.owner(key);
            let place = places::of_frontend(owner.map(|id| &**id), key);
            let problem = Problem::new(place, format!("the maps are not up to date: {why}")).kind(ProblemKind::Map);
            match owner {
                Some(id) => problem.of(&id.service),
                None => problem,
            }
        });
        let cidrs = self.actual.cidrs.failed().iter().map(|(cidr, why)| {
            let place = match cidr.network() {
                Some(net) => format!("network {net}"),
                None => format!("network {}, {} bits", cidr.data, cidr.len),
            };
            let message = format!("the maps are not up to date: {why}");
            Problem::new(place, message).kind(ProblemKind::Map)
        });
        ports.chain(frontends).chain(cidrs).collect()
    }

    /// Returns whether the maps serve any Service, from this run or an earlier one.
    pub(crate) fn is_serving(&self) -> bool {
        !self.actual.ports.is_empty()
    }

    /// Returns the number of backends that were withdrawn so far.
    pub(crate) fn withdrawals(&self) -> u64 {
        self.withdrawals
    }

    /// Returns the maps.
    pub(crate) fn maps(&self) -> &M {
        &self.maps
    }

    /// Returns the maps, for writes that are not part of the update protocol.
    pub(crate) fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Returns the numbers of entries in use while the touched keys are written: those of now, which are freed later, and the
    /// new ones. The cost follows the number of touched keys.
    pub(crate) fn demand(&self, state: &State, touched: &Touched) -> Usage {
        let (mut usage, _) = self.usage();
        let mut frontends: BTreeSet<FrontendKey> = BTreeSet::new();
        let failed = self.failed_ports.keys().filter(|id| !touched.ports.contains(*id));
        for id in touched.ports.iter().chain(failed) {
            let Some(want) = state.desired().port(id) else { continue };
            let have = self.actual.ports.get(id);
            let new = plan::demand(want, have.map(|port| &**port));
            usage.services += new.services;
            usage.backends += new.backends;
            usage.backend_slots += new.backend_slots;
            frontends.extend(want.frontends.iter().map(|(key, _)| *key));
        }
        let failed = self.actual.frontends.failed().keys();
        let others = touched.frontends.iter().chain(failed);
        frontends.extend(others.filter(|key| state.desired().owner(key).is_some()));
        let known = self.actual.frontends.entries();
        let is_new = |key: &&FrontendKey| !known.contains_key(*key);
        usage.frontends += frontends.iter().filter(is_new).count() as u32;
        usage
    }

    /// Returns the smallest number of entries that each map can have; zero for maps that programs fill.
    pub(crate) fn needed(&self) -> Capacities {
        self.actual.needed()
    }

    /// Continues with maps of another size that have the same content.
    ///
    /// # Errors
    /// Returns the error of `replace`, after which the maps are the same as before.
    pub(crate) fn replace_maps<T, E>(&mut self, replace: impl FnOnce(&mut M) -> Result<T, E>) -> Result<T, E> {
        let result = replace(&mut self.maps);
        self.actual.resize(self.maps.capacities());
        result
    }

    /// Returns how much of the maps is in use.
    pub(crate) fn usage(&self) -> (Usage, Capacities) {
        let usage = Usage {
            services: self.actual.indexes.used(),
            frontends: self.actual.frontends.entries().len() as u32,
            backends: self.actual.ids.used(),
            backend_slots: self.actual.slots.used(),
        };
        (usage, self.maps.capacities())
    }

    /// Returns whether any write has failed, for tests.
    #[cfg(any(test, feature = "test-support"))]
    pub(crate) fn failures(&self) -> Failures<'_> {
        Failures {
            ports: &self.failed_ports,
            frontends: self.actual.frontends.failed(),
            cidrs: self.actual.cidrs.failed(),
        }
    }

    /// Frees entries after their grace period.
    fn free_pending(&mut self) {
        let passed = self.maps.grace_passed();
        let mut failed = Vec::new();
        while let Some((epoch, entry)) = self.pending_free.pop_front_if(|(epoch, _)| *epoch <= passed) {
            match entry {
                PendingFree::Range(range) => self.actual.slots.free(range),
                PendingFree::Backend(id) => self.actual.ids.free(id),
                // An address may have the bit again, or may have had it since.
                PendingFree::FilterBit(bit)
                    if !self.actual.filter.is_unused(bit) || self.unused_bits.get(&bit) != Some(&epoch) => {}
                PendingFree::FilterBit(bit) => match self.maps.clear_filter_bit(bit) {
                    Ok(()) => {
                        self.actual.filter.clear(bit);
                        self.unused_bits.remove(&bit);
                    }
                    Err(error) => {
                        warn!(?bit, %error, "cannot clear a bit of the filter; trying again later");
                        failed.push((epoch, PendingFree::FilterBit(bit)));
                    }
                },
                PendingFree::Port(mut port) => {
                    if let Err(error) = self.clear(&mut port) {
                        warn!(index = port.index.get(), %error, "cannot clear a service index; trying again later");
                        failed.push((epoch, PendingFree::Port(port)));
                    }
                }
                PendingFree::SourceRanges(id) => {
                    if let Err(error) = self.remove_leaving_source_ranges(&id, passed) {
                        warn!(%id, %error, "cannot remove a source range; trying again later");
                        failed.push((epoch, PendingFree::SourceRanges(id)));
                    }
                }
            }
        }
        for entry in failed.into_iter().rev() {
            self.pending_free.push_front(entry);
        }
    }

    /// Removes the source ranges of a service port that no running program can look for any more.
    fn remove_leaving_source_ranges(&mut self, id: &Arc<PortId>, passed: Epoch) -> Result<(), MapError> {
        // If the port is gone, its ranges went with it.
        let Some(port) = self.actual.ports.get_mut(id) else {
            return Ok(());
        };
        let is_due = |at: &SourceRangeState| matches!(at, SourceRangeState::Leaving(since) if *since <= passed);
        let due: Vec<_> = port
            .rare()
            .source_ranges
            .iter()
            .filter(|(_, at)| is_due(at))
            .map(|(net, _)| *net)
            .collect();
        for net in due {
            self.maps.delete_source_range(Prefix::of(port.index, net))?;
            port.change_rare(|rare| _ = rare.source_ranges.remove(&net));
        }
        Ok(())
    }

    /// Frees something after a grace period that begins now, and returns the request for it.
    fn free_later(&mut self, entry: PendingFree) -> Epoch {
        let epoch = self.maps.grace_begin();
        self.pending_free.push_back((epoch, entry));
        epoch
    }

    /// Withdraws a backend by changing its generation. Its id is free after a grace period.
    fn withdraw(&mut self, id: u32) -> Result<(), MapError> {
        let next = generation::withdrawn(self.actual.backend_generations[id as usize]);
        self.maps.withdraw_backend(id, next)?;
        self.actual.backend_generations[id as usize] = next;
        self.withdrawals += 1;
        if id != 0 {
            self.free_later(PendingFree::Backend(id));
        }
        Ok(())
    }

    /// Clears the entries of a service port that no frontend leads to any more, and frees its service index.
    fn clear(&mut self, port: &mut ActualPort) -> Result<(), MapError> {
        let index = port.index;
        let generation = generation::withdrawn(self.actual.service_generations[index.to_usize()]);
        let empty = Service {
            generation,
            ..Service::default()
        };
        self.maps.write_service(index, empty)?;
        self.actual.service_generations[index.to_usize()] = generation;
        let mut backends = std::mem::take(&mut port.backends).to_map();
        let mut withdrawn = Ok(());
        while let Some(backend) = backends.first_entry() {
            withdrawn = self.withdraw(backend.get().id);
            if withdrawn.is_err() {
                break;
            }
            backend.remove();
        }
        // The next attempt must not withdraw the others again: until then their ids may be those of other backends.
        port.backends = Backends::of(&backends, []);
        withdrawn?;
        for net in port.rare().source_ranges.keys() {
            self.maps.delete_source_range(Prefix::of(index, *net))?;
        }
        self.maps.delete_name(index)?;
        for range in port.ranges() {
            self.actual.slots.free(range);
        }
        if !index.is_none() {
            self.actual.indexes.free(index.get());
        }
        Ok(())
    }

    /// Writes CLUSTER_CIDRS: new and different entries first, then deletions.
    fn write_cidrs(&mut self, state: &State, cidrs: &BTreeSet<Prefix<Addr>>) {
        let writes = plan::cidrs(cidrs, state.desired().nodes(), state.is_complete(), &self.actual);
        let (updates, deletes) = writes.updates();
        for (cidr, flags) in updates {
            let result = self.maps.write_cluster_cidr(cidr, flags);
            self.record_cidr(cidr, Some(flags), result);
        }
        for cidr in deletes {
            let result = self.maps.delete_cluster_cidr(cidr);
            self.record_cidr(cidr, None, result);
        }
    }

    fn record_cidr(&mut self, cidr: Prefix<Addr>, flags: Option<u32>, result: Result<(), MapError>) {
        match result {
            Ok(()) => drop(self.actual.cidrs.set(cidr, flags)),
            Err(error) => self.actual.cidrs.set_failed(cidr, error),
        }
    }

    /// Removes entries of SOURCE_RANGES that no service can have, before the kernel confuses them with valid ones.
    fn remove_orphaned_source_ranges(&mut self) {
        for range in std::mem::take(&mut self.orphans.source_ranges) {
            if let Err(error) = self.maps.delete_source_range(range) {
                warn!(?range, %error, "cannot remove a source range of an earlier run; trying again later");
                self.orphans.source_ranges.insert(range);
            }
        }
    }

    /// Empties those sets of a service port that have slots with unknown content. That makes room for new slots.
    fn empty_unknown_sets(&mut self, id: &Arc<PortId>) {
        let Some(port) = self.actual.ports.get(id) else { return };
        let index = port.index;
        let sets = SETS.into_iter().zip(port.sets.iter());
        let unknown: Vec<_> = sets.filter(|(_, at)| at.is_none()).map(|(set, _)| set).collect();
        for set in unknown {
            let empty = Step::Publish(set, SetWord::default(), Members::default());
            if let Err(error) = self.step(id, index, empty, &mut BackendMap::new()) {
                warn!(%id, %error, "cannot empty a set that has slots with unknown content");
            }
        }
    }

    /// Returns the content that a service port should have: the desired one. But while the source is incomplete and has
    /// delivered no endpoint of a restored port, the port keeps the backends that it has from an earlier run.
    fn wanted(&mut self, desired: &Desired, id: &PortId) -> Option<DesiredPort> {
        let mut want = desired.port(id)?.clone();
        if !self.restored.contains(id) {
            return Some(want);
        }
        if want.has_backends() {
            self.restored.remove(id);
        } else if let Some(have) = self.actual.ports.get(id) {
            (want.sets, want.draining) = have.published();
        }
        Some(want)
    }

    /// Withdraws entries without an owner, once every set leads only to slots of its own.
    fn withdraw_orphans(&mut self, state: &State) {
        if !state.is_complete()
            || self.orphans == Orphans::default()
            || !self.actual.ports.values().all(|port| port.is_known())
            || self.leads_to_orphans()
        {
            return;
        }
        let Orphans {
            names,
            backends,
            slots,
            source_ranges,
        } = std::mem::take(&mut self.orphans);
        self.orphans.source_ranges = source_ranges;
        for index in names {
            if let Err(error) = self.maps.delete_name(index) {
                warn!(index = index.get(), %error, "cannot remove a name of an earlier run; trying again later");
                self.orphans.names.insert(index);
            }
        }
        for id in backends {
            if let Err(error) = self.withdraw(id) {
                warn!(id, %error, "cannot withdraw a backend of an earlier run; trying again later");
                self.orphans.backends.insert(id);
            }
        }
        for range in slots {
            self.free_later(PendingFree::Range(range));
        }
    }

    /// Writes the steps of a plan and records each. Afterwards, frees the allocations of the plan that no write used.
    fn execute(&mut self, id: &Arc<PortId>, plan: Plan) -> Result<(), MapError> {
        let Plan {
            index,
            new_index,
            new_ranges,
            new_ids,
            steps,
        } = plan;
        if steps.is_empty() {
            return Ok(());
        }
        let old_ranges = self.actual.ports.get(id).map(|port| port.ranges()).unwrap_or_default();
        let mut backends = self
            .actual
            .ports
            .get(id)
            .map(|port| port.backends.to_map())
            .unwrap_or_default();
        let mut refused = None;
        let mut steps = steps.into_iter();
        let result = steps.try_for_each(|step| match step {
            // A network that cannot be admitted is refused until the next attempt. The other steps go on, but no network
            // is removed.
            Step::AddSourceRange(_) => {
                refused = self.step(id, index, step, &mut backends).err().or(refused.take());
                Ok(())
            }
            Step::RemoveSourceRanges(_) if refused.is_some() => Ok(()),
            step => self.step(id, index, step, &mut backends),
        });
        let result = result.and_then(|()| refused.map_or(Ok(()), Err));

        let port = self.actual.ports.get_mut(id);
        let known: BTreeSet<u32> = backends.values().map(|backend| backend.id).collect();
        let port = port.map(|port| {
            port.backends = Backends::of(&backends, port.sets.iter().flatten());
            &*port
        });
        let in_use = port.map(|port| port.ranges()).unwrap_or_default();
        if new_index && port.is_none() {
            self.actual.indexes.free(index.get());
        }
        // No program has seen a range that was never published.
        new_ranges
            .into_iter()
            .filter(|range| !in_use.contains(range))
            .for_each(|range| self.actual.slots.free(range));
        new_ids
            .into_iter()
            .filter(|id| !known.contains(id))
            .for_each(|id| self.actual.ids.free(id));
        for range in old_ranges.difference(&in_use) {
            self.free_later(PendingFree::Range(*range));
        }
        result
    }

    /// Performs one write and records it; writes of backends are recorded in `backends`.
    fn step(
        &mut self,
        id: &Arc<PortId>,
        index: ServiceIndex,
        step: Step,
        backends: &mut BackendMap,
    ) -> Result<(), MapError> {
        if let Step::Name(named) = step {
            self.maps
                .write_name(index, &name_of(id, named.port, named.generation))?;
            let new = || Box::new(ActualPort::new(index, Service::default(), None));
            self.actual.ports.entry(Arc::clone(id)).or_insert_with(new).named = Some(named);
            return Ok(());
        }
        if matches!(step, Step::Frontends | Step::Hide) {
            let Some(port) = self.actual.ports.get_mut(id) else {
                return Ok(());
            };
            port.add_former_sets([]);
            let is_hidden = matches!(step, Step::Hide);
            let service = if is_hidden { Service::default() } else { port.value };
            self.store_sets(index, &service)?;
            if let Some(port) = self.actual.ports.get_mut(id).filter(|_| !is_hidden) {
                port.change_rare(|rare| rare.former_sets = None);
            }
            return Ok(());
        }
        // The first step of a new port writes its name and creates its record.
        let Some(port) = self.actual.ports.get_mut(id) else {
            return Ok(());
        };
        match step {
            Step::Name(_) | Step::Frontends | Step::Hide => {}
            Step::Fill(value, new) => {
                self.maps.fill_backend(new.id, value)?;
                self.actual.backend_generations[new.id as usize] = value.generation;
                backends.insert((IpAddr::from(value.addr), value.port), new);
            }
            Step::Flags(key, flags) => {
                if let Some(backend) = backends.get_mut(&key) {
                    self.maps.write_backend_flags(backend.id, flags)?;
                    backend.flags = flags;
                }
            }
            Step::Slots(range, slots) => self.maps.write_slots(range.base, &slots)?,
            Step::AddSourceRange(net) => {
                self.maps.write_source_range(Prefix::of(index, net))?;
                port.change_rare(|rare| _ = rare.source_ranges.insert(net, SourceRangeState::Correct));
            }
            Step::RemoveSourceRanges(networks) => {
                let since = self.maps.grace_begin();
                let leaving = networks.into_iter().map(|net| (net, SourceRangeState::Leaving(since)));
                port.change_rare(|rare| rare.source_ranges.extend(leaving));
                self.pending_free
                    .push_back((since, PendingFree::SourceRanges(Arc::clone(id))));
            }
            Step::Service(value, sets) => {
                self.maps.write_service(index, value)?;
                self.actual.service_generations[index.to_usize()] = value.generation;
                port.value = value;
                port.sets = sets.map(Some).into();
            }
            Step::Settings(value) => {
                port.add_former_sets([]);
                self.maps.write_service_settings(index, value)?;
                self.actual.service_generations[index.to_usize()] = value.generation;
                port.value = Service {
                    internal: port.value.internal,
                    external: port.value.external,
                    cluster: port.value.cluster,
                    ..value
                };
            }
            Step::Publish(set, word, members) => {
                let ranges = port.set_ranges();
                port.add_former_sets([]);
                self.maps.publish_set(index, set, word)?;
                *port.value.set_word_mut(set) = word;
                if let Some(i) = SETS.iter().position(|known| *known == set) {
                    port.add_former_sets(ranges[i]);
                    port.sets.set(i, Some(members));
                }
            }
            Step::Withdraw(key) => {
                if let Some(backend) = backends.get(&key) {
                    self.withdraw(backend.id)?;
                    backends.remove(&key);
                }
            }
        }
        Ok(())
    }

    /// Stores the sets of a service in all frontends that lead to its index.
    fn store_sets(&mut self, index: ServiceIndex, service: &Service) -> Result<(), MapError> {
        let keys: Vec<_> = self.actual.references.keys(index).collect();
        for key in keys {
            let Some(has) = self.actual.frontends.entries().get(&key).copied() else {
                continue;
            };
            let new = with_set_of(has, service);
            if new == has {
                continue;
            }
            match self.maps.store_frontend(key, new) {
                Ok(()) => self.actual.set_frontend(key, Some(new)),
                // It was removed from outside, and is inserted again.
                Err(error @ MapError::Unexpected { .. }) => {
                    warn!(%error, "a frontend is missing");
                    self.last_deletion = Some(self.maps.grace_begin());
                    self.record_frontend(key, None, Ok(()));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns whether the set in a frontend has one of the slots without an owner.
    fn leads_to_orphans(&self) -> bool {
        let is_orphan = |word: SetWord| {
            let end = word.base.saturating_add(word.len.into());
            let from = Range {
                base: word.base,
                len: 0,
            };
            let next = self.orphans.slots.range(from..).next();
            word.len != 0 && next.is_some_and(|slot| slot.base < end)
        };
        let mut sets = self.actual.frontends.entries().values().map(|frontend| frontend.set);
        !self.orphans.slots.is_empty() && sets.any(is_orphan)
    }

    /// Writes FRONTENDS: in-place stores first, then insertions, then deletions, so that a frontend that moves never
    /// misses and a new one comes before an old one goes.
    fn write_frontends(&mut self, writes: Writes<FrontendKey, Frontend>) {
        let Writes {
            stores,
            inserts,
            deletes,
        } = writes;
        for (key, new) in stores {
            let result = self.maps.store_frontend(key, new);
            self.record_frontend(key, Some(new), result);
        }
        let mut inserts = inserts.into_iter();
        let mut full = None;
        for (key, new) in inserts.by_ref() {
            match self.insert(key, new) {
                Err(MapError::Full { .. }) if !deletes.is_empty() => {
                    full = Some((key, new));
                    break;
                }
                result => self.record_frontend(key, Some(new), result),
            }
        }
        for key in deletes {
            let result = self.maps.delete_frontend(key);
            if result.is_ok() {
                self.last_deletion = Some(self.maps.grace_begin());
            }
            self.record_frontend(key, None, result);
        }
        // The deletions may have made room.
        for (key, new) in full.into_iter().chain(inserts) {
            let result = self.insert(key, new);
            self.record_frontend(key, Some(new), result);
        }
    }

    /// Inserts a frontend, after the grace period of the last deletion.
    fn insert(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        if let Some(epoch) = self.last_deletion {
            self.maps.grace_wait(epoch)?;
            self.last_deletion = None;
        }
        // An insertion that must fail, at every attempt, sets no bit.
        let capacity = self.maps.capacities()[SizedMap::Frontends];
        if self.actual.frontends.entries().len() as u32 >= capacity {
            return Err(MapError::full(&map_spec::FRONTENDS, capacity));
        }
        self.set_filter_bit(key.addr.into())?;
        self.maps.insert_frontend(key, value)
    }

    fn record_frontend(&mut self, key: FrontendKey, new: Option<Frontend>, result: Result<(), MapError>) {
        match result {
            Ok(()) => {
                self.actual.set_frontend(key, new);
                self.free_unused_bit(key.addr.into());
            }
            // The bit stays set, since the insertion is repeated: clearing it would take a grace period, and the end of a grace
            // period is an occasion to repeat.
            Err(error) => self.actual.frontends.set_failed(key, error),
        }
    }

    /// Removes service ports that are no longer desired and that no frontend leads to, after a grace period.
    fn remove_ports(&mut self, desired: &Desired, ids: &BTreeSet<Arc<PortId>>) {
        for id in ids {
            if desired.port(id).is_some() || self.restored.contains(id) {
                continue;
            }
            let Some(port) = self.actual.ports.get(id) else {
                continue;
            };
            if self.actual.references.lead_to(port.index) {
                let why = "frontends still lead to it".to_owned();
                self.failed_ports.insert(Arc::clone(id), why);
                continue;
            }
            if let Some(port) = self.actual.ports.remove(id) {
                self.free_later(PendingFree::Port(port));
            }
        }
    }
}

/// The writes that failed and that the writer will repeat, with the reason of each.
#[cfg(any(test, feature = "test-support"))]
pub(crate) struct Failures<'a> {
    pub(crate) ports: &'a BTreeMap<Arc<PortId>, String>,
    pub(crate) frontends: &'a BTreeMap<FrontendKey, String>,
    pub(crate) cidrs: &'a BTreeMap<Prefix<Addr>, String>,
}

#[cfg(any(test, feature = "test-support"))]
impl Failures<'_> {
    /// Returns whether every service port and frontend could be written.
    pub(crate) fn is_served(&self) -> bool {
        self.ports.is_empty() && self.frontends.is_empty()
    }
}
