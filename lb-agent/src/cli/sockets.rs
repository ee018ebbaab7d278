//! `socket list`: what sockets were given, joined with the sockets that the kernel has.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use lb_common::abi::{Addr, FrontendKey, SocketRecord, UdpFlow};
use lb_common::logic::generation;
use lb_common::logic::ip128::Ip128;
use serde::Serialize;

use super::{ReadArgs, output};
use crate::clock::monotonic_ns;
use crate::maps::bpf::PinnedMaps;
use crate::node::CONNECTING;
use crate::node::netns::{Namespaces, Visit};
use crate::node::sockdiag::{Protocol, Socket, Sockets, canonical, list_sockets};
use lb_core::explain::age;
use lb_core::maps::Dump;
use lb_core::names::ServicePortName;

/// How a socket came to its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// By `connect()`.
    Connected,
    /// By a datagram that named its destination.
    Unconnected,
}

/// A socket and a backend that it was given.
#[derive(Debug, Clone, Copy)]
struct Given {
    kind: Kind,
    /// Key of the record.
    cookie: u64,
    /// The cookie that sock_diag lists the socket with.
    socket: u64,
    netns: u64,
    proto: u8,
    original: (Addr, u16),
    backend: SocketAddr,
    backend_id: u32,
    generation: u32,
    service: u32,
    /// When it was connected, or last sent something: nanoseconds of CLOCK_MONOTONIC.
    time: u64,
}

impl From<SocketRecord> for Given {
    fn from(record: SocketRecord) -> Self {
        Self {
            kind: Kind::Connected,
            cookie: record.cookie,
            socket: record.socket,
            netns: record.netns,
            proto: record.proto,
            original: (record.original_addr, record.original_port),
            backend: record.backend_addr.socket(record.backend_port),
            backend_id: record.backend,
            generation: record.generation,
            service: record.service,
            time: record.time,
        }
    }
}

impl Given {
    fn of_flow(cookie: u64, netns: u64, flow: &UdpFlow) -> Self {
        Self {
            kind: Kind::Unconnected,
            cookie,
            socket: cookie,
            netns,
            proto: Protocol::Udp as u8,
            original: (flow.vip, flow.vip_port),
            backend: flow.backend_addr.socket(flow.backend_port),
            backend_id: flow.backend,
            generation: flow.generation,
            service: flow.service,
            time: flow.asked,
        }
    }

    /// The backend is still in use.
    fn is_current(&self, dump: &Dump) -> bool {
        let entry = dump.backends.get(self.backend_id as usize);
        entry.is_some_and(|entry| generation::is_current(entry.generation, self.generation))
    }

    /// Whose it is. An index that a Service left may be another's by now: it counts where the backend is in use, or
    /// where what was asked for still leads there.
    fn owner(&self, dump: &Dump) -> ServicePortName {
        let (addr, port) = self.original;
        let node_port = Ip128::from(addr).unspecified().into();
        let leads_there = |addr| {
            let found = dump.frontends.get(&FrontendKey::new(addr, port, self.proto));
            found.is_some_and(|found| found.service == self.service)
        };
        let known = self.is_current(dump) || leads_there(addr) || leads_there(node_port);
        ServicePortName::of(dump.names.get(&self.service).filter(|_| known))
    }
}

/// What the kernel has of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It is there.
    Open,
    /// It is there, connected to something else or to nothing.
    Elsewhere,
    /// It is not there: the record is left over.
    Dead,
    /// Its network namespace cannot be looked into; or it may be connecting at this moment.
    Unknown,
}

impl State {
    const fn label(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Elsewhere => "elsewhere",
            Self::Dead => "dead",
            Self::Unknown => "?",
        }
    }
}

#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    owner: ServicePortName,
    kind: Kind,
    cookie: u64,
    netns: u64,
    /// What the process asked for.
    original: SocketAddr,
    /// What it got.
    backend: SocketAddr,
    backend_id: u32,
    backend_generation: u32,
    /// The backend is still in use.
    current: bool,
    /// The socket's own address.
    local: Option<SocketAddr>,
    state: State,
    /// Seconds since it was connected, or last sent something.
    age: u64,
}

type Visited = Visit<io::Result<Sockets>>;

