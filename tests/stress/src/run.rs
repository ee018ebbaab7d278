//! A run: readers on every CPU, and one thread that changes the maps.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastrand::Rng;
use lb_agent::loader::PinPath;
use lb_agent::maps::bpf::BpfMaps;
use lb_common::abi::SizedMap;
use lb_core::maps::Maps as _;
use lb_core::maps::faulty::Fault;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::in_process_agent::{CAPACITIES, InProcessAgent};
use crate::probe::{LookupCounts, Probe};
use crate::resize;
use crate::workload::{ChangeKind, Workload};

/// Lookups in one system call. They take about half a millisecond, so that grace periods are not delayed.
const CHUNK: u32 = 2048;

/// The agent ends and starts again once in this many changes.
const DEATH_EVERY: u64 = 48;
/// An operation fails once in this many changes.
const FAILURE_EVERY: u64 = 21;
/// Number of operations of a change among which one ends or fails: enough for any change.
const OPERATIONS: u64 = 24;
/// Number of sets that are published in sequence. Without a pause, the next one is published before the next lookup.
const BURST: u32 = 6;
/// Stores of frontends in place after each change that moves one.
const STORES: usize = 2000;
/// Number of changes for which FRONTENDS stays full, on average.
const OVERFULL_FOR: usize = 6;
/// The maps settle and are compared with the desired state once in this many changes.
const CHECK_EVERY: u64 = 10;
/// Maps grow or shrink once in this many changes, until every resize was made.
const RESIZE_EVERY: u64 = 9;

/// Options of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The smallest number of lookups.
    pub lookups: u64,
    /// The smallest number of changes.
    pub changes: u64,
    /// Seed of all choices; equal seeds make equal choices until a resize needs changes before it, whose number depends on timing.
    pub seed: u64,
    /// The maps of each resize: they grow fourfold together and shrink again.
    pub resizes: Vec<&'static [SizedMap]>,
}

/// Counters of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Number of lookups.
    pub lookups: u64,
    /// Number of changes by kind.
    pub changes: BTreeMap<ChangeKind, u64>,
    /// Stores of a frontend in place, in addition to those of the changes.
    pub stores: u64,
    /// Injected failures of operations.
    pub failures: u64,
    /// Restarts in which the next agent adopted the maps.
    pub adoptions: u64,
    /// Times that maps grew or shrank.
    pub resizes: u64,
    /// Comparisons with the desired state.
    pub checks: u64,
    /// The highest fill level of FRONTENDS, in percent.
    pub fullest: u32,
    /// The newest change, with the injected fault.
    pub newest: String,
}

impl Progress {
    /// Returns the number of changes of all kinds.
    #[must_use]
    pub fn changed(&self) -> u64 {
        self.changes.values().sum()
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, count) in &self.changes {
            write!(f, "{} {count}, ", kind.text())?;
        }
        write!(
            f,
            "stores {}, failures {}, adoptions {}, resizes {}, checks {}, FRONTENDS up to {} % full",
            self.stores, self.failures, self.adoptions, self.resizes, self.checks, self.fullest
        )
    }
}

/// The result of a run.
#[derive(Debug)]
pub struct Report {
    /// The counters of the run.
    pub progress: Progress,
    /// The results of the lookups.
    pub counts: LookupCounts,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nduring: {}", self.counts, self.progress)?;
        if self.counts.bad() > 0 {
            write!(f, "\nlast change: {}", self.progress.newest)?;
        }
        Ok(())
    }
}

/// Looks frontends up on every CPU while the maps change, until there were enough lookups and changes and every resize was
/// made, or a lookup was bad. A resize replaces lb's programs at the devices of the calling thread's network namespace.
///
/// # Errors
/// If the maps differ from the desired state, or the kernel refuses an operation. Bad lookups are in the report.
pub fn run(pins: &PinPath, options: &Options, mut report: impl FnMut(&Progress)) -> Result<Report> {
    let mut agent = InProcessAgent::new(pins)?;
    let mut workload = Workload::new(Rng::with_seed(options.seed));
    agent.apply(workload.all())?;
    agent.check().context("before the first change")?;
    let probe = RwLock::new(Probe::load(&pins.maps(), agent.capacities())?);
    let (lookups, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let progress = thread::scope(|scope| {
        // Stops the readers also after a panic below, because the scope waits for its threads.
        let _guard = StopOnDrop(&stop);
        let (probe, lookups, stop) = (&probe, &lookups, &stop);
        let readers: Vec<_> = cpus()?
            .into_iter()
            .map(|cpu| scope.spawn(move || read(cpu, probe, lookups, stop)))
            .collect();
        let changed = change(&mut agent, &mut workload, probe, options, |progress| {
            progress.lookups = lookups.load(Ordering::Relaxed);
            report(progress);
            let ended = readers.iter().any(ScopedJoinHandle::is_finished);
            Ok(ended || current(probe).counts()?.bad() > 0)
        });
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| anyhow!("a reader has panicked"))??;
        }
        changed
    })?;
    let counts = current(&probe).counts()?;
    if counts.bad() == 0 {
        agent.apply(workload.end_overflow())?;
        agent.check().context("after the last change")?;
    }
    Ok(Report { progress, counts })
}

