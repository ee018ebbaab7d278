//! The agent's own metrics: kube-proxy's names if the meaning is equal, otherwise names with the prefix `lb_`.
//!
//! kube-proxy has a proxier for each family and labels its measurements by `ip_family`. In lb one application serves both
//! families, so it is counted for both.

use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, exponential_buckets, linear_buckets,
};

use super::Applying;
use super::ct_gc::CtGcMetrics;
use crate::node::ct_gc::Pass;
use lb_core::model::ProblemKind;
use lb_core::reconcile::Usage;

/// The address families, as labels `ip_family` and /healthz have them.
pub(super) const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// The agent's own counters, gauges and histograms. Updates are cheap and may come from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sync_duration: HistogramVec,
    last_queued: GaugeVec,
    last_synced: GaugeVec,
    endpoint_changes: IntCounter,
    endpoint_changes_pending: IntGauge,
    service_changes: IntCounter,
    service_changes_pending: IntGauge,
    network_programming: HistogramVec,
    healthz: IntCounterVec,
    livez: IntCounterVec,
    event_to_map: Histogram,
    problems: IntGaugeVec,
    complete: IntGauge,
    destroyed: IntCounter,
    watch_restarts: IntCounter,
    events: IntCounterVec,
    flows: CtGcMetrics,
    usage: Mutex<Usage>,
}

/// kube-proxy's buckets of network programming latency: from a quarter of a second to five minutes.
fn network_programming_buckets() -> prometheus::Result<Vec<f64>> {
    let ranges = [
        linear_buckets(0.25, 0.25, 2)?,
        linear_buckets(1.0, 1.0, 59)?,
        linear_buckets(60.0, 5.0, 12)?,
        linear_buckets(120.0, 30.0, 7)?,
    ];
    Ok(ranges.concat())
}

