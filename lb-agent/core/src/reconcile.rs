//! Makes the maps say what is desired: plans by `diff`, writes in the order of the update protocol, and waits
//! for grace before anything is used again.
//!
//! Order on creation: NAMES, BACKENDS, BACKEND_SLOTS, SOURCE_RANGES, SERVICES, FRONTENDS. On removal: FRONTENDS, a grace
//! period, then the rest. What is known of the maps is recorded after each write that succeeded, so a failed write is tried again at
//! the next occasion, and the end is the same wherever the agent dies.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{Addr, Frontend, FrontendKey, FrontendKind, Service, SetWord};
use lb_common::logic::generation;
use tracing::{debug, warn};

use crate::actual::{Actual, ActualPort, Admission, BackendMap, Backends, Strays, set_word_mut};
use crate::alloc::Range;
use crate::desired::{self, Desired, DesiredPort, HealthCheck, PortId, SETS, Touched};
use crate::diff::{self, Plan, Step};
use crate::index::{Dirty, Index};
use crate::maps::prefix::Prefix;
use crate::maps::{Capacities, Epoch, MapError, Maps};
use crate::model::{Batch, Node, ObjectKey, Problem, ProblemKind};
use crate::names::name_of;

/// Number of changes in one batch after which memory is given back.
pub const LARGE: usize = 1000;

/// What is out of use, but may still be seen by a program that runs.
#[derive(Debug)]
enum Retired {
    /// A slot range: free after the grace period.
    Range(Range),
    /// A withdrawn backend: its id is free after the grace period.
    Backend(u32),
    /// A service port whose frontends are gone: to be cleared after the grace period.
    Port(Box<ActualPort>),
    /// Some source ranges of a service port: to be removed after the grace period.
    Sources(Arc<PortId>),
}

/// How much of the maps is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Service indexes.
    pub services: u32,
    /// Frontends, marks of service addresses included.
    pub frontends: u32,
    /// Backends.
    pub backends: u32,
    /// Slots, those in the unused part of a range included.
    pub backend_slots: u32,
}

/// The one writer of the maps.
pub struct Reconciler<M> {
    maps: M,
    node: String,
    index: Index,
    desired: Desired,
    actual: Actual,
    limbo: VecDeque<(Epoch, Retired)>,
    /// When a frontend was last deleted: no insertion before a grace period has passed.
    deletion: Option<Epoch>,
    /// What could not be written, and why. Tried again at every occasion.
    failed_ports: BTreeMap<Arc<PortId>, String>,
    failed_frontends: BTreeMap<FrontendKey, String>,
    failed_cidrs: BTreeMap<Prefix<Addr>, String>,
    /// Service ports of an earlier run that the source has not told of, or not of their endpoints: they stay as they
    /// are until it has told everything.
    kept: BTreeSet<Arc<PortId>>,
    /// What nobody owns, until it is sure that nothing leads there.
    strays: Strays,
    /// Nothing was applied yet: what an earlier run left is to be looked at as a whole.
    fresh: bool,
    complete: bool,
    problems: Vec<Problem>,
    /// `loadBalancerSourceRanges` that are none, by Service.
    wrong_ranges: BTreeMap<ObjectKey, Vec<Arc<str>>>,
    withdrawals: u64,
    health_checks: BTreeMap<ObjectKey, HealthCheck>,
    /// Since they were last asked for.
    health_checks_changed: bool,
}

impl<M: Maps> Reconciler<M> {
    /// Adopts what the maps say. Blocks for one grace period, since an agent that died may have freed something a
    /// moment ago.
    ///
    /// # Errors
    /// Where the maps cannot be read.
    pub fn adopt(mut maps: M, node: &str) -> Result<Self, MapError> {
        let epoch = maps.grace_begin();
        maps.grace_wait(epoch)?;
        let (actual, strays) = Actual::adopt(&maps.dump()?, maps.capacities());
        Ok(Self {
            maps,
            node: node.into(),
            index: Index::default(),
            desired: Desired::default(),
            kept: actual.ports.keys().cloned().collect(),
            strays,
            actual,
            limbo: VecDeque::new(),
            deletion: None,
            failed_ports: BTreeMap::new(),
            failed_frontends: BTreeMap::new(),
            failed_cidrs: BTreeMap::new(),
            fresh: true,
            complete: false,
            problems: Vec::new(),
            wrong_ranges: BTreeMap::new(),
            withdrawals: 0,
            health_checks: BTreeMap::new(),
            health_checks_changed: false,
        })
    }

