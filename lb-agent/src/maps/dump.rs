//! The contents of the maps as values.

use std::collections::BTreeMap;

use lb_common::abi::{Backend, BackendSlot, Frontend, FrontendKey, Name, Service};

/// Everything that FRONTENDS, SERVICES, BACKEND_SLOTS, BACKENDS and NAMES hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dump {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// SERVICES, by index.
    pub services: Vec<Service>,
    /// BACKEND_SLOTS, by slot.
    pub slots: Vec<BackendSlot>,
    /// BACKENDS, by id.
    pub backends: Vec<Backend>,
    /// NAMES.
    pub names: BTreeMap<u32, Name>,
}
