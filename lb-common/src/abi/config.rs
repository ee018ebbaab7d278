//! CONFIG: settings that the programs read while they run.

use core::ops::RangeInclusive;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;

/// The only value of CONFIG. The agent stores each half of it by one 4-byte store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Config {
    /// Kinds of trace events that the programs write: see [`super::EventKind::bit`].
    pub events: u32,
    /// First SNAT port, host byte order.
    pub snat_first: u16,
    /// Last SNAT port, host byte order. Less than the first if there are no SNAT ports.
    pub snat_last: u16,
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 7],
}

impl Config {
    /// Returns the SNAT ports; `None` if there are none.
    #[must_use]
    pub fn snat_ports(&self) -> Option<RangeInclusive<u16>> {
        let has_ports = self.snat_first != 0 && self.snat_first <= self.snat_last;
        has_ports.then_some(self.snat_first..=self.snat_last)
    }
}

layout!(Config: size 64, align 8 { events: 0, snat_first: 4, snat_last: 6, reserved: 8 });
