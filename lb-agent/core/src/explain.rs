//! Explains the outcome of a `connect()` or of a packet from outside: the decision of the data plane, made from a copy of
//! the maps by the same `lb_common::logic`.

mod packet;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use lb_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendRef, BackendSlot, DropReason, FilterBit, Frontend, FrontendKey,
    FrontendKind, Service, ServiceIndex, Set, SetWord, backend_flags, ip_protocol, service_flags,
};
use lb_common::logic::decide::{self, Admission, PacketTables, Services, SocketFrontend};
use lb_common::logic::frontend::{self, Destination, Tables};
use lb_common::logic::ip128::Ip128;
use lb_common::logic::selection;
use lb_common::logic::{affinity, generation};
use serde::Serialize;

use crate::maps::{Direction, Dump};
use crate::model::Protocol;
use crate::names::{ServicePortName, port_id};
use crate::places::Places;

pub use packet::explain as explain_packet;

/// A copy of the maps that the decision depends on.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The maps of the update protocol.
    pub dump: Dump,
    /// AFFINITY.
    pub affinity: BTreeMap<AffinityKey, Affinity>,
    /// CT and CT_NEW.
    pub flows: Vec<Direction>,
    /// Places of the problems in NOTICES.
    pub places: Places,
    /// Number of problems that NOTICES has no room for.
    pub unlisted_problems: u32,
    /// Time of the copy, in nanoseconds of CLOCK_MONOTONIC.
    pub now: u64,
}

impl Snapshot {
    /// Returns the number of service ports that NOTICES names and NAMES does not have.
    fn unwritten_ports(&self) -> usize {
        let written: BTreeSet<_> = self.dump.names.values().filter_map(port_id).collect();
        self.places.ports().difference(&written).count()
    }

    /// Returns the problems by which a frontend may be missing from the maps; `None` if there are none.
    fn problems_of(&self, to: Destination) -> Option<String> {
        let addr = to.addr.or_loopback();
        let key = |addr| FrontendKey::new(addr, to.port, to.proto);
        let is_node_port = addr.is_loopback() || self.dump.node_addrs.contains(&addr.into());
        let any = if to.addr.is_v4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let node_port = is_node_port.then(|| key(IpAddr::into(any)));
        let keys = [Some(key(addr.into())), node_port];
        if let Some(place) = keys.iter().flatten().find_map(|key| self.places.frontend(key)) {
            return Some(format!("`status` has a problem of \"{place}\""));
        }
        let ports = match self.unwritten_ports() {
            0 => None,
            1 => Some("`status` lists a service port that is not written".to_owned()),
            n => Some(format!("`status` lists {n} service ports that are not written")),
        };
        let unlisted = match self.unlisted_problems {
            0 => None,
            1 => Some("one more problem is only in the log of the agent".to_owned()),
            n => Some(format!("{n} more problems are only in the log of the agent")),
        };
        let all: Vec<_> = ports.into_iter().chain(unlisted).collect();
        (!all.is_empty()).then(|| all.join(", and "))
    }
}

/// The socket that calls connect().
#[derive(Debug, Clone, Copy)]
pub struct ConnectingSocket {
    /// Cookie of its network namespace.
    pub netns: u64,
    /// Whether this is the node's network namespace.
    pub on_node: bool,
    /// Whether only sockets of the node's namespace are served (`--socket-lb node`).
    pub node_only: bool,
}

/// The decision, step by step; a step that was not reached is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The destination.
    pub to: SocketAddr,
    /// Name of the protocol, such as `TCP`.
    pub protocol: &'static str,
    /// The frontend of the destination.
    pub frontend: Option<FrontendMatch>,
    /// The source of a packet; `None` for a socket.
    pub source: Option<Source>,
    /// The set of backends that serves the client.
    pub set: Option<ServingSet>,
    /// Session affinity of the client.
    pub affinity: Option<AffinityState>,
    /// Every backend of the service port, eligible backends first.
    pub candidates: Vec<Candidate>,
    /// The result of the call, or of the packet.
    pub outcome: Outcome,
    /// The outcome for the packets of a socket that is not translated; `None` if it was not requested.
    pub packets: Option<PacketsOutcome>,
    /// Remarks, such as the ports that the address has.
    pub notes: Vec<String>,
}

