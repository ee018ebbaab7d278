//! Maps that inject faults into their operations.

use std::collections::BTreeSet;
use std::io;

use lb_common::abi::{
    Addr, Backend, BackendSlot, FilterBit, Frontend, FrontendKey, Name, Service, ServiceIndex, Set, SetWord,
    SourceRange,
};

use super::prefix::Prefix;
use super::{Capacities, Dump, Epoch, MapError, Maps};

/// The fault at an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The operation succeeds.
    None,
    /// The operation fails and changes nothing, as a system call that returns an error.
    Fail,
    /// This operation and all that follow do nothing and return success: the process died before it.
    Die,
    /// The process died in the middle of the operation, if that has more than one store; otherwise as [`Fault::Die`].
    Tear,
}

/// Maps that fail at a given operation, or at which the process dies.
#[derive(Debug)]
pub struct FaultyMaps<M> {
    /// The wrapped maps.
    pub inner: M,
    /// Number of operations before the fault.
    countdown: u64,
    fault: Fault,
    dead: bool,
    operations: u64,
}

impl<M: Maps> FaultyMaps<M> {
    /// Creates maps in which operation number `at` (from zero) has the fault.
    pub fn new(inner: M, at: u64, fault: Fault) -> Self {
        Self {
            inner,
            countdown: at,
            fault,
            dead: false,
            operations: 0,
        }
    }

    /// Injects the fault into the operation after the next `at`.
    pub fn arm(&mut self, at: u64, fault: Fault) {
        (self.countdown, self.fault) = (at, fault);
    }

    /// Returns the number of operations so far.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Returns whether the process has died.
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    fn next(&mut self) -> Fault {
        self.operations += 1;
        if self.dead {
            return Fault::Die;
        }
        if self.countdown > 0 {
            self.countdown -= 1;
            return Fault::None;
        }
        let fault = std::mem::replace(&mut self.fault, Fault::None);
        self.dead = matches!(fault, Fault::Die | Fault::Tear);
        fault
    }

    /// Runs an operation that has more than one store. `half`: its stores before the death of the process.
    fn run_torn(
        &mut self,
        operation: impl FnOnce(&mut M) -> Result<(), MapError>,
        half: impl FnOnce(&mut M) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        if self.countdown == 0 && self.fault == Fault::Tear && !self.dead {
            half(&mut self.inner)?;
        }
        self.run(operation)
    }

    fn run(&mut self, operation: impl FnOnce(&mut M) -> Result<(), MapError>) -> Result<(), MapError> {
        match self.next() {
            Fault::None => operation(&mut self.inner),
            Fault::Die | Fault::Tear => Ok(()),
            Fault::Fail => Err(MapError::Call {
                map: "(faulty)",
                call: "an operation that fails on purpose",
                source: io::ErrorKind::OutOfMemory.into(),
            }),
        }
    }
}

impl<M: Maps> Maps for FaultyMaps<M> {
    fn capacities(&self) -> Capacities {
        self.inner.capacities()
    }

    fn insert_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        self.run(|maps| maps.insert_frontend(key, value))
    }

    fn store_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        // The set is stored last.
        let half = |maps: &mut M| {
            let before = maps.dump()?.frontends.get(&key).map(|before| before.set);
            let set = before.unwrap_or(SetWord::NONE);
            maps.store_frontend(key, Frontend { set, ..value })
        };
        self.run_torn(|maps| maps.store_frontend(key, value), half)
    }

    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), MapError> {
        self.run(|maps| maps.delete_frontend(key))
    }

    fn write_service(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError> {
        // The set words are stored first, the generation last.
        let half = |maps: &mut M| {
            maps.publish_set(index, Set::Internal, value.internal)?;
            maps.publish_set(index, Set::External, value.external)
        };
        self.run_torn(|maps| maps.write_service(index, value), half)
    }

    fn write_service_settings(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError> {
        self.run(|maps| maps.write_service_settings(index, value))
    }

    fn publish_set(&mut self, index: ServiceIndex, set: Set, word: SetWord) -> Result<(), MapError> {
        self.run(|maps| maps.publish_set(index, set, word))
    }

    fn write_slots(&mut self, base: u32, slots: &[BackendSlot]) -> Result<(), MapError> {
        let half = |maps: &mut M| maps.write_slots(base, &slots[..slots.len() / 2]);
        self.run_torn(|maps| maps.write_slots(base, slots), half)
    }

    fn fill_backend(&mut self, id: u32, value: Backend) -> Result<(), MapError> {
        self.run(|maps| maps.fill_backend(id, value))
    }

    fn write_backend_flags(&mut self, id: u32, flags: u16) -> Result<(), MapError> {
        self.run(|maps| maps.write_backend_flags(id, flags))
    }

    fn withdraw_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError> {
        self.run(|maps| maps.withdraw_backend(id, generation))
    }

    fn write_name(&mut self, index: ServiceIndex, value: &Name) -> Result<(), MapError> {
        self.run(|maps| maps.write_name(index, value))
    }

    fn delete_name(&mut self, index: ServiceIndex) -> Result<(), MapError> {
        self.run(|maps| maps.delete_name(index))
    }

    fn write_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        self.run(|maps| maps.write_source_range(range))
    }

    fn delete_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        self.run(|maps| maps.delete_source_range(range))
    }

    fn write_cluster_cidr(&mut self, cidr: Prefix<Addr>, flags: u32) -> Result<(), MapError> {
        self.run(|maps| maps.write_cluster_cidr(cidr, flags))
    }

    fn delete_cluster_cidr(&mut self, cidr: Prefix<Addr>) -> Result<(), MapError> {
        self.run(|maps| maps.delete_cluster_cidr(cidr))
    }

    fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        let mut missing = 0;
        self.run(|maps| {
            missing = maps.write_node_addrs(wanted)?;
            Ok(())
        })?;
        Ok(missing)
    }

    fn set_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        self.run(|maps| maps.set_filter_bit(bit))
    }

    fn clear_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        self.run(|maps| maps.clear_filter_bit(bit))
    }

    fn grace_begin(&mut self) -> Epoch {
        self.inner.grace_begin()
    }

    fn grace_passed(&self) -> Epoch {
        self.inner.grace_passed()
    }

    fn grace_wait(&mut self, epoch: Epoch) -> Result<(), MapError> {
        self.run(|maps| maps.grace_wait(epoch))
    }

    fn written(&self) -> u64 {
        self.inner.written()
    }

    fn dump(&self) -> Result<Dump, MapError> {
        self.inner.dump()
    }
}
