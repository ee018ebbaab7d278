//! The two servers that a node has: health for load balancers and probes, metrics for those who watch.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use prometheus::{Encoder as _, TextEncoder};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};

use super::collect::Collector;
use super::service::{CheckServers, Checks};
use super::{BindAddress, Health, Metrics, Settings, serve};
use lb_core::model::{Problem, ProblemKind};

/// Time until an address that cannot be listened at is tried again. That of kube-proxy.
const AGAIN: Duration = Duration::from_secs(5);
/// The ports where none is said: those of kube-proxy.
const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
/// The answer of /proxyMode.
const PROXY_MODE: &str = "ebpf";

/// What the servers need.
pub(super) struct Servers {
    pub(super) settings: Settings,
    pub(super) health: Arc<Health>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) collector: Arc<Collector>,
    pub(super) checks: watch::Receiver<Checks>,
    pub(super) told: watch::Sender<Vec<Problem>>,
}

/// Who may have problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Server {
    Healthz,
    Metrics,
    Checks,
}

/// Problems of all servers together.
struct Told {
    parts: Mutex<BTreeMap<Server, Vec<Problem>>>,
    told: watch::Sender<Vec<Problem>>,
}

impl Told {
    fn set(&self, server: Server, problems: Vec<Problem>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.insert(server, problems);
        let all: Vec<_> = parts.values().flatten().cloned().collect();
        self.told.send_if_modified(|told| {
            let news = *told != all;
            *told = all;
            news
        });
    }
}

impl Servers {
    /// Serves until the agent's side is gone.
    pub(super) async fn run(self) {
        let Self {
            settings,
            health,
            metrics,
            collector,
            checks,
            told,
        } = self;
        let told = Arc::new(Told {
            parts: Mutex::default(),
            told,
        });
        let probes = Probes {
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
        };
        let scrapes = Scrapes { metrics, collector };
        let healthz = keep(
            "--healthz-bind-address",
            at(settings.healthz, HEALTHZ_PORT),
            health_routes(probes),
            |problems| told.set(Server::Healthz, problems),
        );
        let scraped = keep(
            "--metrics-bind-address",
            at(settings.metrics, METRICS_PORT),
            metrics_routes(scrapes),
            |problems| told.set(Server::Metrics, problems),
        );
        let told_checks = Arc::clone(&told);
        let checks = CheckServers::new(checks, health, move |problems| {
            told_checks.set(Server::Checks, problems);
        });
        tokio::select! {
            () = healthz => {}
            () = scraped => {}
            () = checks.run() => {}
        }
    }
}

fn at(address: Option<BindAddress>, port: u16) -> Option<SocketAddr> {
    address.map(|address| address.with_port(port))
}

/// Serves at an address for ever; where that cannot be, says so and tries again.
async fn keep(flag: &str, at: Option<SocketAddr>, routes: Router, told: impl Fn(Vec<Problem>)) {
    let Some(at) = at else {
        return std::future::pending().await;
    };
    loop {
        match serve::serve(at, routes.clone()) {
            Ok(server) => {
                info!(%at, flag, "listening");
                told(Vec::new());
                match server.await {}
            }
            Err(error) => {
                let message = format!("cannot listen: {error}; trying again every {} s", AGAIN.as_secs());
                let problem = Problem::new(format!("{flag} {at}"), message);
                told(vec![problem.kind(ProblemKind::Server)]);
                sleep(AGAIN).await;
            }
        }
    }
}

/// What health is told from.
#[derive(Clone)]
struct Probes {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
}

fn health_routes(probes: Probes) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .with_state(probes)
}

async fn healthz(State(Probes { health, metrics }): State<Probes>) -> Response {
    let (status, response) = answer(&health, true);
    metrics.healthz(status.as_u16());
    response
}

async fn livez(State(Probes { health, metrics }): State<Probes>) -> Response {
    let (status, response) = answer(&health, false);
    metrics.livez(status.as_u16());
    response
}

fn answer(health: &Health, with_node: bool) -> (StatusCode, Response) {
    let answer = health.answer(Instant::now(), SystemTime::now(), with_node);
    let status = if answer.is_good() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, (status, headers, axum::Json(answer)).into_response())
}

/// What metrics are told from.
#[derive(Clone)]
struct Scrapes {
    metrics: Arc<Metrics>,
    collector: Arc<Collector>,
}

fn metrics_routes(scrapes: Scrapes) -> Router {
    let text = |text: &'static str| get(move || async move { text });
    Router::new()
        .route("/metrics", get(metrics))
        .route("/proxyMode", text(PROXY_MODE))
        .route("/healthz", text("ok"))
        .with_state(scrapes)
}

async fn metrics(State(Scrapes { metrics, collector }): State<Scrapes>) -> Response {
    // Reading the maps takes milliseconds, in which nobody else shall wait.
    let text = spawn_blocking(move || {
        let mut families = metrics.gather();
        let result = collector.gather(metrics.usage());
        let failed = result.map(|more| families.extend(more)).err();
        if let Some(error) = failed {
            warn!(%error, "metrics of the maps are missing");
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text).map(|()| text)
    });
    match text.await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> Response {
    warn!(%error, "metrics cannot be told");
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
}
