//! `trace`: prints trace events of the programs as they happen.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use aya::maps::{Map, MapData, RingBuf};
use clap::Args;
use k8s_openapi::jiff::Timestamp;
use lb_common::abi::{Addr, DropReason, Event, EventKind, Name, ServiceIndex, map_name};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use zerocopy::FromBytes as _;

use super::{Format, ReadArgs, output, process};
use crate::clock::monotonic_ns;
use crate::loader::TraceLock;
use crate::maps::bpf::PinnedMaps;
use crate::maps::sys;
use lb_core::model::Protocol;
use lb_core::names::ServicePortName;

#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// Only events of this Service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<ServiceName>,
    /// Exit after this number of events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    read: ReadArgs,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ServiceName {
    namespace: String,
    name: String,
}

impl FromStr for ServiceName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(Self {
                namespace: namespace.into(),
                name: name.into(),
            }),
            _ => Err("not NAMESPACE/NAME"),
        }
    }
}

impl ServiceName {
    fn is(&self, owner: &ServicePortName) -> bool {
        (&self.namespace, &self.name) == (&owner.namespace, &owner.name)
    }
}

/// Number of events that are printed before signals are checked.
const TURN: usize = 256;

/// Interval at which the counter of lost events and the addresses of the requested Service are read, and at which replaced maps are
/// noticed.
const INTERVAL: Duration = Duration::from_millis(500);

/// One trace event, for tables and JSON.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    event: &'static str,
    /// Nanoseconds since 1970.
    time_ns: u64,
    /// `None` if no service port was found.
    service: Option<ServicePortName>,
    /// Source of a packet; `None` for a socket.
    client: Option<SocketAddr>,
    /// The original destination.
    to: SocketAddr,
    protocol: &'static str,
    /// The selected backend, if any.
    backend: Option<SocketAddr>,
    /// The drop reason, by label of its counter.
    reason: Option<&'static str>,
    /// Process id; zero if the event is not of a process.
    pid: u32,
    command: String,
    netns: u64,
    cookie: u64,
}

impl Row {
    /// Creates the row of an event. `boot` is the time since 1970, in nanoseconds, at which CLOCK_MONOTONIC was zero.
    fn new(event: &Event, service: Option<ServicePortName>, boot: u64, command: String) -> Self {
        let kind = EventKind::from_u8(event.kind);
        let refused = kind.is_some_and(EventKind::is_refusal);
        let packet = kind.is_some_and(EventKind::is_of_packet);
        Self {
            event: kind.map_or("(unknown)", EventKind::label),
            time_ns: boot + event.time,
            service,
            client: packet.then(|| event.client.socket(event.client_port)),
            to: event.addr.socket(event.port),
            protocol: Protocol::name_of(event.proto),
            backend: (event.backend_addr != Addr::UNSPECIFIED).then(|| event.backend_addr.socket(event.backend_port)),
            reason: refused.then(|| DropReason::from_u32(event.reason).map_or("unknown", DropReason::label)),
            pid: event.pid,
            command,
            netns: event.netns,
            cookie: event.cookie,
        }
    }

    fn line(&self) -> String {
        let dash = || "-".to_owned();
        let result = match (self.reason, self.backend) {
            (Some(reason), _) => reason.to_owned(),
            (None, backend) => backend.map_or_else(dash, |backend| backend.to_string()),
        };
        let source = match (self.client, self.pid) {
            (Some(client), _) => client.to_string(),
            (None, 0) => dash(),
            (None, pid) => format!("{pid} ({})", self.command),
        };
        // Packets are handled only in the node's network namespace.
        let netns = if self.client.is_some() {
            dash()
        } else {
            self.netns.to_string()
        };
        columns([
            &time_of_day(self.time_ns),
            self.event,
            &self.service.as_ref().map_or_else(dash, ToString::to_string),
            &format!("{}/{}", self.to, self.protocol),
            &result,
            &source,
            &netns,
        ])
    }
}

/// Joins columns of fixed, typical widths, since later rows are not known yet.
fn columns([time, event, service, to, result, source, netns]: [&str; 7]) -> String {
    format!("{time:<12}  {event:<10}  {service:<24}  {to:<22}  {result:<21}  {source:<22}  {netns}")
}

/// Formats a time as hours, minutes, seconds and milliseconds, UTC.
fn time_of_day(time_ns: u64) -> String {
    let time = Timestamp::from_nanosecond(time_ns.into());
    time.map_or_else(|_| "?".into(), |time| time.strftime("%H:%M:%S%.3f").to_string())
}

/// Lost events, in JSON.
#[derive(Debug, Serialize)]
struct Lost {
    event: &'static str,
    count: u64,
}

/// Makes the programs write events until it is dropped.
struct EnabledEvents<'a>(&'a PinnedMaps);

impl<'a> EnabledEvents<'a> {
    fn all(maps: &'a PinnedMaps) -> Self {
        maps.write_events(EventKind::ALL_BITS);
        Self(maps)
    }
}