/// The frontend of a destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FrontendMatch {
    /// Label of the kind.
    pub kind: &'static str,
    /// Name of the service port.
    pub service: ServicePortName,
    /// Service index: index into SERVICES.
    pub index: u32,
}

/// The outcome for the packets that a socket sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PacketsOutcome {
    /// Source address of the packets.
    pub from: IpAddr,
    /// Their outcome.
    pub outcome: Outcome,
}

/// Facts about the source of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// Source address.
    pub address: IpAddr,
    /// Whether the address is inside the cluster.
    pub inside: bool,
    /// Whether the address is a pod of this node.
    pub here: bool,
    /// The longest network of CLUSTER_CIDRS that contains the address.
    pub network: Option<String>,
    /// Whether the source ranges of the load-balancer address admit the source; `None` without source ranges.
    pub admitted: Option<bool>,
}

impl FrontendMatch {
    fn new(maps: &Snapshot, frontend: Frontend) -> Self {
        Self {
            kind: FrontendKind::from_u8(frontend.kind).map_or("(unknown kind)", FrontendKind::label),
            service: ServicePortName::of(maps.dump.names.get(&frontend.service)),
            index: frontend.service.get(),
        }
    }
}

/// The set of backends that serves a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServingSet {
    /// Name of the set.
    pub name: &'static str,
    /// The reason for this set.
    pub why: &'static str,
    /// Number of its backends.
    pub members: u16,
}

/// The entry of AFFINITY for a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AffinityState {
    /// Timeout of the service port, in seconds.
    pub timeout: u32,
    /// Address of the backend; `None` if the client is new or the backend is gone.
    pub backend: Option<SocketAddr>,
    /// Seconds since the last use; `None` if the client is new.
    pub age: Option<u64>,
    /// Seconds until the entry expires, if it is in force.
    pub remaining: Option<u64>,
    /// Whether the entry decides the backend.
    pub holds: bool,
    /// The reason.
    pub why: &'static str,
}

/// A backend of the service port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// Address and port.
    pub address: SocketAddr,
    /// Backend id: index into BACKENDS.
    pub id: u32,
    /// Generation in BACKENDS.
    pub generation: u32,
    /// Whether the backend is on this node.
    pub local: bool,
    /// Whether the connection may get this backend.
    pub eligible: bool,
    /// The reason.
    pub why: String,
}

/// The result of a `connect()` or of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Outcome {
    /// lb leaves the destination as it is.
    Untouched {
        /// The reason.
        why: String,
    },
    /// The destination becomes one of the backends, each with equal probability.
    Connects {
        /// Addresses and ports of the backends.
        backends: Vec<SocketAddr>,
    },
    /// The client of a packet gets a response at once.
    Rejected {
        /// The response: a TCP RST or an ICMP error.
        answer: &'static str,
        /// Label of the counter in DROPS.
        reason: &'static str,
        /// Text of the drop reason.
        why: &'static str,
    },
    /// A packet is dropped.
    Dropped {
        /// Label of the counter in DROPS.
        reason: &'static str,
        /// Text of the drop reason.
        why: &'static str,
    },
    /// The call fails at once.
    Refused {
        /// Name of the error number.
        errno: &'static str,
        /// The error number.
        number: i32,
        /// Label of the counter in DROPS.
        reason: &'static str,
        /// Text of the drop reason.
        why: &'static str,
    },
}

impl Outcome {
    fn refused(reason: DropReason) -> Self {
        let errno = reason.errno();
        Self::Refused {
            errno: errno.name,
            number: errno.number,
            reason: reason.label(),
            why: reason.text(),
        }
    }

    fn untouched(why: impl Into<String>) -> Self {
        Self::Untouched { why: why.into() }
    }
}

/// The maps as the lookups of [`decide`] see them.
struct View<'a> {
    maps: &'a Snapshot,
    on_node: bool,
}

impl Tables for View<'_> {
    fn frontend(&self, key: Destination) -> Option<Frontend> {
        let key = FrontendKey::new(key.addr.into(), key.port, key.proto);
        self.maps.dump.frontends.get(&key).copied()
    }

    fn may_have(&self, addr: Ip128) -> bool {
        self.maps.dump.filter.contains(&FilterBit::of(addr.0))
    }

    fn is_node_address(&self, addr: Ip128) -> bool {
        self.maps.dump.node_addrs.contains(&addr.into())
    }

    fn is_on_node(&self) -> bool {
        self.on_node
    }
}

