//! The garbage collector of CT and CT_NEW: a thread, separate from the reconciler, that deletes expired flows.
//!
//! It sweeps each map again and again: it reads the whole map, in batches. A sweep of a large map takes several passes of a
//! second each, so that the thread never examines more than [`PER_SECOND`] entries in a
//! second. Its cost does not depend on the number of flows; only the delay until an expired flow is found does.
//!
//! Both directions of a flow are deleted together, the reply direction first: while the original direction exists, no
//! program creates the flow again. Before the deletion both are looked up again, and stay if a packet arrived in the
//! meantime.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use lb_common::abi::{CtEntry, CtKey, ct_flags};
use lb_common::logic::ct::{Phase, Timeouts, reverse_key};
use lb_common::logic::idle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::warn;

use super::nf_conntrack::NfConntrackSettings;
use crate::clock::monotonic_ns;
use crate::maps::ct::{CtMap, CtMaps, Position};
use crate::maps::gate::{MapGate, SharedMaps};
use lb_core::maps::Direction;
use lb_core::maps::MapError;
use lb_core::model::{Problem, ProblemKind};

/// The largest number of entries that are examined in a second, plus at most one batch.
pub const PER_SECOND: usize = 1 << 16;
/// Least time between the beginnings of two passes.
const PASS_INTERVAL: Duration = Duration::from_secs(1);
/// Time from the end of a sweep to the next.
const SWEEP_PAUSE: Duration = Duration::from_secs(4);

/// Reasons why an entry is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The flow was idle for the time-out of its phase.
    Idle(Phase),
    /// The entry was idle for the time-out of its phase, and its other direction is missing.
    Orphan,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 6] = [
        Self::Idle(Phase::New),
        Self::Idle(Phase::Established),
        Self::Idle(Phase::HalfClosed),
        Self::Idle(Phase::Closed),
        Self::Idle(Phase::Reset),
        Self::Orphan,
    ];

    /// Label of the metric `lb_conntrack_gc_removed_total`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Idle(Phase::New) => "new",
            Self::Idle(Phase::Established) => "idle",
            Self::Idle(Phase::HalfClosed) => "half_closed",
            Self::Idle(Phase::Closed) => "closed",
            Self::Idle(Phase::Reset) => "reset",
            Self::Orphan => "orphan",
        }
    }
}

/// Converts kube-proxy's settings to time-outs. Zero keeps the default.
#[must_use]
pub fn timeouts(settings: &NfConntrackSettings) -> Timeouts {
    let or = |configured: Duration, default| match u64::try_from(configured.as_nanos()) {
        Ok(0) => default,
        Ok(configured) => configured,
        Err(_) => u64::MAX,
    };
    let default = Timeouts::DEFAULT;
    Timeouts {
        established: or(settings.tcp_established, default.established),
        half_closed: or(settings.tcp_close_wait, default.half_closed),
        datagrams: or(settings.udp_stream, default.datagrams),
        new_datagrams: or(settings.udp, default.new_datagrams),
        ..default
    }
}

/// The result of a pass: a part of a sweep, or all of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pass {
    /// Duration of the pass.
    pub took: Duration,
    /// Number of examined entries.
    pub examined: usize,
    /// Number of deleted entries, by reason.
    pub removed: BTreeMap<Reason, u64>,
    /// Maps that were read to their end, with their number of entries.
    pub entries: Vec<(&'static str, usize)>,
    /// The problem, if there is one.
    pub problem: Option<Problem>,
}

/// Handle of the thread that deletes flows. The thread ends when the handle is dropped.
#[derive(Debug)]
pub struct CtGc {
    /// Carries no message: dropping it ends the thread.
    _stop: Sender<()>,
    passes: UnboundedReceiver<Pass>,
}

/// Reasons why the garbage collector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CtGcError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The thread cannot be started.
    #[error("starting a thread: {0}")]
    Thread(io::Error),
}

impl CtGc {
    /// Starts the thread on the maps that are pinned in a directory. It opens them again after a move.
    ///
    /// # Errors
    /// Returns an error if the maps cannot be opened or the thread cannot be started.
    pub fn start(maps: &Path, gate: &MapGate, timeouts: Timeouts) -> Result<Self, CtGcError> {
        let maps = SharedMaps::open(gate, maps, CtMaps::open)?;
        let (stop, stopped) = mpsc::channel();
        let (reports, passes) = unbounded_channel();
        let worker = Worker {
            timeouts,
            maps,
            reports,
            pass_begun: Instant::now(),
            pass: Pass::default(),
        };
        thread::Builder::new()
            .name("lb-ct-gc".into())
            .spawn(move || worker.run(&stopped))
            .map_err(CtGcError::Thread)?;
        Ok(Self { _stop: stop, passes })
    }

