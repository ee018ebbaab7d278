//! Rate of exchanges, a request and its reply, on every way, in short rounds that alternate between them.

use anyhow::Result;
use lb_tests::Random;
use serde::Serialize;

use crate::numbers::{Quartiles, median};
use crate::scenario::{Scenario, shuffled};
use crate::testbed::{TestBed, Way};
use crate::worker::{SocketUse, Task};

/// Exchanges on one way in one round.
const EXCHANGES: u32 = 200;

/// Behaviors of a client.
const SOCKET_USES: [SocketUse; 4] = [
    SocketUse {
        connected: false,
        fresh: false,
    },
    SocketUse {
        connected: true,
        fresh: false,
    },
    SocketUse {
        connected: false,
        fresh: true,
    },
    SocketUse {
        connected: true,
        fresh: true,
    },
];

pub(crate) fn label(manner: SocketUse) -> &'static str {
    match (manner.connected, manner.fresh) {
        (false, false) => "one, unconnected",
        (true, false) => "one, connected",
        (false, true) => "new each time, unconnected",
        (true, true) => "new each time, connected",
    }
}

/// Rate of exchanges on one way.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Rate {
    pub(crate) way: Way,
    #[serde(flatten)]
    pub(crate) scenario: Scenario,
    pub(crate) manner: SocketUse,
    /// Exchanges per second, median of the rounds. One thread sends a request, receives it, replies, and receives the reply.
    pub(crate) rate: f64,
    /// Rate of a round divided by that of [`Way::Direct`] in the same round.
    pub(crate) of_direct: Quartiles,
}

/// Returns the scenarios of exchanges: random Services, hit and miss.
fn scenarios(bed: &TestBed) -> impl Iterator<Item = Scenario> {
    let one = bed.services.number == 1;
    Scenario::all(bed.services)
        .into_iter()
        .filter(move |scenario| one || !scenario.is_hot())
}

/// Measures all ways at one number of Services. Backends must be up.
pub(crate) fn measure(bed: &TestBed, rounds: u32, mut tick: impl FnMut()) -> Result<Vec<Rate>> {
    let mut workers = bed.way_workers()?;
    let mut random = Random::new(bed.services.number.into());
    let mut all = Vec::new();
    for scenario in scenarios(bed) {
        for manner in SOCKET_USES {
            let mut ways: Vec<Vec<f64>> = workers.iter().map(|_| Vec::new()).collect();
            // The first round warms up and is not counted.
            for round in 0..=rounds {
                for at in shuffled(workers.len(), &mut random) {
                    let (way, worker) = &mut workers[at];
                    let from = way.destinations(scenario);
                    let order = from.order(bed.services, Task::Exchange(manner), EXCHANGES, random.next_u64());
                    let done = worker.order(&order)?;
                    if round > 0 {
                        ways[at].push(f64::from(EXCHANGES) / done.seconds);
                    }
                }
                tick();
            }
            let direct = ways.first().cloned().unwrap_or_default();
            for ((way, _), rates) in workers.iter().zip(ways) {
                let of_direct = rates.iter().zip(&direct).map(|(own, direct)| own / direct);
                all.push(Rate {
                    way: *way,
                    scenario,
                    manner,
                    of_direct: Quartiles::of(of_direct),
                    rate: median(rates),
                });
            }
        }
    }
    Ok(all)
}

/// Returns the number of calls of `tick` by [`measure`].
pub(crate) fn ticks(bed: &TestBed, rounds: u32) -> u64 {
    (scenarios(bed).count() * SOCKET_USES.len()) as u64 * (u64::from(rounds) + 1)
}