/// A [`View`] in which every bit of FILTER is set.
struct Unfiltered<'a>(&'a View<'a>);

impl Tables for Unfiltered<'_> {
    fn frontend(&self, key: Destination) -> Option<Frontend> {
        self.0.frontend(key)
    }

    fn may_have(&self, _: Ip128) -> bool {
        true
    }

    fn is_node_address(&self, addr: Ip128) -> bool {
        self.0.is_node_address(addr)
    }

    fn is_on_node(&self) -> bool {
        self.0.is_on_node()
    }
}

impl<'a> Services for View<'a> {
    type Service = &'a Service;

    fn service(&self, index: ServiceIndex) -> Option<&'a Service> {
        self.maps.dump.service(index)
    }

    fn flags(&self, service: &'a Service) -> u32 {
        service.flags
    }
}

impl PacketTables for View<'_> {
    fn cluster_flags(&self, addr: Ip128) -> u32 {
        self.maps.dump.cluster_cidr(addr.into()).map_or(0, |(_, flags)| flags)
    }

    fn is_in_source_range(&self, service: ServiceIndex, addr: Ip128) -> bool {
        let mut ranges = self.maps.dump.source_ranges.keys();
        ranges.any(|range| range.admits(service, addr.into()))
    }
}

impl Explanation {
    /// Adds the outcome for the packets of a socket that is not translated, if they have source address `from`. No packet
    /// leaves the node from a loopback address.
    pub fn with_packets(mut self, maps: &Snapshot, from: Option<IpAddr>, to: Destination) -> Self {
        let from = from.filter(|from| from.is_ipv4() == to.addr.is_v4() && !from.is_loopback());
        if let (Outcome::Untouched { .. }, Some(from)) = (&self.outcome, from) {
            let outcome = explain_packet(maps, from, to).outcome;
            self.packets = Some(PacketsOutcome { from, outcome });
        }
        self
    }

    /// The explanation of a destination without any lookup.
    pub fn untouched(to: Destination, why: impl Into<String>) -> Self {
        Self {
            to: Addr::from(to.addr).socket(to.port),
            protocol: Protocol::name_of(to.proto),
            frontend: None,
            source: None,
            set: None,
            affinity: None,
            candidates: Vec::new(),
            outcome: Outcome::untouched(why),
            packets: None,
            notes: Vec::new(),
        }
    }
}

/// Explains a `connect()` of a socket that the programs serve. The steps are those of `lb-ebpf`.
pub fn explain(maps: &Snapshot, socket: ConnectingSocket, to: Destination) -> Explanation {
    let view = View {
        maps,
        on_node: socket.on_node,
    };
    let mut explanation = Explanation::untouched(to, "");
    let frontend = match decide::socket_frontend(&view, socket.node_only, to) {
        Ok(SocketFrontend::Found(frontend)) => frontend,
        Ok(SocketFrontend::OtherNamespace) => {
            explanation.outcome = Outcome::untouched(
                "only sockets of the node's network namespace are served (--socket-lb node); others send packets to \
                 the destination, and what becomes of those is told for the address that they come from",
            );
            return explanation;
        }
        Ok(SocketFrontend::None) => {
            let unfiltered = frontend::of_socket(&Unfiltered(&view), to);
            explanation.outcome = Outcome::untouched(why_no_frontend(&view, to, unfiltered));
            return explanation;
        }
        Err(reason) => {
            explanation.outcome = Outcome::refused(reason);
            explanation.notes.push(ports_of(maps, to));
            return explanation;
        }
    };
    explanation.frontend = Some(FrontendMatch::new(maps, frontend));
    let client = AffinityKey::of_netns(socket.netns, frontend.service);
    let mut by_service = explanation.clone();
    choose_by_service(&view, client, frontend, &mut by_service);
    match ServedBy::frontend(&maps.dump, frontend) {
        None => explanation = by_service,
        Some(served_by) => {
            choose(maps, client, &served_by, &mut explanation);
            // They differ for a moment during a change, or after a write from outside.
            if explanation.outcome != by_service.outcome {
                explanation.notes.extend(served_by.note_on_other_slots());
                explanation.notes.push(note_on_sets(to, &by_service.outcome));
            }
        }
    }
    if to.proto == ip_protocol::UDP && explanation.set.is_some() {
        explanation.notes.push(
            "this is a new connect(), or a first datagram: an unconnected socket stays with the backend that it has \
             for this address while that is usable"
                .into(),
        );
    }
    explanation
}

