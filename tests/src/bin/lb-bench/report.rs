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

/// Numbers of Services that the limits apply to.
const LIMITED: [u32; 3] = [1, 1_000, 10_000];
/// Limits of the ratio of lb's program to the one in C, both above an empty program: for a Service's destination, and for
/// another.
const HIT_LIMIT: f64 = 1.3;
const MISS_LIMIT: f64 = 1.1;

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

/// A figure that is identified by a call and its scenario.
#[derive(Debug, Serialize)]
pub(crate) struct CallInScenario {
    call: Call,
    #[serde(flatten)]
    scenario: Scenario,
}

impl Display for CallInScenario {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { call, scenario } = self;
        let (family, to) = (scenario.family.label(), scenario.label());
        write!(f, "{}, {family} to {to}, {} Services", call.label(), scenario.services)
    }
}

/// A figure that may have a limit.
pub(crate) trait HasLimit {
    type Figure: Display;

    /// Compares the figure with its limit; returns nothing if it has none.
    fn check(&self) -> Option<Check<Self::Figure>>;
}

/// Compares all figures that have limits with them.
pub(crate) fn check_limits<J: HasLimit>(costs: &[J]) -> Vec<Check<J::Figure>> {
    costs.iter().filter_map(HasLimit::check).collect()
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
impl HasLimit for Cost {
    type Figure = CallInScenario;

    fn check(&self) -> Option<Check<CallInScenario>> {
        let Self { call, scenario, .. } = *self;
        let limit = match scenario.outcome {
            Outcome::Hit => HIT_LIMIT,
            Outcome::Miss => MISS_LIMIT,
        };
        let limited = !matches!(call, Call::Getpeername | Call::Close) && LIMITED.contains(&scenario.services);
        let measured = self.ratio.filter(|_| limited)?.median;
        Some(Check::at_most(limit, CallInScenario { call, scenario }, measured))
    }
}

/// Compares programs, and measures a second time with new samples if a figure exceeds its limit. Both values are printed and
/// the second one counts: of a hundred medians with an uncertainty of some percent each, one exceeds a limit by chance.
pub(crate) fn compare_again_if_exceeded<J: HasLimit>(
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
        if let (Some(first), Some(second)) = (cost.check().filter(|first| !first.met), again.check()) {
            let Check {
                what, measured, limit, ..
            } = first;
            let both = format!("{what}: {measured:.3}, then {:.3} (limit {limit})", second.measured);
            bar.suspend(|| eprintln!("{both}"));
            *cost = again;
        }
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
        "empty (ns)",
        "lb - empty",
        "C - empty",
        "lb / C",
        "quartiles",
    ]);
    for cost in costs {
        let ns = |value: Option<f64>| value.map(|v| format!("{v:.1}")).unwrap_or_default();
        let above = |value: Option<f64>| ns(value.zip(cost.empty).map(|(v, empty)| v - empty));
        let [ratio, quartiles] = cells(cost.ratio, |value| format!("{value:.2}"));
        table.add_row([
            cost.scenario.services.to_string(),
            cost.scenario.family.label().to_owned(),
            cost.scenario.label(),
            cost.call.label().to_owned(),
            cost.hook.label().to_owned(),
            ns(Some(cost.lb)),
            ns(cost.c),
            ns(cost.empty),
            above(Some(cost.lb)),
            above(cost.c),
            ratio,
            quartiles,
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
            empty: Some(10.0),
            ratio: Some(Quartiles::of([ratio])),
        }
    }

    #[test]
    fn limits_apply_to_the_ratio() {
        let met = |cost: &Cost| cost.check().map(|check| check.met);
        assert_eq!(met(&cost(Outcome::Hit, 1.3)), Some(true));
        assert_eq!(met(&cost(Outcome::Hit, 1.31)), Some(false));
        assert_eq!(met(&cost(Outcome::Miss, 1.2)), Some(false));
        let release = Cost {
            call: Call::Close,
            ..cost(Outcome::Hit, 9.0)
        };
        assert_eq!(met(&release), None);
        let without = Cost {
            ratio: None,
            ..cost(Outcome::Hit, 1.0)
        };
        assert_eq!(met(&without), None);
    }

    #[test]
    fn missing_size_is_an_error() {
        let checks = check_limits(&[cost(Outcome::Hit, 1.0)]);
        assert!(all_met(&checks) && is_complete(&checks).is_err());
    }
}
