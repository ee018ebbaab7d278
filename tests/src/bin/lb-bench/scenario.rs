//! Destinations of connections and datagrams.

use lb_core::model::Protocol;
use lb_tests::Random;
use serde::Serialize;

use crate::objects::{BACKEND_PORT, Family, SERVICE_PORT, Services};
use crate::worker::{Order, Targets, Task};

/// Choice of Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Spread {
    /// Always one Service.
    Hot,
    /// A random Service each time.
    Random,
}

/// Kind of destination: a Service's address, or another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// A Service's address, which is translated.
    Hit,
    /// A backend's own address, which is looked up and not translated.
    Miss,
}

/// Destinations of one measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Scenario {
    pub(crate) services: u32,
    pub(crate) family: Family,
    pub(crate) spread: Spread,
    pub(crate) outcome: Outcome,
}

impl Scenario {
    /// Returns all scenarios for a number of Services. With a single Service there is no random choice.
    pub(crate) fn all(services: Services) -> Vec<Self> {
        let spreads: &[_] = match services.number {
            1 => &[Spread::Hot],
            _ => &[Spread::Hot, Spread::Random],
        };
        let scenario = |spread, outcome| Self {
            services: services.number,
            family: services.family,
            spread,
            outcome,
        };
        [Outcome::Hit, Outcome::Miss]
            .into_iter()
            .flat_map(|outcome| spreads.iter().map(move |spread| scenario(*spread, outcome)))
            .collect()
    }

    pub(crate) fn is_hot(&self) -> bool {
        self.spread == Spread::Hot
    }

    pub(crate) fn is_hit(&self) -> bool {
        self.outcome == Outcome::Hit
    }

    /// Returns the scenario with the backends' own addresses as destinations.
    pub(crate) fn missed(self) -> Self {
        Self {
            outcome: Outcome::Miss,
            ..self
        }
    }

    /// Returns the order for a worker: the destinations among `services`, and the task. The hot Service is the middle one:
    /// of rules that are tried one after the other, half come before its own.
    pub(crate) fn order(self, services: Services, task: Task, count: u32, seed: u64) -> Order {
        let (first, number) = match self.spread {
            Spread::Hot => (services.number / 2, 1),
            Spread::Random => (0, services.number),
        };
        let (first, port) = match self.outcome {
            Outcome::Hit => (services.vip(first), SERVICE_PORT),
            Outcome::Miss => (services.backend(first), BACKEND_PORT),
        };
        Order {
            task,
            udp: services.protocol == Protocol::Udp,
            targets: Targets { first, number, port },
            count,
            seed,
        }
    }

    pub(crate) fn label(&self) -> String {
        let spread = match self.spread {
            Spread::Hot => "hot",
            Spread::Random => "random",
        };
        let outcome = match self.outcome {
            Outcome::Hit => "hit",
            Outcome::Miss => "miss",
        };
        format!("{outcome}, {spread}")
    }

    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Self {
            services: 1,
            family: Family::Ipv4,
            spread: Spread::Hot,
            outcome: Outcome::Hit,
        }
    }
}

/// Returns the numbers below `len` in random order. In a fixed or rotating order, each would always follow the same other
/// and find that one's data in the caches.
pub(crate) fn shuffled(len: usize, random: &mut Random) -> Vec<usize> {
    let mut left: Vec<_> = (0..len).collect();
    (0..len).map(|_| random.take(&mut left)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffled_order_gives_each_position_equal_chances() {
        let mut random = Random::new(1);
        let mut first = [0; 3];
        for _ in 0..300 {
            let mut round = shuffled(3, &mut random);
            first[round[0]] += 1;
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2]);
        }
        assert!(first.iter().all(|times| (60..140).contains(times)), "{first:?}");
    }

    #[test]
    fn the_hot_service_is_in_the_middle_and_misses_are_backends() {
        for family in Family::ALL {
            let services = Services {
                number: 1000,
                endpoints: 10,
                family,
                protocol: Protocol::Udp,
            };
            let all = Scenario::all(services);
            assert_eq!(all.len(), 4);
            let order = all[0].order(services, Task::Ask, 5, 0);
            assert_eq!((order.targets.first, order.targets.number), (services.vip(500), 1));
            assert!(order.udp);
            let order = all[0].missed().order(services, Task::Ask, 5, 0);
            assert_eq!((order.targets.first, order.targets.port), (services.backend(500), 8080));
            assert_eq!(Scenario::all(Services { number: 1, ..services }).len(), 2);
        }
    }
}
