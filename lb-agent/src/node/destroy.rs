//! Destroys sockets that are connected to removed backends, and sweeps records without a socket: one thread, separate
//! from the reconciler.
//!
//! A backend is removed when its generation moves. From then on no connect() selects it, but an earlier connect() may
//! still be in progress. Therefore records with a generation that is not current are examined in passes, until a pass
//! that began a second after the removal finds no connected socket. The records contain all the work to be done, so
//! nothing is lost when the agent dies: the next agent begins with a pass.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use lb_common::abi::{Event, EventKind, UdpDests};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tracing::{debug, info};

use super::netns::{Namespaces, Visit};
use super::sockdiag::{Destroyed, Protocol, SockDiag, Socket, list_sockets};
use super::socket_verdict::{self, CONNECTING, EntryVersion, Suspects, Verdict};
use crate::clock::monotonic_ns;
use crate::maps::gate::{MapGate, SharedMaps};
use crate::maps::records::{LocatedRecord, Records};
use lb_core::maps::MapError;
use lb_core::model::{Problem, ProblemKind};

/// Time between two passes while a connect() may be in progress.
const STEP: Duration = Duration::from_millis(100);
/// Least time between two passes, however many backends are removed.
const PAUSE: Duration = Duration::from_millis(20);

/// Prefix of the place of a problem in one namespace; the cookie follows.
const NAMESPACE: &str = "network namespace";

/// Settings of the socket destroyer.
#[derive(Debug, Clone, Copy)]
pub struct DestroySettings {
    /// TCP sockets of removed backends are destroyed too.
    pub tcp: bool,
    /// Age at which a record without a socket may be swept, and time between two sweeps.
    pub sweep: Duration,
}

/// Handle of the thread that destroys sockets and sweeps records. The thread ends when the handle is dropped.
#[derive(Debug)]
pub struct Destroyer {
    wake: Sender<()>,
    problems: watch::Receiver<Vec<Problem>>,
    events: UnboundedReceiver<Event>,
}

impl Destroyer {
    /// Starts the thread on the maps that are pinned in a directory. It opens them again after a move. The calling thread's
    /// network namespace is the node's.
    ///
    /// # Errors
    /// Returns an error if the maps cannot be opened or /proc cannot be read.
    pub fn start(maps: &Path, gate: &MapGate, settings: DestroySettings) -> Result<Self, DestroyError> {
        let records = SharedMaps::open(gate, maps, Records::open)?;
        let namespaces = Namespaces::new().map_err(DestroyError::Proc)?;
        let (reports, problems) = watch::channel(Vec::new());
        let (destroyed, events) = unbounded_channel();
        let (wake, woken) = mpsc::channel();
        let worker = Worker {
            settings,
            namespaces,
            suspects: Suspects::default(),
            missing: Suspects::default(),
            problems: BTreeMap::new(),
            reports,
            destroyed,
        };
        thread::Builder::new()
            .name("lb-destroy".into())
            .spawn(move || worker.run(records, &woken))
            .map_err(DestroyError::Thread)?;
        Ok(Self { wake, problems, events })
    }

    /// Notifies the thread that backends were removed; returns at once.
    pub fn wake(&self) {
        // Fails only if the thread has panicked, and then the panic was printed.
        self.wake.send(()).ok();
    }

    /// Problems of the thread.
    #[must_use]
    pub fn problems(&self) -> watch::Receiver<Vec<Problem>> {
        self.problems.clone()
    }

    /// Waits for the next destroyed socket; `None` if the thread has ended.
    pub async fn destroyed(&mut self) -> Option<Event> {
        self.events.recv().await
    }
}

/// Reasons why the thread cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DestroyError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The processes cannot be listed.
    #[error("/proc: {0}")]
    Proc(io::Error),
    /// The thread cannot be started.
    #[error("starting a thread: {0}")]
    Thread(io::Error),
}