/// Chooses the backend by the entry of SERVICES, as programs do for every call and packet that the set in the frontend does not
/// serve.
fn choose_by_service(view: &View<'_>, client: AffinityKey, frontend: Frontend, explanation: &mut Explanation) {
    match decide::admit_socket(view, frontend) {
        Ok(Some(admission)) => {
            let served_by = ServedBy::service(&view.maps.dump, frontend.service, admission);
            choose(view.maps, client, &served_by, explanation);
        }
        Ok(None) => {
            explanation.outcome = Outcome::untouched(
                "the load-balancer address is for some sources only (loadBalancerSourceRanges), and a socket's source \
                 is not known when it connects: what becomes of its packets is told for the address that they come \
                 from",
            );
        }
        Err(reason) => explanation.outcome = Outcome::refused(reason),
    }
}

/// Returns the note on a frontend whose set in FRONTENDS leads elsewhere than that in SERVICES. `by_service`: the outcome by
/// SERVICES.
fn note_on_sets(to: Destination, by_service: &Outcome) -> String {
    let datagrams = if to.proto == ip_protocol::UDP {
        ", which the first datagram of an unconnected socket uses,"
    } else {
        ""
    };
    format!(
        "connect() uses the set in FRONTENDS; by the one in SERVICES{datagrams} it {by_service}; the two differ for a \
         moment during a change, else `lb-agent verify` names the field"
    )
}

/// The set of a service port that serves the client.
struct ServedBy<'a> {
    index: ServiceIndex,
    /// The name of the set; `None` if the kind of the frontend is unknown, and the set in the frontend serves it.
    set: Option<Set>,
    word: SetWord,
    /// The slots of the set that programs take a backend from.
    members: Vec<&'a BackendSlot>,
    /// Timeout in seconds if the service has session affinity.
    affinity_timeout: Option<u32>,
}

impl<'a> ServedBy<'a> {
    /// Returns the set in an entry of SERVICES.
    fn service(dump: &'a Dump, index: ServiceIndex, admission: Admission<&Service>) -> Self {
        let Admission { service, set, .. } = admission;
        let word = service.set_word(set);
        Self {
            index,
            set: Some(set),
            word,
            members: slots(dump, word).unwrap_or_default().iter().collect(),
            affinity_timeout: (service.flags & service_flags::AFFINITY != 0).then_some(service.affinity_timeout),
        }
    }

    /// Returns the set in a frontend, by which a connect() needs no entry of SERVICES; `None` if the frontend has none, or only slots of
    /// other services.
    fn frontend(dump: &'a Dump, frontend: Frontend) -> Option<Self> {
        let word = frontend.set;
        let slots = (0..u32::from(word.len)).filter_map(|n| dump.slots.get(word.base.wrapping_add(n) as usize));
        let members: Vec<_> = slots.filter(|slot| slot.service == frontend.service).collect();
        (!members.is_empty()).then(|| Self {
            index: frontend.service,
            set: selection::set_for_socket(frontend).ok(),
            word,
            members,
            affinity_timeout: None,
        })
    }

    fn describe(&self) -> ServingSet {
        let (name, why) = match self.set {
            Some(Set::Internal) => ("internal", "cluster IPs: internalTrafficPolicy applies"),
            Some(Set::External) => ("external", "clients outside: externalTrafficPolicy applies"),
            Some(Set::Cluster) => (
                "cluster",
                "a client inside the cluster: external addresses have policy Cluster",
            ),
            None => (
                "unknown",
                "the kind of the frontend is unknown, but FRONTENDS has a set for it",
            ),
        };
        ServingSet {
            name,
            why,
            members: self.word.len,
        }
    }

    /// Returns the note on slots of the set in a frontend that are not of its service, if there are any.
    fn note_on_other_slots(&self) -> Option<String> {
        let (len, others) = (self.word.len, usize::from(self.word.len) - self.members.len());
        (others != 0).then(|| {
            format!(
                "{others} of the {len} slots of the set in FRONTENDS are not of this Service: a connect() that selects \
                 one of them uses SERVICES"
            )
        })
    }

    /// Returns the entry of BACKENDS if affinity may select it again.
    fn reusable_backend<'b>(&self, dump: &'b Dump, reference: BackendRef) -> Option<&'b Backend> {
        let entry = dump.backends.get(reference.id as usize)?;
        entry.serves(reference, self.index, self.set?).then_some(entry)
    }
}

