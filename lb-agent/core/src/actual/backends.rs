//! The backends of one service port.

use std::collections::BTreeMap;
use std::net::IpAddr;

use lb_common::abi::backend_flags;

use crate::policy::{Member, Members};

/// A backend that a service port has. Its generation is that of its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ActualBackend {
    pub(crate) id: u32,
    pub(crate) flags: u16,
}

/// Backends by address and port, while they change.
pub(crate) type BackendMap = BTreeMap<(IpAddr, u16), ActualBackend>;

/// Backends by address and port, in little memory: there may be hundreds of thousands, of which few change.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backends {
    /// Sorted. They nearly always equal the members of a set and share its memory.
    members: Members,
    /// The backend of each member, in the order of `members`.
    known: Box<[ActualBackend]>,
}

impl Backends {
    /// Creates it from a map. It shares the memory of one of `lists` if that has the same members.
    pub(crate) fn of<'a>(map: &BackendMap, lists: impl IntoIterator<Item = &'a Members>) -> Self {
        let member = |(&(addr, port), backend): (&(IpAddr, u16), &ActualBackend)| Member {
            addr,
            port,
            local: backend.flags & backend_flags::LOCAL != 0,
        };
        let mut lists = lists.into_iter();
        let shared = lists.find(|list| list.iter().eq(map.iter().map(member)));
        Self {
            members: shared.cloned().unwrap_or_else(|| map.iter().map(member).collect()),
            known: map.values().copied().collect(),
        }
    }

    /// Returns a map that can be changed.
    pub(crate) fn to_map(&self) -> BackendMap {
        self.iter().map(|(m, backend)| ((m.addr, m.port), *backend)).collect()
    }

    pub(crate) fn get(&self, addr: IpAddr, port: u16) -> Option<&ActualBackend> {
        self.known.get(self.members.position(addr, port)?)
    }

    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Member, &ActualBackend)> {
        self.members.iter().zip(&self.known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_round_trip_and_share_memory() {
        let backend = |id, flags| ActualBackend { id, flags };
        let addr = |last| IpAddr::from([10, 0, 0, last]);
        let map: BackendMap = [
            ((addr(2), 80), backend(7, backend_flags::LOCAL)),
            ((addr(1), 90), backend(8, 0)),
            ((addr(1), 80), backend(9, 0)),
        ]
        .into();
        let own = Backends::of(&map, []);
        assert_eq!(own.to_map(), map);
        assert_eq!(own.get(addr(1), 90), Some(&backend(8, 0)));
        assert_eq!(own.get(addr(2), 90), None);

        let other: Members = own.members().iter().skip(1).collect();
        let same: Members = own.members().iter().collect();
        let shared = Backends::of(&map, [&other, &same]);
        assert!(shared.members().is_shared_with(&same));
        assert_eq!(shared.to_map(), map);
    }
}