    /// Waits for the end of the next pass; `None` if the thread has ended.
    pub async fn pass(&mut self) -> Option<Pass> {
        self.passes.recv().await
    }
}

struct Worker {
    timeouts: Timeouts,
    maps: SharedMaps<CtMaps>,
    reports: UnboundedSender<Pass>,
    /// Start of the present pass.
    pass_begun: Instant,
    pass: Pass,
}

/// Waits, and returns whether the thread should continue: its handle was not dropped.
fn should_continue(stopped: &Receiver<()>, wait: Duration) -> bool {
    matches!(stopped.recv_timeout(wait), Err(RecvTimeoutError::Timeout))
}

impl Worker {
    fn run(mut self, stopped: &Receiver<()>) {
        loop {
            self.pass_begun = Instant::now();
            for established in [true, false] {
                match self.sweep(established, stopped) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        warn!(%error, "flows that are over may stay");
                        self.pass.problem =
                            Some(Problem::new("collecting flows", error.to_string()).kind(ProblemKind::Map));
                    }
                }
            }
            self.end_pass();
            if !should_continue(stopped, SWEEP_PAUSE) {
                return;
            }
        }
    }

    /// Reads a map as a whole and deletes its expired flows. `established`: whether it is CT, not CT_NEW. Returns false if the
    /// thread should end. A move does not wait for the whole sweep: the sweep begins again in the new map.
    fn sweep(&mut self, established: bool, stopped: &Receiver<()>) -> Result<bool, MapError> {
        let mut position = Position::Begin;
        let mut entries = 0;
        let mut name = "";
        while position != Position::End {
            let (mut maps, is_new) = self.maps.enter()?;
            if is_new {
                (position, entries) = (Position::Begin, 0);
            }
            let map = if established {
                &mut maps.established
            } else {
                &mut maps.unreplied
            };
            name = map.name();
            let (found, next) = map.read(position)?;
            let removed = collect(map, &found, established, &self.timeouts, monotonic_ns)?;
            self.pass.examined += found.len();
            entries += found.len();
            entries -= removed.values().sum::<u64>().min(entries as u64) as usize;
            for (reason, count) in removed {
                *self.pass.removed.entry(reason).or_default() += count;
            }
            drop(maps);
            position = next;
            if self.pass.examined >= PER_SECOND {
                let begun = self.pass_begun;
                self.end_pass();
                if !should_continue(stopped, PASS_INTERVAL.saturating_sub(begun.elapsed())) {
                    return Ok(false);
                }
                self.pass_begun = Instant::now();
            }
        }
        self.pass.entries.push((name, entries));
        Ok(true)
    }

    fn end_pass(&mut self) {
        self.pass.took = self.pass_begun.elapsed();
        // Without a receiver the agent is ending.
        self.reports.send(std::mem::take(&mut self.pass)).ok();
    }
}

/// Entries by key.
trait Entries {
    fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError>;
    fn remove(&mut self, key: &CtKey) -> Result<bool, MapError>;
}

impl Entries for CtMap {
    fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError> {
        CtMap::get(self, key)
    }

    fn remove(&mut self, key: &CtKey) -> Result<bool, MapError> {
        CtMap::remove(self, key)
    }
}

/// Deletes the expired entries and their other directions; returns the number by reason.
fn collect(
    map: &mut impl Entries,
    found: &[Direction],
    established: bool,
    timeouts: &Timeouts,
    now: impl Fn() -> u64,
) -> Result<BTreeMap<Reason, u64>, MapError> {
    let begun = now();
    let mut removed = BTreeMap::new();
    for (key, entry) in found {
        // On a busy node this holds for most entries, and they cost no lookup.
        if !idle::is_over(entry.seen, begun, timeouts.shortest()) {
            continue;
        }
        let other_key = reverse_key(entry, key.proto);
        let other = map.get(&other_key)?;
        let Some(reason) = expiry(key.proto, established, entry, other.as_ref(), timeouts, begun) else {
            continue;
        };
        // Looked up again, since the entry was read a while ago; missing if it was deleted as the other direction of
        // another entry.
        let is_as_before = |now: Option<CtEntry>, before: &CtEntry| now.is_some_and(|now| now.seen == before.seen);
        if !is_as_before(map.get(key)?, entry) {
            continue;
        }
        let mut keys = vec![(*key, entry.flags)];
        if let Some(other) = other {
            if !is_as_before(map.get(&other_key)?, &other) {
                continue;
            }
            keys.push((other_key, other.flags));
        }
        keys.sort_by_key(|(_, flags)| flags & ct_flags::REPLY == 0);
        for (key, _) in keys {
            if map.remove(&key)? {
                *removed.entry(reason).or_default() += 1;
            }
        }
    }
    Ok(removed)
}

