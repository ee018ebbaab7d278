//! Nanoseconds per run of a program, as the kernel counts them (`BPF_ENABLE_STATS`): lb, C and nothing in turn, in many
//! short rounds, so that what else the machine does falls on all of them alike.
//!
//! A run that is counted has the reading of a clock in it. That is why the cost of an empty program, measured in the
//! same round, is taken off before lb and C are compared.

use anyhow::{Result, ensure};
use aya::sys::{Stats, enable_stats};
use lb_tests::Random;
use serde::Serialize;

use super::bed::Bed;
use super::numbers::Quartiles;
use super::programs::{Hook, Maker};
use super::worker::{Order, Task, Worker};
use super::{Outcome, Scenario, shuffled};

/// Sockets of one maker in one round.
const SOCKETS: u32 = 1000;
/// Questions for the peer of one maker in one round.
const PEERS: u32 = 1000;

/// Rounds between loadings of the programs.
const RELOAD: u32 = 10;

/// What one program costs in one scenario.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cost {
    pub(crate) hook: Hook,
    #[serde(flatten)]
    pub(crate) scenario: Scenario,
    /// Nanoseconds per run, median of the rounds, with the reading of the clock.
    pub(crate) lb: f64,
    pub(crate) c: Option<f64>,
    pub(crate) empty: Option<f64>,
    /// lb above the empty program / C above it, of the same round.
    pub(crate) ratio: Option<Quartiles>,
}

/// Nanoseconds per run of each maker's program, a round each.
#[derive(Debug, Default)]
struct Rounds {
    lb: Vec<f64>,
    c: Vec<f64>,
    empty: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, maker: Maker, cost: f64) {
        match maker {
            Maker::Lb => &mut self.lb,
            Maker::C => &mut self.c,
            Maker::Empty => &mut self.empty,
        }
        .push(cost);
    }

    fn summary(&self, hook: Hook, scenario: Scenario) -> Cost {
        let median = |rounds: &Vec<f64>| (!rounds.is_empty()).then(|| Quartiles::of(rounds.iter().copied()).median);
        let ratio = |((lb, c), empty): ((&f64, &f64), &f64)| (lb - empty) / (c - empty);
        let ratios = self.lb.iter().zip(&self.c).zip(&self.empty).map(ratio);
        Cost {
            hook,
            scenario,
            lb: median(&self.lb).unwrap_or_default(),
            c: median(&self.c),
            empty: median(&self.empty),
            ratio: (!self.c.is_empty()).then(|| Quartiles::of(ratios)),
        }
    }
}

/// The programs at one size. Backends must not be up when this begins, and are when it ends.
pub(crate) fn measure(bed: &mut Bed, rounds: u32, mut tick: impl FnMut()) -> Result<Vec<Cost>> {
    let _statistics = enable_stats(Stats::RunTime)?;
    let mut workers = bed.program_workers()?;
    let mut random = Random::new(bed.services.number.into());
    let scenarios = Scenario::all(bed.services);
    let mut asked: Vec<_> = scenarios
        .iter()
        .map(|_| [Rounds::default(), Rounds::default()])
        .collect();
    let before = bed.connections()?;
    // The first round is not counted.
    for round in 0..=rounds {
        if round % RELOAD == 0 {
            bed.reload()?;
        }
        for (scenario, [connect, release]) in scenarios.iter().zip(&mut asked) {
            for at in shuffled(workers.len(), &mut random) {
                let (maker, worker) = &mut workers[at];
                let order = scenario.order(Task::Ask, SOCKETS, random.number());
                let [connected, released] = runs(bed, *maker, worker, &order, [Hook::Connect4, Hook::SockRelease])?;
                if round > 0 {
                    connect.add(*maker, connected);
                    release.add(*maker, released);
                }
            }
        }
        tick();
    }
    let hits = scenarios.iter().filter(|s| s.outcome == Outcome::Hit).count() as u64;
    let counting = workers.iter().filter(|(maker, _)| *maker != Maker::Empty).count() as u64;
    let expected = hits * counting * u64::from(SOCKETS) * u64::from(rounds + 1);
    let counted = bed.connections()? - before;
    ensure!(
        counted == expected,
        "{counted} connections were rewritten instead of {expected}"
    );

    bed.bring_up_backends()?;
    let mut peers = Vec::new();
    for scenario in scenarios.iter().filter(|s| s.is_hot()) {
        let mut found = Rounds::default();
        for round in 0..=rounds {
            if round % RELOAD == 0 {
                bed.reload()?;
            }
            for at in shuffled(workers.len(), &mut random) {
                let (maker, worker) = &mut workers[at];
                // Where nothing is rewritten, only backends can be reached.
                let from = if *maker == Maker::Empty {
                    scenario.missed()
                } else {
                    *scenario
                };
                let order = from.order(Task::Peer, PEERS, random.number());
                let [cost] = runs(bed, *maker, worker, &order, [Hook::Getpeername4])?;
                if round > 0 {
                    found.add(*maker, cost);
                }
            }
            tick();
        }
        peers.push(found.summary(Hook::Getpeername4, *scenario));
    }
    let asked = scenarios.iter().zip(asked).flat_map(|(scenario, [connect, release])| {
        [
            connect.summary(Hook::Connect4, *scenario),
            release.summary(Hook::SockRelease, *scenario),
        ]
    });
    Ok(asked.chain(peers).collect())
}

/// How often [`measure`] ticks.
pub(crate) fn ticks(rounds: u32) -> u64 {
    // Peers are asked for after a hit and after a miss.
    3 * (u64::from(rounds) + 1)
}

/// Gives an order; the cost of a run at each of the hooks meanwhile.
fn runs<const N: usize>(
    bed: &Bed,
    maker: Maker,
    worker: &mut Worker,
    order: &Order,
    hooks: [Hook; N],
) -> Result<[f64; N]> {
    let mut before = Vec::with_capacity(N);
    for hook in hooks {
        before.push(bed.runs(maker, hook)?);
    }
    worker.order(order)?;
    let mut costs = [0.0; N];
    for ((cost, hook), before) in costs.iter_mut().zip(hooks).zip(before) {
        let runs = bed.runs(maker, hook)?.since(before);
        ensure!(
            runs.number == order.runs(),
            "{maker:?}'s {} ran {} times in {order:?}",
            hook.label(),
            runs.number
        );
        *cost = runs.cost();
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_program_is_taken_off() {
        let mut rounds = Rounds::default();
        for (lb, c, empty) in [(130.0, 110.0, 10.0), (240.0, 220.0, 20.0), (70.0, 60.0, 10.0)] {
            rounds.add(Maker::Lb, lb);
            rounds.add(Maker::C, c);
            rounds.add(Maker::Empty, empty);
        }
        let scenario = Scenario::example();
        let cost = rounds.summary(Hook::Connect4, scenario);
        assert_eq!((cost.lb, cost.c, cost.empty), (130.0, Some(110.0), Some(10.0)));
        assert!((cost.ratio.unwrap_or_default().median - 1.2).abs() < 1e-9);
        let mut alone = Rounds::default();
        alone.add(Maker::Lb, 100.0);
        let cost = alone.summary(Hook::Connect4, scenario);
        assert_eq!((cost.lb, cost.c, cost.ratio), (100.0, None, None));
    }
}
