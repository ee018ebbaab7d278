//! The two servers of every node: health for load balancers and probes, and metrics.

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
use super::health_checks::{HealthCheckServers, HealthChecks};
use super::{BindAddress, Health, Metrics, ServerSettings, serve};
use lb_core::model::{Problem, ProblemKind};

/// Delay before an address that could not be listened on is tried again; kube-proxy's.
const RETRY_DELAY: Duration = Duration::from_secs(5);
/// Ports of addresses that are given without one; kube-proxy's.
const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
/// The body of /proxyMode.
const PROXY_MODE: &str = "ebpf";

/// All servers, with their state.
pub(super) struct ServerThread {
    pub(super) settings: ServerSettings,
    pub(super) health: Arc<Health>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) collector: Arc<Collector>,
    pub(super) checks: watch::Receiver<HealthChecks>,
    pub(super) reported: watch::Sender<Vec<Problem>>,
}

/// A part of the servers that reports problems of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Healthz,
    Metrics,
    HealthChecks,
}

/// The problems of all parts, sent to the agent's loop when they change.
struct PartProblems {
    parts: Mutex<BTreeMap<Part, Vec<Problem>>>,
    reported: watch::Sender<Vec<Problem>>,
}

impl PartProblems {
    fn set(&self, part: Part, problems: Vec<Problem>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.insert(part, problems);
        let all: Vec<_> = parts.values().flatten().cloned().collect();
        self.reported.send_if_modified(|reported| {
            let changed = *reported != all;
            *reported = all;
            changed
        });
    }
}

impl ServerThread {
    /// Serves until the agent's loop drops its handle.
    pub(super) async fn run(self) {
        let Self {
            settings,
            health,
            metrics,
            collector,
            checks,
            reported,
        } = self;
        let problems = Arc::new(PartProblems {
            parts: Mutex::default(),
            reported,
        });
        let probes = Probes {
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
        };
        let scrapes = Scrapes { metrics, collector };
        let healthz = serve_at(
            "--healthz-bind-address",
            at(settings.healthz, HEALTHZ_PORT),
            health_routes(probes),
            |of_part| problems.set(Part::Healthz, of_part),
        );
        let scraped = serve_at(
            "--metrics-bind-address",
            at(settings.metrics, METRICS_PORT),
            metrics_routes(scrapes),
            |of_part| problems.set(Part::Metrics, of_part),
        );
        let check_problems = Arc::clone(&problems);
        let checks = HealthCheckServers::new(checks, health, move |of_part| {
            check_problems.set(Part::HealthChecks, of_part);
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

/// Serves at an address for ever. If the address cannot be listened on, reports a problem and tries again.
async fn serve_at(flag: &str, at: Option<SocketAddr>, routes: Router, report: impl Fn(Vec<Problem>)) {
    let Some(at) = at else {
        return std::future::pending().await;
    };
    loop {
        match serve::serve(at, routes.clone()) {
            Ok(server) => {
                info!(%at, flag, "listening");
                report(Vec::new());
                match server.await {}
            }
            Err(error) => {
                let message = format!("cannot listen: {error}; trying again every {} s", RETRY_DELAY.as_secs());
                let problem = Problem::new(format!("{flag} {at}"), message);
                report(vec![problem.kind(ProblemKind::Server)]);
                sleep(RETRY_DELAY).await;
            }
        }
    }
}

/// State of the health handlers.
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

/// State of the metrics handlers.
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
    // Reading the maps takes milliseconds, during which other requests must not wait.
    let text = spawn_blocking(move || {
        let mut families = metrics.gather();
        let result = collector.gather(metrics.usage());
        let failed = result.map(|more| families.extend(more)).err();
        if let Some(error) = failed {
            warn!(%error, "failed to read the metrics of the maps");
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
    warn!(%error, "failed to write metrics");
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
}