/// Returns the reason to delete a flow, given one of its directions and, if it exists, the other; `None` if the flow has
/// not expired.
fn expiry(
    proto: u8,
    established: bool,
    entry: &CtEntry,
    other: Option<&CtEntry>,
    timeouts: &Timeouts,
    now: u64,
) -> Option<Reason> {
    let seen = other.map_or(entry.seen, |other| other.seen.max(entry.seen));
    let phase = Phase::of(established, [entry.state, other.map_or(0, |other| other.state)]);
    let reason = other.map_or(Reason::Orphan, |_| Reason::Idle(phase));
    idle::is_over(seen, now, timeouts.of(proto, phase)).then_some(reason)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use lb_common::abi::{Addr, ct_state, ip_protocol};

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const TCP: u8 = ip_protocol::TCP;
    const UDP: u8 = ip_protocol::UDP;

    /// Entries in memory. After a number of lookups, a packet of this direction arrives.
    #[derive(Default)]
    struct Fake {
        entries: BTreeMap<CtKey, CtEntry>,
        packet: Option<CtKey>,
        looks: Cell<usize>,
        removed: Vec<CtKey>,
    }

    impl Entries for Fake {
        fn get(&self, key: &CtKey) -> Result<Option<CtEntry>, MapError> {
            self.looks.set(self.looks.get() + 1);
            let mut entry = self.entries.get(key).copied();
            if self.looks.get() > 1
                && self.packet == Some(*key)
                && let Some(entry) = &mut entry
            {
                entry.seen += 1;
            }
            Ok(entry)
        }

        fn remove(&mut self, key: &CtKey) -> Result<bool, MapError> {
            self.removed.push(*key);
            Ok(self.entries.remove(key).is_some())
        }
    }

    /// The flow of a client with this number: original and reply direction, each last seen the given number of seconds
    /// ago.
    fn flow(n: u8, proto: u8, seen: [u64; 2], states: [u8; 2]) -> [Direction; 2] {
        let (client, frontend) = (Addr::from_v4([192, 0, 2, n]), Addr::from_v4([10, 96, 0, 1]));
        let (node, backend) = (Addr::from_v4([192, 168, 0, 1]), Addr::from_v4([10, 0, 0, 1]));
        let key = |src, src_port, dst, dst_port| CtKey {
            src,
            dst,
            src_port,
            dst_port,
            proto,
            pad: [0; 3],
        };
        let asked = key(client, 1000, frontend, 80);
        let sent = key(node, 61_000 + u16::from(n), backend, 8080);
        let entry = |becomes: CtKey, reply, ago: u64, state| CtEntry {
            src: becomes.src,
            dst: becomes.dst,
            src_port: becomes.src_port,
            dst_port: becomes.dst_port,
            seen: NOW - ago * SECOND,
            flags: reply,
            state,
            ..CtEntry::default()
        };
        let reverse = |k: CtKey| key(k.dst, k.dst_port, k.src, k.src_port);
        [
            (asked, entry(sent, 0, seen[0], states[0])),
            (
                reverse(sent),
                entry(reverse(asked), ct_flags::REPLY, seen[1], states[1]),
            ),
        ]
    }

    const NOW: u64 = 1_000_000 * SECOND;

    fn of(flows: &[[Direction; 2]]) -> (Fake, Vec<Direction>) {
        let all: Vec<_> = flows.iter().flatten().copied().collect();
        let fake = Fake {
            entries: all.iter().copied().collect(),
            ..Fake::default()
        };
        (fake, all)
    }

    fn run(fake: &mut Fake, found: &[Direction], established: bool) -> BTreeMap<Reason, u64> {
        collect(fake, found, established, &Timeouts::DEFAULT, || NOW).unwrap()
    }

    #[test]
    fn a_flow_goes_when_both_directions_were_idle_for_the_time_of_its_phase() {
        const FIN: u8 = ct_state::FIN;
        const RST: u8 = ct_state::RST;
        for (proto, established, states, seconds, reason) in [
            (TCP, true, [0, 0], 86_400, Reason::Idle(Phase::Established)),
            (TCP, true, [0, FIN], 3600, Reason::Idle(Phase::HalfClosed)),
            (TCP, true, [FIN, FIN], 120, Reason::Idle(Phase::Closed)),
            (TCP, true, [0, RST], 10, Reason::Idle(Phase::Reset)),
            (TCP, false, [0, 0], 60, Reason::Idle(Phase::New)),
            (UDP, true, [0, 0], 120, Reason::Idle(Phase::Established)),
            (UDP, false, [0, 0], 30, Reason::Idle(Phase::New)),
        ] {
            for (seen, goes) in [
                ([seconds, seconds], true),
                ([seconds, seconds - 1], false),
                ([seconds - 1, seconds], false),
                ([seconds + 9, seconds], true),
            ] {
                let (mut fake, found) = of(&[flow(1, proto, seen, states), flow(2, proto, [0, 0], [0, 0])]);
                let removed = run(&mut fake, &found, established);
                let expected = if goes {
                    BTreeMap::from([(reason, 2)])
                } else {
                    BTreeMap::new()
                };
                assert_eq!(removed, expected, "{proto} {reason:?} {seen:?}");
                assert_eq!(fake.entries.len(), if goes { 2 } else { 4 });
            }
        }
    }

    #[test]
    fn the_direction_of_the_answers_goes_first_whichever_was_found() {
        let [asked, answered] = flow(1, TCP, [100, 100], [ct_state::RST, 0]);
        for found in [asked, answered] {
            let (mut fake, _) = of(&[[asked, answered]]);
            run(&mut fake, &[found], true);
            assert_eq!(fake.removed, [answered.0, asked.0]);
        }
    }

    #[test]
    fn a_packet_in_between_saves_the_flow() {
        let both = flow(1, TCP, [100, 100], [ct_state::RST, 0]);
        for direction in both {
            for found in both {
                let (mut fake, _) = of(&[both]);
                fake.packet = Some(direction.0);
                assert_eq!(run(&mut fake, &[found], true), BTreeMap::new());
                assert_eq!(fake.entries.len(), 2);
            }
        }
    }

    #[test]
    fn what_lacks_its_other_direction_goes_after_its_own_time() {
        for (ago, goes) in [(59, false), (60, true)] {
            for direction in flow(1, TCP, [ago, ago], [0, 0]) {
                let mut fake = Fake::default();
                fake.entries.insert(direction.0, direction.1);
                let removed = run(&mut fake, &[direction], false);
                assert_eq!(removed.get(&Reason::Orphan).copied(), goes.then_some(1), "{ago}");
                assert_eq!(fake.entries.is_empty(), goes);
            }
        }
    }

    #[test]
    fn what_was_just_seen_costs_no_look() {
        let (mut fake, found) = of(&[flow(1, TCP, [9, 9], [0, 0]), flow(2, UDP, [0, 1], [0, 0])]);
        run(&mut fake, &found, true);
        assert_eq!(fake.looks.get(), 0);
    }

    #[test]
    fn timeouts_follow_the_configuration() {
        assert_eq!(timeouts(&NfConntrackSettings::default()), Timeouts::DEFAULT);
        let settings = NfConntrackSettings {
            tcp_established: Duration::from_secs(7),
            tcp_close_wait: Duration::ZERO,
            udp: Duration::from_secs(5),
            udp_stream: Duration::from_millis(1),
            ..NfConntrackSettings::default()
        };
        let expected = Timeouts {
            established: 7 * SECOND,
            new_datagrams: 5 * SECOND,
            datagrams: SECOND / 1000,
            ..Timeouts::DEFAULT
        };
        assert_eq!(timeouts(&settings), expected);
    }

    #[test]
    fn reasons_have_names_of_their_own() {
        let labels: std::collections::BTreeSet<_> = Reason::ALL.map(Reason::label).into();
        assert_eq!(labels.len(), Reason::ALL.len());
    }
}