impl Row {
    /// `sockets`: a listing that was begun at `begun`.
    fn new(given: &Given, dump: &Dump, sockets: &Visited, begun: u64) -> Self {
        let listing = match sockets.visited.get(&given.netns) {
            Some(Ok(listing)) => Some(listing.get(&given.socket)),
            Some(Err(_)) => None,
            None => sockets.missing.contains(&given.netns).then_some(None),
        };
        let is_new = begun.saturating_sub(given.time) < CONNECTING;
        let state = match listing {
            Some(Some(socket)) if has_peer(given, socket) => State::Open,
            Some(_) | None if is_new => State::Unknown,
            Some(Some(_)) => State::Elsewhere,
            Some(None) => State::Dead,
            None => State::Unknown,
        };
        let (addr, port) = given.original;
        Self {
            owner: given.owner(dump),
            kind: given.kind,
            cookie: given.cookie,
            netns: given.netns,
            original: addr.socket(port),
            backend: given.backend,
            backend_id: given.backend_id,
            backend_generation: given.generation,
            current: given.is_current(dump),
            local: listing.flatten().map(|socket| canonical(socket.local)),
            state,
            age: age(given.time, begun).as_secs(),
        }
    }

    fn cells(&self) -> [String; 8] {
        let gone = if self.current { "" } else { " (gone)" };
        let unconnected = match self.kind {
            Kind::Connected => "",
            Kind::Unconnected => ", unconnected",
        };
        [
            self.owner.to_string(),
            self.original.to_string(),
            format!("{}{gone}", self.backend),
            self.local.map_or_else(|| "-".into(), |local| local.to_string()),
            format!("{}{unconnected}", self.state.label()),
            format!("{}s", self.age),
            self.cookie.to_string(),
            self.netns.to_string(),
        ]
    }
}

/// Whether a socket is connected to what it was given, if it is to be.
fn has_peer(given: &Given, socket: &Socket) -> bool {
    given.kind == Kind::Unconnected || socket.is_connected_to(given.backend)
}

fn all(maps: &PinnedMaps) -> anyhow::Result<Vec<Given>> {
    let mut all: Vec<_> = maps.sockets()?.into_iter().map(Given::from).collect();
    for (cookie, socket) in maps.udp_flows()? {
        let used = socket.flows.iter().filter(|flow| flow.vip_port != 0);
        all.extend(used.map(|flow| Given::of_flow(cookie, socket.netns, flow)));
    }
    Ok(all)
}

pub(super) fn list(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let mut given = all(&maps)?;
    let begun = monotonic_ns();
    let wanted: BTreeSet<u64> = given.iter().map(|given| given.netns).collect();
    let sockets = Namespaces::new()?.visit(&wanted, |_| list_sockets(&Protocol::ALL));
    // What was closed meanwhile is not dead but gone, record and all.
    let still: BTreeSet<u64> = all(&maps)?.iter().map(|given| given.cookie).collect();
    given.retain(|given| still.contains(&given.cookie));
    let dump = maps.dump()?;
    let mut rows: Vec<_> = given.iter().map(|it| Row::new(it, &dump, &sockets, begun)).collect();
    rows.sort_by_cached_key(|row| (row.owner.to_string(), row.backend, row.cookie, row.original));
    let header = [
        "SERVICE",
        "ASKED FOR",
        "BACKEND",
        "LOCAL",
        "SOCKET",
        "AGE",
        "COOKIE",
        "NETNS",
    ];
    output::rows(args.output, header, &rows, Row::cells)?;
    if let Some(why) = unseen(&wanted, &sockets) {
        output::complain(&format!("not all sockets could be looked at: {why}"));
    }
    Ok(())
}

