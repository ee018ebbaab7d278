//! What load balancers ask a node for: whether it has endpoints of a Service, at the Service's `healthCheckNodePort`.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;
use tracing::info;

use super::health::Health;
use super::serve;
use crate::desired::HealthCheck;
use crate::model::{ObjectKey, Problem, ProblemKind};

/// Time until a port that could not be opened is tried again.
const AGAIN: Duration = Duration::from_secs(5);
/// How load balancers weigh nodes.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is to be answered, and where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checks {
    /// By Service.
    pub services: BTreeMap<ObjectKey, HealthCheck>,
    /// The node's addresses that serve node ports; `None`: all that it has, at any time.
    pub addresses: Option<Vec<IpAddr>>,
}

impl Checks {
    /// The Service that has a port. The API gives a port to one only; of several, the first has it.
    fn by_port(&self) -> BTreeMap<u16, &ObjectKey> {
        let mut ports = BTreeMap::new();
        for (key, check) in &self.services {
            ports.entry(check.port).or_insert(key);
        }
        ports
    }

    /// The sockets that this takes.
    fn sockets(&self) -> BTreeSet<SocketAddr> {
        let everywhere = [IpAddr::from(Ipv6Addr::UNSPECIFIED)];
        let addresses = self.addresses.as_deref().unwrap_or(&everywhere);
        let ports = self.by_port();
        let at = |port: &u16| {
            addresses
                .iter()
                .map(|ip| SocketAddr::new(*ip, *port))
                .collect::<Vec<_>>()
        };
        ports.keys().flat_map(at).collect()
    }
}

/// The sockets of health checks, kept as [`Checks`] say.
pub(super) struct CheckServers {
    wanted: watch::Receiver<Checks>,
    health: Arc<Health>,
    tasks: JoinSet<Infallible>,
    open: BTreeMap<SocketAddr, AbortHandle>,
    failed: BTreeMap<SocketAddr, io::Error>,
    told: Box<dyn Fn(Vec<Problem>) + Send>,
}

impl CheckServers {
    /// `told` gets everything that is wrong, whenever that has changed.
    pub(super) fn new(
        wanted: watch::Receiver<Checks>,
        health: Arc<Health>,
        told: impl Fn(Vec<Problem>) + Send + 'static,
    ) -> Self {
        Self {
            wanted,
            health,
            tasks: JoinSet::new(),
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
            told: Box::new(told),
        }
    }

    /// Opens and closes sockets until nobody tells of checks any more.
    pub(super) async fn run(mut self) {
        loop {
            self.follow().await;
            (self.told)(self.problems());
            let again = sleep(AGAIN);
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                () = again, if !self.failed.is_empty() => {}
            }
        }
    }

    /// Makes the open sockets those that are wanted.
    async fn follow(&mut self) {
        let sockets = self.wanted.borrow_and_update().sockets();
        let gone: Vec<_> = self.open.extract_if(.., |at, _| !sockets.contains(at)).collect();
        for (at, task) in &gone {
            info!(%at, "health check port closed");
            task.abort();
        }
        for _ in &gone {
            // Closed only when the task has ended; the port may be needed at once.
            self.tasks.join_next().await;
        }
        self.failed.clear();
        for at in sockets {
            if self.open.contains_key(&at) {
                continue;
            }
            match serve::serve(at, self.routes(at.port())) {
                Ok(server) => {
                    info!(%at, "health check port opened");
                    let task = self.tasks.spawn(server);
                    self.open.insert(at, task);
                }
                Err(error) => {
                    self.failed.insert(at, error);
                }
            }
        }
    }

    fn routes(&self, port: u16) -> Router {
        let asked = Asked {
            port,
            checks: self.wanted.clone(),
            health: Arc::clone(&self.health),
        };
        // Every path, as kube-proxy does.
        Router::new().fallback(answer).with_state(asked)
    }

    fn problems(&self) -> Vec<Problem> {
        let checks = self.wanted.borrow();
        let ports = checks.by_port();
        let failed = self.failed.iter().filter_map(|(at, error)| {
            let service = ports.get(&at.port())?;
            let at = if at.ip().is_unspecified() {
                format!("port {}", at.port())
            } else {
                at.to_string()
            };
            let message = format!("the health check node port cannot be served at {at}: {error}");
            let problem = Problem::new(format!("Service {service}"), message);
            Some(problem.of(service).kind(ProblemKind::HealthCheck))
        });
        let unserved = checks
            .services
            .iter()
            .filter(|(key, check)| ports.get(&check.port) != Some(key));
        let unserved = unserved.map(|(key, check)| {
            let message = format!("another Service has the health check node port {}", check.port);
            let problem = Problem::new(format!("Service {key}"), message);
            problem.of(key).kind(ProblemKind::HealthCheck)
        });
        failed.chain(unserved).collect()
    }
}

/// What a request needs to be answered.
#[derive(Clone)]
struct Asked {
    port: u16,
    checks: watch::Receiver<Checks>,
    health: Arc<Health>,
}

/// The answer, with kube-proxy's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    service: Named<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct Named<'a> {
    namespace: &'a str,
    name: &'a str,
}

async fn answer(State(asked): State<Asked>) -> Response {
    let checks = asked.checks.borrow();
    let ports = checks.by_port();
    let Some((key, check)) = ports
        .get(&asked.port)
        .and_then(|key| checks.services.get_key_value(*key))
    else {
        // About to be closed.
        return StatusCode::NOT_FOUND.into_response();
    };
    let endpoints = check.local_endpoints;
    let healthy = asked.health.is_healthy(Instant::now());
    let status = if endpoints > 0 && healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = [
        (WEIGHT, endpoints.to_string()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".into()),
    ];
    let body = Answer {
        service: Named {
            namespace: &key.namespace,
            name: &key.name,
        },
        local_endpoints: endpoints,
        service_proxy_healthy: healthy,
    };
    (status, headers, axum::Json(body)).into_response()
}