impl Drop for EnabledEvents<'_> {
    fn drop(&mut self) {
        self.0.write_events(0);
    }
}

struct Tracer<'a> {
    args: &'a TraceArgs,
    /// The maps at the beginning.
    maps: &'a PinnedMaps,
    /// The maps that replaced them.
    newer: Option<PinnedMaps>,
    /// Time of the last check whether the maps were replaced.
    maps_checked: Instant,
    boot: u64,
    shown: u64,
    /// The counter of lost events at the last check.
    lost: u64,
    lost_before: u64,
    /// Addresses of the requested Service.
    addresses: BTreeSet<Addr>,
    /// Time at which the addresses were read.
    addresses_read: Option<Instant>,
}

impl<'a> Tracer<'a> {
    fn new(args: &'a TraceArgs, maps: &'a PinnedMaps) -> anyhow::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?;
        let boot = u64::try_from(now.as_nanos())?.saturating_sub(monotonic_ns());
        let lost = maps.drops(DropReason::EventLost)?;
        Ok(Self {
            args,
            maps,
            newer: None,
            maps_checked: Instant::now(),
            boot,
            shown: 0,
            lost,
            lost_before: lost,
            addresses: BTreeSet::new(),
            addresses_read: None,
        })
    }

    fn is_done(&self) -> bool {
        self.args.count.is_some_and(|count| self.shown >= count)
    }

    /// Prints an event, if it is of the requested Service.
    fn show(&mut self, event: &Event) -> anyhow::Result<()> {
        let service = if event.service.is_none() {
            None
        } else {
            Some(ServicePortName::of(self.name(event.service)?.as_ref()))
        };
        if let Some(wanted) = &self.args.service {
            let concerned = match &service {
                Some(owner) => wanted.is(owner),
                None => self.has_address(wanted, event.addr)?,
            };
            if !concerned {
                return Ok(());
            }
        }
        let command = if event.pid == 0 {
            String::new()
        } else {
            process::command(event.pid)
        };
        let row = Row::new(event, service, self.boot, command);
        self.shown += 1;
        match self.args.read.output {
            Format::Json => output::print(&serde_json::to_string(&row)?),
            Format::Table => output::print(&row.line()),
        }
    }

    /// Returns the name of a service index. If the agent has replaced the maps, they are opened again, at most once per interval.
    fn name(&mut self, service: ServiceIndex) -> anyhow::Result<Option<Name>> {
        if self.maps_checked.elapsed() >= INTERVAL {
            self.maps_checked = Instant::now();
            let pin = &self.args.read.pin;
            let maps = self.newer.as_ref().unwrap_or(self.maps);
            // Maps that cannot be opened are being replaced right now: the next check finds them.
            if !maps.has_names_of(&pin.pins().maps()).unwrap_or(true)
                && let Ok(newer) = pin.open()
            {
                self.newer = Some(newer);
            }
        }
        let maps = self.newer.as_ref().unwrap_or(self.maps);
        Ok(maps.name(service)?)
    }

    /// Whether an address belongs to the Service. An event of a port that the Service does not have contains no service
    /// index.
    fn has_address(&mut self, service: &ServiceName, addr: Addr) -> anyhow::Result<bool> {
        if self.addresses_read.is_none_or(|at| at.elapsed() >= INTERVAL) {
            let maps = self.args.read.pin.open()?;
            let names = maps.names()?;
            let indexes: BTreeSet<ServiceIndex> = names
                .iter()
                .filter(|(_, name)| service.is(&ServicePortName::of(Some(name))))
                .map(|(index, _)| *index)
                .collect();
            let frontends = maps.frontends()?.into_iter();
            self.addresses = frontends
                .filter(|(_, value)| indexes.contains(&value.service))
                .map(|(key, _)| key.addr)
                .collect();
            self.addresses_read = Some(Instant::now());
        }
        Ok(self.addresses.contains(&addr))
    }

    /// Prints the number of events that were lost since the last check.
    fn report_lost(&mut self) -> anyhow::Result<()> {
        let lost = self.maps.drops(DropReason::EventLost)?;
        let count = lost.saturating_sub(self.lost);
        self.lost = lost;
        if count == 0 {
            return Ok(());
        }
        match self.args.read.output {
            Format::Json => output::print(&serde_json::to_string(&Lost { event: "lost", count })?),
            Format::Table => output::print(&format!("({count} events were lost: the ring buffer was full)")),
        }
    }
}

pub(super) fn run(args: &TraceArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(trace(args))
}

