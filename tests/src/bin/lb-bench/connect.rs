//! `connect`: what a connection to a Service costs, against a direct one, kube-proxy's rules, and the same work in C.
//!
//! Everything happens in network namespaces of the test bed, none of which has a way out.

mod bed;
mod cost;
mod kube_proxy;
mod latency;
mod numbers;
mod plot;
mod programs;
mod report;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use lb_tests::Random;
use serde::Serialize;

use bed::Bed;
use kube_proxy::Services;
use report::Report;
use worker::{Order, Targets, Task};

use crate::objects::{self, BACKEND_PORT, SERVICE_PORT};

pub(crate) use worker::run as run_worker;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000, 10_000], value_parser = clap::value_parser!(u32).range(1..=100_000))]
    services: Vec<u32>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    /// Rounds of each comparison
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Folder for the results as JSON, and plots
    #[arg(long)]
    out: PathBuf,
    /// Fail where a limit is exceeded
    #[arg(long)]
    check: bool,
}

/// Which Services connections go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Spread {
    /// Always the same.
    Hot,
    /// Any.
    Random,
}

/// Whether a destination is that of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Hit,
    /// A backend's own address: no rewriting, but the question must be asked.
    Miss,
}

/// Where connections go.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Scenario {
    pub(crate) services: u32,
    pub(crate) spread: Spread,
    pub(crate) outcome: Outcome,
}

impl Scenario {
    /// All at one size: with a single Service, there is nothing to choose from.
    fn all(services: Services) -> Vec<Self> {
        let spreads: &[_] = match services.number {
            1 => &[Spread::Hot],
            _ => &[Spread::Hot, Spread::Random],
        };
        let scenario = |spread, outcome| Self {
            services: services.number,
            spread,
            outcome,
        };
        [Outcome::Hit, Outcome::Miss]
            .into_iter()
            .flat_map(|outcome| spreads.iter().map(move |spread| scenario(*spread, outcome)))
            .collect()
    }

    fn is_hot(&self) -> bool {
        self.spread == Spread::Hot
    }

    /// The same, to backends' own addresses.
    fn missed(self) -> Self {
        Self {
            outcome: Outcome::Miss,
            ..self
        }
    }

    /// The destinations, and what to do with them. The hot Service is that in the middle: of rules that are tried one
    /// after the other, half come before its own.
    fn order(self, task: Task, count: u32, seed: u64) -> Order {
        let (first, number) = match self.spread {
            Spread::Hot => (self.services / 2, 1),
            Spread::Random => (0, self.services),
        };
        let (first, port) = match self.outcome {
            Outcome::Hit => (objects::vip(first), SERVICE_PORT),
            Outcome::Miss => (objects::backend(first), BACKEND_PORT),
        };
        Order {
            task,
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
    fn example() -> Self {
        Self {
            services: 1,
            spread: Spread::Hot,
            outcome: Outcome::Hit,
        }
    }
}

/// The numbers below `len` in any order: in one that is fixed, or that rotates, each would always come after the same
/// other, and find in the caches what that one left.
fn shuffled(len: usize, random: &mut Random) -> Vec<usize> {
    let mut left: Vec<_> = (0..len).collect();
    (0..len).map(|_| random.take(&mut left)).collect()
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let scratch = tempfile::tempdir().context("making a scratch directory")?;
    let object = match which::which(programs::CLANG) {
        Ok(_) => Some(programs::compile(scratch.path())?),
        Err(_) => {
            eprintln!("bench connect: no clang, so nothing is compared with C; install clang for that");
            None
        }
    };
    let mut numbers = options.services.clone();
    numbers.sort_unstable();
    numbers.dedup();
    let mut report = Report::new(options.endpoints, options.rounds)?;
    for number in numbers {
        let services = Services {
            number,
            endpoints: options.endpoints,
        };
        measure(services, object.as_deref(), options.rounds, &mut report)?;
    }
    report.judge();
    report.print()?;
    report.write(&options.out)?;
    plot::draw(&report, &options.out)?;
    if !options.check {
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(
        object.is_some(),
        "the limits of `bench connect` are ratios to C: install clang"
    );
    report.is_complete()?;
    Ok(if report.is_well() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One size.
fn measure(services: Services, object: Option<&[u8]>, rounds: u32, report: &mut Report) -> Result<()> {
    let bar = progress(services.number)?;
    bar.set_message("rules and maps");
    let mut bed = Bed::new(services, object)?;
    bar.set_length(cost::ticks(rounds) + latency::ticks(&bed, rounds));
    bar.set_message("programs");
    report.costs.extend(cost::measure(&mut bed, rounds, || bar.inc(1))?);
    bar.set_message("connections");
    report.latencies.extend(latency::measure(&bed, rounds, || bar.inc(1))?);
    report.loading.push(bed.take_down()?);
    bar.finish_and_clear();
    Ok(())
}

/// A bar on standard error, where that is a terminal.
fn progress(services: u32) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {elapsed} {msg}").context("progress bar")?;
    let bar = ProgressBar::no_length().with_style(style.progress_chars("=> "));
    bar.set_prefix(format!("{services} Services"));
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_has_a_turn_at_any_place() {
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
        let services = Services {
            number: 1000,
            endpoints: 10,
        };
        let all = Scenario::all(services);
        assert_eq!(all.len(), 4);
        let order = all[0].order(Task::Ask, 5, 0);
        assert_eq!((order.targets.first, order.targets.number), (objects::vip(500), 1));
        let order = all[0].missed().order(Task::Ask, 5, 0);
        assert_eq!((order.targets.first, order.targets.port), (objects::backend(500), 8080));
        assert_eq!(Scenario::all(Services { number: 1, ..services }).len(), 2);
    }
}
