//! `socket list`: records of translated sockets, joined with the sockets in the kernel.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use lb_common::abi::{Addr, BackendRef, FrontendKey, ServiceIndex, SocketRecord, UdpDest};
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

/// How the backend of a socket was selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// By `connect()`.
    Connected,
    /// By a datagram with a destination of its own.
    Unconnected,
}

/// A record of a socket and its backend.
#[derive(Debug, Clone, Copy)]
struct Record {
    kind: Kind,
    /// Key of the record in the map.
    cookie: u64,
    /// The cookie that sock_diag lists the socket with.
    socket: u64,
    netns: u64,
    proto: u8,
    original: (Addr, u16),
    backend: SocketAddr,
    reference: BackendRef,
    service: ServiceIndex,
    /// Time of the connect or of the last datagram, in nanoseconds of CLOCK_MONOTONIC.
    time: u64,
}

impl From<SocketRecord> for Record {
    fn from(record: SocketRecord) -> Self {
        Self {
            kind: Kind::Connected,
            cookie: record.cookie,
            socket: record.socket,
            netns: record.netns,
            proto: record.proto,
            original: (record.original_addr, record.original_port),
            backend: record.backend_addr.socket(record.backend_port),
            reference: record.backend,
            service: record.service,
            time: record.time,
        }
    }
}

impl Record {
    fn of_dest(cookie: u64, netns: u64, dest: &UdpDest) -> Self {
        Self {
            kind: Kind::Unconnected,
            cookie,
            socket: cookie,
            netns,
            proto: Protocol::Udp as u8,
            original: (dest.vip, dest.vip_port),
            backend: dest.backend_addr.socket(dest.backend_port),
            reference: dest.backend,
            service: dest.service,
            time: dest.asked,
        }
    }

    /// Whether the record's reference to the backend is current.
    fn is_current(&self, dump: &Dump) -> bool {
        let entry = dump.backends.get(self.reference.id as usize);
        entry.is_some_and(|entry| entry.is_current(self.reference))
    }

    /// Returns the service port of the record. Its service index may have been reused for another service port: the name
    /// counts only if the backend reference is current, or if the original destination still leads to that index.
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

/// State of a socket in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It exists, and is connected to the backend if it has to be.
    Open,
    /// It exists, and is connected to another address or to none.
    Elsewhere,
    /// It does not exist; the record is not removed yet.
    Dead,
    /// Its network namespace cannot be entered, or it may be connecting at this moment.
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
    /// The destination that the process requested.
    original: SocketAddr,
    /// The selected backend.
    backend: SocketAddr,
    backend_id: u32,
    backend_generation: u32,
    /// Whether the reference to the backend is current.
    current: bool,
    /// Local address of the socket.
    local: Option<SocketAddr>,
    state: State,
    /// Seconds since the connect or the last datagram.
    age: u64,
}

type Visited = Visit<io::Result<Sockets>>;