struct Worker {
    settings: DestroySettings,
    namespaces: Namespaces,
    /// Records without a socket in the last sweep.
    suspects: Suspects,
    /// Records of removed backends without a socket in the last pass.
    missing: Suspects,
    /// The reported problems, by place.
    problems: BTreeMap<String, String>,
    reports: watch::Sender<Vec<Problem>>,
    destroyed: UnboundedSender<Event>,
}

/// The result of a pass in one namespace.
#[derive(Default)]
struct PassResult {
    destroyed: Vec<(LocatedRecord, Socket)>,
    /// Records of sockets that are connected elsewhere, or no longer connected.
    stale: Vec<LocatedRecord>,
    /// Records of sockets that were not listed.
    missing: Vec<LocatedRecord>,
    /// Sockets that may still be connected.
    open: usize,
    failed: Option<io::Error>,
}

impl Worker {
    fn run(mut self, mut records: SharedMaps<Records>, woken: &Receiver<()>) {
        self.probe();
        let mut removed = Instant::now();
        let mut next = removed;
        let mut sweep = removed + self.settings.sweep;
        let mut wait = STEP;
        loop {
            match woken.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(()) => {
                    thread::sleep(PAUSE);
                    while woken.try_recv().is_ok() {}
                    removed = Instant::now();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let begun = Instant::now();
            let open = self.pass(&mut records);
            let settling = begun < removed + Duration::from_nanos(CONNECTING);
            wait = match open {
                _ if settling => STEP,
                0 => self.settings.sweep,
                _ => (wait * 2).min(self.settings.sweep),
            };
            if begun >= sweep {
                let result = self.sweep(&mut records);
                self.note("sweeping socket records", result.err().map(|error| error.to_string()));
                sweep = begun + self.settings.sweep;
            }
            next = sweep.min(begun + wait);
            self.report_problems();
        }
    }

    /// Checks whether this kernel can destroy sockets, before any socket has to be destroyed.
    fn probe(&mut self) {
        let tcp = self.settings.tcp;
        for protocol in Protocol::ALL.into_iter().filter(|p| *p == Protocol::Udp || tcp) {
            let result = SockDiag::open().and_then(|mut diag| diag.probe(protocol));
            let why = result.err().map(|error| why_not_destroyed(&error));
            self.note(&format!("destroying {protocol:?} sockets"), why);
        }
        let why = Namespaces::probe().err();
        let why =
            why.map(|error| format!("{error}: sockets of pods are left alone (CAP_SYS_ADMIN and CAP_SYS_PTRACE)"));
        self.note("entering network namespaces", why);
        if !self.namespaces.sees_all() {
            let why = "not in the machine's process namespace (hostPID): sockets of pods may not be found";
            self.note("processes", Some(why.into()));
        }
        self.report_problems();
    }

    /// Destroys sockets that are connected to removed backends, and deletes obsolete records. Returns how many sockets
    /// may still be connected to a removed backend.
    fn pass(&mut self, records: &mut SharedMaps<Records>) -> usize {
        let result = self.try_pass(records);
        let (open, why) = match result {
            Ok(open) => (open, None),
            Err(error) => (1, Some(error.to_string())),
        };
        self.note("destroying sockets", why);
        open
    }

    fn try_pass(&mut self, records: &mut SharedMaps<Records>) -> Result<usize, MapError> {
        // A move waits for the end of the pass, since it must not copy a slot that is about to be freed.
        let (mut records, _) = records.enter()?;
        self.problems.retain(|place, _| !place.starts_with(NAMESPACE));
        let begun = monotonic_ns();
        let mut dead: BTreeMap<u64, Vec<LocatedRecord>> = BTreeMap::new();
        for found in records.all()? {
            let concerned = found.record.proto == Protocol::Udp as u8 || self.settings.tcp;
            if concerned && !records.is_current(&found.record) {
                dead.entry(found.record.netns).or_default().push(found);
            }
        }
        if dead.is_empty() {
            return Ok(0);
        }
        let wanted: BTreeSet<u64> = dead.keys().copied().collect();
        let nothing = Vec::new();
        let visit = self.namespaces.visit(&wanted, |netns| {
            let dead = dead.get(&netns).unwrap_or(&nothing);
            destroy(&records, dead, begun)
        });
        self.note_unvisited(&visit);
        // The sockets of a namespace that could not be entered are unknown.
        let is_seen = |netns: &&u64| visit.visited.contains_key(netns) || visit.missing.contains(netns);
        let mut open = wanted.len() - wanted.iter().filter(is_seen).count();
        let (mut stale, mut missing) = (Vec::new(), Vec::new());
        for (netns, done) in visit.visited {
            for (found, socket) in &done.destroyed {
                self.report_destroyed(found, socket);
            }
            open += done.open;
            stale.extend(done.destroyed.into_iter().map(|(found, _)| found));
            stale.extend(done.stale);
            missing.extend(done.missing);
            let why = done.failed.map(|error| error.to_string());
            self.note(&format!("{NAMESPACE} {netns}"), why);
        }
        let gone = self.missing.without_socket(missing.iter().map(version_of).collect());
        open += missing.len() - gone.len();
        stale.extend(missing.into_iter().filter(|found| gone.contains(&version_of(found))));
        records.forget(&stale)?;
        Ok(open)
    }

    /// Deletes records without a socket in two listings of their namespace.
    fn sweep(&mut self, records: &mut SharedMaps<Records>) -> Result<(), MapError> {
        let (mut maps, _) = records.enter()?;
        maps.free_left_over()?;
        let oldest = monotonic_ns().saturating_sub(self.settings.sweep.as_nanos() as u64);
        let records: Vec<_> = maps.all()?.into_iter().filter(|f| f.record.time <= oldest).collect();
        let dests: Vec<_> = maps
            .udp_dests()?
            .into_iter()
            .filter(|(_, f)| last_use(f) <= oldest)
            .collect();
        let wanted: BTreeSet<u64> = records
            .iter()
            .map(|f| f.record.netns)
            .chain(dests.iter().map(|(_, f)| f.netns))
            .collect();
        let visit = self.namespaces.visit(&wanted, |_| list_sockets(&Protocol::ALL));
        self.note_unvisited(&visit);
        // If a namespace could not be listed, none of its sockets is known to be gone.
        let is_gone = |netns: u64, cookie: u64| match visit.visited.get(&netns) {
            Some(Ok(listing)) => !listing.contains_key(&cookie),
            Some(Err(_)) => false,
            None => visit.missing.contains(&netns),
        };
        let mut gone = BTreeSet::new();
        gone.extend(
            records
                .iter()
                .filter(|f| is_gone(f.record.netns, f.record.socket))
                .map(version_of),
        );
        gone.extend(
            dests
                .iter()
                .filter(|(cookie, f)| is_gone(f.netns, *cookie))
                .map(|(cookie, f)| version_of_dests(*cookie, f)),
        );
        let twice = self.suspects.without_socket(gone);
        let stale: Vec<_> = records
            .into_iter()
            .filter(|found| twice.contains(&version_of(found)))
            .collect();
        let mut swept = maps.forget(&stale)?;
        for (cookie, read) in dests
            .iter()
            .filter(|(cookie, f)| twice.contains(&version_of_dests(*cookie, f)))
        {
            swept += usize::from(maps.forget_udp_dests(*cookie, read)?);
        }
        if swept > 0 {
            info!(swept, "forgot sockets that are gone");
        }
        Ok(())
    }

    /// Logs a destroyed socket, and reports it to `lb-agent trace`.
    fn report_destroyed(&self, found: &LocatedRecord, socket: &Socket) {
        let record = &found.record;
        debug!(
            original = %format_args!("{}:{}", record.original_addr, record.original_port),
            backend = %socket.remote, local = %socket.local, protocol = ?socket.protocol,
            service = record.service.get(), cookie = socket.cookie, netns = record.netns,
            "socket destroyed: its backend was removed"
        );
        let event = Event {
            time: monotonic_ns(),
            cookie: record.socket,
            netns: record.netns,
            addr: record.original_addr,
            backend_addr: record.backend_addr,
            port: record.original_port,
            backend_port: record.backend_port,
            proto: record.proto,
            kind: EventKind::Destroyed as u8,
            service: record.service,
            ..Event::default()
        };
        // Without a receiver the agent is ending.
        self.destroyed.send(event).ok();
    }

    /// Reports namespaces that cannot be found or entered.
    fn note_unvisited<T>(&mut self, visit: &Visit<T>) {
        let why = visit.refused.first().map(|(path, error)| {
            let path = path.display();
            format!("some cannot be found, and their sockets are left alone: {path}: {error}")
        });
        self.note("other network namespaces", why);
    }

    /// Sets or clears the problem of a place.
    fn note(&mut self, place: &str, why: Option<String>) {
        match why {
            Some(why) => self.problems.insert(place.into(), why),
            None => self.problems.remove(place),
        };
    }

    /// Publishes the problems if they have changed.
    fn report_problems(&self) {
        let problems: Vec<_> = self
            .problems
            .iter()
            .map(|(place, message)| Problem::new(place, message).kind(ProblemKind::Sockets))
            .collect();
        self.reports.send_if_modified(|reported| {
            let is_new = *reported != problems;
            *reported = problems;
            is_new
        });
    }
}

/// Explains the kernel's refusal to destroy sockets.
fn why_not_destroyed(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            "this kernel is built without CONFIG_INET_DIAG_DESTROY: sockets of removed backends are not destroyed"
                .into()
        }
        Some(libc::ENOENT) => {
            "this kernel lacks the modules tcp_diag and udp_diag: sockets of removed backends are not destroyed".into()
        }
        _ => format!("sockets of removed backends are not destroyed: {error}"),
    }
}