    /// Networks that are inside the cluster, besides the addresses and the pods of this node; to be said before anything is
    /// applied.
    #[must_use]
    pub fn with_inside(mut self, inside: &[IpNet]) -> Self {
        self.desired = Desired::new(inside);
        self
    }

    /// The addresses of this node's devices are these now.
    pub fn set_addresses(&mut self, own: BTreeSet<Addr>) {
        let mut touched = Touched::default();
        self.desired.set_addresses(own, &mut touched);
        if touched != Touched::default() {
            self.reconcile(touched);
        }
    }

    /// Applies a batch of changes as a whole.
    pub fn apply(&mut self, batch: Batch) {
        let is_large = batch.changes.len() >= LARGE;
        let zone = |index: &Index| index.node(&self.node).and_then(|node| node.zone.clone());
        let before = zone(&self.index);
        let Dirty {
            services: mut dirty,
            nodes,
        } = self.index.apply(batch.changes);
        if zone(&self.index) != before {
            // Other endpoints are meant for this node now.
            dirty.extend(self.index.services().map(|service| service.key.clone()));
        }
        let here = self.index.here(&self.node);
        let mut touched = Touched::default();
        self.desired.update_nodes(&nodes, &self.index, &self.node, &mut touched);
        for key in dirty {
            let service = self.index.service(&key);
            let slices = self.index.slices(&key);
            let ports = service.map_or_else(Vec::new, |service| desired::ports(service, &slices, here));
            self.desired.update(&key, ports, &mut touched);
            match service
                .map(desired::wrong_source_ranges)
                .filter(|wrong| !wrong.is_empty())
            {
                Some(wrong) => drop(self.wrong_ranges.insert(key.clone(), wrong)),
                None => drop(self.wrong_ranges.remove(&key)),
            }
            match service.and_then(|service| desired::health_check(service, slices, here.node)) {
                Some(check) => self.health_checks_changed |= self.health_checks.insert(key, check) != Some(check),
                None => self.health_checks_changed |= self.health_checks.remove(&key).is_some(),
            }
        }
        for id in &touched.ports {
            // Told of, and removed again.
            if self.desired.port(id).is_none() {
                self.kept.remove(id);
            }
        }
        let completed = batch.complete && !self.complete;
        if completed {
            self.complete = true;
            self.kept.clear();
        }
        if self.fresh || completed {
            self.fresh = false;
            touched.ports.extend(self.actual.ports.keys().cloned());
            touched.frontends.extend(self.actual.frontends.keys().copied());
            touched.cidrs.extend(self.actual.cidrs.keys().copied());
            touched.cidrs.extend(self.desired.nodes().cidrs().map(|(cidr, _)| cidr));
        }
        self.problems = batch.problems;
        if is_large {
            // Now, so that what is written down while the maps are written goes where it was.
            self.desired.compact();
        }
        self.reconcile(touched);
    }

    /// Uses grace periods that have passed: clears what is gone, frees what was in use, and tries again what failed.
    pub fn reclaim(&mut self) {
        let passed = self.maps.grace_passed();
        let ready = self.limbo.front().is_some_and(|(epoch, _)| *epoch <= passed);
        let failed =
            !(self.failed_ports.is_empty() && self.failed_frontends.is_empty() && self.failed_cidrs.is_empty());
        if ready || failed {
            self.reconcile(Touched::default());
        }
    }

    /// Waits until nothing is left to be cleared (but for what fails again and again).
    ///
    /// # Errors
    /// Where the grace period fails.
    pub fn settle(&mut self) -> Result<(), MapError> {
        // Clearing a service port withdraws its backends, whose ids need a second period.
        for _ in 0..4 {
            let Some((epoch, _)) = self.limbo.back() else { break };
            let epoch = *epoch;
            self.maps.grace_wait(epoch)?;
            self.reclaim();
        }
        Ok(())
    }

