//! The check whether the backend of a stored reference may serve again.

use super::generation;
use crate::abi::{Backend, BackendRef, ServiceIndex, Set};

/// The fields of a [`Backend`] that decide whether it may serve, as they were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendState {
    /// [`Backend::generation`]. To be read first: it changes before the other fields do.
    pub generation: u32,
    /// [`Backend::service`].
    pub service: ServiceIndex,
    /// [`Backend::flags`].
    pub flags: u16,
}

impl BackendState {
    /// Returns whether a reference may serve a service port from a set: the entry of BACKENDS is still that backend, it
    /// belongs to the service port, and the set contains it.
    #[inline(always)]
    #[must_use]
    pub const fn serves(self, reference: BackendRef, service: ServiceIndex, set: Set) -> bool {
        generation::is_current(self.generation, reference.generation)
            && self.service.get() == service.get()
            && self.flags & set.member_flag() != 0
    }
}

impl Backend {
    /// Returns whether a reference to this entry of BACKENDS may serve a service port from a set; see
    /// [`BackendState::serves`].
    #[must_use]
    pub const fn serves(&self, reference: BackendRef, service: ServiceIndex, set: Set) -> bool {
        let state = BackendState {
            generation: self.generation,
            service: self.service,
            flags: self.flags,
        };
        state.serves(reference, service, set)
    }

    /// Returns whether a reference to this entry of BACKENDS is current.
    #[must_use]
    pub const fn is_current(&self, reference: BackendRef) -> bool {
        generation::is_current(self.generation, reference.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::backend_flags;

    #[test]
    fn a_backend_serves_only_while_its_set_contains_it() {
        let (service, other) = (ServiceIndex::new(7), ServiceIndex::new(8));
        let entry = |generation| Backend {
            service,
            flags: backend_flags::INTERNAL | backend_flags::LOCAL,
            generation,
            ..Backend::default()
        };
        let reference = |generation| BackendRef { id: 1, generation };
        assert!(entry(3).serves(reference(3), service, Set::Internal));
        assert!(!entry(3).serves(reference(3), service, Set::Cluster), "not a member");
        assert!(
            !entry(3).serves(reference(1), service, Set::Internal),
            "an earlier backend"
        );
        assert!(
            !entry(3).serves(reference(3), other, Set::Internal),
            "another service's"
        );
        assert!(!entry(4).serves(reference(4), service, Set::Internal), "withdrawn");
        assert!(entry(3).is_current(reference(3)));
        assert!(!entry(4).is_current(reference(3)), "withdrawn");
    }
}
