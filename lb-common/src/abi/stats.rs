//! STATS: counters of service ports.

use core::ops::AddAssign;

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
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 2],
}

impl AddAssign for ServiceStats {
    fn add_assign(&mut self, other: Self) {
        let Self {
            connections,
            refused,
            reserved: _,
        } = other;
        self.connections += connections;
        self.refused += refused;
    }
}

layout!(ServiceStats: size 32, align 8 { connections: 0, refused: 8, reserved: 16 });
