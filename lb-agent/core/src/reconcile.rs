//! Reconciliation: applies changes to the desired state and has the writer carry them into the maps.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use lb_common::abi::Addr;

use crate::desired::{Desired, HealthCheck, Touched};
use crate::maps::{Capacities, MapError, Maps};
use crate::model::{Batch, Node, ObjectKey, Problem};
pub use crate::state::LARGE_BATCH;
use crate::state::State;
pub use crate::writer::Usage;
use crate::writer::Writer;

/// The desired state of a node, and the one writer of the maps that programs read.
pub struct Reconciler<M> {
    state: State,
    writer: Writer<M>,
    /// Changes of the state that are not written yet.
    received: Received,
}

/// Changes of the state that are not written yet.
#[derive(Debug, Default)]
struct Received {
    touched: Touched,
    /// Whether the source became complete with them.
    completed: bool,
}

impl<M: Maps> Reconciler<M> {
    /// Adopts the content of the maps. Blocks for one grace period, since an agent that died may have freed something
    /// just before.
    ///
    /// # Errors
    /// If the maps cannot be read, or the grace period fails.
    pub fn adopt(maps: M, node: &str) -> Result<Self, MapError> {
        Ok(Self {
            state: State::new(node),
            writer: Writer::adopt(maps)?,
            received: Received::default(),
        })
    }

    /// Adds networks inside the cluster, in addition to the addresses and the pods of this node. To be called before
    /// anything is applied.
    #[must_use]
    pub fn with_inside(mut self, inside: &[IpNet]) -> Self {
        self.state = self.state.with_inside(inside);
        self
    }

    /// Replaces the addresses of this node's devices.
    pub fn set_addresses(&mut self, own: BTreeSet<Addr>) {
        let touched = self.state.set_addresses(own);
        if touched != Touched::default() {
            self.writer.write(&self.state, touched);
        }
    }

    /// Makes NODE_ADDRS equal to `wanted`, and returns the number of addresses that did not fit.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        self.writer.write_node_addrs(wanted)
    }

    /// Applies a batch of changes as a whole.
    pub fn apply(&mut self, batch: Batch) {
        self.receive(batch);
        self.write();
    }

    /// Adds a batch of changes to the desired state. The caller may make room for them before [`Self::write`].
    pub fn receive(&mut self, batch: Batch) {
        let was_complete = self.state.is_complete();
        self.received.touched.extend(self.state.apply(batch));
        self.received.completed |= self.state.is_complete() && !was_complete;
    }

    /// Writes the received changes.
    pub fn write(&mut self) {
        let Received { touched, completed } = std::mem::take(&mut self.received);
        self.writer.write_batch(&self.state, touched, completed);
    }

    /// Returns the numbers of entries in use while the received changes are written: those of now and the new ones. The cost
    /// follows the number of changes.
    #[must_use]
    pub fn demand(&self) -> Usage {
        self.writer.demand(&self.state, &self.received.touched)
    }

    /// Returns the smallest number of entries that each map can have; zero for maps that programs fill.
    #[must_use]
    pub fn needed(&self) -> Capacities {
        self.writer.needed()
    }

    /// Continues with maps of another size that have the same content.
    ///
    /// # Errors
    /// Returns the error of `replace`, after which the maps must be the same as before.
    pub fn replace_maps<T, E>(&mut self, replace: impl FnOnce(&mut M) -> Result<T, E>) -> Result<T, E> {
        self.writer.replace_maps(replace)
    }

    /// Frees entries after their grace period, and repeats failed writes.
    pub fn reclaim(&mut self) {
        self.writer.reclaim(&self.state);
    }

    /// Waits until nothing is left to be freed, except for what fails repeatedly.
    ///
    /// # Errors
    /// If a grace period fails.
    pub fn settle(&mut self) -> Result<(), MapError> {
        self.writer.settle(&self.state)
    }

    /// Returns all present problems: of the source, between Services, and of the maps.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut all: Vec<_> = self.state.problems().collect();
        all.extend(self.writer.problems(self.state.desired()));
        all
    }

    /// Returns whether the maps serve any Service, from this run or an earlier one.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.writer.is_serving()
    }

    /// Returns the problems of the source at the last batch.
    #[must_use]
    pub fn source_problems(&self) -> &[Problem] {
        self.state.source_problems()
    }

    /// Returns whether the source has delivered all of its objects at least once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.state.is_complete()
    }

    /// Returns the number of backends that were withdrawn so far. The caller closes the sockets that are connected to
    /// them.
    #[must_use]
    pub fn withdrawals(&self) -> u64 {
        self.writer.withdrawals()
    }

    /// Returns the Services that have a `healthCheckNodePort`, with the content of the answer.
    #[must_use]
    pub fn health_checks(&self) -> &BTreeMap<ObjectKey, HealthCheck> {
        self.state.health_checks()
    }

    /// Returns the health checks if they changed since the last call.
    pub fn new_health_checks(&mut self) -> Option<&BTreeMap<ObjectKey, HealthCheck>> {
        self.state.new_health_checks()
    }

    /// Returns the Node object of this node, if the source has one.
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        self.state.node()
    }

    /// Returns the desired content of the maps.
    #[must_use]
    pub fn desired(&self) -> &Desired {
        self.state.desired()
    }

    /// Returns the maps.
    #[must_use]
    pub fn maps(&self) -> &M {
        self.writer.maps()
    }

    /// Returns the maps, for writes that are not part of the update protocol.
    pub fn maps_mut(&mut self) -> &mut M {
        self.writer.maps_mut()
    }

    /// Returns how much of the maps is in use.
    #[must_use]
    pub fn usage(&self) -> (Usage, Capacities) {
        self.writer.usage()
    }
}

#[cfg(test)]
mod outside;
#[cfg(any(test, feature = "test-support"))]
pub mod random;
#[cfg(test)]
mod tests;