/// Destroys the sockets of some records in the network namespace of the calling thread.
fn destroy(records: &Records, dead: &[LocatedRecord], begun: u64) -> PassResult {
    let mut done = PassResult::default();
    if let Err(error) = try_destroy(records, dead, begun, &mut done) {
        done.open += 1;
        done.failed = Some(error);
    }
    done
}

fn try_destroy(records: &Records, dead: &[LocatedRecord], begun: u64, done: &mut PassResult) -> io::Result<()> {
    let is_there = |protocol: &Protocol| dead.iter().any(|found| found.record.proto == *protocol as u8);
    let protocols: Vec<_> = Protocol::ALL.into_iter().filter(is_there).collect();
    let listing = list_sockets(&protocols)?;
    let mut diag = SockDiag::open()?;
    for found in dead {
        match socket_verdict::of_removed(&found.record, &listing, begun) {
            Verdict::Forget => done.stale.push(*found),
            Verdict::Missing => done.missing.push(*found),
            Verdict::Wait => done.open += 1,
            // The socket has connected again: it has another record, which is examined separately.
            Verdict::Destroy(_) if !records.is_unchanged(found).map_err(io::Error::other)? => done.open += 1,
            Verdict::Destroy(socket) => match diag.destroy(&socket) {
                Ok(Destroyed::Yes) => done.destroyed.push((*found, socket)),
                Ok(Destroyed::Gone) => done.open += 1,
                Err(error) => {
                    done.open += 1;
                    done.failed = Some(error);
                }
            },
        }
    }
    Ok(())
}

/// Time of the last datagram of an unconnected socket to a Service.
fn last_use(dests: &UdpDests) -> u64 {
    dests.dests.iter().map(|dest| dest.asked).max().unwrap_or(0)
}

fn version_of(found: &LocatedRecord) -> EntryVersion {
    EntryVersion::Record {
        key: found.record.cookie,
        time: found.record.time,
    }
}

fn version_of_dests(cookie: u64, dests: &UdpDests) -> EntryVersion {
    EntryVersion::UdpDests {
        cookie,
        time: last_use(dests),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_kernel_support_and_missing_privileges_are_reported_differently() {
        let why = |errno| why_not_destroyed(&io::Error::from_raw_os_error(errno));
        let text = why(libc::EOPNOTSUPP);
        assert!(text.contains("without CONFIG_INET_DIAG_DESTROY"), "{text}");
        let text = why(libc::EPERM);
        assert!(!text.contains("CONFIG") && text.contains("not permitted"), "{text}");
    }
}