async fn trace(args: &TraceArgs) -> anyhow::Result<()> {
    let pins = args.read.pin.pins();
    let maps = args.read.pin.open()?;
    let _lock = TraceLock::take(&pins)?.with_context(|| {
        format!(
            "another `lb-agent trace` is running on {}: only one can run at a time",
            pins.root().display()
        )
    })?;
    // From here on a signal ends the loop below, not the process, so that the programs stop writing events.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ring = MapData::from_pin(pins.maps().join(map_name::EVENTS))?;
    let mut ring = RingBuf::try_from(Map::RingBuf(ring))?;
    // Events of an earlier trace that were not read.
    maps.write_events(0);
    while ring.next().is_some() {}
    let mut ring = sys::watched(ring)?;
    let mut tracer = Tracer::new(args, &maps)?;
    let events = EnabledEvents::all(&maps);
    if args.read.output == Format::Table {
        let header = [
            "TIME (UTC)",
            "EVENT",
            "SERVICE",
            "TO",
            "BACKEND OR REASON",
            "PROCESS OR CLIENT",
            "NETNS",
        ];
        output::print(&columns(header))?;
    }
    let mut check = tokio::time::interval(INTERVAL);
    while !tracer.is_done() {
        tokio::select! {
            ready = ring.readable_mut() => {
                let mut ready = ready?;
                for _ in 0..TURN {
                    if tracer.is_done() {
                        break;
                    }
                    let Some(bytes) = ready.get_inner_mut().next() else {
                        ready.clear_ready();
                        break;
                    };
                    if let Ok((event, _)) = Event::read_from_prefix(&bytes) {
                        tracer.show(&event)?;
                    }
                }
            }
            _ = check.tick() => tracer.report_lost()?,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    drop(events);
    tracer.report_lost()?;
    let lost = tracer.lost - tracer.lost_before;
    output::warn(&format!("{} events, {lost} lost", tracer.shown));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind) -> Event {
        Event {
            time: 1_500_000_000,
            cookie: 9,
            netns: 4711,
            addr: Addr::from_v4([10, 96, 0, 10]),
            port: 53,
            proto: 17,
            kind: kind as u8,
            pid: 17,
            ..Event::default()
        }
    }

    fn owner() -> ServicePortName {
        ServicePortName {
            namespace: "kube-system".into(),
            name: "kube-dns".into(),
            port_name: "dns".into(),
            protocol: "UDP".into(),
            port: 53,
            family: 4,
        }
    }

    /// 2026-01-01, an hour and a minute after midnight.
    const BOOT: u64 = 1_767_229_260_000_000_000;

    #[test]
    fn each_kind_of_event_is_one_line() {
        let sent = Event {
            backend_addr: Addr::from_v4([10, 10, 1, 2]),
            backend_port: 5353,
            service: ServiceIndex::new(3),
            ..event(EventKind::Sent)
        };
        let line = Row::new(&sent, Some(owner()), BOOT, "dig".into()).line();
        let words: Vec<_> = line.split_whitespace().collect();
        let expected = [
            "01:01:01.500",
            "sent",
            "kube-system/kube-dns:dns",
            "10.96.0.10:53/UDP",
            "10.10.1.2:5353",
            "17",
            "(dig)",
            "4711",
        ];
        assert_eq!(words, expected);

        let refused = Event {
            reason: DropReason::NoSuchPort as u32,
            ..event(EventKind::Refused)
        };
        let row = Row::new(&refused, None, BOOT, "?".into());
        assert_eq!((row.backend, row.reason), (None, Some("no_such_port")));
        assert!(row.line().contains("no_such_port"), "{}", row.line());

        let of_packet = |kind| Event {
            client: Addr::from_v4([203, 0, 113, 7]),
            client_port: 40_000,
            pid: 0,
            netns: 0,
            cookie: 0,
            ..event(kind)
        };
        let translated = Event {
            backend_addr: Addr::from_v4([10, 10, 1, 2]),
            backend_port: 5353,
            service: ServiceIndex::new(3),
            ..of_packet(EventKind::Translated)
        };
        let line = Row::new(&translated, Some(owner()), BOOT, String::new()).line();
        let words: Vec<_> = line.split_whitespace().collect();
        let expected = ["10.10.1.2:5353", "203.0.113.7:40000", "-"];
        assert_eq!((words[1], &words[4..]), ("translated", &expected[..]));
        let rejected = Event {
            reason: DropReason::SourceNotAllowed as u32,
            ..of_packet(EventKind::Rejected)
        };
        let row = Row::new(&rejected, None, BOOT, String::new());
        assert_eq!(row.client, Some("203.0.113.7:40000".parse().unwrap()));
        assert_eq!(row.reason, Some("source_not_allowed"));
        assert!(row.line().contains("203.0.113.7:40000"), "{}", row.line());

        let destroyed = Event {
            pid: 0,
            ..event(EventKind::Destroyed)
        };
        let line = Row::new(&destroyed, None, BOOT, String::new()).line();
        assert!(!line.contains("()"), "{line}");
    }

    #[test]
    fn service_is_given_with_its_namespace() {
        let name: ServiceName = "kube-system/kube-dns".parse().unwrap();
        assert!(name.is(&owner()));
        assert!(!"default/kube-dns".parse::<ServiceName>().unwrap().is(&owner()));
        assert!("kube-dns".parse::<ServiceName>().is_err());
        assert!("/kube-dns".parse::<ServiceName>().is_err());
    }
}
