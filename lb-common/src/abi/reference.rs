//! References from one map to another.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;

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
