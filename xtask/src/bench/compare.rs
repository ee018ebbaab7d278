//! Comparison of two builds: ratios of figures with their confidence intervals, and ratios of verified instructions.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::figures::Figures;

/// Confidence level of the intervals.
const CONFIDENCE: f64 = 0.95;

/// Verified instructions by program.
pub(crate) type Verified = BTreeMap<String, u32>;

/// The figures of two runs, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Pair {
    /// Figures of this workspace.
    pub(crate) new: Figures,
    /// Figures of the commit that it is compared with.
    pub(crate) old: Figures,
}

/// A ratio new / old with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Ratio {
    /// Geometric mean of the pairs.
    pub(crate) mean: f64,
    /// Lower bound.
    pub(crate) low: f64,
    /// Upper bound.
    pub(crate) high: f64,
}

impl Ratio {
    /// Computes the ratio of pairs (new, old).
    ///
    /// Student's t distribution on the logarithms of the pairs' ratios: a pair cancels what both runs of it have in
    /// common, and logarithms make a factor and its inverse equally far from one.
    ///
    /// # Errors
    /// If there are fewer than two pairs, or if a figure is not positive.
    pub(crate) fn of(pairs: &[(f64, f64)]) -> Result<Self> {
        ensure!(pairs.len() >= 2, "an interval needs two pairs, not {}", pairs.len());
        let positive = pairs.iter().all(|&(new, old)| new > 0.0 && old > 0.0);
        ensure!(positive, "not positive in every run");
        let logs: Vec<_> = pairs.iter().map(|(new, old)| (new / old).ln()).collect();
        let number = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / number;
        let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (number - 1.0);
        let student = StudentsT::new(0.0, 1.0, number - 1.0).context("Student's t distribution")?;
        let reach = student.inverse_cdf(0.5 + CONFIDENCE / 2.0) * (variance / number).sqrt();
        Ok(Self {
            mean: mean.exp(),
            low: (mean - reach).exp(),
            high: (mean + reach).exp(),
        })
    }
}

/// A row of the comparison of figures.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// Name of the figure.
    pub(crate) name: String,
    /// Ratio, or the reason why there is none.
    pub(crate) ratio: Result<Ratio, String>,
    /// The highest lower bound that passes.
    pub(crate) limit: f64,
}

impl Row {
    /// Returns true if the whole interval is above the limit.
    pub(crate) fn is_exceeded(&self) -> bool {
        self.ratio.as_ref().is_ok_and(|ratio| ratio.low > self.limit)
    }
}

/// Compares the figures that at least one run has, in the order of their names.
pub(crate) fn compare(pairs: &[Pair], limit: f64) -> Vec<Row> {
    let names: BTreeSet<_> = pairs
        .iter()
        .flat_map(|pair| pair.new.keys().chain(pair.old.keys()))
        .collect();
    let row = |name: &String| {
        let of_pair = |pair: &Pair| -> Result<(f64, f64), String> {
            match (pair.new.get(name), pair.old.get(name)) {
                (Some(new), Some(old)) => Ok((*new, *old)),
                (Some(_), None) => Err("only in this workspace".to_owned()),
                (None, _) => Err("only in the commit".to_owned()),
            }
        };
        let values: Result<Vec<_>, _> = pairs.iter().map(of_pair).collect();
        Row {
            name: name.clone(),
            ratio: values.and_then(|values| Ratio::of(&values).map_err(|error| error.to_string())),
            limit,
        }
    };
    names.into_iter().map(row).collect()
}

/// A row of the comparison of verified instructions.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct VerifiedRow {
    /// Name of the program.
    pub(crate) program: String,
    /// Verified instructions in this workspace.
    pub(crate) new: Option<u32>,
    /// Verified instructions in the commit.
    pub(crate) old: Option<u32>,
    /// The highest ratio that passes.
    pub(crate) limit: f64,
}

impl VerifiedRow {
    /// Ratio new / old of a program that both have.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let (new, old) = self.new.zip(self.old)?;
        Some(f64::from(new) / f64::from(old))
    }

    /// Returns true if the ratio is above the limit.
    pub(crate) fn is_exceeded(&self) -> bool {
        self.ratio().is_some_and(|ratio| ratio > self.limit)
    }
}

/// Compares the programs that at least one of the two has.
pub(crate) fn compare_verified(new: &Verified, old: &Verified, limit: f64) -> Vec<VerifiedRow> {
    let names: BTreeSet<_> = new.keys().chain(old.keys()).collect();
    let row = |program: &String| VerifiedRow {
        program: program.clone(),
        new: new.get(program).copied(),
        old: old.get(program).copied(),
        limit,
    };
    names.into_iter().map(row).collect()
}

/// Word of a row for a verdict.
fn verdict(is_exceeded: bool) -> String {
    if is_exceeded { "EXCEEDED" } else { "met" }.to_owned()
}

