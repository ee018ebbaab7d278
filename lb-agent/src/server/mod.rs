//! What a cluster sees of a Service proxy besides its Services: the HTTP servers that kube-proxy has, and Events.
//!
//! The servers have a thread of their own, since the agent's loop stands still while it writes maps, and /healthz must
//! be able to say so. What they tell is handed over by [`Face`]; nothing here changes what is served.

pub(crate) mod bind;
mod collect;
mod ct_gc;
mod health;
mod http;
mod metrics;
pub(crate) mod serve;
mod service;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use std::{io, thread};

use tokio::sync::watch;

pub use bind::{BindAddress, NotAnAddress};
pub use health::Health;
pub use metrics::Metrics;
pub use service::Checks;

use crate::maps::bpf::PinnedMaps;
use lb_core::maps::{MapError, Maps};
use lb_core::model::{Batch, Change, Kind, Node, Object, ObjectId, Problem};
use lb_core::reconcile::Reconciler;

/// Where the servers listen, and what they tell.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// /healthz and /livez; `None`: nowhere.
    pub healthz: Option<BindAddress>,
    /// /metrics, /proxyMode and /healthz; `None`: nowhere.
    pub metrics: Option<BindAddress>,
    /// Whether /metrics counts connections of each Service port.
    pub per_service: bool,
    /// Whether a node without a Node object is one that is being deleted.
    pub needs_node: bool,
}

/// Why there is no face.
#[derive(Debug, thiserror::Error)]
pub enum FaceError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The metrics contradict each other.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// No thread, or no runtime on it.
    #[error("starting a thread: {0}")]
    Thread(#[from] io::Error),
}

/// The agent's side of the servers. None of its methods blocks.
#[derive(Debug)]
pub struct Face {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    checks: watch::Sender<Checks>,
    problems: watch::Receiver<Vec<Problem>>,
}

/// An application of changes that has begun.
#[derive(Debug)]
#[must_use]
pub struct Applying {
    begun: Instant,
    received: Option<Instant>,
    triggers: Vec<SystemTime>,
    /// Families of the EndpointSlices among the changes: IPv4, IPv6.
    families: [bool; 2],
}

impl Face {
    /// Starts the servers on a thread of their own, in the network namespace of the caller. `maps`: the folder of the
    /// pinned maps. An address that cannot be listened at is a problem, tried again every few seconds.
    ///
    /// # Errors
    /// Where the maps cannot be opened, or the thread cannot be started.
    pub fn start(settings: Settings, maps: &Path) -> Result<Self, FaceError> {
        let health = Arc::new(Health::new(settings.needs_node, Instant::now()));
        let metrics = Arc::new(Metrics::new()?);
        let collector = collect::Collector::new(PinnedMaps::open(maps)?, settings.per_service);
        let (checks, wanted) = watch::channel(Checks::default());
        let (told, problems) = watch::channel(Vec::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let servers = http::Servers {
            settings,
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
            collector: Arc::new(collector),
            checks: wanted,
            told,
        };
        thread::Builder::new()
            .name("lb-face".into())
            .spawn(move || runtime.block_on(servers.run()))?;
        Ok(Self {
            health,
            metrics,
            checks,
            problems,
        })
    }

    /// What the servers could not do.
    #[must_use]
    pub fn problems(&self) -> watch::Receiver<Vec<Problem>> {
        self.problems.clone()
    }

    /// Counters, for whoever has something to count.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The agent's loop goes round.
    pub fn alive(&self) {
        self.health.alive(Instant::now());
    }

    /// From now on Services are served: /healthz says so.
    pub fn serving(&self) {
        self.health.serving();
    }

    /// The changes of a batch are about to be applied.
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

    /// They were applied.
    pub fn applied<M: Maps>(&self, applying: &Applying, reconciler: &mut Reconciler<M>) {
        let now = Instant::now();
        self.metrics.applied(applying, now, SystemTime::now());
        let (usage, _) = reconciler.usage();
        self.metrics.set_usage(usage, reconciler.is_complete());
        self.health.applied(now, SystemTime::now());
        self.node(reconciler.node(), reconciler.is_complete());
        if let Some(checks) = reconciler.new_health_checks() {
            self.checks.send_modify(|told| told.services.clone_from(checks));
        }
    }

    fn node(&self, node: Option<&Node>, complete: bool) {
        self.health.node(node.map(|node| node.leaving), complete);
    }

    /// Where health check ports are served: at these addresses, or at all of the node.
    pub fn health_check_addresses(&self, addresses: Option<Vec<IpAddr>>) {
        self.checks.send_if_modified(|told| {
            let news = told.addresses != addresses;
            told.addresses = addresses;
            news
        });
    }
}
