//! Who was certainly out of use, and when.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::load::Record;
use crate::monotonic_ns;

/// From when to when each backend was out of use, in nanoseconds of `CLOCK_MONOTONIC`.
///
/// An absence begins when the change that takes the backend out has been made, and ends before the one that brings it
/// back is begun. In between, no connection may be given that backend; on the edges, it may.
#[derive(Debug, Default)]
pub struct DowntimeLog {
    /// Downtimes that have ended, in order.
    past: BTreeMap<String, Vec<(u64, u64)>>,
    /// Those that have not.
    since: BTreeMap<String, u64>,
}

impl DowntimeLog {
    /// The change that took `backend` out has been made.
    pub fn begin(&mut self, backend: &str) {
        self.since.entry(backend.to_owned()).or_insert_with(monotonic_ns);
    }

    /// The change that brings `backend` back comes next.
    pub fn end(&mut self, backend: &str) {
        if let Some(since) = self.since.remove(backend) {
            let past = self.past.entry(backend.to_owned()).or_default();
            past.push((since, monotonic_ns()));
        }
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> usize {
        self.past.values().map(Vec::len).sum::<usize>() + self.since.len()
    }

    /// Fails unless every connection succeeded and none was given a backend that was out of use from before
    /// `connect()` until after its end.
    ///
    /// # Errors
    /// See above.
    pub fn check(&self, records: &[Record]) -> Result<()> {
        let failed: Vec<_> = records.iter().filter(|record| record.outcome.is_err()).collect();
        ensure!(
            failed.is_empty(),
            "{} of {} connections failed: {:?}",
            failed.len(),
            records.len(),
            &failed[..failed.len().min(5)]
        );
        let wrong: Vec<_> = records.iter().filter(|record| self.covers(record)).collect();
        ensure!(
            wrong.is_empty(),
            "{} of {} connections reached a backend that was out of use: {:?}",
            wrong.len(),
            records.len(),
            &wrong[..wrong.len().min(5)]
        );
        Ok(())
    }

    /// Whether the backend that a connection reached was out of use all the while.
    fn covers(&self, record: &Record) -> bool {
        let Ok(backend) = &record.outcome else { return false };
        if self.since.get(backend).is_some_and(|&since| since <= record.start_ns) {
            return true;
        }
        let past = self.past.get(backend).map_or(&[][..], Vec::as_slice);
        // The last absence that began before the connection.
        let before = past.partition_point(|&(since, _)| since <= record.start_ns);
        before > 0 && record.end_ns <= past[before - 1].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(start_ns: u64, end_ns: u64, backend: &str) -> Record {
        Record {
            start_ns,
            end_ns,
            to: "10.96.0.80:80".parse().unwrap(),
            outcome: Ok(backend.to_owned()),
        }
    }

    #[test]
    fn only_connections_that_lie_within_an_absence_are_wrong() {
        let log = DowntimeLog {
            past: BTreeMap::from([("a".to_owned(), vec![(10, 20), (30, 40)])]),
            since: BTreeMap::from([("a".to_owned(), 50)]),
        };
        assert_eq!(log.count(), 3);
        for (start, end, right) in [
            (5, 9, true),
            (5, 15, true),
            (10, 20, false),
            (12, 15, false),
            (15, 21, true),
            (25, 26, true),
            (31, 39, false),
            (41, 60, true),
            (50, 51, false),
        ] {
            let result = log.check(&[record(start, end, "a")]);
            assert_eq!(result.is_ok(), right, "{start} to {end}: {result:?}");
            assert!(log.check(&[record(start, end, "b")]).is_ok());
        }
        let failed = Record {
            outcome: Err(libc::ENETUNREACH),
            ..record(1, 2, "")
        };
        assert!(log.check(&[failed]).is_err());
    }

    #[test]
    fn an_absence_has_a_beginning_and_an_end() {
        let mut log = DowntimeLog::default();
        log.end("a");
        assert_eq!(log.count(), 0, "it was never out");
        log.begin("a");
        let now = monotonic_ns();
        let during = record(now, now, "a");
        log.end("a");
        assert_eq!(log.count(), 1);
        assert!(log.check(&[during]).is_err());
        let later = monotonic_ns() + 1;
        assert!(log.check(&[record(now, later, "a")]).is_ok());
    }
}
