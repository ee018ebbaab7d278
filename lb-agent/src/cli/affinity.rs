//! `affinity list`: the backend of each client with session affinity, and for how long it is kept.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use lb_common::abi::{Affinity, AffinityKey, BackendRef, Set, backend_flags, service_flags};
use lb_common::logic::affinity;
use serde::Serialize;

use super::{ReadArgs, output};
use crate::clock::monotonic_ns;
use lb_core::explain::{age, remaining};
use lb_core::maps::Dump;
use lb_core::names::ServicePortName;

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    #[serde(flatten)]
    owner: ServicePortName,
    /// Cookie of the client's network namespace, if the client is identified by it.
    netns: Option<u64>,
    /// Address of the client, if the client is identified by it.
    client: Option<IpAddr>,
    /// Address and port of the backend; `None` if it was removed.
    backend: Option<SocketAddr>,
    backend_id: u32,
    backend_generation: u32,
    /// Seconds since the last use.
    age: u64,
    /// Seconds until the entry expires; zero if it has no effect.
    remaining: u64,
    /// Whether the next connection gets this backend.
    holds: bool,
    state: &'static str,
}

fn row(dump: &Dump, now: u64, key: &AffinityKey, entry: Affinity) -> Row {
    let Affinity {
        backend: reference,
        used,
    } = entry;
    let BackendRef { id, generation } = reference;
    let service = dump.service(key.service).copied().unwrap_or_default();
    let backend = dump
        .backends
        .get(id as usize)
        .filter(|backend| backend.is_current(reference));
    // Cluster IPs use the internal set, and other frontends one that depends on the client. The entry does not contain
    // which frontend the client connected to.
    let other = if key.netns().is_some() || dump.is_inside(key.client) {
        Set::Cluster
    } else {
        Set::External
    };
    let usable = |set| backend.is_some_and(|backend| backend.serves(reference, key.service, set));
    let (holds, state) = if service.flags & service_flags::AFFINITY == 0 {
        (false, "the service has no affinity")
    } else if !affinity::holds(used, now, service.affinity_timeout) {
        (false, "expired")
    } else if let Some(backend) = backend {
        match (usable(Set::Internal), usable(other)) {
            (false, false) if backend.flags & backend_flags::SETS == 0 => (false, "backend drains"),
            (false, false) => (false, "backend serves others"),
            (false, true) => (true, "holds, not for cluster IPs"),
            (true, false) => (true, "holds, for cluster IPs only"),
            (true, true) => (true, "holds"),
        }
    } else {
        (false, "backend gone")
    };
    let age = age(used, now);
    Row {
        owner: ServicePortName::of(dump.names.get(&key.service)),
        netns: key.netns(),
        client: key.netns().is_none().then(|| key.client.into()),
        backend: backend.map(|backend| backend.addr.socket(backend.port)),
        backend_id: id,
        backend_generation: generation,
        age: age.as_secs(),
        remaining: if holds {
            remaining(age, service.affinity_timeout)
        } else {
            0
        },
        holds,
        state,
    }
}

fn rows(dump: &Dump, entries: &BTreeMap<AffinityKey, Affinity>, now: u64) -> Vec<Row> {
    let mut rows: Vec<_> = entries.iter().map(|(key, entry)| row(dump, now, key, *entry)).collect();
    rows.sort_by_key(|row| (row.owner.to_string(), row.netns, row.client));
    rows
}

