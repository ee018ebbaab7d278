//! HTTP servers for health checks and metrics, with kube-proxy's addresses, paths and names.
//!
//! They run on a thread of their own: the agent's loop blocks while it writes maps, and /healthz must be able to report
//! that. The loop passes state to them through [`Servers`]; nothing here changes the maps.

pub(crate) mod bind;
mod collect;
mod ct_gc;
mod health;
mod health_checks;
mod http;
mod metrics;
pub(crate) mod serve;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use std::{io, thread};

use tokio::sync::watch;

pub use bind::{BindAddress, NotAnAddress};
pub use health::Health;
pub use health_checks::HealthChecks;
pub use metrics::Metrics;

use crate::maps::bpf::PinnedMaps;
use crate::maps::gate::{MapGate, SharedMaps};
use lb_core::maps::{MapError, Maps};
use lb_core::model::{Batch, Change, Kind, Node, Object, ObjectId, Problem};
use lb_core::reconcile::Reconciler;

/// Addresses of the servers, and the content of /metrics.
#[derive(Debug, Clone, Copy)]
pub struct ServerSettings {
    /// Address of /healthz and /livez; `None` to disable.
    pub healthz: Option<BindAddress>,
    /// Address of /metrics, /proxyMode and /healthz; `None` to disable.
    pub metrics: Option<BindAddress>,
    /// Whether /metrics counts connections of each Service port.
    pub per_service: bool,
}

/// An error at the start of the servers.
#[derive(Debug, thiserror::Error)]
pub enum ServersError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Two metrics have the same name.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// The thread or its runtime could not be started.
    #[error("starting a thread: {0}")]
    Thread(#[from] io::Error),
}

/// The agent loop's handle of the servers. None of its methods blocks.
#[derive(Debug)]
pub struct Servers {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    checks: watch::Sender<HealthChecks>,
    problems: watch::Receiver<Vec<Problem>>,
}

/// A batch of changes that is being applied.
#[derive(Debug)]
#[must_use]
pub struct Applying {
    begun: Instant,
    received: Option<Instant>,
    triggers: Vec<SystemTime>,
    /// Whether EndpointSlices of each family are among the changes: IPv4, IPv6.
    families: [bool; 2],
}

impl Servers {
    /// Starts the servers on a thread of their own, in the network namespace of the caller. An address that cannot be
    /// listened on is reported as a problem and tried again every few seconds.
    ///
    /// With `needs_node`, a node without a Node object is not eligible for traffic: it is being deleted. `maps` is the
    /// directory of the pinned maps, which are opened again after a move.
    ///
    /// # Errors
    /// If the maps cannot be opened, or the thread cannot be started.
    pub fn start(
        settings: ServerSettings,
        needs_node: bool,
        maps: &Path,
        gate: &MapGate,
    ) -> Result<Self, ServersError> {
        let health = Arc::new(Health::new(needs_node, Instant::now()));
        let metrics = Arc::new(Metrics::new()?);
        let collector = collect::Collector::new(SharedMaps::open(gate, maps, PinnedMaps::open)?, settings.per_service);
        let (checks, wanted) = watch::channel(HealthChecks::default());
        let (reported, problems) = watch::channel(Vec::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let servers = http::ServerThread {
            settings,
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
            collector: Arc::new(collector),
            checks: wanted,
            reported,
        };
        thread::Builder::new()
            .name("lb-server".into())
            .spawn(move || runtime.block_on(servers.run()))?;
        Ok(Self {
            health,
            metrics,
            checks,
            problems,
        })
    }

    /// Current problems of the servers.
    #[must_use]
    pub fn problems(&self) -> watch::Receiver<Vec<Problem>> {
        self.problems.clone()
    }

    /// The agent's own metrics.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Records that the agent's loop is running, for /livez and /healthz.
    pub fn alive(&self) {
        self.health.alive(Instant::now());
    }

    /// Records that Services are served; until then /healthz fails.
    pub fn serving(&self) {
        self.health.serving();
    }

    /// Records that the changes of a batch are about to be applied.
    pub fn applying(&self, batch: &Batch) -> Applying {
        let begun = Instant::now();
        self.health.queued(batch.received.unwrap_or(begun));
        self.metrics.queued();
        let mut applying = Applying {
            begun,
            received: batch.received,
            triggers: batch.triggers.clone(),
            families: [false; 2],
        };
        let (mut services, mut slices) = (0, 0);
        for change in &batch.changes {
            match change {
                Change::Set(Object::Service(_))
                | Change::Remove(ObjectId {
                    kind: Kind::Service, ..
                }) => services += 1,
                Change::Set(Object::EndpointSlice(slice)) => {
                    slices += 1;
                    applying.families[usize::from(slice.ipv6)] = true;
                }
                Change::Remove(ObjectId {
                    kind: Kind::EndpointSlice,
                    ..
                }) => slices += 1,
                Change::Set(Object::Node(_)) | Change::Remove(ObjectId { kind: Kind::Node, .. }) => {}
            }
        }
        self.metrics.applying(services, slices);
        applying
    }

    /// Records that the changes of a batch were applied.
    pub fn applied<M: Maps>(&self, applying: &Applying, reconciler: &mut Reconciler<M>) {
        let now = Instant::now();
        self.metrics.applied(applying, now, SystemTime::now());
        let (usage, _) = reconciler.usage();
        self.metrics.set_usage(usage, reconciler.is_complete());
        self.health.applied(now, SystemTime::now());
        self.node(reconciler.node(), reconciler.is_complete());
        if let Some(new) = reconciler.new_health_checks() {
            self.checks.send_modify(|checks| checks.services.clone_from(new));
        }
    }

    fn node(&self, node: Option<&Node>, complete: bool) {
        self.health.node(node.map(|node| node.leaving), complete);
    }

    /// Sets the addresses that health check node ports listen on; `None` for all addresses of the node.
    pub fn health_check_addresses(&self, addresses: Option<Vec<IpAddr>>) {
        self.checks.send_if_modified(|checks| {
            let changed = checks.addresses != addresses;
            checks.addresses = addresses;
            changed
        });
    }
}
