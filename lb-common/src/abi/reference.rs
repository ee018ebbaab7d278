//! References from one map to another.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::{AbiType, TypeLayout, layout};

/// A backend at one point in its life: its id and the generation that the id then had.
///
/// Affinity, flows, sockets and slots store it. It is current while BACKENDS has that generation under the id, see
/// [`crate::logic::generation::is_current`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct BackendRef {
    /// Index into BACKENDS.
    pub id: u32,
    /// [`super::Backend::generation`] of that entry.
    pub generation: u32,
}

layout!(BackendRef: size 8, align 4 { id: 0, generation: 4 });

impl BackendRef {
    /// Refers to no backend: id zero is never used.
    pub const NONE: Self = Self { id: 0, generation: 0 };
}

/// A service index: the position of a service port in SERVICES, NAMES and STATS.
///
/// To the layout it is the `u32` that it contains. `bpftool` prints it as `{"index": 3}`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct ServiceIndex {
    index: u32,
}

impl AbiType for ServiceIndex {
    const LAYOUT: &'static TypeLayout = <u32 as AbiType>::LAYOUT;
}

impl ServiceIndex {
    /// Refers to no service port: index zero is never used.
    pub const NONE: Self = Self::new(0);

    /// Returns the service index with a number.
    #[inline(always)]
    #[must_use]
    pub const fn new(index: u32) -> Self {
        Self { index }
    }

    /// Returns the number, which is the key in SERVICES, NAMES and STATS.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u32 {
        self.index
    }

    /// Returns the position in a slice of all entries of SERVICES.
    #[inline(always)]
    #[must_use]
    pub const fn to_usize(self) -> usize {
        self.index as usize
    }

    /// Returns whether this refers to no service port.
    #[inline(always)]
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.index == Self::NONE.index
    }
}

impl fmt::Display for ServiceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.index, f)
    }
}

impl fmt::Debug for ServiceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