/// Returns the slots of a set; `None` if the set is empty or out of range.
fn slots(dump: &Dump, word: SetWord) -> Option<&[BackendSlot]> {
    let base = selection::slot(word, 0).ok()? as usize;
    dump.slots.get(base..base + usize::from(word.len))
}

/// Chooses the backend: the client's last backend if the service has affinity, or any of the set.
fn choose(maps: &Snapshot, client: AffinityKey, served_by: &ServedBy<'_>, explanation: &mut Explanation) {
    explanation.set = Some(served_by.describe());
    let mut kept = None;
    if let Some(timeout) = served_by.affinity_timeout {
        let (state, backend) = affinity_of(maps, client, served_by, timeout);
        kept = backend.map(|backend| (backend, state.remaining.unwrap_or(0)));
        explanation.affinity = Some(state);
    }
    explanation.candidates = candidates(&maps.dump, served_by, kept);
    let eligible = || explanation.candidates.iter().filter(|candidate| candidate.eligible);
    let refused = |reason| match &explanation.source {
        Some(_) => packet::refused(reason, explanation.protocol),
        None => Outcome::refused(reason),
    };
    explanation.outcome = match selection::slot(served_by.word, 0) {
        Err(reason) if kept.is_none() => refused(reason),
        _ if eligible().next().is_none() => refused(DropReason::BadSlot),
        _ => Outcome::Connects {
            backends: eligible().map(|candidate| candidate.address).collect(),
        },
    };
}

/// Returns the entry of AFFINITY for the client, and the backend that it keeps.
fn affinity_of(
    maps: &Snapshot,
    client: AffinityKey,
    served_by: &ServedBy<'_>,
    timeout: u32,
) -> (AffinityState, Option<u32>) {
    let mut state = AffinityState {
        timeout,
        backend: None,
        age: None,
        remaining: None,
        holds: false,
        why: "the client is new to this service",
    };
    let Some(entry) = maps.affinity.get(&client) else {
        return (state, None);
    };
    let age = age(entry.used, maps.now);
    state.age = Some(age.as_secs());
    let backend = maps.dump.backends.get(entry.backend.id as usize);
    state.backend = backend
        .filter(|backend| backend.is_current(entry.backend))
        .map(|backend| backend.addr.socket(backend.port));
    if !affinity::holds(entry.used, maps.now, timeout) {
        state.why = "it was last used longer ago than the timeout";
    } else if served_by.reusable_backend(&maps.dump, entry.backend).is_none() {
        state.why = "the backend is gone, or is no member of the set any more";
    } else {
        state.holds = true;
        state.remaining = Some(remaining(age, timeout));
        state.why = "used within the timeout, and the backend is usable";
        return (state, Some(entry.backend.id));
    }
    (state, None)
}

/// Age of a time stamp.
pub fn age(used: u64, now: u64) -> Duration {
    Duration::from_nanos(now.saturating_sub(used))
}

/// Whole seconds until an entry of this age expires, rounded up; zero if it has expired.
pub fn remaining(age: Duration, timeout: u32) -> u64 {
    let left = Duration::from_secs(timeout.into()).saturating_sub(age);
    left.as_secs() + u64::from(left.subsec_nanos() > 0)
}

/// Every backend of the service port: the members of the set in the order of its slots, then the others. `kept`: the
/// backend that affinity selects, and the remaining seconds.
fn candidates(dump: &Dump, served_by: &ServedBy<'_>, kept: Option<(u32, u64)>) -> Vec<Candidate> {
    let members = &served_by.members;
    let mut all: Vec<_> = members
        .iter()
        .map(|slot| {
            let (eligible, why) = match kept {
                None => (
                    true,
                    format!("one of {} in the {}", members.len(), set_name(served_by.set)),
                ),
                Some((id, left)) if id == slot.backend.id => (true, format!("affinity, for {left} s more")),
                Some(_) => (false, "the client has affinity to another backend".into()),
            };
            Candidate {
                address: slot.addr.socket(slot.port),
                id: slot.backend.id,
                generation: slot.backend.generation,
                local: slot.flags & backend_flags::LOCAL != 0,
                eligible,
                why,
            }
        })
        .collect();
    let in_set: BTreeSet<u32> = members.iter().map(|slot| slot.backend.id).collect();
    let others = (0_u32..).zip(&dump.backends).filter(|(id, backend)| {
        generation::is_live(backend.generation) && backend.service == served_by.index && !in_set.contains(id)
    });
    all.extend(others.map(|(id, backend)| {
        // The flags of a backend that joins or leaves at this moment may differ from the slots.
        let eligible = kept.is_some_and(|(kept, _)| kept == id);
        Candidate {
            address: backend.addr.socket(backend.port),
            id,
            generation: backend.generation,
            local: backend.flags & backend_flags::LOCAL != 0,
            eligible,
            why: if eligible {
                "affinity".into()
            } else {
                why_no_member(backend, served_by.set)
            },
        }
    }));
    all.sort_by_key(|candidate| (!candidate.eligible, candidate.address));
    all
}

