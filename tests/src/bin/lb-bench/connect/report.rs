//! What was measured: tables, JSON, and the limits.

use std::fs;
use std::io::{Write as _, stdout};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::bed::{Loading, Way};
use super::cost::Cost;
use super::latency::Latency;
use super::programs::Hook;
use super::{Outcome, Scenario};

/// The sizes that the limits are for.
const LIMITED: [u32; 3] = [1, 1_000, 10_000];
/// lb's connect4 / that in C, both above an empty program: where the destination is a Service's, and where not.
const HIT_LIMIT: f64 = 1.3;
const MISS_LIMIT: f64 = 1.1;

/// A limit, and how it was met.
#[derive(Debug, Serialize)]
struct Check {
    #[serde(flatten)]
    scenario: Scenario,
    limit: f64,
    measured: f64,
    met: bool,
}

/// Everything, as the JSON file holds it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    kernel: String,
    processor: String,
    endpoints: u32,
    rounds: u32,
    pub(crate) costs: Vec<Cost>,
    pub(crate) latencies: Vec<Latency>,
    pub(crate) loading: Vec<Loading>,
    checks: Vec<Check>,
}

impl Report {
    pub(crate) fn new(endpoints: u32, rounds: u32) -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let processors = read("/proc/cpuinfo")?;
        let model = processors.lines().find_map(|line| line.strip_prefix("model name\t: "));
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().into(),
            processor: model.unwrap_or("unknown").into(),
            endpoints,
            rounds,
            costs: Vec::new(),
            latencies: Vec::new(),
            loading: Vec::new(),
            checks: Vec::new(),
        })
    }

    /// Compares with the limits what there are limits for.
    pub(crate) fn judge(&mut self) {
        self.checks = self.costs.iter().filter_map(check).collect();
    }

    pub(crate) fn is_well(&self) -> bool {
        self.checks.iter().all(|check| check.met)
    }

    /// Fails unless every size that has limits was measured.
    pub(crate) fn is_complete(&self) -> Result<()> {
        for services in LIMITED {
            let measured = self.checks.iter().any(|check| check.scenario.services == services);
            ensure!(measured, "the limits are for {LIMITED:?} Services: measure those sizes");
        }
        Ok(())
    }

    /// Writes `connect.json`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join("connect.json");
        let json = serde_json::to_string_pretty(self).context("writing JSON")?;
        fs::write(&path, json + "\n").with_context(|| format!("writing {}", path.display()))
    }

    pub(crate) fn print(&self) -> Result<()> {
        let tables = [
            ("connect()", self.latency_table()),
            ("runs of a program", self.cost_table()),
            ("kube-proxy's rules", self.loading_table()),
            ("limits", self.check_table()),
        ];
        for (title, table) in tables.iter().filter(|(_, table)| table.row_count() > 0) {
            writeln!(stdout(), "{title}\n{table}\n").context("writing to standard output")?;
        }
        Ok(())
    }

    fn latency_table(&self) -> Table {
        let mut table = table(&[
            "Services",
            "to",
            "by",
            "p50 (us)",
            "p99 (us)",
            "above direct (us)",
            "quartiles",
            "connections/s",
        ]);
        for l in &self.latencies {
            let above = |value: f64| {
                if l.way == Way::Direct {
                    String::new()
                } else {
                    format!("{value:.2}")
                }
            };
            table.add_row([
                l.scenario.services.to_string(),
                l.scenario.label(),
                l.way.label().to_owned(),
                format!("{:.2}", l.p50),
                format!("{:.2}", l.p99),
                above(l.above_direct.median),
                range(&above(l.above_direct.low), &above(l.above_direct.high)),
                format!("{:.0}", l.rate),
            ]);
        }
        table
    }

    fn cost_table(&self) -> Table {
        let mut table = table(&[
            "Services",
            "to",
            "program",
            "lb (ns)",
            "C (ns)",
            "empty (ns)",
            "lb - empty",
            "C - empty",
            "lb / C",
            "quartiles",
        ]);
        for cost in &self.costs {
            let ns = |value: Option<f64>| value.map(|v| format!("{v:.1}")).unwrap_or_default();
            let above = |value: Option<f64>| ns(value.zip(cost.empty).map(|(v, empty)| v - empty));
            let ratio = |pick: fn(super::numbers::Quartiles) -> f64| {
                cost.ratio.map(|r| format!("{:.2}", pick(r))).unwrap_or_default()
            };
            table.add_row([
                cost.scenario.services.to_string(),
                cost.scenario.label(),
                cost.hook.label().to_owned(),
                ns(Some(cost.lb)),
                ns(cost.c),
                ns(cost.empty),
                above(Some(cost.lb)),
                above(cost.c),
                ratio(|r| r.median),
                range(&ratio(|r| r.low), &ratio(|r| r.high)),
            ]);
        }
        table
    }

    fn loading_table(&self) -> Table {
        let mut table = table(&["Services", "nft (s)", "iptables (s)", "by"]);
        for loading in &self.loading {
            table.add_row([
                loading.services.to_string(),
                format!("{:.2}", loading.nftables_seconds),
                format!("{:.2}", loading.iptables_seconds),
                loading.iptables_program.to_owned(),
            ]);
        }
        table
    }

    fn check_table(&self) -> Table {
        let mut table = table(&["connect4, lb / C", "Services", "at most", "measured", ""]);
        for check in &self.checks {
            let verdict = if check.met { "met" } else { "EXCEEDED" };
            table.add_row([
                check.scenario.label(),
                check.scenario.services.to_string(),
                format!("{:.1}", check.limit),
                format!("{:.3}", check.measured),
                verdict.to_owned(),
            ]);
        }
        table
    }
}

fn check(cost: &Cost) -> Option<Check> {
    let limit = match cost.scenario.outcome {
        Outcome::Hit => HIT_LIMIT,
        Outcome::Miss => MISS_LIMIT,
    };
    let limited = cost.hook == Hook::Connect4 && LIMITED.contains(&cost.scenario.services);
    let measured = cost.ratio.filter(|_| limited)?.median;
    Some(Check {
        scenario: cost.scenario,
        limit,
        measured,
        met: measured <= limit,
    })
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn range(low: &str, high: &str) -> String {
    if low.is_empty() {
        String::new()
    } else {
        format!("{low}..{high}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::numbers::Quartiles;

    fn cost(outcome: Outcome, ratio: f64) -> Cost {
        Cost {
            hook: Hook::Connect4,
            scenario: Scenario {
                outcome,
                ..Scenario::example()
            },
            lb: 100.0,
            c: Some(90.0),
            empty: Some(10.0),
            ratio: Some(Quartiles::of([ratio])),
        }
    }

    #[test]
    fn limits_are_judged_by_the_ratio() {
        let met = |cost: &Cost| check(cost).map(|check| check.met);
        assert_eq!(met(&cost(Outcome::Hit, 1.3)), Some(true));
        assert_eq!(met(&cost(Outcome::Hit, 1.31)), Some(false));
        assert_eq!(met(&cost(Outcome::Miss, 1.2)), Some(false));
        let release = Cost {
            hook: Hook::SockRelease,
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
    fn a_size_that_was_not_measured_is_missed() -> Result<()> {
        let mut report = Report::new(1, 1)?;
        report.costs.push(cost(Outcome::Hit, 1.0));
        report.judge();
        assert!(report.is_well() && report.is_complete().is_err());
        Ok(())
    }
}
