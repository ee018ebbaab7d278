//! CONFIG: settings that the programs read while they run.

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
}

layout!(Config: size 8, align 8 { events: 0, snat_first: 4, snat_last: 6 });
