//! Latency of `connect()` on every way, in short rounds that alternate between them.

use anyhow::Result;
use lb_tests::Random;
use serde::Serialize;

use crate::numbers::{Quartiles, median, percentile};
use crate::scenario::{Scenario, shuffled};
use crate::testbed::{TestBed, Way};
use crate::worker::Task;

/// Connections on one way in one round.
const CONNECTIONS: u32 = 100;

/// Latencies of connections on one way.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Latency {
    pub(crate) way: Way,
    #[serde(flatten)]
    pub(crate) scenario: Scenario,
    /// Microseconds of `connect()`, median.
    pub(crate) p50: f64,
    /// Microseconds of `connect()`, 99th percentile.
    pub(crate) p99: f64,
    /// Connections per second that one thread makes, accepts and closes, median of the rounds.
    pub(crate) rate: f64,
    /// Difference in microseconds between the median of a round and that of [`Way::Direct`] in the same round.
    pub(crate) above_direct: Quartiles,
}

#[derive(Debug, Default)]
struct Rounds {
    /// Nanoseconds.
    times: Vec<u32>,
    medians: Vec<f64>,
    /// Connections per second.
    rates: Vec<f64>,
}

/// Measures all ways at one number of Services. Backends must be up.
pub(crate) fn measure(bed: &TestBed, rounds: u32, mut tick: impl FnMut()) -> Result<Vec<Latency>> {
    let mut workers = bed.way_workers()?;
    let mut random = Random::new(bed.services.number.into());
    let mut all = Vec::new();
    for scenario in Scenario::all(bed.services) {
        let mut ways: Vec<_> = workers.iter().map(|_| Rounds::default()).collect();
        // The first round warms up and is not counted.
        for round in 0..=rounds {
            for at in shuffled(workers.len(), &mut random) {
                let (way, worker) = &mut workers[at];
                let from = way.destinations(scenario);
                let mut done =
                    worker.order(&from.order(bed.services, Task::Connect, CONNECTIONS, random.next_u64()))?;
                if round == 0 {
                    continue;
                }
                done.times.sort_unstable();
                let found = &mut ways[at];
                found.medians.push(f64::from(percentile(&done.times, 50)));
                found.times.append(&mut done.times);
                found.rates.push(f64::from(CONNECTIONS) / done.seconds);
            }
            tick();
        }
        let direct = ways.first().map(|direct| direct.medians.clone()).unwrap_or_default();
        for ((way, _), mut found) in workers.iter().zip(ways) {
            found.times.sort_unstable();
            let above = found
                .medians
                .iter()
                .zip(&direct)
                .map(|(own, direct)| (own - direct) / 1e3);
            all.push(Latency {
                way: *way,
                scenario,
                p50: f64::from(percentile(&found.times, 50)) / 1e3,
                p99: f64::from(percentile(&found.times, 99)) / 1e3,
                rate: median(found.rates),
                above_direct: Quartiles::of(above),
            });
        }
    }
    Ok(all)
}

/// Returns the number of calls of `tick` by [`measure`].
pub(crate) fn ticks(bed: &TestBed, rounds: u32) -> u64 {
    Scenario::all(bed.services).len() as u64 * (u64::from(rounds) + 1)
}
