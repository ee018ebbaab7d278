//! The cost of each step of lb's connect hooks: a C program with all of them, and programs with one step less each.
//!
//! They have rounds of their own, a tenth as many as the other comparisons. In each round a C
//! program is loaded and attached for its measurement, always to the same pod. So its position in the kernel's memory differs.

use anyhow::{Result, ensure};
use comfy_table::Table;
use lb_tests::Random;
use serde::Serialize;

use super::SOCKETS;
use crate::cost::{Call, RELOAD};
use crate::numbers::{Quartiles, median};
use crate::programs::{self, Hook};
use crate::report;
use crate::scenario::{Scenario, shuffled};
use crate::testbed::TestBed;
use crate::worker::Task;

/// Prefix of the names of lb's programs.
const LB: &str = "lb";
/// Prefixes of the names of the measured programs: lb's, the C program with all steps, those that lack one more step each, the
/// floor and the empty program. See `connect_up_to` in the C source for the steps.
const PROGRAMS: [&str; 12] = [
    LB,
    "all",
    "no_trace",
    "no_counter",
    "no_record",
    "no_mptcp",
    "no_netns",
    "no_cookie",
    "no_filter",
    "no_checks",
    "floor",
    "empty",
];
/// Programs that count connections in STATS.
const COUNTING: [&str; 3] = [LB, "all", "no_trace"];
/// C programs that store records of sockets. [`RELEASE`] is attached with them.
const RECORDING: [&str; 3] = ["all", "no_trace", "no_counter"];
/// The C program that deletes the record of a closed socket.
const RELEASE: &str = "c_sock_release";

/// Nanoseconds per run of each program, one value per round.
type Rounds = [Vec<f64>; PROGRAMS.len()];

/// Costs of the steps in one scenario. Nanoseconds per run of a program are above the empty program of the round, as the median.
#[derive(Debug, Clone, Serialize)]
pub(super) struct RemovalCost {
    #[serde(flatten)]
    scenario: Scenario,
    /// Nanoseconds per run of lb's program.
    lb: f64,
    /// Nanoseconds per run of the C program with all steps.
    all: f64,
    /// Steps in the order of their removal.
    steps: Vec<StepCost>,
    /// Nanoseconds per run of the C program without these steps.
    rest: f64,
    /// Nanoseconds per run of the floor.
    floor: f64,
}

/// Cost of a step: the difference in nanoseconds per run between the C programs with and without it in the same round.
#[derive(Debug, Clone, Serialize)]
struct StepCost {
    step: &'static str,
    #[serde(flatten)]
    cost: Quartiles,
}

impl RemovalCost {
    /// Summarizes the rounds of one scenario.
    fn of(rounds: &Rounds, scenario: Scenario) -> Self {
        let [lb, all, .., rest, floor, empty] = rounds;
        let above_empty = |own: &[f64]| median(differences(own, empty));
        let pairs = rounds.iter().zip(&rounds[1..]).zip(&PROGRAMS[1..]);
        let steps = pairs.filter_map(|((with, without), program)| {
            Some(StepCost {
                step: program.strip_prefix("no_")?,
                cost: Quartiles::of(differences(with, without)),
            })
        });
        Self {
            scenario,
            lb: above_empty(lb),
            all: above_empty(all),
            steps: steps.collect(),
            rest: above_empty(rest),
            floor: above_empty(floor),
        }
    }
}

fn differences(values: &[f64], less: &[f64]) -> impl Iterator<Item = f64> {
    values.iter().zip(less).map(|(value, less)| value - less)
}

/// Returns the number of rounds, if the other comparisons have `rounds`.
fn own_rounds(rounds: u32) -> u32 {
    rounds.div_ceil(10).max(5)
}

/// Returns the number of calls of `tick` by [`measure`].
pub(super) fn ticks(rounds: u32) -> u64 {
    u64::from(own_rounds(rounds)) + 1
}