pub(super) fn list(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let entries = maps.affinity()?;
    let rows = rows(&maps.dump()?, &entries, monotonic_ns());
    let header = ["SERVICE", "CLIENT", "BACKEND", "LAST USED", "REMAINING", "STATE"];
    output::rows(args.output, header, &rows, |row| {
        let client = match (row.netns, row.client) {
            (Some(netns), _) => format!("netns {netns}"),
            (None, Some(client)) => client.to_string(),
            (None, None) => "?".into(),
        };
        [
            row.owner.to_string(),
            client,
            row.backend.map_or_else(|| "-".into(), |backend| backend.to_string()),
            format!("{}s ago", row.age),
            format!("{}s", row.remaining),
            row.state.into(),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::abi::{ServiceIndex, cluster_flags};
    use lb_core::maps::Maps as _;
    use lb_core::testing::{Builder as _, Cluster, apply, maps, service, slice, start};

    /// The service index of the only service port.
    const WEB: ServiceIndex = ServiceIndex::new(1);

    #[test]
    fn state_shows_whether_the_next_connection_keeps_the_backend() {
        const SECOND: u64 = 1_000_000_000;
        let endpoints = ["10.10.1.2 @n1", "10.10.2.2 @n2"];
        let mut lb = start(maps());
        let mut cluster = Cluster::of([
            service("web", "10.96.0.10").affinity(60).local().into(),
            slice("web", &endpoints).into(),
        ]);
        apply(&mut lb, &mut cluster);
        let mut dump = lb.maps().dump().unwrap();
        let of = |dump: &Dump, id, generation, used: u64| {
            let entry = Affinity {
                backend: BackendRef { id, generation },
                used: used * SECOND,
            };
            let key = AffinityKey::of_netns(7, WEB);
            let row = row(dump, 100 * SECOND + 1, &key, entry);
            assert_eq!((row.netns, row.client), (Some(7), None));
            (row.state, row.holds, row.age, row.remaining)
        };
        assert_eq!(of(&dump, 1, 1, 90), ("holds", true, 10, 50));
        assert_eq!(of(&dump, 2, 1, 90), ("holds, not for cluster IPs", true, 10, 50));
        assert_eq!(of(&dump, 1, 1, 40), ("expired", false, 60, 0));
        assert_eq!(of(&dump, 1, 3, 90), ("backend gone", false, 10, 0));
        dump.backends[2].flags = 0;
        assert_eq!(of(&dump, 2, 1, 90), ("backend drains", false, 10, 0));
        dump.services[1].flags = 0;
        assert_eq!(of(&dump, 1, 1, 90), ("the service has no affinity", false, 10, 0));

        let by_address = AffinityKey::of_addr(IpAddr::from([192, 0, 2, 1]).into(), WEB);
        let all = rows(&dump, &[(by_address, Affinity::default())].into(), 0);
        assert_eq!((all[0].netns, all[0].client), (None, Some([192, 0, 2, 1].into())));
        assert_eq!(all[0].backend, None);
    }

    #[test]
    fn set_of_a_client_address_depends_on_inside_or_outside() {
        let mut lb = start(maps());
        let mut cluster = Cluster::of([
            service("web", "10.96.0.10").affinity(60).into(),
            slice("web", &["10.10.1.2 @n1"]).into(),
        ]);
        apply(&mut lb, &mut cluster);
        let mut dump = lb.maps().dump().unwrap();
        let inside: ipnet::IpNet = "10.10.0.0/16".parse().unwrap();
        dump.cluster_cidrs.insert(inside.into(), cluster_flags::INSIDE);
        for (flags, outside, inside) in [
            (
                backend_flags::EXTERNAL,
                "holds, not for cluster IPs",
                "backend serves others",
            ),
            (
                backend_flags::CLUSTER,
                "backend serves others",
                "holds, not for cluster IPs",
            ),
            (
                backend_flags::INTERNAL,
                "holds, for cluster IPs only",
                "holds, for cluster IPs only",
            ),
            (backend_flags::SETS, "holds", "holds"),
            (0, "backend drains", "backend drains"),
        ] {
            dump.backends[1].flags = flags;
            for (client, expected) in [([192, 0, 2, 1], outside), ([10, 10, 2, 9], inside)] {
                let key = AffinityKey::of_addr(IpAddr::from(client).into(), WEB);
                let entry = Affinity {
                    backend: BackendRef { id: 1, generation: 1 },
                    used: 0,
                };
                let row = row(&dump, 0, &key, entry);
                let holds = expected.starts_with("holds");
                assert_eq!((row.state, row.holds), (expected, holds), "{client:?} {flags}");
            }
        }
    }
}
