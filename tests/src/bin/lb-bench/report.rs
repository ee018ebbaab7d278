//! Parts of reports that benchmarks share: the machine, costs of programs, limits and tables.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io::{Write as _, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::cost::{Call, Cost};
use crate::numbers::Quartiles;
use crate::scenario::{Outcome, Scenario};
use crate::testbed::Way;

/// Highest number of Services that the limits apply to.
const LARGEST: u32 = 10_000;
/// Numbers of Services that the limits apply to.
const LIMITED: [u32; 3] = [1, 1_000, LARGEST];
/// Limits of the ratio of lb's program to the one in C, both above an empty program: for a Service's destination, and for
/// another.
const HIT_LIMIT: f64 = 1.3;
const MISS_LIMIT: f64 = 1.1;
/// Limit of the ratio of lb's program to the floor, both above an empty program, for the destination of the hot Service.
const HOT_HIT_TO_FLOOR_LIMIT: f64 = 2.5;
/// Limit of the ratio of lb's program to the floor, both above an empty program, for random Services among [`LARGEST`].
const RANDOM_HIT_TO_FLOOR_LIMIT: f64 = 1.0;
/// Limit of the nanoseconds of lb's program above an empty program, for a destination that is no Service's.
const MISS_ABOVE_EMPTY_LIMIT: f64 = 25.0;

/// Options for the output of a report.
#[derive(Debug, clap::Args)]
pub(crate) struct Reporting {
    /// Folder for the results as JSON, and plots
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Fail if a limit is exceeded
    #[arg(long)]
    check: bool,
}

impl Reporting {
    /// Writes a report as JSON.
    pub(crate) fn write(&self, name: &str, report: &impl Serialize) -> Result<()> {
        fs::create_dir_all(&self.out).with_context(|| format!("making {}", self.out.display()))?;
        let path = self.out.join(name);
        let json = serde_json::to_string_pretty(report).context("writing JSON")?;
        fs::write(&path, json + "\n").with_context(|| format!("writing {}", path.display()))
    }

    /// Returns the exit code: with `--check`, failure if a limit is exceeded.
    ///
    /// # Errors
    /// With `--check`, the error in `complete`: a figure with a limit was not measured.
    pub(crate) fn verdict<W>(&self, checks: &[Check<W>], complete: Result<()>) -> Result<ExitCode> {
        if self.check {
            complete?;
        }
        Ok(if all_met(checks) || !self.check {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// Description of the machine.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    /// Load average of the minute before the benchmark.
    load: f64,
}

impl Machine {
    pub(crate) fn this() -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let text = read("/proc/cpuinfo")?;
        let models: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("model name\t: "))
            .collect();
        let load = read("/proc/loadavg")?;
        let load = load.split(' ').next().and_then(|first| first.parse().ok());
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().into(),
            processor: (*models.first().unwrap_or(&"unknown")).into(),
            processors: models.len(),
            load: load.context("no number in /proc/loadavg")?,
        })
    }
}

/// A limit and the measured figure.
#[derive(Debug, Serialize)]
pub(crate) struct Check<W> {
    /// Name of the figure.
    #[serde(flatten)]
    pub(crate) what: W,
    pub(crate) limit: f64,
    pub(crate) measured: f64,
    pub(crate) met: bool,
}

impl<W> Check<W> {
    pub(crate) fn at_most(limit: f64, what: W, measured: f64) -> Self {
        Self {
            what,
            limit,
            measured,
            met: measured <= limit,
        }
    }

    pub(crate) fn verdict(&self) -> &'static str {
        if self.met { "met" } else { "EXCEEDED" }
    }
}

/// A figure that is identified by a name alone.
#[derive(Debug, Serialize)]
pub(crate) struct Named {
    pub(crate) what: &'static str,
}

impl Display for Named {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

/// A quantity that is computed from the cost of lb's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Quantity {
    /// Ratio lb / C, both above the empty program.
    LbToC,
    /// Ratio lb / floor, both above the empty program.
    LbToFloor,
    /// Nanoseconds above the empty program.
    LbAboveEmpty,
}

impl Quantity {
    fn label(self) -> &'static str {
        match self {
            Self::LbToC => "lb / C",
            Self::LbToFloor => "lb / floor",
            Self::LbAboveEmpty => "lb - empty (ns)",
        }
    }
}