/// Returns the probe, which is not replaced while it is borrowed.
fn current(probe: &RwLock<Probe>) -> RwLockReadGuard<'_, Probe> {
    probe.read().unwrap_or_else(PoisonError::into_inner)
}

/// Stops the readers when it is dropped.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns the CPUs that this process may run on, as one set per CPU.
fn cpus() -> Result<Vec<CpuSet>> {
    let all = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
    let mut cpus = Vec::new();
    for number in 0..CpuSet::count() {
        if all.is_set(number)? {
            let mut one = CpuSet::new();
            one.set(number)?;
            cpus.push(one);
        }
    }
    Ok(cpus)
}

/// Looks the frontends up in turn, on one CPU.
fn read(cpu: CpuSet, probe: &RwLock<Probe>, lookups: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &cpu).context("sched_setaffinity")?;
    while !stop.load(Ordering::Relaxed) {
        for target in Workload::targets() {
            current(probe).look_up(target.key, target.owner, CHUNK)?;
            lookups.fetch_add(CHUNK.into(), Ordering::Relaxed);
        }
        // Without this, the thread that changes the maps would wait for the scheduler.
        thread::yield_now();
    }
    Ok(())
}

/// Changes the maps until there were enough changes and lookups and every resize was made, or `is_over` returns true.
fn change(
    agent: &mut InProcessAgent,
    workload: &mut Workload,
    probe: &RwLock<Probe>,
    options: &Options,
    mut is_over: impl FnMut(&mut Progress) -> Result<bool>,
) -> Result<Progress> {
    let mut random = Rng::with_seed(options.seed ^ 1);
    let mut progress = Progress::default();
    let mut kinds = Vec::new();
    let resizes = options.resizes.iter();
    let mut sizes = resizes.flat_map(|maps| [resize::grown(maps), CAPACITIES]).peekable();
    while !is_over(&mut progress)? {
        let number = progress.changed() + 1;
        if progress.lookups >= options.lookups && number > options.changes && sizes.peek().is_none() {
            break;
        }
        if kinds.is_empty() {
            kinds = ChangeKind::round(&mut random);
        }
        if *agent.capacities() != CAPACITIES {
            // Entries that are freed now are used again, so that few positions are taken that the smaller maps do not have.
            agent.reconciler()?.settle()?;
        }
        let ends_overflow = workload.is_overfull() && random.usize(..OVERFULL_FOR) == 0;
        let kind = if ends_overflow {
            Some(ChangeKind::Overflow)
        } else {
            kinds.pop()
        };
        let kind = kind.context("no kind of change is left")?;
        let (dies, fails) = (number % DEATH_EVERY == 0, number % FAILURE_EVERY == 0);
        let fault = match (dies, fails) {
            (true, _) if random.bool() => Fault::Die,
            (true, _) => Fault::Tear,
            (false, true) => Fault::Fail,
            (false, false) => Fault::None,
        };
        let at = random.u64(..OPERATIONS);
        progress.newest = match fault {
            Fault::None => kind.text().into(),
            fault => format!("{}, {fault:?} at operation {at}", kind.text()),
        };
        agent.reconciler()?.maps_mut().arm(at, fault);
        agent.apply(workload.change(kind))?;
        *progress.changes.entry(kind).or_default() += 1;
        if dies {
            // If the operation was not reached, the agent ends after the last one.
            agent.restart()?;
            agent.apply(workload.all())?;
            progress.adoptions += 1;
        } else if fails {
            agent.reconciler()?.maps_mut().arm(0, Fault::None);
            progress.failures += 1;
        }
        match kind {
            ChangeKind::Endpoints => {
                for _ in 1..BURST {
                    agent.apply(workload.change(kind))?;
                }
            }
            ChangeKind::MoveFrontend => progress.stores += store(&mut agent.reconciler()?.maps_mut().inner)?,
            ChangeKind::Services | ChangeKind::Settings | ChangeKind::Overflow => {}
        }
        agent.reconciler()?.reclaim();
        let (usage, capacities) = agent.reconciler()?.usage();
        progress.fullest = progress
            .fullest
            .max(usage.frontends * 100 / capacities[SizedMap::Frontends]);
        if number % RESIZE_EVERY == 0
            && let Some(to) = sizes.next()
        {
            progress.newest = format!("a resize to {to:?}");
            resize::resize(agent, workload, probe, to).with_context(|| format!("after {number} changes, {to:?}"))?;
            progress.resizes += 1;
        }
        if number % CHECK_EVERY == 0 {
            if workload.is_overfull() {
                agent.reconciler()?.settle()?;
            } else {
                let what = || format!("after {number} changes, the last: {}", progress.newest);
                agent.check().with_context(what)?;
                progress.checks += 1;
            }
        }
    }
    ensure!(progress.changed() > 0, "no change was made");
    Ok(progress)
}

/// Stores frontends in place with their present values. Many stores are needed, because one takes so little time that a
/// lookup rarely coincides with it.
fn store(maps: &mut BpfMaps) -> Result<u64> {
    let frontends: Vec<_> = maps.dump()?.frontends.into_iter().collect();
    for (key, value) in frontends.into_iter().cycle().take(STORES) {
        maps.store_frontend(key, value)?;
    }
    Ok(STORES as u64)
}
