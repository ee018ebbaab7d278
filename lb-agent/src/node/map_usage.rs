//! Counts the entries of the maps that programs fill: a thread, separate from the reconciler.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use lb_common::abi::SizedMap;
use lb_core::maps::{Capacities, MapError};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::warn;

use crate::clock::thread_cpu_time;
use crate::maps::bpf::PinnedMaps;
use crate::maps::gate::{MapGate, SharedMaps};

/// Least time between two counts.
const INTERVAL: Duration = Duration::from_secs(5);
/// Ratio of the time between two counts to the processor time of a count, at least: the thread uses one percent of a processor at
/// most.
const PAUSE: u32 = 100;

/// Handle of the thread that counts entries. The thread ends when the handle is dropped.
#[derive(Debug)]
pub struct MapUsage {
    /// Carries no message: dropping it ends the thread.
    _stop: Sender<()>,
    counts: UnboundedReceiver<Capacities>,
}

/// Reasons why the thread cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MapUsageError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The thread cannot be started.
    #[error("starting a thread: {0}")]
    Thread(#[from] io::Error),
}

impl MapUsage {
    /// Starts the thread on the maps that are pinned in a directory. It opens them again after a move.
    ///
    /// # Errors
    /// Returns an error if the maps cannot be opened or the thread cannot be started.
    pub fn start(maps: &Path, gate: &MapGate) -> Result<Self, MapUsageError> {
        let maps = SharedMaps::open(gate, maps, PinnedMaps::open)?;
        let (stop, stopped) = mpsc::channel();
        let (reports, counts) = unbounded_channel();
        thread::Builder::new()
            .name("lb-map-usage".into())
            .spawn(move || run(maps, &reports, &stopped))?;
        Ok(Self { _stop: stop, counts })
    }

    /// Waits for the next count: the number of entries of each map that programs fill, and zero for the others. Returns
    /// `None` if the thread has ended.
    pub async fn next(&mut self) -> Option<Capacities> {
        self.counts.recv().await
    }
}

fn run(mut maps: SharedMaps<PinnedMaps>, reports: &UnboundedSender<Capacities>, stopped: &Receiver<()>) {
    loop {
        let begun = thread_cpu_time();
        let counts = count(&mut maps);
        // Not the time that passed: on a busy machine that is longer, and maps would grow too late.
        let wait = INTERVAL.max((thread_cpu_time() - begun) * PAUSE);
        match counts {
            // Without a receiver the agent is ending.
            Ok(counts) => drop(reports.send(counts)),
            Err(error) => warn!(%error, "cannot count the entries of maps, which do not grow meanwhile"),
        }
        if !matches!(stopped.recv_timeout(wait), Err(RecvTimeoutError::Timeout)) {
            return;
        }
    }
}

fn count(maps: &mut SharedMaps<PinnedMaps>) -> Result<Capacities, MapError> {
    let (maps, _) = maps.enter()?;
    let mut counts = Capacities::uniform(0);
    for map in SizedMap::ALL.iter().filter(|map| map.is_filled_by_programs()) {
        counts = counts.with(*map, maps.used_by_programs(*map)? as u32);
    }
    Ok(counts)
}
