//! A statistical test of an even distribution.

use statrs::distribution::{ChiSquared, ContinuousCDF as _};

/// Returns the p-value of Pearson's chi-squared test against an even distribution: the probability of a distribution at
/// least this uneven if every choice is random with equal chances. A small value, for example below 0.001, means that the
/// distribution is not even.
///
/// `counts` has one entry per backend, including backends without connections. Without samples the result is 0, with a
/// single backend it is 1.
///
/// ```
/// assert!(lb_tests::chi_squared_p(&[205, 195]) > 0.5);
/// assert!(lb_tests::chi_squared_p(&[300, 100]) < 1e-6);
/// ```
#[must_use]
pub fn chi_squared_p(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    if total == 0 {
        return 0.0;
    }
    if counts.len() == 1 {
        return 1.0;
    }
    let expected = as_f64(total) / as_f64(counts.len() as u64);
    let statistic: f64 = counts
        .iter()
        .map(|&count| (as_f64(count) - expected).powi(2) / expected)
        .sum();
    ChiSquared::new(as_f64(counts.len() as u64 - 1)).map_or(0.0, |distribution| distribution.sf(statistic))
}

/// Converts a count, which is far below 2^53.
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_agree_with_the_tables() {
        // With one degree of freedom, 3.841 is the 5 % point and 10.828 the 0.1 % point; 6.0 with two degrees is exp(-3).
        assert!((chi_squared_p(&[1_000 + 44, 1_000 - 44]) - 0.05).abs() < 0.002);
        assert!((chi_squared_p(&[10, 20, 30]) - (-5.0_f64).exp()).abs() < 1e-9);
        assert!(chi_squared_p(&[0, 400]) < 1e-12);
        assert!((chi_squared_p(&[7, 7, 7]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn no_samples_and_single_backends_are_defined() {
        assert!(chi_squared_p(&[]) < 1e-12);
        assert!(chi_squared_p(&[0, 0]) < 1e-12);
        assert!((chi_squared_p(&[5]) - 1.0).abs() < 1e-12);
    }
}