    /// Everything that is wrong now: in the source, between Services, and with the maps.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut all = self.problems.clone();
        all.extend(self.desired.conflicts());
        all.extend(self.wrong_ranges.iter().map(|(service, wrong)| {
            let message = format!(
                "spec.loadBalancerSourceRanges: no CIDR, so it admits nobody: {}",
                wrong.join(", ")
            );
            Problem::new(format!("Service {service}"), message).of(service)
        }));
        all.extend(self.failed_ports.iter().map(|(id, why)| {
            let message = format!("not served as it should be: {why}");
            let problem = Problem::new(format!("Service {id}"), message);
            problem.of(&id.service).kind(ProblemKind::Map)
        }));
        all.extend(self.failed_frontends.iter().map(|(key, why)| {
            let place = format!("frontend {}:{}", key.addr, key.port);
            let problem = Problem::new(place, format!("not served as it should be: {why}")).kind(ProblemKind::Map);
            match self.desired.owner(key) {
                Some(service) => problem.of(service),
                None => problem,
            }
        }));
        all.extend(self.failed_cidrs.iter().map(|(cidr, why)| {
            let place = match cidr.network() {
                Some(net) => format!("network {net}"),
                None => format!("network {}, {} bits", cidr.data, cidr.len),
            };
            let message = format!("not known to be inside the cluster or not, as it should be: {why}");
            Problem::new(place, message).kind(ProblemKind::Map)
        }));
        all
    }

    /// Whether the maps serve anything, be it from an earlier run.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        !self.actual.ports.is_empty()
    }

    /// What was wrong in the source at the last batch.
    #[must_use]
    pub fn source_problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Whether the source has told everything at least once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// How many backends were withdrawn so far: sockets that chose one have to go.
    #[must_use]
    pub fn withdrawals(&self) -> u64 {
        self.withdrawals
    }

    /// The Services that have a `healthCheckNodePort`, and what is to be answered there.
    #[must_use]
    pub fn health_checks(&self) -> &BTreeMap<ObjectKey, HealthCheck> {
        &self.health_checks
    }

    /// The same, if that is another answer than the last time.
    pub fn new_health_checks(&mut self) -> Option<&BTreeMap<ObjectKey, HealthCheck>> {
        std::mem::take(&mut self.health_checks_changed).then_some(&self.health_checks)
    }

    /// The Node object of this node, if the source has one.
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        self.index.node(&self.node)
    }

    /// What is desired.
    #[must_use]
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// The maps, for what is not part of the update protocol.
    pub fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// How much of the maps is in use.
    #[must_use]
    pub fn usage(&self) -> (Usage, Capacities) {
        let usage = Usage {
            services: self.actual.indexes.used(),
            frontends: self.actual.frontends.len() as u32,
            backends: self.actual.ids.used(),
            backend_slots: self.actual.slots.used(),
        };
        (usage, self.maps.capacities())
    }

    /// Frees what a grace period has passed for.
    fn free_retired(&mut self) {
        let passed = self.maps.grace_passed();
        let mut failed = Vec::new();
        while let Some((epoch, retired)) = self.limbo.pop_front_if(|(epoch, _)| *epoch <= passed) {
            match retired {
                Retired::Range(range) => self.actual.slots.free(range),
                Retired::Backend(id) => self.actual.ids.free(id),
                Retired::Port(port) => {
                    if let Err(error) = self.clear(&port) {
                        warn!(index = port.index, %error, "cannot clear a service index; trying again later");
                        failed.push((epoch, Retired::Port(port)));
                    }
                }
                Retired::Sources(id) => {
                    if let Err(error) = self.expire_sources(&id, passed) {
                        warn!(%id, %error, "cannot remove a source range; trying again later");
                        failed.push((epoch, Retired::Sources(id)));
                    }
                }
            }
        }
        failed.into_iter().rev().for_each(|again| self.limbo.push_front(again));
    }

    /// Removes the source ranges of a service port that nobody looks for any more.
    fn expire_sources(&mut self, id: &Arc<PortId>, passed: Epoch) -> Result<(), MapError> {
        // Where the port is gone, its ranges go with it.
        let Some(port) = self.actual.ports.get_mut(id) else {
            return Ok(());
        };
        let is_due = |at: &Admission| matches!(at, Admission::Leaves(since) if *since <= passed);
        let due: Vec<_> = port
            .sources
            .iter()
            .filter(|(_, at)| is_due(at))
            .map(|(net, _)| *net)
            .collect();
        for net in due {
            self.maps.delete_source_range(Prefix::of(port.index, net))?;
            port.sources.remove(&net);
        }
        Ok(())
    }

    fn retire(&mut self, retired: Retired) {
        let epoch = self.maps.grace_begin();
        self.limbo.push_back((epoch, retired));
    }

    /// Moves a backend's generation; its id is free after a grace period.
    fn withdraw(&mut self, id: u32) -> Result<(), MapError> {
        let next = generation::withdrawn(self.actual.backend_generations[id as usize]);
        self.maps.withdraw_backend(id, next)?;
        self.actual.backend_generations[id as usize] = next;
        self.withdrawals += 1;
        if id != 0 {
            self.retire(Retired::Backend(id));
        }
        Ok(())
    }

    /// Clears a service index that nothing leads to any more.
    fn clear(&mut self, port: &ActualPort) -> Result<(), MapError> {
        let index = port.index;
        let generation = generation::withdrawn(self.actual.service_generations[index as usize]);
        let empty = Service {
            generation,
            ..Service::default()
        };
        self.maps.write_service(index, empty)?;
        self.actual.service_generations[index as usize] = generation;
        for (_, backend) in port.backends.iter() {
            // Not again where a try before this one came so far.
            if self.actual.backend_generations[backend.id as usize] == backend.generation {
                self.withdraw(backend.id)?;
            }
        }
        for net in port.sources.keys() {
            self.maps.delete_source_range(Prefix::of(index, *net))?;
        }
        self.maps.delete_name(index)?;
        for range in port.ranges() {
            self.actual.slots.free(range);
        }
        if index != 0 {
            self.actual.indexes.free(index);
        }
        Ok(())
    }

    fn reconcile(&mut self, mut touched: Touched) {
        self.free_retired();
        self.remove_stray_sources();
        let mut no_room = BTreeSet::new();
        touched.ports.extend(std::mem::take(&mut self.failed_ports).into_keys());
        touched
            .frontends
            .extend(std::mem::take(&mut self.failed_frontends).into_keys());
        touched.cidrs.extend(std::mem::take(&mut self.failed_cidrs).into_keys());
        // Before anything that makes programs ask who is inside.
        self.sync_cidrs(&touched.cidrs);
        for id in &touched.ports {
            let Some(want) = self.wanted(id) else { continue };
            let result = match diff::plan(id, &want, &mut self.actual) {
                Err(error @ MapError::Full { .. }) if !self.limbo.is_empty() => {
                    // Room is on its way.
                    debug!(%id, %error, "waiting for a grace period");
                    self.settle_limbo()
                        .and_then(|()| diff::plan(id, &want, &mut self.actual))
                }
                other => other,
            };
            let result = result.and_then(|plan| self.execute(id, plan));
            if let Err(error) = result {
                self.failed_ports.insert(Arc::clone(id), error.to_string());
                if matches!(error, MapError::Full { .. }) {
                    self.close_unknown(id);
                    no_room.insert(Arc::clone(id));
                }
            }
            // They may lead here from now on, or elsewhere where this failed.
            touched.frontends.extend(want.frontends.iter().map(|(key, _)| *key));
        }
        self.sync_frontends(&touched.frontends, &no_room);
        self.remove_ports(&touched.ports);
        self.withdraw_strays();
    }

    /// Makes CLUSTER_CIDRS say what it should: what is new or differs first, then what is gone.
    fn sync_cidrs(&mut self, cidrs: &BTreeSet<Prefix<Addr>>) {
        let mut gone = Vec::new();
        for cidr in cidrs {
            let have = self.actual.cidrs.get(cidr).copied();
            // Until then the source may have more Nodes to tell of: what is there stays.
            let stays = if self.complete { None } else { have };
            let want = self.desired.nodes().flags(cidr);
            let want = want.map(|flags| flags | stays.unwrap_or(0)).or(stays);
            match want {
                want if want == have => {}
                Some(flags) => {
                    let result = self.maps.write_cluster_cidr(*cidr, flags);
                    self.record_cidr(*cidr, Some(flags), result);
                }
                None => gone.push(*cidr),
            }
        }
        for cidr in gone {
            let result = self.maps.delete_cluster_cidr(cidr);
            self.record_cidr(cidr, None, result);
        }
    }

    fn record_cidr(&mut self, cidr: Prefix<Addr>, flags: Option<u32>, result: Result<(), MapError>) {
        match (result, flags) {
            (Err(error), _) => drop(self.failed_cidrs.insert(cidr, error.to_string())),
            (Ok(()), Some(flags)) => drop(self.actual.cidrs.insert(cidr, flags)),
            (Ok(()), None) => drop(self.actual.cidrs.remove(&cidr)),
        }
    }

    /// Removes entries of SOURCE_RANGES that no service can have, before the kernel takes them for others.
    fn remove_stray_sources(&mut self) {
        for range in std::mem::take(&mut self.strays.sources) {
            if let Err(error) = self.maps.delete_source_range(range) {
                warn!(?range, %error, "cannot remove a source range of an earlier run; trying again later");
                self.strays.sources.insert(range);
            }
        }
    }

    /// Empties the sets that lead to nobody knows where, if any: that makes room for them.
    fn close_unknown(&mut self, id: &Arc<PortId>) {
        let Some(port) = self.actual.ports.get(id) else { return };
        let (index, sets) = (port.index, port.sets.clone());
        for (set, _) in SETS.into_iter().zip(sets).filter(|(_, at)| at.members.is_none()) {
            let empty = Step::Publish(set, SetWord::default(), None, Arc::default());
            if let Err(error) = self.step(id, index, empty, &mut BackendMap::new()) {
                warn!(%id, %error, "cannot empty a set that somebody else has written");
            }
        }
    }

    /// What a service port is to be: what is desired, but while the source has more to tell and has told of no endpoint
    /// of it, with the backends that it has from an earlier run.
    fn wanted(&mut self, id: &PortId) -> Option<DesiredPort> {
        let mut want = self.desired.port(id)?.clone();
        if !self.kept.contains(id) {
            return Some(want);
        }
        if want.has_backends() {
            self.kept.remove(id);
        } else if let Some(have) = self.actual.ports.get(id) {
            (want.sets, want.draining) = have.published();
        }
        Some(want)
    }

    /// Puts out of use what nobody owns, once every set leads to what is its own.
    fn withdraw_strays(&mut self) {
        if !self.complete || self.strays == Strays::default() || !self.actual.ports.values().all(|port| port.is_known())
        {
            return;
        }
        let Strays {
            names,
            backends,
            slots,
            sources,
        } = std::mem::take(&mut self.strays);
        self.strays.sources = sources;
        for index in names {
            if let Err(error) = self.maps.delete_name(index) {
                warn!(index, %error, "cannot remove a name of an earlier run; trying again later");
                self.strays.names.insert(index);
            }
        }
        for id in backends {
            if let Err(error) = self.withdraw(id) {
                warn!(id, %error, "cannot withdraw a backend of an earlier run; trying again later");
                self.strays.backends.insert(id);
            }
        }
        slots.into_iter().for_each(|range| self.retire(Retired::Range(range)));
    }

    /// Waits for all grace periods that were asked for, and frees what they were for.
    fn settle_limbo(&mut self) -> Result<(), MapError> {
        for _ in 0..4 {
            let Some((epoch, _)) = self.limbo.back() else { break };
            let epoch = *epoch;
            self.maps.grace_wait(epoch)?;
            self.free_retired();
        }
        Ok(())
    }

    /// Writes the steps of a plan and records each; afterwards, what was taken and is not used goes back.
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
            // Who cannot be admitted is refused until the next try; nothing else waits for that, but nobody is dismissed.
            Step::Admit(_) => {
                refused = self.step(id, index, step, &mut backends).err().or(refused.take());
                Ok(())
            }
            Step::Dismiss(_) if refused.is_some() => Ok(()),
            step => self.step(id, index, step, &mut backends),
        });
        let result = result.and_then(|()| refused.map_or(Ok(()), Err));

        let port = self.actual.ports.get_mut(id);
        let known: BTreeSet<u32> = backends.values().map(|backend| backend.id).collect();
        let port = port.map(|port| {
            let sets = port.sets.iter().filter_map(|set| set.members.as_ref());
            port.backends = Backends::of(&backends, sets);
            &*port
        });
        let in_use = port.map(|port| port.ranges()).unwrap_or_default();
        if new_index && port.is_none() {
            self.actual.indexes.free(index);
        }
        // What was never published was never seen.
        new_ranges
            .into_iter()
            .filter(|range| !in_use.contains(range))
            .for_each(|range| self.actual.slots.free(range));
        new_ids
            .into_iter()
            .filter(|id| !known.contains(id))
            .for_each(|id| self.actual.ids.free(id));
        old_ranges
            .difference(&in_use)
            .for_each(|range| self.retire(Retired::Range(*range)));
        result
    }

    /// One write, and then its record; that of backends is `backends`.
    fn step(&mut self, id: &Arc<PortId>, index: u32, step: Step, backends: &mut BackendMap) -> Result<(), MapError> {
        if let Step::Name(named) = step {
            self.maps
                .write_name(index, &name_of(id, named.port, named.generation))?;
            let new = || Box::new(ActualPort::new(index, Service::default(), None));
            self.actual.ports.entry(Arc::clone(id)).or_insert_with(new).named = Some(named);
            return Ok(());
        }
        // The first step of a new port is its name.
        let Some(port) = self.actual.ports.get_mut(id) else {
            return Ok(());
        };
        match step {
            Step::Name(_) => {}
            Step::Fill(value, new) => {
                self.maps.fill_backend(new.id, value)?;
                self.actual.backend_generations[new.id as usize] = new.generation;
                backends.insert((IpAddr::from(value.addr), value.port), new);
            }
            Step::Flags(key, flags) => {
                if let Some(backend) = backends.get_mut(&key) {
                    self.maps.write_backend_flags(backend.id, flags)?;
                    backend.flags = flags;
                }
            }
            Step::Slots(range, slots) => self.maps.write_slots(range.base, &slots)?,
            Step::Admit(net) => {
                self.maps.write_source_range(Prefix::of(index, net))?;
                port.sources.insert(net, Admission::Holds);
            }
            Step::Dismiss(networks) => {
                let since = self.maps.grace_begin();
                port.sources
                    .extend(networks.into_iter().map(|net| (net, Admission::Leaves(since))));
                self.limbo.push_back((since, Retired::Sources(Arc::clone(id))));
            }
            Step::Service(value, sets) => {
                self.maps.write_service(index, value)?;
                self.actual.service_generations[index as usize] = value.generation;
                port.value = value;
                for (set, (range, members)) in port.sets.iter_mut().zip(sets) {
                    set.range = range;
                    set.members = Some(members);
                }
            }
            Step::Settings(value) => {
                self.maps.write_service_settings(index, value)?;
                self.actual.service_generations[index as usize] = value.generation;
                port.value = Service {
                    internal: port.value.internal,
                    external: port.value.external,
                    cluster: port.value.cluster,
                    ..value
                };
            }
            Step::Publish(set, word, range, members) => {
                self.maps.publish_set(index, set, word)?;
                *set_word_mut(&mut port.value, set) = word;
                for (known, at) in SETS.into_iter().zip(&mut port.sets) {
                    if known == set {
                        at.range = range;
                        at.members = Some(Arc::clone(&members));
                    }
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

    /// Makes frontends lead where they should: in-place stores first, then insertions, then deletions, so that what
    /// moves is never away and what is new comes before what is gone. `no_room`: service ports that the maps have no
    /// room for.
    fn sync_frontends(&mut self, keys: &BTreeSet<FrontendKey>, no_room: &BTreeSet<Arc<PortId>>) {
        let mut stores = Vec::new();
        let mut inserts = Vec::new();
        let mut deletes = Vec::new();
        let kept = self.kept.iter().filter(|id| self.desired.port(id).is_none());
        let kept: BTreeSet<u32> = kept
            .filter_map(|id| self.actual.ports.get(id))
            .map(|p| p.index)
            .collect();
        for key in keys {
            let have = self.actual.frontends.get(key).copied();
            // What leads to a service port stays there also where the port could not be put right.
            let leads = |port: &ActualPort| have.is_some_and(|have| have.service == port.index || have.is_mark());
            let ports = &self.actual.ports;
            let index_of = |id: &PortId| {
                ports
                    .get(id)
                    .filter(|p| p.is_written() || leads(p))
                    .map(|port| port.index)
            };
            let want = self.desired.frontend(key, index_of);
            match (have, want) {
                (have, want) if have == want => {}
                (Some(old), _) if self.is_kept(*key, old, &kept) => {}
                (Some(old), None) if self.is_awaited(*key, old, no_room) => {}
                (None, Some(new)) => inserts.push((*key, new)),
                (Some(_), Some(new)) => stores.push((*key, new)),
                (_, None) => deletes.push(*key),
            }
        }
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
                self.deletion = Some(self.maps.grace_begin());
            }
            self.record_frontend(key, None, result);
        }
        // Where there was no room, there may be now.
        for (key, new) in full.into_iter().chain(inserts) {
            let result = self.insert(key, new);
            self.record_frontend(key, Some(new), result);
        }
    }

    /// Whether a frontend of an earlier run stays, whoever claims it: the source has not told everything yet.
    fn is_kept(&self, key: FrontendKey, value: Frontend, kept: &BTreeSet<u32>) -> bool {
        if self.complete {
            return false;
        }
        match FrontendKind::from_u8(value.kind) {
            Some(FrontendKind::Address) => key == FrontendKey::address_mark(key.addr),
            // Also where only this node's own addresses are known.
            Some(FrontendKind::ExternalAddress) => {
                key == FrontendKey::address_mark(key.addr) && !self.desired.nodes().have(key.addr)
            }
            Some(_) => kept.contains(&value.service),
            None => false,
        }
    }

    /// Whether a frontend stays with whom it has because the service port that it passes to could not be written, and
    /// will be at the next try: until then it is no miss. Where there is no room it goes: what it leads to may be what
    /// takes the room.
    fn is_awaited(&self, key: FrontendKey, value: Frontend, no_room: &BTreeSet<Arc<PortId>>) -> bool {
        let claimant = self.desired.frontend(&key, |id| (!no_room.contains(id)).then_some(0));
        let serves = |port: &ActualPort| port.index == value.service && port.is_written();
        claimant.is_some() && (value.is_mark() || self.actual.ports.values().any(|port| serves(port)))
    }

    fn insert(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        if let Some(epoch) = self.deletion {
            self.maps.grace_wait(epoch)?;
            self.deletion = None;
        }
        self.maps.insert_frontend(key, value)
    }

    fn record_frontend(&mut self, key: FrontendKey, new: Option<Frontend>, result: Result<(), MapError>) {
        if let Err(error) = result {
            self.failed_frontends.insert(key, error.to_string());
            return;
        }
        let old = match new {
            Some(new) => {
                self.actual.count(new, true);
                self.actual.frontends.insert(key, new)
            }
            None => self.actual.frontends.remove(&key),
        };
        if let Some(old) = old {
            self.actual.count(old, false);
        }
    }

    /// Retires service ports that nothing is desired of and nothing leads to.
    fn remove_ports(&mut self, ids: &BTreeSet<Arc<PortId>>) {
        for id in ids {
            if self.desired.port(id).is_some() || self.kept.contains(id) {
                continue;
            }
            let Some(port) = self.actual.ports.get(id) else {
                continue;
            };
            if self.actual.references.contains_key(&port.index) {
                let why = "frontends still lead to it".to_owned();
                self.failed_ports.insert(Arc::clone(id), why);
                continue;
            }
            if let Some(port) = self.actual.ports.remove(id) {
                self.retire(Retired::Port(port));
            }
        }
    }
}

#[cfg(test)]
mod outside;
#[cfg(any(test, feature = "test-support"))]
pub mod random;
#[cfg(test)]
mod tests;
