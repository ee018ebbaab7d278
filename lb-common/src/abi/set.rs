//! The three sets of backends that a service port has.

use super::backend_flags;
use super::enums::abi_enum;

abi_enum! {
    /// Which of a service port's three sets serves a connection. The number is stored in [`super::CtEntry::set`].
    pub enum Set: u8, from_u8 {
        /// [`super::Service::internal`].
        Internal = 0, "internal";
        /// [`super::Service::external`].
        External = 1, "external";
        /// [`super::Service::cluster`].
        Cluster = 2, "cluster";
    }
}

impl Set {
    /// Returns the bit of [`super::Backend::flags`] that marks a member of the set.
    #[inline(always)]
    #[must_use]
    pub const fn member_flag(self) -> u16 {
        match self {
            Self::Internal => backend_flags::INTERNAL,
            Self::External => backend_flags::EXTERNAL,
            Self::Cluster => backend_flags::CLUSTER,
        }
    }
}
