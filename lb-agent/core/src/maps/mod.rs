//! The trait through which the writer accesses the maps. `lb-agent` implements it for the kernel, and `fake` in
//! memory, with checks of the rules of the update protocol.

mod capacities;
pub mod dump;
#[cfg(any(test, feature = "test-support"))]
pub mod fake;
#[cfg(any(test, feature = "test-support"))]
pub mod faulty;
pub mod memory;
pub mod prefix;
pub mod resize;
pub mod sizing;
pub mod takeover;

use std::collections::BTreeSet;
use std::io;

use lb_common::abi::{
    Addr, Backend, BackendSlot, Capacity, CtEntry, CtKey, FilterBit, Frontend, FrontendKey, MapSpec, Name, Service,
    ServiceIndex, Set, SetWord, SourceRange,
};

pub use capacities::Capacities;
pub use dump::Dump;
use prefix::Prefix;

/// A failed operation on a map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The map is full.
    #[error("{map} is full ({capacity} entries): raise --{flag} or --map-memory (they take effect at the next start)")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Flag of `lb-agent run` that bounds the number of entries.
        flag: &'static str,
        /// Number of entries that the map has room for.
        capacity: u32,
    },
    /// No room, in a map of fixed size.
    #[error("{map} is full ({capacity} entries, which no flag changes)")]
    Bound {
        /// Name of the map.
        map: &'static str,
        /// Number of entries that the map has room for.
        capacity: u32,
    },
    /// A system call failed.
    #[error("{map}: {call}: {source}")]
    Call {
        /// Name of the map.
        map: &'static str,
        /// The operation.
        call: &'static str,
        /// Cause of the failure.
        source: io::Error,
    },
    /// An index is beyond the end of an array.
    #[error("{map}: index {index} is out of range (0..{capacity})")]
    OutOfRange {
        /// Name of the map.
        map: &'static str,
        /// The index that is out of range.
        index: u32,
        /// Number of entries that the map has room for.
        capacity: u32,
    },
    /// The operation needs an entry that is missing, or must not have one that is present.
    #[error("{map}: {what}")]
    Unexpected {
        /// Name of the map.
        map: &'static str,
        /// Description of the entry.
        what: String,
    },
}

impl MapError {
    /// Returns the error of an insertion into a full map.
    #[must_use]
    pub const fn full(map: &MapSpec, capacity: u32) -> Self {
        match map.capacity {
            Capacity::Sized(sized) => Self::Full {
                map: map.name,
                flag: sized.flag(),
                capacity,
            },
            Capacity::Fixed(_) => Self::Bound {
                map: map.name,
                capacity,
            },
        }
    }
}

/// A point in time that a grace period can pass: all programs that ran when [`Maps::grace_begin`] returned it have
/// ended once [`Maps::grace_passed`] is at least as large.
pub type Epoch = u64;

/// One direction of a flow in conntrack.
pub type Direction = (CtKey, CtEntry);

/// Writes to the maps. Every method is one step of the update protocol (docs/architecture.md), safe at any instant for
/// programs that run at the same time if the steps come in its order.
pub trait Maps {
    /// Sizes of the maps.
    fn capacities(&self) -> Capacities;

    /// Adds an entry to FRONTENDS; never changes one.
    ///
    /// # Errors
    /// Returns [`MapError::Full`], [`MapError::Unexpected`] if the key is present, or the error of the system call.
    fn insert_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError>;

    /// Changes an entry of FRONTENDS in place by two 8-byte stores, the set last.
    ///
    /// # Errors
    /// Returns [`MapError::Unexpected`] if the key is missing, or the error of the system call.
    fn store_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError>;

    /// Removes an entry of FRONTENDS. Nothing may be inserted until a grace period has passed.
    ///
    /// # Errors
    /// Returns the error of the system call; a missing key is no error.
    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), MapError>;

    /// Writes an entry of SERVICES that no frontend leads to.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn write_service(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError>;

    /// Writes all fields of an entry of SERVICES except the set words. Programs may read it at the same time.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn write_service_settings(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError>;

    /// Publishes a set by one 8-byte store.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn publish_set(&mut self, index: ServiceIndex, set: Set, word: SetWord) -> Result<(), MapError>;

    /// Writes slots that no published set contains, or adds the service to slots that a build of layout 3 wrote.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn write_slots(&mut self, base: u32, slots: &[BackendSlot]) -> Result<(), MapError>;

    /// Fills an entry of BACKENDS that is not in use, its generation last.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn fill_backend(&mut self, id: u32, value: Backend) -> Result<(), MapError>;

    /// Writes the flags of a backend.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn write_backend_flags(&mut self, id: u32, flags: u16) -> Result<(), MapError>;

    /// Withdraws a backend: changes its generation, so that references to it are no longer valid.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn withdraw_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError>;

    /// Adds or replaces an entry of NAMES.
    ///
    /// # Errors
    /// Returns [`MapError::Full`] or the error of the system call.
    fn write_name(&mut self, index: ServiceIndex, value: &Name) -> Result<(), MapError>;

    /// Removes an entry of NAMES, and the counters of its service.
    ///
    /// # Errors
    /// Returns the error of the system call; a missing entry is no error.
    fn delete_name(&mut self, index: ServiceIndex) -> Result<(), MapError>;

    /// Adds or replaces an entry of SOURCE_RANGES. The entries of a service are written before the flag that restricts
    /// it to them, and removed before another service gets the index.
    ///
    /// # Errors
    /// Returns [`MapError::Bound`] or the error of the system call.
    fn write_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError>;

    /// Removes an entry of SOURCE_RANGES.
    ///
    /// # Errors
    /// Returns the error of the system call; a missing entry is no error.
    fn delete_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError>;

    /// Adds or replaces an entry of CLUSTER_CIDRS; a program finds the old one or the new one.
    ///
    /// # Errors
    /// Returns [`MapError::Bound`] or the error of the system call.
    fn write_cluster_cidr(&mut self, cidr: Prefix<Addr>, flags: u32) -> Result<(), MapError>;

    /// Removes an entry of CLUSTER_CIDRS.
    ///
    /// # Errors
    /// Returns the error of the system call; a missing entry is no error.
    fn delete_cluster_cidr(&mut self, cidr: Prefix<Addr>) -> Result<(), MapError>;

    /// Makes NODE_ADDRS equal to `wanted`, and returns the number of addresses that did not fit.
    ///
    /// # Errors
    /// Returns the error of the system call.
    fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError>;

    /// Sets a bit of FILTER. It is set before the first of the addresses that have it is added to FRONTENDS or NODE_ADDRS.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn set_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError>;

    /// Clears a bit of FILTER, a grace period after the last of the addresses that have it was removed from FRONTENDS or
    /// NODE_ADDRS.
    ///
    /// # Errors
    /// Returns [`MapError::OutOfRange`] if the map is shorter.
    fn clear_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError>;

    /// Requests a grace period that begins now.
    fn grace_begin(&mut self) -> Epoch;

    /// Returns the newest point in time that a grace period has passed.
    fn grace_passed(&self) -> Epoch;

    /// Waits until a grace period has passed `epoch`.
    ///
    /// # Errors
    /// Returns the error of the system call that waits for the grace period.
    fn grace_wait(&mut self, epoch: Epoch) -> Result<(), MapError>;

    /// Returns the number of bytes written so far by the methods of this trait: values, and keys of hashes.
    fn written(&self) -> u64;

    /// Returns the content of the maps.
    ///
    /// # Errors
    /// Returns the error of the system call.
    fn dump(&self) -> Result<Dump, MapError>;
}
