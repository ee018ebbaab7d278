//! The record of what leads to each service index.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{Addr, Frontend, FrontendKey, ServiceIndex};

/// The frontends that lead to each service index. Address marks lead to none.
///
/// One tree for all: a change of any of them costs the same, however many a Service has.
#[derive(Debug, Default)]
pub(crate) struct References(BTreeSet<(ServiceIndex, FrontendKey)>);

impl References {
    /// Creates the record of these frontends.
    pub(super) fn of(frontends: &BTreeMap<FrontendKey, Frontend>) -> Self {
        let leading = frontends.iter().filter(|(_, value)| !value.is_mark());
        Self(leading.map(|(key, value)| (value.service, *key)).collect())
    }

    /// Records that the value of a frontend changes; `None` for one that does not exist.
    pub(super) fn change(&mut self, key: FrontendKey, before: Option<Frontend>, after: Option<Frontend>) {
        let service = |value: Option<Frontend>| value.filter(|value| !value.is_mark()).map(|value| value.service);
        let (before, after) = (service(before), service(after));
        if before == after {
            return;
        }
        if let Some(index) = before {
            self.0.remove(&(index, key));
        }
        if let Some(index) = after {
            self.0.insert((index, key));
        }
    }

    /// Returns the frontends that lead to a service index, in order.
    pub(crate) fn keys(&self, index: ServiceIndex) -> impl Iterator<Item = FrontendKey> {
        let first = FrontendKey::new(Addr::default(), 0, 0);
        let from_first = self.0.range((index, first)..);
        from_first.take_while(move |(at, _)| *at == index).map(|(_, key)| *key)
    }

    /// Returns whether a frontend leads to a service index.
    pub(crate) fn lead_to(&self, index: ServiceIndex) -> bool {
        self.keys(index).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{FrontendKind, SetWord};

    use super::*;
    use crate::testing::key;

    fn to(index: u32) -> Frontend {
        Frontend::new(ServiceIndex::new(index), FrontendKind::ClusterIp)
    }

    #[test]
    fn each_index_has_the_frontends_that_lead_to_it() {
        let (mut references, [one, two]) = (References::default(), [1, 2].map(ServiceIndex::new));
        let [a, b] = ["10.96.0.1", "10.96.0.2"].map(|ip| key(ip, 80));
        let keys = |references: &References, index| references.keys(index).collect::<Vec<_>>();
        references.change(b, None, Some(to(1)));
        references.change(a, None, Some(to(1)));
        assert_eq!((keys(&references, one), references.lead_to(two)), (vec![a, b], false));
        // Another set, and another service.
        let set = SetWord {
            len: 1,
            ..SetWord::NONE
        };
        references.change(a, Some(to(1)), Some(Frontend { set, ..to(1) }));
        references.change(b, Some(to(1)), Some(to(2)));
        assert_eq!((keys(&references, one), keys(&references, two)), (vec![a], vec![b]));
        // A mark of the same address does not count.
        references.change(b, Some(to(2)), Some(Frontend::mark(FrontendKind::Address)));
        references.change(a, Some(to(1)), None);
        assert!(references.0.is_empty());
    }
}
