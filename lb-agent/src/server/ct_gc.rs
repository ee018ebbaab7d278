//! Metrics of the CT garbage collector.

use lb_common::abi::map_name;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry, exponential_buckets,
};

use crate::node::ct_gc::{Pass, Reason};

/// Counters, gauges and the duration of the CT garbage collector.
#[derive(Debug)]
pub(super) struct CtGcMetrics {
    seconds: Histogram,
    examined: IntCounter,
    removed: IntCounterVec,
    entries: IntGaugeVec,
}

impl CtGcMetrics {
    /// Registers the metrics, all at zero.
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let ours = |name: &str, help: &str| Opts::new(name, help).namespace("lb").subsystem("conntrack");
        let seconds = ours("gc_seconds", "Duration of one conntrack GC pass");
        let new = Self {
            seconds: Histogram::with_opts(
                HistogramOpts::from(seconds).buckets(exponential_buckets(0.000_1, 2.0, 14)?),
            )?,
            examined: IntCounter::with_opts(ours("gc_entries_total", "Conntrack entries examined by GC"))?,
            removed: IntCounterVec::new(
                ours("gc_removed_total", "Conntrack entries removed by GC, by reason"),
                &["reason"],
            )?,
            entries: IntGaugeVec::new(
                ours(
                    "entries",
                    "Conntrack entries at the last complete GC scan: two for each flow",
                ),
                &["map"],
            )?,
        };
        let Self {
            seconds,
            examined,
            removed,
            entries,
        } = &new;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(examined.clone()))?;
        registry.register(Box::new(removed.clone()))?;
        registry.register(Box::new(entries.clone()))?;
        for map in [map_name::CT, map_name::CT_NEW] {
            entries.with_label_values(&[map]);
        }
        for reason in Reason::ALL {
            removed.with_label_values(&[reason.label()]);
        }
        Ok(new)
    }

    /// Records a pass that has ended.
    pub(super) fn record(&self, pass: &Pass) {
        self.seconds.observe(pass.took.as_secs_f64());
        self.examined.inc_by(pass.examined as u64);
        for (reason, count) in &pass.removed {
            self.removed.with_label_values(&[reason.label()]).inc_by(*count);
        }
        for (map, entries) in &pass.entries {
            self.entries.with_label_values(&[map]).set(*entries as i64);
        }
    }
}
