//! Times during which a backend was certainly out of service.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::load::Record;
use crate::monotonic_ns;

/// The downtimes of each backend, in nanoseconds of `CLOCK_MONOTONIC`.
///
/// A downtime begins after the change that removes the backend was applied, and ends before the change that adds it
/// again begins. In between, no connection may be translated to that backend; at the edges, both results are right.
#[derive(Debug, Default)]
pub struct DowntimeLog {
    /// Downtimes that have ended, as start and end, in order.
    past: BTreeMap<String, Vec<(u64, u64)>>,
    /// Starts of the downtimes that have not ended.
    since: BTreeMap<String, u64>,
}

impl DowntimeLog {
    /// Records that the change that removes `backend` was applied.
    pub fn begin(&mut self, backend: &str) {
        self.since.entry(backend.to_owned()).or_insert_with(monotonic_ns);
    }

    /// Records that the change that adds `backend` again comes next.
    pub fn end(&mut self, backend: &str) {
        if let Some(since) = self.since.remove(backend) {
            let past = self.past.entry(backend.to_owned()).or_default();
            past.push((since, monotonic_ns()));
        }
    }

    /// Returns the number of downtimes, including those that have not ended.
    #[must_use]
    pub fn count(&self) -> usize {
        self.past.values().map(Vec::len).sum::<usize>() + self.since.len()
    }

    /// Checks that every connection succeeded, and that none reached a backend that was out of service from before
    /// `connect()` until after the end of the connection.
    ///
    /// # Errors
    /// If a connection failed or reached such a backend.
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
            "{} of {} connections reached a backend that was out of service: {:?}",
            wrong.len(),
            records.len(),
            &wrong[..wrong.len().min(5)]
        );
        Ok(())
    }

    /// Returns whether the backend of a connection was out of service for the whole time of the connection.
    fn covers(&self, record: &Record) -> bool {
        let Ok(backend) = &record.outcome else { return false };
        if self.since.get(backend).is_some_and(|&since| since <= record.start_ns) {
            return true;
        }
        let past = self.past.get(backend).map_or(&[][..], Vec::as_slice);
        // The last downtime that began before the connection.
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
    fn only_connections_within_a_downtime_are_wrong() {
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
    fn a_downtime_begins_and_ends() {
        let mut log = DowntimeLog::default();
        log.end("a");
        assert_eq!(log.count(), 0, "the backend was never out of service");
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