fn set_name(set: Option<Set>) -> &'static str {
    match set {
        Some(Set::Internal) => "internal set",
        Some(Set::External) => "external set",
        Some(Set::Cluster) => "cluster set",
        None => "set in FRONTENDS",
    }
}

fn why_no_member(backend: &Backend, set: Option<Set>) -> String {
    if backend.flags & backend_flags::SETS == 0 {
        return "drains: it serves what it has, and gets nothing new".into();
    }
    let name = set_name(set);
    let policy = match set {
        Some(Set::Internal) => "internalTrafficPolicy",
        Some(Set::External) => "externalTrafficPolicy",
        Some(Set::Cluster) | None => return format!("not in the {name}"),
    };
    if backend.flags & backend_flags::LOCAL == 0 {
        format!("not in the {name}: {policy} is Local, and it is on another node")
    } else {
        format!("not in the {name}")
    }
}

/// Returns the reason why programs find no frontend of a destination. `unfiltered`: the frontend that they would find without
/// FILTER.
fn why_no_frontend(view: &View<'_>, to: Destination, unfiltered: Result<Option<Frontend>, DropReason>) -> String {
    let addr = to.addr.or_loopback();
    let proto = Protocol::name_of(to.proto);
    let port = to.port;
    let entry = match unfiltered {
        Ok(None) => None,
        Ok(Some(_)) => Some(format!("a frontend for {}/{proto}", Addr::from(addr).socket(port))),
        Err(_) => Some(format!("the address mark of {}", Addr::from(addr))),
    };
    if let Some(entry) = entry {
        return format!(
            "FRONTENDS has {entry}, but the bit of the address in FILTER is not set, so programs do not look it up: \
             `lb-agent verify` names the bit, and a start of the agent sets it"
        );
    }
    let problems = view
        .maps
        .problems_of(to)
        .filter(|_| view.on_node || !addr.is_loopback());
    if addr.is_loopback() && problems.is_none() {
        return if view.on_node {
            format!("loopback of the node, and {port}/{proto} is no node port")
        } else {
            "loopback of another network namespace than the node's: node ports are not served there".into()
        };
    }
    let ip: IpAddr = Addr::from(addr).into();
    if let Some(problems) = problems {
        return format!(
            "no frontend is written for {}/{proto}: {problems}",
            SocketAddr::new(ip, port)
        );
    }
    if view.is_node_address(addr) {
        format!("{ip} is an address of this node, and {port}/{proto} is no node port")
    } else {
        format!(
            "no Service has {}/{proto}, and {ip} is no address of this node",
            SocketAddr::new(ip, port)
        )
    }
}

/// The ports that a service address has.
fn ports_of(maps: &Snapshot, to: Destination) -> String {
    let addr = Addr::from(to.addr);
    let ports: Vec<_> = maps
        .dump
        .frontends
        .iter()
        .filter(|(key, value)| key.addr == addr && !value.is_mark())
        .map(|(key, value)| {
            let owner = ServicePortName::of(maps.dump.names.get(&value.service));
            format!("{}/{} ({owner})", key.port, Protocol::name_of(key.proto))
        })
        .collect();
    let ip = IpAddr::from(addr);
    if let Some(problems) = maps.problems_of(to) {
        let has = if ports.is_empty() {
            "no port".to_owned()
        } else {
            ports.join(", ")
        };
        format!("{ip} has {has} in the maps, but there may be more: {problems}")
    } else if ports.is_empty() {
        format!("{ip} is the address of a Service that has no port here")
    } else {
        format!("{ip} has {}", ports.join(", "))
    }
}

#[cfg(test)]
mod tests;