fn seconds_since_1970(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

impl Metrics {
    /// Registers all metrics, at zero.
    ///
    /// # Errors
    /// If two metrics have the same name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let kube = |name: &str, help: &str| Opts::new(name, help).subsystem("kubeproxy");
        let ours = |name: &str, help: &str| Opts::new(name, help).namespace("lb");
        let sync_buckets = exponential_buckets(0.001, 2.0, 15)?;
        let family = ["ip_family"];
        let metrics = Self {
            sync_duration: HistogramVec::new(
                HistogramOpts::from(kube(
                    "sync_proxy_rules_duration_seconds",
                    "Time to apply a batch of changes to the maps",
                ))
                .buckets(sync_buckets),
                &family,
            )?,
            last_queued: GaugeVec::new(
                kube(
                    "sync_proxy_rules_last_queued_timestamp_seconds",
                    "Time at which changes were last queued, in seconds since 1970",
                ),
                &family,
            )?,
            last_synced: GaugeVec::new(
                kube(
                    "sync_proxy_rules_last_timestamp_seconds",
                    "Time at which changes were last applied, in seconds since 1970",
                ),
                &family,
            )?,
            endpoint_changes: IntCounter::with_opts(kube(
                "sync_proxy_rules_endpoint_changes_total",
                "Changes of EndpointSlices",
            ))?,
            endpoint_changes_pending: IntGauge::with_opts(kube(
                "sync_proxy_rules_endpoint_changes_pending",
                "Changes of EndpointSlices that are not applied yet",
            ))?,
            service_changes: IntCounter::with_opts(kube(
                "sync_proxy_rules_service_changes_total",
                "Changes of Services",
            ))?,
            service_changes_pending: IntGauge::with_opts(kube(
                "sync_proxy_rules_service_changes_pending",
                "Changes of Services that are not applied yet",
            ))?,
            network_programming: HistogramVec::new(
                HistogramOpts::from(kube(
                    "network_programming_duration_seconds",
                    "Time from the event that changed endpoints to the update of the maps, by the clocks of two machines",
                ))
                .buckets(network_programming_buckets()?),
                &family,
            )?,
            healthz: IntCounterVec::new(kube("proxy_healthz_total", "Responses of /healthz by status code"), &["code"])?,
            livez: IntCounterVec::new(kube("proxy_livez_total", "Responses of /livez by status code"), &["code"])?,
            event_to_map: Histogram::with_opts(
                HistogramOpts::from(ours(
                    "event_to_map_seconds",
                    "Time from the arrival of a change to the end of the map updates",
                ))
                .buckets(exponential_buckets(0.000_1, 2.0, 18)?),
            )?,
            problems: IntGaugeVec::new(
                ours("problems", "Current problems by kind, as listed by `lb-agent status`"),
                &["kind"],
            )?,
            complete: IntGauge::with_opts(ours("source_complete", "1 after the initial sync of all objects"))?,
            destroyed: IntCounter::with_opts(ours(
                "sockets_destroyed_total",
                "Sockets destroyed because their backend was removed",
            ))?,
            watch_restarts: IntCounter::with_opts(ours(
                "watch_restarts_total",
                "Restarts of watches of the API server",
            ))?,
            events: IntCounterVec::new(
                ours("events_total", "Kubernetes Events on Services, by result"),
                &["result"],
            )?,
            flows: CtGcMetrics::new(&registry)?,
            usage: Mutex::default(),
            registry,
        };
        metrics.register(&ours("build_info", "1; the labels identify the build"))?;
        Ok(metrics)
    }

    fn register(&self, build_info: &Opts) -> prometheus::Result<()> {
        let Self {
            registry,
            sync_duration,
            last_queued,
            last_synced,
            endpoint_changes,
            endpoint_changes_pending,
            service_changes,
            service_changes_pending,
            network_programming,
            healthz,
            livez,
            event_to_map,
            problems,
            complete,
            destroyed,
            watch_restarts,
            events,
            // Registers itself.
            flows: _,
            usage: _,
        } = self;
        let collectors: [Box<dyn prometheus::core::Collector>; 16] = [
            Box::new(sync_duration.clone()),
            Box::new(last_queued.clone()),
            Box::new(last_synced.clone()),
            Box::new(endpoint_changes.clone()),
            Box::new(endpoint_changes_pending.clone()),
            Box::new(service_changes.clone()),
            Box::new(service_changes_pending.clone()),
            Box::new(network_programming.clone()),
            Box::new(healthz.clone()),
            Box::new(livez.clone()),
            Box::new(event_to_map.clone()),
            Box::new(problems.clone()),
            Box::new(complete.clone()),
            Box::new(destroyed.clone()),
            Box::new(watch_restarts.clone()),
            Box::new(events.clone()),
        ];
        for collector in collectors {
            registry.register(collector)?;
        }
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let build = build_info
            .clone()
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label("layout", lb_common::abi::VERSION.to_string());
        let build = Gauge::with_opts(build)?;
        build.set(1.0);
        registry.register(Box::new(build))?;
        // Series that exist from the start, so that their first increase is visible to `rate`.
        for family in FAMILIES {
            sync_duration.with_label_values(&[family]);
            network_programming.with_label_values(&[family]);
        }
        for code in ["200", "503"] {
            healthz.with_label_values(&[code]);
            livez.with_label_values(&[code]);
        }
        for kind in ProblemKind::ALL {
            problems.with_label_values(&[kind.label()]);
        }
        for result in ["published", "failed"] {
            events.with_label_values(&[result]);
        }
        Ok(())
    }

    /// Collects all metrics for output.
    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    pub(super) fn queued(&self) {
        for family in FAMILIES {
            let gauge = self.last_queued.with_label_values(&[family]);
            gauge.set(seconds_since_1970(SystemTime::now()));
        }
    }

    pub(super) fn applying(&self, services: usize, slices: usize) {
        self.service_changes.inc_by(services as u64);
        self.service_changes_pending.set(services as i64);
        self.endpoint_changes.inc_by(slices as u64);
        self.endpoint_changes_pending.set(slices as i64);
    }

    pub(super) fn applied(&self, applying: &Applying, now: Instant, time: SystemTime) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
        if let Some(received) = applying.received {
            let passed = now.saturating_duration_since(received);
            self.event_to_map.observe(passed.as_secs_f64());
        }
        let duration = now.saturating_duration_since(applying.begun);
        for (family, concerned) in FAMILIES.into_iter().zip(applying.families) {
            let family = [family];
            self.sync_duration
                .with_label_values(&family)
                .observe(duration.as_secs_f64());
            self.last_synced
                .with_label_values(&family)
                .set(seconds_since_1970(time));
            if !concerned {
                continue;
            }
            for trigger in &applying.triggers {
                // The clocks of two machines differ: a trigger in the future counts as zero.
                let passed = time.duration_since(*trigger).unwrap_or_default();
                self.network_programming
                    .with_label_values(&family)
                    .observe(passed.as_secs_f64());
            }
        }
    }

    pub(super) fn set_usage(&self, usage: Usage, complete: bool) {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner) = usage;
        self.complete.set(complete.into());
    }

    /// Usage of the maps that the agent fills.
    pub(super) fn usage(&self) -> Usage {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn healthz(&self, code: u16) {
        self.healthz.with_label_values(&[&code.to_string()]).inc();
    }

    pub(super) fn livez(&self, code: u16) {
        self.livez.with_label_values(&[&code.to_string()]).inc();
    }

    /// Sets the number of current problems of each kind.
    pub fn problems(&self, kinds: impl Iterator<Item = ProblemKind>) {
        let mut counts = ProblemKind::ALL.map(|kind| (kind, 0));
        for found in kinds {
            for (_, count) in counts.iter_mut().filter(|(kind, _)| *kind == found) {
                *count += 1;
            }
        }
        for (kind, count) in counts {
            self.problems.with_label_values(&[kind.label()]).set(count);
        }
    }

    /// Counts a destroyed socket.
    pub fn socket_destroyed(&self) {
        self.destroyed.inc();
    }

    /// Records a pass of the CT garbage collector.
    pub fn ct_gc_pass(&self, pass: &Pass) {
        self.flows.record(pass);
    }

    /// Sets the number of watches of the API server that were restarted so far.
    pub fn watch_restarts(&self, total: u64) {
        self.watch_restarts
            .inc_by(total.saturating_sub(self.watch_restarts.get()));
    }

    /// Counter of Kubernetes Events by result: `published` or `failed`.
    #[must_use]
    pub(crate) fn events(&self) -> IntCounterVec {
        self.events.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn text(metrics: &Metrics) -> String {
        let text = prometheus::TextEncoder::new().encode_to_string(&metrics.gather());
        text.unwrap()
    }

    #[track_caller]
    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
    }

    #[test]
    fn a_batch_is_measured_for_both_families_and_its_triggers_for_their_own() {
        let metrics = Metrics::new().unwrap();
        let begun = Instant::now();
        let time = SystemTime::now();
        let applying = Applying {
            begun,
            received: Some(begun),
            triggers: vec![time - Duration::from_millis(700), time + Duration::from_secs(5)],
            families: [false, true],
        };
        metrics.applying(3, 2);
        has(&text(&metrics), "kubeproxy_sync_proxy_rules_service_changes_pending 3");
        metrics.applied(&applying, begun + Duration::from_millis(3), time);
        let text = text(&metrics);
        for line in [
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_service_changes_total 3",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.004\"} 1",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.5\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"1\"} 2",
            "lb_event_to_map_seconds_count 1",
        ] {
            has(&text, line);
        }
    }

    #[test]
    fn buckets_of_network_programming_are_kube_proxys() {
        let buckets = network_programming_buckets().unwrap();
        assert_eq!(buckets.len(), 80);
        assert_eq!(buckets[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(buckets[60..63], [59.0, 60.0, 65.0]);
        assert_eq!(buckets.last(), Some(&300.0));
        assert!(buckets.is_sorted());
    }

    #[test]
    fn problems_are_counted_by_kind() {
        let metrics = Metrics::new().unwrap();
        metrics.problems([ProblemKind::Map, ProblemKind::Source, ProblemKind::Map].into_iter());
        has(&text(&metrics), "lb_problems{kind=\"map\"} 2");
        metrics.problems([ProblemKind::Source].into_iter());
        has(&text(&metrics), "lb_problems{kind=\"map\"} 0");
        has(&text(&metrics), "lb_problems{kind=\"source\"} 1");
    }
}
