//! `conntrack list`: the flows in lb's conntrack, one row for both directions of a flow.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use lb_common::abi::{CtEntry, CtKey, Name, ServiceIndex, ct_flags};
use lb_common::logic::ct::{Phase, reverse_key};
use serde::Serialize;

use super::{ReadArgs, output};
use crate::clock::monotonic_ns;
use crate::maps::ct::CtMaps;
use lb_core::explain::age;
use lb_core::maps::Direction;
use lb_core::model::Protocol;
use lb_core::names::ServicePortName;

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    #[serde(flatten)]
    owner: ServicePortName,
    proto: &'static str,
    client: SocketAddr,
    /// The destination of the client's packets.
    frontend: SocketAddr,
    backend: SocketAddr,
    backend_id: u32,
    backend_generation: u32,
    /// The source address and port that the backend sees, if it is not the client's.
    source: Option<SocketAddr>,
    state: &'static str,
    /// Seconds since the last packet of either direction.
    idle: u64,
    /// The hook that translates packets of the original direction.
    hook: &'static str,
    /// Whether the hook forwards packets, past the stack.
    forwarded: bool,
    /// Whether both directions have an entry.
    complete: bool,
}

fn state(phase: Phase) -> &'static str {
    match phase {
        Phase::New => "new",
        Phase::Established => "established",
        Phase::HalfClosed => "closing",
        Phase::Closed => "closed",
        Phase::Reset => "reset",
    }
}

/// Returns the row of a flow from one direction and, if it exists, the entry of the other.
fn row(
    (key, entry): &Direction,
    other: Option<&CtEntry>,
    replied: bool,
    names: &BTreeMap<ServiceIndex, Name>,
    now: u64,
) -> Row {
    // The tuple before and after translation; swapped and reversed in the reply direction.
    let tuple = [key.src.socket(key.src_port), key.dst.socket(key.dst_port)];
    let translated = [entry.src.socket(entry.src_port), entry.dst.socket(entry.dst_port)];
    let is_reply = entry.flags & ct_flags::REPLY != 0;
    let ([client, frontend], [source, backend]) = if is_reply {
        ([translated[1], translated[0]], [tuple[1], tuple[0]])
    } else {
        (tuple, translated)
    };
    let seen = other.map_or(entry.seen, |other| other.seen.max(entry.seen));
    let phase = Phase::of(replied, [entry.state, other.map_or(0, |other| other.state)]);
    Row {
        owner: ServicePortName::of(names.get(&entry.service)),
        proto: Protocol::name_of(key.proto),
        client,
        frontend,
        backend,
        backend_id: entry.backend.id,
        backend_generation: entry.backend.generation,
        source: (source != client).then_some(source),
        state: state(phase),
        idle: age(seen, now).as_secs(),
        // Replies are translated at either hook, whichever hook translates the client's packets. Without the entry of
        // the original direction that hook is unknown.
        hook: match (is_reply, entry.flags & ct_flags::EGRESS != 0) {
            (true, _) => "?",
            (false, true) => "egress",
            (false, false) => "ingress",
        },
        forwarded: entry.flags & ct_flags::FORWARD != 0,
        complete: other.is_some(),
    }
}

/// Returns one row for each flow of a map.
fn rows(all: &[Direction], replied: bool, names: &BTreeMap<ServiceIndex, Name>, now: u64) -> Vec<Row> {
    let by_key: BTreeMap<&CtKey, &CtEntry> = all.iter().map(|(key, entry)| (key, entry)).collect();
    let rows = all.iter().filter_map(|direction| {
        let (key, entry) = direction;
        let other = by_key.get(&reverse_key(entry, key.proto)).copied();
        let is_second = entry.flags & ct_flags::REPLY != 0 && other.is_some();
        (!is_second).then(|| row(direction, other, replied, names, now))
    });
    rows.collect()
}