/// A figure that is identified by a quantity, a call and its scenario.
#[derive(Debug, Serialize)]
pub(crate) struct CallInScenario {
    quantity: Quantity,
    call: Call,
    #[serde(flatten)]
    scenario: Scenario,
}

impl Display for CallInScenario {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            quantity,
            call,
            scenario,
        } = self;
        let (family, to) = (scenario.family.label(), scenario.label());
        write!(
            f,
            "{}: {}, {family} to {to}, {} Services",
            quantity.label(),
            call.label(),
            scenario.services
        )
    }
}

/// A measurement with figures that may have limits.
pub(crate) trait HasLimits {
    type Figure: Display;

    /// Compares each figure that has a limit with it.
    fn checks(&self) -> Vec<Check<Self::Figure>>;
}

/// Compares all figures that have limits with them.
pub(crate) fn check_limits<J: HasLimits>(costs: &[J]) -> Vec<Check<J::Figure>> {
    costs.iter().flat_map(HasLimits::checks).collect()
}

pub(crate) fn all_met<W>(checks: &[Check<W>]) -> bool {
    checks.iter().all(|check| check.met)
}

/// Checks that every number of Services with limits was measured.
///
/// # Errors
/// If one of them is missing.
pub(crate) fn is_complete(checks: &[Check<CallInScenario>]) -> Result<()> {
    for services in LIMITED {
        let measured = checks.iter().any(|check| check.what.scenario.services == services);
        ensure!(
            measured,
            "the limits are ratios to programs in C and apply to {LIMITED:?} Services: install clang and measure those sizes"
        );
    }
    Ok(())
}

/// Calls with programs that decide or translate have limits. Those that only clean up, or serve `getpeername`, have none.
fn has_limits(cost: &Cost) -> bool {
    !matches!(cost.call, Call::Getpeername | Call::Close) && LIMITED.contains(&cost.scenario.services)
}

/// Compares a figure of a cost with its limit.
fn check(cost: &Cost, quantity: Quantity, limit: f64, measured: f64) -> Check<CallInScenario> {
    let Cost { call, scenario, .. } = *cost;
    let what = CallInScenario {
        quantity,
        call,
        scenario,
    };
    Check::at_most(limit, what, measured)
}

impl HasLimits for Cost {
    type Figure = CallInScenario;

    fn checks(&self) -> Vec<Check<CallInScenario>> {
        if !has_limits(self) {
            return Vec::new();
        }
        let limit = match self.scenario.outcome {
            Outcome::Hit => HIT_LIMIT,
            Outcome::Miss => MISS_LIMIT,
        };
        let to_c = self
            .ratio
            .map(|ratio| check(self, Quantity::LbToC, limit, ratio.median));
        let more = match self.scenario.outcome {
            Outcome::Hit => self.check_to_floor(),
            Outcome::Miss => self.check_above_empty(),
        };
        to_c.into_iter().chain(more).collect()
    }
}

impl Cost {
    /// Compares a hit with the floor, where that has a limit.
    fn check_to_floor(&self) -> Option<Check<CallInScenario>> {
        let limit = if self.scenario.is_hot() {
            HOT_HIT_TO_FLOOR_LIMIT
        } else if self.scenario.services == LARGEST {
            RANDOM_HIT_TO_FLOOR_LIMIT
        } else {
            return None;
        };
        let measured = self.ratio_to_floor?.median;
        Some(check(self, Quantity::LbToFloor, limit, measured))
    }

    /// Compares a miss of TCP's `connect()` with the empty program.
    fn check_above_empty(&self) -> Option<Check<CallInScenario>> {
        let measured = self.lb - self.empty?;
        // Only TCP is measured with a floor. A UDP socket that connects may have a record to remove.
        (self.ratio_to_floor.is_some()).then(|| check(self, Quantity::LbAboveEmpty, MISS_ABOVE_EMPTY_LIMIT, measured))
    }
}

