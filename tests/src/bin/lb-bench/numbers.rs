//! Percentiles, quartiles, and the confidence interval of a median.

use serde::Serialize;

/// Returns the smallest value that `percent` percent of the sorted values do not exceed, or zero if there are no values.
pub(crate) fn percentile<T: Copy + Default>(sorted: &[T], percent: usize) -> T {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// Median and quartiles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Quartiles {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

impl Quartiles {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<_> = values.into_iter().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        Self {
            low: percentile(&sorted, 25),
            median: percentile(&sorted, 50),
            high: percentile(&sorted, 75),
        }
    }
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Quartiles::of(values).median
}

/// Returns the 95 % confidence interval of the median. Its bounds are two of the values, selected by their ranks (normal
/// approximation of the binomial distribution).
pub(crate) fn median_interval(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let mut sorted: Vec<_> = values.into_iter().collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let (middle, reach) = (sorted.len() as f64 / 2.0, 0.98 * (sorted.len() as f64).sqrt());
    let at = |rank: f64| {
        let last = sorted.len().saturating_sub(1);
        sorted.get((rank.max(0.0) as usize).min(last)).copied()
    };
    (
        at((middle - reach).floor()).unwrap_or_default(),
        at((middle + reach).ceil()).unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_do_not_need_sorted_values() {
        let quartiles = Quartiles::of([4.0, 1.0, 3.0, 2.0]);
        assert_eq!((quartiles.low, quartiles.median, quartiles.high), (1.0, 2.0, 3.0));
        assert_eq!(Quartiles::of([]), Quartiles::default());
    }

    #[test]
    fn interval_of_the_median_has_values_as_bounds() {
        assert_eq!(median_interval((0..100).map(f64::from)), (40.0, 60.0));
        assert_eq!(median_interval([7.0]), (7.0, 7.0));
        assert_eq!(median_interval([]), (0.0, 0.0));
    }

    #[test]
    fn percentiles_are_measured_values() {
        let sorted: Vec<u32> = (1..=200).collect();
        assert_eq!((percentile(&sorted, 50), percentile(&sorted, 99)), (100, 198));
        assert_eq!(percentile::<u32>(&[], 99), 0);
    }
}