/// Renders the comparison of figures.
pub(crate) fn table(rows: &[Row]) -> Table {
    let mut table = empty_table(&["figure", "new / old", "lower", "upper", "limit", ""]);
    let number = |value: f64| format!("{value:.3}");
    for row in rows {
        let cells = match &row.ratio {
            Ok(ratio) => [
                row.name.clone(),
                number(ratio.mean),
                number(ratio.low),
                number(ratio.high),
                number(row.limit),
                verdict(row.is_exceeded()),
            ],
            Err(why) => {
                let [a, b, c, d] = [(); 4].map(|()| String::new());
                [row.name.clone(), a, b, c, d, format!("not compared: {why}")]
            }
        };
        table.add_row(cells);
    }
    table
}

/// Renders the comparison of verified instructions.
pub(crate) fn verified_table(rows: &[VerifiedRow]) -> Table {
    let mut table = empty_table(&["verified instructions", "old", "new", "new / old", "limit", ""]);
    let number = |value: Option<u32>| value.map(|number| number.to_string()).unwrap_or_default();
    for row in rows {
        let (ratio, verdict) = match row.ratio() {
            Some(ratio) => (format!("{ratio:.3}"), verdict(row.is_exceeded())),
            None => (String::new(), "not compared: only in one of them".to_owned()),
        };
        table.add_row([
            row.program.clone(),
            number(row.old),
            number(row.new),
            ratio,
            format!("{:.3}", row.limit),
            verdict,
        ]);
    }
    table
}

/// Returns a table without lines; its columns are right-aligned except the first and the last.
fn empty_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    let last = header.len() - 1;
    for (at, column) in table.column_iter_mut().enumerate() {
        if at != 0 && at != last {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn interval_follows_students_t_distribution() {
        // Log ratios -d and d in equal numbers: mean 0, variance 10/9 d^2, t(0.975, 9) = 2.262157.
        let d = 0.1_f64;
        let pairs: Vec<_> = (0..10)
            .map(|n| (if n % 2 == 0 { d.exp() } else { (-d).exp() }, 1.0))
            .collect();
        let ratio = Ratio::of(&pairs).unwrap();
        let reach = 2.262_157 * (d * d / 9.0).sqrt();
        assert!(close(ratio.mean, 1.0), "{ratio:?}");
        assert!(
            close(ratio.high.ln(), reach) && close(ratio.low.ln(), -reach),
            "{ratio:?} {reach}"
        );
    }

    #[test]
    fn drift_that_both_runs_of_a_pair_share_cancels() {
        let pairs: Vec<_> = (1..=10).map(|n| (1.02 * f64::from(n), f64::from(n))).collect();
        let ratio = Ratio::of(&pairs).unwrap();
        assert!(
            [ratio.mean, ratio.low, ratio.high]
                .iter()
                .all(|value| close(*value, 1.02))
        );
    }

    #[test]
    fn ratio_needs_two_pairs_of_positive_figures() {
        assert!(Ratio::of(&[(1.0, 1.0)]).is_err());
        assert!(Ratio::of(&[(1.0, 1.0), (0.0, 1.0)]).is_err());
        assert!(Ratio::of(&[(1.0, 1.0), (1.0, -1.0)]).is_err());
    }

    fn pairs(new: &[f64]) -> Vec<Pair> {
        let figures = |value: f64| Figures::from([("x".to_owned(), value)]);
        let pair = |value: &f64| Pair {
            new: figures(*value),
            old: figures(1.0),
        };
        new.iter().map(pair).collect()
    }

    #[test]
    fn row_is_exceeded_if_the_whole_interval_is_above_the_limit() {
        let exceeded = |new: &[f64]| compare(&pairs(new), 1.03)[0].is_exceeded();
        assert!(exceeded(&[1.05; 10]));
        assert!(!exceeded(&[1.02; 10]));
        // The mean is above the limit, the lower bound is not.
        assert!(!exceeded(&[1.3, 0.9, 1.3, 0.9, 1.3, 0.9, 1.3, 0.9, 1.3, 0.9]));
    }

    #[test]
    fn figure_that_one_build_lacks_is_shown_and_not_judged() {
        let mut runs = pairs(&[1.0, 1.0]);
        runs[1].old.clear();
        let rows = compare(&runs, 1.03);
        assert_eq!(
            rows[0].ratio.as_ref().unwrap_err(),
            "only in this workspace",
            "{rows:?}"
        );
        assert!(!rows[0].is_exceeded());
        assert!(
            table(&rows)
                .to_string()
                .contains("not compared: only in this workspace")
        );
    }

    #[test]
    fn verified_instructions_have_a_limit_without_interval() {
        let verified = |numbers: &[(&str, u32)]| -> Verified {
            numbers
                .iter()
                .map(|(name, number)| ((*name).to_owned(), *number))
                .collect()
        };
        let new = verified(&[("lb_connect4", 1031), ("lb_connect6", 1029), ("lb_new", 5)]);
        let old = verified(&[("lb_connect4", 1000), ("lb_connect6", 1000)]);
        let rows = compare_verified(&new, &old, 1.03);
        let exceeded: Vec<_> = rows.iter().map(VerifiedRow::is_exceeded).collect();
        assert_eq!(exceeded, [true, false, false]);
        assert_eq!(rows[2].ratio(), None);
    }
}