pub(super) fn list(args: &ReadArgs) -> anyhow::Result<()> {
    let maps = args.pin.open()?;
    let mut flows = CtMaps::open(&args.pin.pins().maps())?;
    let names = maps.names()?;
    // A flow that moves from CT_NEW to CT meanwhile is in one listing or in both. Reading CT_NEW first lists it twice
    // rather than not at all.
    let (new, established) = (flows.unreplied.all()?, flows.established.all()?);
    let now = monotonic_ns();
    let mut all = rows(&established, true, &names, now);
    all.extend(rows(&new, false, &names, now));
    all.sort_by_key(|row| (row.owner.to_string(), row.client, row.frontend));
    let header = [
        "PROTO", "CLIENT", "FRONTEND", "BACKEND", "SOURCE", "SERVICE", "STATE", "IDLE", "HOOK",
    ];
    output::rows(args.output, header, &all, |row| {
        let mut notes = row.hook.to_owned();
        if row.forwarded {
            notes += ", forwarded";
        }
        if !row.complete {
            notes += ", one direction only";
        }
        [
            row.proto.into(),
            row.client.to_string(),
            row.frontend.to_string(),
            row.backend.to_string(),
            row.source.map_or_else(|| "-".into(), |source| source.to_string()),
            row.owner.to_string(),
            row.state.into(),
            format!("{}s", row.idle),
            notes,
        ]
    })
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{Addr, BackendRef, ct_state};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn at(text: &str) -> (Addr, u16) {
        let at: SocketAddr = text.parse().unwrap();
        (at.ip().into(), at.port())
    }

    fn direction(tuple: [&str; 2], translated: [&str; 2], flags: u16, state: u8, seen: u64) -> Direction {
        let ([src, dst], [to_src, to_dst]) = (tuple.map(at), translated.map(at));
        let key = CtKey {
            src: src.0,
            dst: dst.0,
            src_port: src.1,
            dst_port: dst.1,
            proto: 6,
            pad: [0; 3],
        };
        let entry = CtEntry {
            src: to_src.0,
            dst: to_dst.0,
            src_port: to_src.1,
            dst_port: to_dst.1,
            backend: BackendRef { id: 3, generation: 5 },
            service: ServiceIndex::new(9),
            seen: seen * SECOND,
            flags,
            state,
            ..CtEntry::default()
        };
        (key, entry)
    }

    const CLIENT: &str = "203.0.113.7:4000";
    const FRONTEND: &str = "192.168.0.1:30001";
    const SOURCE: &str = "10.10.1.0:61001";
    const BACKEND: &str = "10.10.2.2:8080";

    /// Returns both directions of a flow to another node.
    fn forwarded(seen: [u64; 2], states: [u8; 2]) -> [Direction; 2] {
        let flags = ct_flags::FORWARD;
        [
            direction([CLIENT, FRONTEND], [SOURCE, BACKEND], flags, states[0], seen[0]),
            direction(
                [BACKEND, SOURCE],
                [FRONTEND, CLIENT],
                flags | ct_flags::REPLY,
                states[1],
                seen[1],
            ),
        ]
    }

    fn one(all: &[Direction], replied: bool) -> Row {
        let mut rows = rows(all, replied, &BTreeMap::new(), 100 * SECOND);
        assert_eq!(rows.len(), 1, "{rows:?}");
        rows.remove(0)
    }

    #[test]
    fn both_directions_are_one_row() {
        let row = one(&forwarded([90, 95], [ct_state::SYN, ct_state::SYN]), true);
        let text = |at: SocketAddr| at.to_string();
        assert_eq!(
            [row.client, row.frontend, row.backend].map(text),
            [CLIENT, FRONTEND, BACKEND]
        );
        assert_eq!(row.source.map(text).as_deref(), Some(SOURCE));
        assert_eq!((row.state, row.idle, row.hook), ("established", 5, "ingress"));
        assert!(row.forwarded && row.complete);
        assert_eq!((row.backend_id, row.backend_generation, row.proto), (3, 5, "TCP"));
    }

    #[test]
    fn single_direction_is_listed_as_incomplete() {
        let [original, reply] = forwarded([90, 95], [0, 0]);
        for (direction, hook) in [(original, "ingress"), (reply, "?")] {
            let row = one(&[direction], true);
            let addresses = [Some(row.client), Some(row.frontend), Some(row.backend), row.source];
            let text = addresses.map(|at| at.unwrap().to_string());
            assert_eq!(text, [CLIENT, FRONTEND, BACKEND, SOURCE]);
            assert_eq!((row.hook, row.complete), (hook, false));
        }
    }

    #[test]
    fn flow_without_snat_has_no_source() {
        let all = [
            direction([CLIENT, FRONTEND], [CLIENT, BACKEND], ct_flags::EGRESS, 0, 1),
            direction([BACKEND, CLIENT], [FRONTEND, CLIENT], ct_flags::REPLY, 0, 1),
        ];
        let row = one(&all, false);
        assert_eq!((row.source, row.state, row.hook), (None, "new", "egress"));
        assert!(!row.forwarded);
    }

    #[test]
    fn states_have_names() {
        const FIN: u8 = ct_state::FIN;
        for (replied, states, expected) in [
            (false, [0, 0], "new"),
            (true, [FIN, 0], "closing"),
            (true, [FIN, FIN], "closed"),
            (true, [0, ct_state::RST], "reset"),
        ] {
            assert_eq!(one(&forwarded([1, 1], states), replied).state, expected);
        }
    }
}
