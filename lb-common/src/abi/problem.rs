//! NOTICES: problems that `status` shows.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;

/// Value of NOTICES: one problem, as text for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ProblemRecord {
    /// Object or component that has the problem: UTF-8, padded with zero bytes, truncated if it is longer.
    pub place: [u8; 256],
    /// Description of the problem: UTF-8, padded with zero bytes, truncated if it is longer.
    pub message: [u8; 512],
}

layout!(ProblemRecord: size 768, align 1 { place: 0, message: 256 });