/// Measures the programs at one number of Services. `rounds` are those of the other comparisons. Backends must not be up.
pub(super) fn measure(bed: &mut TestBed, rounds: u32, mut tick: impl FnMut()) -> Result<Vec<RemovalCost>> {
    let Some(mut detached) = bed.load_detached()? else {
        return Ok(Vec::new());
    };
    let hook = Call::Connect.hook(bed.services.family);
    let mut scenarios = Scenario::all(bed.services);
    scenarios.retain(Scenario::is_hit);
    let mut random = Random::new(bed.services.number.into());
    let mut found: Vec<_> = scenarios.iter().map(|_| Rounds::default()).collect();
    let before = bed.connections()?;
    let mut expected = 0;
    // The first round warms up and is not counted.
    for round in 0..=own_rounds(rounds) {
        if round % RELOAD == 0 {
            bed.reload()?;
        }
        for at in shuffled(PROGRAMS.len(), &mut random) {
            let program = PROGRAMS[at];
            let names = names(program, hook);
            for name in &names {
                programs::attach_one(&mut detached.programs, name, &detached.cgroup)?;
            }
            for (scenario, found) in scenarios.iter().zip(&mut found) {
                let order = scenario.order(bed.services, Task::Ask, SOCKETS, random.next_u64());
                let runs = detached.run(bed, names.first().map(String::as_str), hook, &order)?;
                ensure!(
                    runs.number == u64::from(SOCKETS),
                    "the program {program} ran {} times in {order:?}",
                    runs.number
                );
                if COUNTING.contains(&program) {
                    expected += runs.number;
                }
                if round > 0 {
                    found[at].push(runs.cost());
                }
            }
            for name in &names {
                programs::unload(&mut detached.programs, name)?;
            }
        }
        tick();
    }
    let counted = bed.connections()? - before;
    ensure!(
        counted == expected,
        "{counted} destinations were rewritten instead of {expected}"
    );
    let costs = scenarios.iter().zip(&found);
    Ok(costs
        .map(|(scenario, rounds)| RemovalCost::of(rounds, *scenario))
        .collect())
}

/// Returns the names of the C programs to attach, of which the first is measured; none for lb, whose programs are attached.
fn names(program: &str, hook: Hook) -> Vec<String> {
    let measured = (program != LB).then(|| format!("{program}_{}", hook.label()));
    let release = RECORDING.contains(&program).then(|| RELEASE.to_owned());
    measured.into_iter().chain(release).collect()
}

/// Returns the table of nanoseconds: a row for each scenario.
pub(super) fn table(costs: &[RemovalCost]) -> Table {
    let steps = PROGRAMS.iter().filter_map(|program| program.strip_prefix("no_"));
    let before = ["Services", "family", "to", "lb", "all"].into_iter();
    let header: Vec<_> = before.chain(steps).chain(["rest", "floor"]).collect();
    let mut table = report::table(&header);
    for cost in costs {
        let steps = cost.steps.iter().map(|step| step.cost.median);
        let figures = [cost.lb, cost.all]
            .into_iter()
            .chain(steps)
            .chain([cost.rest, cost.floor]);
        let names = [
            cost.scenario.services.to_string(),
            cost.scenario.family.label().to_owned(),
            cost.scenario.label(),
        ];
        table.add_row(names.into_iter().chain(figures.map(|ns| format!("{ns:.1}"))));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c_source_has_every_program() {
        for program in PROGRAMS.into_iter().filter(|program| *program != LB) {
            let starts = [format!("\nCONNECT_UP_TO({program}, "), format!(" {program}_connect4(")];
            assert!(starts.iter().any(|start| programs::SOURCE.contains(start)), "{program}");
        }
        assert!(programs::SOURCE.contains(&format!(" {RELEASE}(")));
        let mut known = COUNTING.iter().chain(&RECORDING);
        assert!(known.all(|program| PROGRAMS.contains(program)));
    }

    #[test]
    fn only_c_programs_with_records_need_the_release_program() {
        assert!(names(LB, Hook::Connect4).is_empty());
        assert_eq!(names("no_counter", Hook::Connect6), ["no_counter_connect6", RELEASE]);
        assert_eq!(names("no_record", Hook::Connect6), ["no_record_connect6"]);
    }

    #[test]
    fn steps_cost_the_difference_within_a_round() {
        // Each program takes as many nanoseconds less than the one before it as its position, and the second round is slower.
        let mut left = 166.0;
        let rounds = std::array::from_fn(|at| {
            left -= at as f64;
            vec![left, left + 500.0, left]
        });
        let cost = RemovalCost::of(&rounds, Scenario::example());
        assert_eq!((cost.lb, cost.all, cost.rest, cost.floor), (66.0, 65.0, 21.0, 11.0));
        let steps: Vec<_> = cost.steps.iter().map(|step| (step.step, step.cost.median)).collect();
        assert_eq!((steps.len(), steps[0], steps[7]), (8, ("trace", 2.0), ("checks", 9.0)));
        let table = table(&[cost]);
        let [first, last] = [table.lines().next(), table.lines().last()].map(Option::unwrap_or_default);
        assert_eq!(first.split_whitespace().count(), 5 + 8 + 2, "{first}");
        let figures = "66.0 65.0 2.0 3.0 4.0 5.0 6.0 7.0 8.0 9.0 21.0 11.0";
        assert!(
            last.split_whitespace().collect::<Vec<_>>().join(" ").ends_with(figures),
            "{last}"
        );
    }

    #[test]
    fn there_are_at_least_five_rounds() {
        assert_eq!([1, 50, 200].map(own_rounds), [5, 5, 20]);
    }
}
