//! STATS: counters of service ports.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;

/// Value of STATS, one on each CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceStats {
    /// Connections translated to a backend.
    pub connections: u64,
    /// Connections that were refused.
    pub refused: u64,
}

layout!(ServiceStats: size 16, align 8 { connections: 0, refused: 8 });
