//! The desired state of a node and the facts derived with it: pure, without maps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::Addr;

use crate::desired::{self, Desired, HealthCheck, Touched};
use crate::index::{Index, TouchedObjects};
use crate::model::{Batch, Node, ObjectKey, Problem};
use crate::places;
use crate::policy::LocalNode;

/// Number of changes from which on a batch is large: the agent compacts its state and returns freed memory to the kernel.
pub const LARGE_BATCH: usize = 1000;

/// The objects that the source has delivered, and everything that follows from them.
#[derive(Debug)]
pub struct State {
    /// Name of this node's Node object.
    node: String,
    index: Index,
    desired: Desired,
    complete: bool,
    /// Problems of the source at the last batch.
    source_problems: Vec<Problem>,
    /// Invalid `loadBalancerSourceRanges`, by Service.
    invalid_source_ranges: BTreeMap<ObjectKey, Vec<Arc<str>>>,
    health_checks: BTreeMap<ObjectKey, HealthCheck>,
    /// Whether `health_checks` changed since [`State::new_health_checks`] returned them.
    health_checks_changed: bool,
}

impl State {
    /// Creates the state of a node for which the source has delivered nothing yet.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self {
            node: node.into(),
            index: Index::default(),
            desired: Desired::default(),
            complete: false,
            source_problems: Vec::new(),
            invalid_source_ranges: BTreeMap::new(),
            health_checks: BTreeMap::new(),
            health_checks_changed: false,
        }
    }

    /// Adds networks inside the cluster, in addition to the addresses and the pods of this node. To be called before
    /// anything is applied.
    #[must_use]
    pub fn with_inside(self, inside: &[IpNet]) -> Self {
        Self {
            desired: Desired::new(inside),
            ..self
        }
    }

    /// Replaces the addresses of this node's devices.
    pub fn set_addresses(&mut self, own: BTreeSet<Addr>) -> Touched {
        let mut touched = Touched::default();
        self.desired.set_addresses(own, &mut touched);
        touched
    }

    /// Applies a batch of changes as a whole. The cost follows the number of changes, unless the zone of this node
    /// changes.
    pub fn apply(&mut self, batch: Batch) -> Touched {
        let Batch {
            changes,
            complete,
            problems,
            ..
        } = batch;
        let is_large = changes.len() >= LARGE_BATCH;
        let zone_before = self.zone();
        let TouchedObjects { mut services, nodes } = self.index.apply(changes);
        if self.zone() != zone_before {
            // Topology hints now choose other endpoints for this node.
            services.extend(self.index.services().map(|service| service.key.clone()));
        }
        let mut touched = Touched::default();
        self.desired.update_nodes(&nodes, &self.index, &self.node, &mut touched);
        for key in services {
            self.update_service(key, &mut touched);
        }
        self.complete |= complete;
        self.source_problems = problems;
        if is_large {
            // Before the maps are written, so that what the writer records takes the room that this frees.
            self.desired.compact();
            touched.compact();
        }
        touched
    }

    fn zone(&self) -> Option<Arc<str>> {
        self.node().and_then(|node| node.zone.clone())
    }

    /// Derives the state of one Service again.
    fn update_service(&mut self, key: ObjectKey, touched: &mut Touched) {
        let local_node = LocalNode::new(&self.node, self.index.node(&self.node));
        let service = self.index.service(&key);
        let slices = self.index.slices(&key);
        let ports = service.map_or_else(Vec::new, |service| desired::ports(service, &slices, local_node));
        self.desired.update(&key, ports, touched);
        match service
            .map(desired::invalid_source_ranges)
            .filter(|invalid| !invalid.is_empty())
        {
            Some(invalid) => drop(self.invalid_source_ranges.insert(key.clone(), invalid)),
            None => drop(self.invalid_source_ranges.remove(&key)),
        }
        match service.and_then(|service| desired::health_check(service, slices, &self.node)) {
            Some(check) => self.health_checks_changed |= self.health_checks.insert(key, check) != Some(check),
            None => self.health_checks_changed |= self.health_checks.remove(&key).is_some(),
        }
    }

    /// Returns the problems of the source, between Services, and of single fields.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        let invalid_source_ranges = self.invalid_source_ranges.iter().map(|(service, invalid)| {
            let message = format!(
                "spec.loadBalancerSourceRanges: invalid CIDR, which allows no client: {}",
                invalid.join(", ")
            );
            Problem::new(places::of_service(service), message).of(service)
        });
        let source = self.source_problems.iter().cloned();
        source.chain(self.desired.conflicts()).chain(invalid_source_ranges)
    }

    /// Returns the problems of the source at the last batch.
    #[must_use]
    pub fn source_problems(&self) -> &[Problem] {
        &self.source_problems
    }

    /// Returns whether the source has delivered all of its objects at least once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Returns the Services that have a `healthCheckNodePort`, with the content of the answer.
    #[must_use]
    pub fn health_checks(&self) -> &BTreeMap<ObjectKey, HealthCheck> {
        &self.health_checks
    }

    /// Returns the health checks if they changed since the last call.
    pub fn new_health_checks(&mut self) -> Option<&BTreeMap<ObjectKey, HealthCheck>> {
        std::mem::take(&mut self.health_checks_changed).then_some(&self.health_checks)
    }

    /// Returns the Node object of this node, if the source has one.
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        self.index.node(&self.node)
    }

    /// Returns the desired content of the maps.
    #[must_use]
    pub fn desired(&self) -> &Desired {
        &self.desired
    }
}