/// Compares programs, and measures a second time with new samples if a figure exceeds its limit. Both results of such a cost
/// are printed and the second one counts: of a hundred medians with an uncertainty of some percent each, one exceeds a limit by
/// chance.
pub(crate) fn compare_again_if_exceeded<J: HasLimits>(
    bar: &ProgressBar,
    mut compare: impl FnMut() -> Result<Vec<J>>,
) -> Result<Vec<J>> {
    let mut costs = compare()?;
    if all_met(&check_limits(&costs)) {
        return Ok(costs);
    }
    let begun = bar.position();
    bar.suspend(|| eprintln!("a limit is exceeded: measuring again"));
    let again = compare()?;
    bar.inc_length(bar.position() - begun);
    for (cost, again) in costs.iter_mut().zip(again) {
        let first = cost.checks();
        if all_met(&first) {
            continue;
        }
        for (first, second) in first.iter().zip(again.checks()) {
            let Check {
                what, measured, limit, ..
            } = first;
            let both = format!("{what}: {measured:.3}, then {:.3} (limit {limit})", second.measured);
            bar.suspend(|| eprintln!("{both}"));
        }
        *cost = again;
    }
    Ok(costs)
}

/// Writes the tables that have rows to standard output.
pub(crate) fn print<'a>(tables: impl IntoIterator<Item = (&'a str, Table)>) -> Result<()> {
    for (title, table) in tables.into_iter().filter(|(_, table)| table.row_count() > 0) {
        writeln!(stdout(), "{title}\n{table}\n").context("writing to standard output")?;
    }
    Ok(())
}

pub(crate) fn cost_table(costs: &[Cost]) -> Table {
    let mut table = table(&[
        "Services",
        "family",
        "to",
        "call",
        "program",
        "lb (ns)",
        "C (ns)",
        "floor (ns)",
        "empty (ns)",
        "lb - empty",
        "C - empty",
        "lb / C",
        "quartiles",
        "lb / floor",
        "quartiles",
    ]);
    for cost in costs {
        let ns = |value: Option<f64>| value.map(|v| format!("{v:.1}")).unwrap_or_default();
        let above = |value: Option<f64>| ns(value.zip(cost.empty).map(|(v, empty)| v - empty));
        let text = |value: f64| format!("{value:.2}");
        let [ratio, quartiles] = cells(cost.ratio, text);
        let [ratio_to_floor, floor_quartiles] = cells(cost.ratio_to_floor, text);
        table.add_row([
            cost.scenario.services.to_string(),
            cost.scenario.family.label().to_owned(),
            cost.scenario.label(),
            cost.call.label().to_owned(),
            cost.hook.label().to_owned(),
            ns(Some(cost.lb)),
            ns(cost.c),
            ns(cost.floor),
            ns(cost.empty),
            above(Some(cost.lb)),
            above(cost.c),
            ratio,
            quartiles,
            ratio_to_floor,
            floor_quartiles,
        ]);
    }
    table
}

/// Returns the table of limits; `measured` is the header of the figures.
pub(crate) fn check_table<W: Display>(measured: &str, checks: &[Check<W>]) -> Table {
    let mut table = table(&[measured, "at most", "measured", ""]);
    for check in checks {
        table.add_row([
            check.what.to_string(),
            format!("{:.1}", check.limit),
            format!("{:.3}", check.measured),
            check.verdict().to_owned(),
        ]);
    }
    table
}

/// Returns a table without lines and with right-aligned columns.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Returns two cells: the median and the quartiles. Both are empty if the row has no comparison.
pub(crate) fn cells(compared: Option<Quartiles>, text: impl Fn(f64) -> String) -> [String; 2] {
    let both = compared.map(|q| [text(q.median), format!("{}..{}", text(q.low), text(q.high))]);
    both.unwrap_or_default()
}

