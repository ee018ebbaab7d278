//! How often what is told of whom. Pure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lb_core::model::ObjectKey;

/// Time after which the same is told once more: an API server keeps Events for an hour.
pub(super) const REPEAT: Duration = Duration::from_secs(3600);
/// Of one Service: so much at once, then one in five minutes. kube-proxy's client has the latter too.
const OF_SERVICE: Rate = Rate {
    burst: 10,
    every: Duration::from_secs(300),
};
/// Of all Services together.
const OF_ALL: Rate = Rate {
    burst: 25,
    every: Duration::from_secs(1),
};

#[derive(Debug, Clone, Copy)]
struct Rate {
    burst: u32,
    every: Duration,
}

/// A token bucket, told by the time at which it is full again.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    full: Instant,
}

impl Bucket {
    /// When the next one may be taken.
    fn next(self, rate: Rate, now: Instant) -> Instant {
        let spare = rate.every * (rate.burst - 1);
        self.full.checked_sub(spare).map_or(now, |next| next.max(now))
    }

    fn take(&mut self, rate: Rate, now: Instant) {
        self.full = self.full.max(now) + rate.every;
    }
}

/// Whether something may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Now. It counts as told.
    Now,
    /// It was told not long ago: again at that time, if it is still so.
    Told(Instant),
    /// Too much was told.
    Later(Instant),
}

#[derive(Debug)]
struct OfService {
    bucket: Bucket,
    /// What was told when, by its hash.
    told: HashMap<u64, Instant>,
}

/// What was told, as far as it matters.
#[derive(Debug)]
pub(super) struct Throttle {
    services: HashMap<ObjectKey, OfService>,
    all: Bucket,
}

impl Throttle {
    /// Of somebody who has told nothing.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            services: HashMap::new(),
            all: Bucket { full: now },
        }
    }

    /// Whether `what` (a hash) may be told of a Service.
    pub(super) fn ask(&mut self, service: &ObjectKey, what: u64, now: Instant) -> Verdict {
        let known = self.services.get(service);
        if let Some(again) = known.and_then(|known| known.told.get(&what)).map(|told| *told + REPEAT)
            && again > now
        {
            return Verdict::Told(again);
        }
        let next = known.map_or(now, |known| known.bucket.next(OF_SERVICE, now));
        let next = next.max(self.all.next(OF_ALL, now));
        if next > now {
            return Verdict::Later(next);
        }
        self.all.take(OF_ALL, now);
        let known = self.services.entry(service.clone()).or_insert_with(|| OfService {
            bucket: Bucket { full: now },
            told: HashMap::new(),
        });
        known.bucket.take(OF_SERVICE, now);
        known.told.insert(what, now);
        Verdict::Now
    }

    /// It could not be told.
    pub(super) fn failed(&mut self, service: &ObjectKey, what: u64) {
        if let Some(known) = self.services.get_mut(service) {
            known.told.remove(&what);
        }
    }

    /// Forgets what no longer matters.
    pub(super) fn forget(&mut self, now: Instant) {
        self.services.retain(|_, known| {
            known.told.retain(|_, told| *told + REPEAT > now);
            !known.told.is_empty() || known.bucket.full > now
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
    fn the_same_is_told_once_an_hour() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        assert_eq!(throttle.ask(&key("a"), 1, now), Verdict::Now);
        assert_eq!(throttle.ask(&key("a"), 1, now), Verdict::Told(now + REPEAT));
        assert_eq!(throttle.ask(&key("a"), 2, now), Verdict::Now);
        assert_eq!(throttle.ask(&key("b"), 1, now), Verdict::Now);
        assert_eq!(throttle.ask(&key("a"), 1, now + REPEAT), Verdict::Now);
    }

    #[test]
    fn what_could_not_be_told_may_be_again() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        throttle.ask(&key("a"), 1, now);
        throttle.failed(&key("a"), 1);
        assert_eq!(throttle.ask(&key("a"), 1, now), Verdict::Now);
    }

    #[test]
    fn one_service_cannot_tell_without_end() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let told = |throttle: &mut Throttle, from: u64, now| {
            let verdicts = (from..from + 100).map(|what| throttle.ask(&key("a"), what, now));
            verdicts.filter(|verdict| *verdict == Verdict::Now).count()
        };
        assert_eq!(told(&mut throttle, 0, now), 10);
        assert_eq!(
            throttle.ask(&key("a"), 1000, now),
            Verdict::Later(now + OF_SERVICE.every)
        );
        assert_eq!(told(&mut throttle, 100, now + OF_SERVICE.every), 1);
        assert_eq!(told(&mut throttle, 200, now + 3 * OF_SERVICE.every), 2);
        assert_eq!(throttle.ask(&key("b"), 1, now + 3 * OF_SERVICE.every), Verdict::Now);
    }

    #[test]
    fn many_services_cannot_either() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let told = |throttle: &mut Throttle, now| {
            let verdicts = (0..1000).map(|n| throttle.ask(&key(&n.to_string()), 1, now));
            verdicts.filter(|verdict| *verdict == Verdict::Now).count()
        };
        assert_eq!(told(&mut throttle, now), 25);
        assert_eq!(told(&mut throttle, now + Duration::from_secs(7)), 7);
    }

    #[test]
    fn what_no_longer_matters_is_forgotten() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        throttle.ask(&key("a"), 1, now);
        throttle.forget(now + REPEAT - Duration::from_secs(1));
        assert_eq!(throttle.services.len(), 1);
        throttle.forget(now + REPEAT);
        assert_eq!(throttle.services.len(), 0);
    }
}