/// Why some of the wanted namespaces could not be looked into.
fn unseen(wanted: &BTreeSet<u64>, sockets: &Visited) -> Option<String> {
    let failed = sockets
        .visited
        .iter()
        .find_map(|(netns, it)| Some((netns, it.as_ref().err()?)));
    if let Some((netns, error)) = failed {
        return Some(format!("network namespace {netns}: {error}"));
    }
    let is_known = |netns| sockets.visited.contains_key(netns) || sockets.missing.contains(netns);
    if wanted.iter().all(is_known) {
        return None;
    }
    Some(match sockets.refused.first() {
        Some((path, error)) => format!("{}: {error} ({} in all)", path.display(), sockets.refused.len()),
        None => "network namespaces of other process namespaces are not found (hostPID)".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_core::maps::Maps as _;
    use lb_core::testing::{Cluster, apply, maps, service, slice, start};

    const LATE: u64 = 100 * CONNECTING;

    fn given() -> Given {
        Given {
            kind: Kind::Connected,
            cookie: 9,
            socket: 9,
            netns: 7,
            proto: 6,
            original: (Addr::from_v4([10, 96, 0, 10]), 80),
            backend: "10.10.1.2:8080".parse().unwrap(),
            backend_id: 1,
            generation: 1,
            service: 1,
            time: LATE - 10 * CONNECTING,
        }
    }

    fn dump() -> Dump {
        let mut lb = start(maps());
        let objects = [service("web", "10.96.0.10").into(), slice("web", &["10.10.1.2"]).into()];
        apply(&mut lb, &mut Cluster::of(objects));
        lb.maps().dump().unwrap()
    }

    fn socket(remote: &str) -> Socket {
        Socket {
            cookie: 9,
            protocol: Protocol::Tcp,
            family: 10,
            state: 1,
            local: "[::ffff:10.10.1.9]:4000".parse().unwrap(),
            remote: remote.parse().unwrap(),
            interface: 0,
        }
    }

    fn sockets(socket: Option<Socket>) -> Visited {
        let listing = socket.into_iter().map(|socket| (socket.cookie, socket)).collect();
        Visit {
            visited: [(7, Ok(listing))].into(),
            missing: BTreeSet::new(),
            refused: Vec::new(),
        }
    }

    #[test]
    fn a_row_says_what_the_kernel_has() {
        let dump = dump();
        let state = |given: &Given, sockets: &Visited| Row::new(given, &dump, sockets, LATE).state;
        let there = sockets(Some(socket("[::ffff:10.10.1.2]:8080")));
        assert_eq!(state(&given(), &there), State::Open);
        let row = Row::new(&given(), &dump, &there, LATE);
        let cells = [
            "default/web:80",
            "10.96.0.10:80",
            "10.10.1.2:8080",
            "10.10.1.9:4000",
            "open",
            "10s",
            "9",
            "7",
        ];
        assert_eq!(row.cells(), cells);

        let elsewhere = sockets(Some(socket("10.10.1.3:8080")));
        assert_eq!(state(&given(), &elsewhere), State::Elsewhere);
        let unconnected = Given {
            kind: Kind::Unconnected,
            ..given()
        };
        assert_eq!(state(&unconnected, &elsewhere), State::Open);
        assert_eq!(state(&given(), &sockets(None)), State::Dead);
        let connecting = Given {
            time: LATE - CONNECTING / 2,
            ..given()
        };
        assert_eq!(state(&connecting, &sockets(None)), State::Unknown);
        assert_eq!(state(&connecting, &elsewhere), State::Unknown);

        let of_another = |missing: &[u64]| Visit {
            visited: [(8, Ok(Sockets::new()))].into(),
            missing: missing.iter().copied().collect(),
            refused: Vec::new(),
        };
        assert_eq!(state(&given(), &of_another(&[7])), State::Dead, "with its namespace");
        assert_eq!(state(&given(), &of_another(&[])), State::Unknown);
        let failed = Visit {
            visited: [(7, Err(io::ErrorKind::Interrupted.into()))].into(),
            ..of_another(&[])
        };
        assert_eq!(state(&given(), &failed), State::Unknown);
        let wanted = [7].into();
        assert!(unseen(&wanted, &failed).is_some_and(|why| why.starts_with("network namespace 7: ")));
        assert!(unseen(&wanted, &of_another(&[])).is_some());
        assert_eq!(unseen(&wanted, &of_another(&[7])), None);
        assert_eq!(unseen(&wanted, &there), None);
    }

    #[test]
    fn a_service_index_that_may_be_anothers_is_not_named() {
        let dump = dump();
        let none = sockets(None);
        let row = |given: &Given| Row::new(given, &dump, &none, LATE);
        let old = Given {
            generation: 3,
            ..given()
        };
        assert_eq!((&*row(&old).owner.name, row(&old).current), ("web", false));
        let left = Given {
            original: (Addr::from_v4([10, 96, 0, 11]), 80),
            ..old
        };
        assert_eq!(row(&left).owner.name, "?");
    }
}