/// Returns the cells of a rate in percent of the direct way's: median and quartiles, both empty for the direct way itself.
pub(crate) fn percent_cells(way: Way, of_direct: Quartiles) -> [String; 2] {
    let compared = (way != Way::Direct).then_some(of_direct);
    cells(compared, |value| format!("{:.1}", value * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Spread;

    fn cost(outcome: Outcome, ratio: f64) -> Cost {
        let scenario = Scenario {
            outcome,
            ..Scenario::example()
        };
        Cost {
            call: Call::Connect,
            hook: Call::Connect.hook(scenario.family),
            scenario,
            lb: 100.0,
            c: Some(90.0),
            floor: None,
            empty: Some(10.0),
            ratio: Some(Quartiles::of([ratio])),
            ratio_to_floor: None,
        }
    }

    fn with_floor(outcome: Outcome, spread: Spread, services: u32, ratio: f64) -> Cost {
        let cost = cost(outcome, 1.0);
        Cost {
            scenario: Scenario {
                spread,
                services,
                ..cost.scenario
            },
            floor: Some(50.0),
            ratio_to_floor: Some(Quartiles::of([ratio])),
            ..cost
        }
    }

    fn quantities(checks: &[Check<CallInScenario>]) -> Vec<(Quantity, bool)> {
        checks.iter().map(|check| (check.what.quantity, check.met)).collect()
    }

    #[test]
    fn limits_apply_to_the_ratio() {
        let met = |cost: &Cost| quantities(&cost.checks());
        let [is_met, exceeded] = [true, false].map(|met| vec![(Quantity::LbToC, met)]);
        assert_eq!(met(&cost(Outcome::Hit, 1.3)), is_met);
        assert_eq!(met(&cost(Outcome::Hit, 1.31)), exceeded);
        assert_eq!(met(&cost(Outcome::Miss, 1.2)), exceeded);
        let release = Cost {
            call: Call::Close,
            ..cost(Outcome::Hit, 9.0)
        };
        assert!(met(&release).is_empty());
        let without = Cost {
            ratio: None,
            ..cost(Outcome::Hit, 1.0)
        };
        assert!(met(&without).is_empty());
    }

    #[test]
    fn hits_are_compared_with_the_floor_and_misses_with_the_empty_program() {
        let met = |cost: &Cost| quantities(&cost.checks());
        let to_c = (Quantity::LbToC, true);
        for (spread, services, ratio, is_met) in [
            (Spread::Hot, 1_000, 2.5, true),
            (Spread::Hot, 1_000, 2.6, false),
            (Spread::Random, LARGEST, 1.0, true),
            (Spread::Random, LARGEST, 1.1, false),
        ] {
            let hit = with_floor(Outcome::Hit, spread, services, ratio);
            assert_eq!(met(&hit), [to_c, (Quantity::LbToFloor, is_met)]);
        }
        assert_eq!(met(&with_floor(Outcome::Hit, Spread::Random, 1_000, 9.0)), [to_c]);
        assert!(met(&with_floor(Outcome::Hit, Spread::Hot, 2, 9.0)).is_empty());
        // The empty program takes 10 ns.
        for (lb, is_met) in [(35.0, true), (36.0, false)] {
            let miss = Cost {
                lb,
                ..with_floor(Outcome::Miss, Spread::Random, 1, 9.0)
            };
            assert_eq!(met(&miss), [to_c, (Quantity::LbAboveEmpty, is_met)]);
        }
        assert_eq!(met(&cost(Outcome::Miss, 1.0)), [to_c]);
    }

    #[test]
    fn checks_name_their_quantity() {
        let checks = with_floor(Outcome::Hit, Spread::Hot, 1, 2.0).checks();
        let names: Vec<_> = checks.iter().map(|check| check.what.to_string()).collect();
        assert_eq!(
            names,
            [
                "lb / C: connect, IPv4 to hit, hot, 1 Services",
                "lb / floor: connect, IPv4 to hit, hot, 1 Services"
            ]
        );
    }

    #[test]
    fn cells_of_the_floor_are_empty_without_one() {
        let row = |cost: Cost| cost_table(&[cost]).lines().last().unwrap_or_default();
        let with = row(with_floor(Outcome::Hit, Spread::Hot, 1, 2.0));
        assert!(
            with.contains(" 50.0 ") && with.trim_end().ends_with("2.00..2.00"),
            "{with}"
        );
        let without = row(cost(Outcome::Hit, 1.0));
        assert!(without.trim_end().ends_with("1.00..1.00"), "{without}");
    }

    #[test]
    fn missing_size_is_an_error() {
        let checks = check_limits(&[cost(Outcome::Hit, 1.0)]);
        assert!(all_met(&checks) && is_complete(&checks).is_err());
    }
}
