//! A run: readers on every CPU, and one that changes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastrand::Rng;
use lb_agent::loader::PinPath;
use lb_agent::maps::Maps as _;
use lb_agent::maps::bpf::BpfMaps;
use lb_agent::maps::faulty::Fault;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::in_process_agent::InProcessAgent;
use crate::probe::{LookupCounts, Probe};
use crate::workload::{ChangeKind, Workload};

/// Lookups in one system call: some half a millisecond, so that grace periods are not held up.
const CHUNK: u32 = 2048;

/// How often the agent dies or an operation fails: once in so many changes.
const DEATH_EVERY: u64 = 48;
const FAILURE_EVERY: u64 = 21;
/// Operations of a change that one of them meets, at most: enough for any change.
const OPERATIONS: u64 = 24;
/// Sets that are published one after the other: as soon as the next lookup, if they are not kept apart.
const BURST: u32 = 6;
/// Stores of frontends in place, after each that changes one.
const STORES: usize = 2000;
/// How many changes FRONTENDS stays full for, about.
const CROWDED_FOR: usize = 6;
/// How often everything settles and is compared with what is desired, likewise.
const CHECK_EVERY: u64 = 10;

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Lookups to make, at least.
    pub lookups: u64,
    /// Changes to make, at least.
    pub changes: u64,
    /// The same seed makes the same choices.
    pub seed: u64,
}

/// How far a run has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Lookups that were made.
    pub lookups: u64,
    /// Changes by kind.
    pub changes: BTreeMap<ChangeKind, u64>,
    /// Stores of a frontend in place, beside those that the changes made.
    pub stores: u64,
    /// Operations that failed on purpose.
    pub failures: u64,
    /// Agents that died and were followed by one that adopted the maps.
    pub adoptions: u64,
    /// Comparisons with what is desired.
    pub checks: u64,
    /// Frontends in the map, at most and in percent.
    pub fullest: u32,
    /// The newest change, and what happened at it.
    pub newest: String,
}

impl Progress {
    /// Changes of every kind.
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
            "stores {}, failures {}, adoptions {}, checks {}, FRONTENDS up to {} % full",
            self.stores, self.failures, self.adoptions, self.checks, self.fullest
        )
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Report {
    /// What was done.
    pub progress: Progress,
    /// What the lookups found.
    pub counts: LookupCounts,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nmeanwhile: {}", self.counts, self.progress)?;
        if self.counts.bad() > 0 {
            write!(f, "\nat the end: {}", self.progress.newest)?;
        }
        Ok(())
    }
}

/// Looks up on every CPU while everything changes, until there were enough of both, or a lookup was bad.
///
/// # Errors
/// If the maps are not as desired in between, or the kernel refuses something. Bad lookups are in the outcome.
pub fn run(pins: &PinPath, options: &Options, mut report: impl FnMut(&Progress)) -> Result<Report> {
    let mut agent = InProcessAgent::new(pins)?;
    let mut workload = Workload::new(Rng::with_seed(options.seed));
    agent.apply(workload.all())?;
    agent.check().context("at the beginning")?;
    let probe = Probe::load(&pins.maps(), &crate::CAPACITIES)?;
    let (lookups, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let progress = thread::scope(|scope| {
        // Also where something below panics: the scope waits for its threads.
        let _guard = StopOnDrop(&stop);
        let (probe, lookups, stop) = (&probe, &lookups, &stop);
        let readers: Vec<_> = cpus()?
            .into_iter()
            .map(|cpu| scope.spawn(move || read(cpu, probe, lookups, stop)))
            .collect();
        let changed = change(&mut agent, &mut workload, options, |progress| {
            progress.lookups = lookups.load(Ordering::Relaxed);
            report(progress);
            let ended = readers.iter().any(ScopedJoinHandle::is_finished);
            Ok(ended || probe.counts()?.bad() > 0)
        });
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| anyhow!("a reader has panicked"))??;
        }
        changed
    })?;
    let counts = probe.counts()?;
    if counts.bad() == 0 {
        agent.apply(workload.disperse())?;
        agent.check().context("at the end")?;
    }
    Ok(Report { progress, counts })
}

/// Tells the readers to stop.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The CPUs that this process may run on.
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

/// Looks the targets up in turn, on one CPU.
fn read(cpu: CpuSet, probe: &Probe, lookups: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &cpu).context("sched_setaffinity")?;
    while !stop.load(Ordering::Relaxed) {
        for target in Workload::targets() {
            probe.look_up(target.key, target.owner, CHUNK)?;
            lookups.fetch_add(CHUNK.into(), Ordering::Relaxed);
        }
        // Otherwise the one who changes would wait for the scheduler.
        thread::yield_now();
    }
    Ok(())
}

/// Changes until there were enough changes and lookups, or `look` says that it is over.
fn change(
    agent: &mut InProcessAgent,
    workload: &mut Workload,
    options: &Options,
    mut look: impl FnMut(&mut Progress) -> Result<bool>,
) -> Result<Progress> {
    let mut random = Rng::with_seed(options.seed ^ 1);
    let mut progress = Progress::default();
    let mut kinds = Vec::new();
    while !look(&mut progress)? {
        let number = progress.changed() + 1;
        if progress.lookups >= options.lookups && number > options.changes {
            break;
        }
        if kinds.is_empty() {
            kinds = ChangeKind::round(&mut random);
        }
        let ends_crowd = workload.is_crowded() && random.usize(..CROWDED_FOR) == 0;
        let kind = if ends_crowd {
            Some(ChangeKind::Crowd)
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
            // Where the operation was not reached, it dies after the last.
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
            ChangeKind::Pass => progress.stores += store(&mut agent.reconciler()?.maps_mut().inner)?,
            ChangeKind::Services | ChangeKind::Settings | ChangeKind::Crowd => {}
        }
        agent.reconciler()?.reclaim();
        let (usage, capacities) = agent.reconciler()?.usage();
        progress.fullest = progress.fullest.max(usage.frontends * 100 / capacities.frontends);
        if number % CHECK_EVERY == 0 {
            if workload.is_crowded() {
                agent.reconciler()?.settle()?;
            } else {
                let what = || format!("after {number} changes, the last: {}", progress.newest);
                agent.check().with_context(what)?;
                progress.checks += 1;
            }
        }
    }
    ensure!(progress.changed() > 0, "nothing was changed");
    Ok(progress)
}

/// Stores frontends in place, by the values that they have: a miss is as rare as a change is quick.
fn store(maps: &mut BpfMaps) -> Result<u64> {
    let frontends: Vec<_> = maps.dump()?.frontends.into_iter().collect();
    for (key, value) in frontends.into_iter().cycle().take(STORES) {
        maps.store_frontend(key, value)?;
    }
    Ok(STORES as u64)
}