impl Row {
    /// Joins a record with a listing of sockets that was started at `begun`.
    fn new(record: &Record, dump: &Dump, sockets: &Visited, begun: u64) -> Self {
        let listing = match sockets.visited.get(&record.netns) {
            Some(Ok(listing)) => Some(listing.get(&record.socket)),
            Some(Err(_)) => None,
            None => sockets.missing.contains(&record.netns).then_some(None),
        };
        let is_new = begun.saturating_sub(record.time) < CONNECTING;
        let state = match listing {
            Some(Some(socket)) if has_peer(record, socket) => State::Open,
            Some(_) | None if is_new => State::Unknown,
            Some(Some(_)) => State::Elsewhere,
            Some(None) => State::Dead,
            None => State::Unknown,
        };
        let (addr, port) = record.original;
        Self {
            owner: record.owner(dump),
            kind: record.kind,
            cookie: record.cookie,
            netns: record.netns,
            original: addr.socket(port),
            backend: record.backend,
            backend_id: record.reference.id,
            backend_generation: record.reference.generation,
            current: record.is_current(dump),
            local: listing.flatten().map(|socket| canonical(socket.local)),
            state,
            age: age(record.time, begun).as_secs(),
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

/// Whether a socket is connected to the backend of its record, if it has to be.
fn has_peer(record: &Record, socket: &Socket) -> bool {
    record.kind == Kind::Unconnected || socket.is_connected_to(record.backend)
}

fn all(maps: &PinnedMaps) -> anyhow::Result<Vec<Record>> {
    let mut all: Vec<_> = maps.sockets()?.into_iter().map(Record::from).collect();
    for (cookie, socket) in maps.udp_dests()? {
        let used = socket.dests.iter().filter(|dest| dest.vip_port != 0);
        all.extend(used.map(|dest| Record::of_dest(cookie, socket.netns, dest)));
    }
    Ok(all)
}

pub(super) fn list(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let mut records = all(&maps)?;
    let begun = monotonic_ns();
    let wanted: BTreeSet<u64> = records.iter().map(|record| record.netns).collect();
    let sockets = Namespaces::new()?.visit(&wanted, |_| list_sockets(&Protocol::ALL));
    // A socket that was closed meanwhile is left out: its record is removed too, so it is not dead.
    let still: BTreeSet<u64> = all(&maps)?.iter().map(|record| record.cookie).collect();
    records.retain(|record| still.contains(&record.cookie));
    let dump = maps.dump()?;
    let mut rows: Vec<_> = records
        .iter()
        .map(|record| Row::new(record, &dump, &sockets, begun))
        .collect();
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
    if let Some(why) = unread_reason(&wanted, &sockets) {
        output::warn(&format!("some sockets could not be read: {why}"));
    }
    Ok(())
}

/// Returns why some of the wanted network namespaces could not be read, if any.
fn unread_reason(wanted: &BTreeSet<u64>, sockets: &Visited) -> Option<String> {
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

    fn record() -> Record {
        Record {
            kind: Kind::Connected,
            cookie: 9,
            socket: 9,
            netns: 7,
            proto: 6,
            original: (Addr::from_v4([10, 96, 0, 10]), 80),
            backend: "10.10.1.2:8080".parse().unwrap(),
            reference: BackendRef { id: 1, generation: 1 },
            service: ServiceIndex::new(1),
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
    fn row_shows_the_state_in_the_kernel() {
        let dump = dump();
        let state = |record: &Record, sockets: &Visited| Row::new(record, &dump, sockets, LATE).state;
        let there = sockets(Some(socket("[::ffff:10.10.1.2]:8080")));
        assert_eq!(state(&record(), &there), State::Open);
        let row = Row::new(&record(), &dump, &there, LATE);
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
        assert_eq!(state(&record(), &elsewhere), State::Elsewhere);
        let unconnected = Record {
            kind: Kind::Unconnected,
            ..record()
        };
        assert_eq!(state(&unconnected, &elsewhere), State::Open);
        assert_eq!(state(&record(), &sockets(None)), State::Dead);
        let connecting = Record {
            time: LATE - CONNECTING / 2,
            ..record()
        };
        assert_eq!(state(&connecting, &sockets(None)), State::Unknown);
        assert_eq!(state(&connecting, &elsewhere), State::Unknown);

        let of_another = |missing: &[u64]| Visit {
            visited: [(8, Ok(Sockets::new()))].into(),
            missing: missing.iter().copied().collect(),
            refused: Vec::new(),
        };
        assert_eq!(state(&record(), &of_another(&[7])), State::Dead, "with its namespace");
        assert_eq!(state(&record(), &of_another(&[])), State::Unknown);
        let failed = Visit {
            visited: [(7, Err(io::ErrorKind::Interrupted.into()))].into(),
            ..of_another(&[])
        };
        assert_eq!(state(&record(), &failed), State::Unknown);
        let wanted = [7].into();
        assert!(unread_reason(&wanted, &failed).is_some_and(|why| why.starts_with("network namespace 7: ")));
        assert!(unread_reason(&wanted, &of_another(&[])).is_some());
        assert_eq!(unread_reason(&wanted, &of_another(&[7])), None);
        assert_eq!(unread_reason(&wanted, &there), None);
    }

    #[test]
    fn reused_service_index_is_not_named() {
        let dump = dump();
        let none = sockets(None);
        let row = |record: &Record| Row::new(record, &dump, &none, LATE);
        let old = Record {
            reference: BackendRef { id: 1, generation: 3 },
            ..record()
        };
        assert_eq!((&*row(&old).owner.name, row(&old).current), ("web", false));
        let left = Record {
            original: (Addr::from_v4([10, 96, 0, 11]), 80),
            ..old
        };
        assert_eq!(row(&left).owner.name, "?");
    }
}
