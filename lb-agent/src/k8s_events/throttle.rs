//! Rate limit of Events, per Service and in total. Pure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lb_core::model::ObjectKey;

/// Time after which an unchanged problem is published again: an API server keeps Events for an hour.
pub(super) const REPEAT: Duration = Duration::from_secs(3600);
/// Limit of one Service: a burst, then one Event in five minutes. The client of kube-proxy has the latter too.
const OF_SERVICE: Rate = Rate {
    burst: 10,
    every: Duration::from_secs(300),
};
/// Limit of all Services together.
const OF_ALL: Rate = Rate {
    burst: 25,
    every: Duration::from_secs(1),
};

#[derive(Debug, Clone, Copy)]
struct Rate {
    burst: u32,
    every: Duration,
}

/// A token bucket, represented by the time at which it is full again.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    full: Instant,
}

impl Bucket {
    /// Returns the time at which the next token may be taken.
    fn next(self, rate: Rate, now: Instant) -> Instant {
        let spare = rate.every * (rate.burst - 1);
        self.full.checked_sub(spare).map_or(now, |next| next.max(now))
    }

    fn take(&mut self, rate: Rate, now: Instant) {
        self.full = self.full.max(now) + rate.every;
    }
}

/// Whether an Event may be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// It may be published now, and is recorded as published.
    Now,
    /// It was published recently; if the problem persists, it may be published again at that time.
    Published(Instant),
    /// A limit is reached; it may be published at that time.
    Later(Instant),
}

#[derive(Debug)]
struct OfService {
    bucket: Bucket,
    /// Times of publication, by the hash of the Event.
    published: HashMap<u64, Instant>,
}

/// The published Events that still count.
#[derive(Debug)]
pub(super) struct Throttle {
    services: HashMap<ObjectKey, OfService>,
    all: Bucket,
}

impl Throttle {
    /// Returns a throttle with full buckets.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            services: HashMap::new(),
            all: Bucket { full: now },
        }
    }

    /// Decides whether the Event with hash `what` may be published for a Service.
    pub(super) fn admit(&mut self, service: &ObjectKey, what: u64, now: Instant) -> Decision {
        let known = self.services.get(service);
        if let Some(again) = known
            .and_then(|known| known.published.get(&what))
            .map(|at| *at + REPEAT)
            && again > now
        {
            return Decision::Published(again);
        }
        let next = known.map_or(now, |known| known.bucket.next(OF_SERVICE, now));
        let next = next.max(self.all.next(OF_ALL, now));
        if next > now {
            return Decision::Later(next);
        }
        self.all.take(OF_ALL, now);
        let known = self.services.entry(service.clone()).or_insert_with(|| OfService {
            bucket: Bucket { full: now },
            published: HashMap::new(),
        });
        known.bucket.take(OF_SERVICE, now);
        known.published.insert(what, now);
        Decision::Now
    }

    /// Records that an admitted Event could not be published, so that it may be tried again.
    pub(super) fn failed(&mut self, service: &ObjectKey, what: u64) {
        if let Some(known) = self.services.get_mut(service) {
            known.published.remove(&what);
        }
    }

    /// Removes entries that no longer limit anything.
    pub(super) fn expire(&mut self, now: Instant) {
        self.services.retain(|_, known| {
            known.published.retain(|_, at| *at + REPEAT > now);
            !known.published.is_empty() || known.bucket.full > now
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("default", name)
    }

    #[test]
    fn unchanged_problem_is_published_once_an_hour() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        assert_eq!(throttle.admit(&key("a"), 1, now), Decision::Now);
        assert_eq!(throttle.admit(&key("a"), 1, now), Decision::Published(now + REPEAT));
        assert_eq!(throttle.admit(&key("a"), 2, now), Decision::Now);
        assert_eq!(throttle.admit(&key("b"), 1, now), Decision::Now);
        assert_eq!(throttle.admit(&key("a"), 1, now + REPEAT), Decision::Now);
    }

    #[test]
    fn failed_event_may_be_published_again() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        throttle.admit(&key("a"), 1, now);
        throttle.failed(&key("a"), 1);
        assert_eq!(throttle.admit(&key("a"), 1, now), Decision::Now);
    }

    #[test]
    fn events_of_one_service_are_limited() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let published = |throttle: &mut Throttle, from: u64, now| {
            let verdicts = (from..from + 100).map(|what| throttle.admit(&key("a"), what, now));
            verdicts.filter(|verdict| *verdict == Decision::Now).count()
        };
        assert_eq!(published(&mut throttle, 0, now), 10);
        assert_eq!(
            throttle.admit(&key("a"), 1000, now),
            Decision::Later(now + OF_SERVICE.every)
        );
        assert_eq!(published(&mut throttle, 100, now + OF_SERVICE.every), 1);
        assert_eq!(published(&mut throttle, 200, now + 3 * OF_SERVICE.every), 2);
        assert_eq!(throttle.admit(&key("b"), 1, now + 3 * OF_SERVICE.every), Decision::Now);
    }

    #[test]
    fn events_of_all_services_are_limited() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let published = |throttle: &mut Throttle, now| {
            let verdicts = (0..1000).map(|n| throttle.admit(&key(&n.to_string()), 1, now));
            verdicts.filter(|verdict| *verdict == Decision::Now).count()
        };
        assert_eq!(published(&mut throttle, now), 25);
        assert_eq!(published(&mut throttle, now + Duration::from_secs(7)), 7);
    }

    #[test]
    fn expired_entries_are_removed() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        throttle.admit(&key("a"), 1, now);
        throttle.expire(now + REPEAT - Duration::from_secs(1));
        assert_eq!(throttle.services.len(), 1);
        throttle.expire(now + REPEAT);
        assert_eq!(throttle.services.len(), 0);
    }
}
