//! The record of FILTER.

use std::collections::HashMap;

use lb_common::abi::FilterBit;

use crate::maps::Dump;

/// The bits that are set in FILTER, with the number of entries of FRONTENDS and NODE_ADDRS whose addresses have each.
#[derive(Debug, Default)]
pub(crate) struct FilterOwners(HashMap<FilterBit, u32>);

impl FilterOwners {
    /// Creates the record of these maps, as if the bits of all addresses were set.
    pub(super) fn of(dump: &Dump) -> Self {
        let mut owners = Self(dump.filter.iter().map(|bit| (*bit, 0)).collect());
        for addr in dump.addresses() {
            owners.add(addr.into());
        }
        owners
    }

    /// Returns the bits that are set.
    pub(crate) fn bits(&self) -> impl Iterator<Item = FilterBit> {
        self.0.keys().copied()
    }

    /// Returns whether a bit is set.
    pub(crate) fn is_set(&self, bit: FilterBit) -> bool {
        self.0.contains_key(&bit)
    }

    /// Returns whether a bit is set that no address has.
    pub(crate) fn is_unused(&self, bit: FilterBit) -> bool {
        self.0.get(&bit) == Some(&0)
    }

    /// Records that a bit was set.
    pub(crate) fn set(&mut self, bit: FilterBit) {
        self.0.entry(bit).or_default();
    }

    /// Records that a bit was cleared.
    pub(crate) fn clear(&mut self, bit: FilterBit) {
        self.0.remove(&bit);
    }

    /// Records an entry whose address has a bit.
    pub(crate) fn add(&mut self, bit: FilterBit) {
        *self.0.entry(bit).or_default() += 1;
    }

    /// Records that an entry whose address has a bit is gone.
    pub(crate) fn remove(&mut self, bit: FilterBit) {
        if let Some(owners) = self.0.get_mut(&bit) {
            *owners = owners.saturating_sub(1);
        }
    }
}
