//! Metrics of the CT garbage collector.

use lb_common::abi::map_name;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry, exponential_buckets,
};

use crate::node::ct_gc::{Reason, Turn};

/// Counters, gauges and the duration of the CT garbage collector.
#[derive(Debug)]
pub(super) struct FlowMetrics {
    seconds: Histogram,
    looked_at: IntCounter,
    removed: IntCounterVec,
    entries: IntGaugeVec,
}

impl FlowMetrics {
    /// Registers the metrics, all at zero.
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let ours = |name: &str, help: &str| Opts::new(name, help).namespace("lb").subsystem("conntrack");
        let seconds = ours("gc_seconds", "Duration of one conntrack GC pass");
        let new = Self {
            seconds: Histogram::with_opts(
                HistogramOpts::from(seconds).buckets(exponential_buckets(0.000_1, 2.0, 14)?),
            )?,
            looked_at: IntCounter::with_opts(ours("gc_entries_total", "Conntrack entries examined by GC"))?,
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
            looked_at,
            removed,
            entries,
        } = &new;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(looked_at.clone()))?;
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
    pub(super) fn record(&self, turn: &Turn) {
        self.seconds.observe(turn.took.as_secs_f64());
        self.looked_at.inc_by(turn.looked_at as u64);
        for (reason, count) in &turn.removed {
            self.removed.with_label_values(&[reason.label()]).inc_by(*count);
        }
        for (map, entries) in &turn.entries {
            self.entries.with_label_values(&[map]).set(*entries as i64);
        }
    }
}
