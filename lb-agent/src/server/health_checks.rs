//! Health check node ports: load balancers request there whether the node has endpoints of a Service
//! (`healthCheckNodePort`).

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
use lb_core::desired::HealthCheck;
use lb_core::model::{ObjectKey, Problem, ProblemKind};

/// Delay before a port that could not be opened is tried again.
const RETRY_DELAY: Duration = Duration::from_secs(5);
/// Header with the number of local endpoints, by which load balancers weigh nodes.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The health checks to serve, and their addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HealthChecks {
    /// Health checks by Service.
    pub services: BTreeMap<ObjectKey, HealthCheck>,
    /// The node's addresses that serve node ports; `None` for all addresses, also later ones.
    pub addresses: Option<Vec<IpAddr>>,
}

impl HealthChecks {
    /// Returns the Service that owns a port. The API assigns a port to one Service only; of several, the first owns it.
    fn owner(&self, port: u16) -> Option<(&ObjectKey, &HealthCheck)> {
        self.services.iter().find(|(_, check)| check.port == port)
    }

    /// The addresses and ports to listen on.
    fn sockets(&self) -> BTreeSet<SocketAddr> {
        let everywhere = [IpAddr::from(Ipv6Addr::UNSPECIFIED)];
        let addresses = self.addresses.as_deref().unwrap_or(&everywhere);
        let ports = self.services.values().map(|check| check.port);
        let at = |port| addresses.iter().map(move |ip| SocketAddr::new(*ip, port));
        ports.flat_map(at).collect()
    }
}

/// The listening sockets of health checks, kept in step with [`HealthChecks`].
pub(super) struct HealthCheckServers {
    wanted: watch::Receiver<HealthChecks>,
    health: Arc<Health>,
    tasks: JoinSet<Infallible>,
    open: BTreeMap<SocketAddr, AbortHandle>,
    failed: BTreeMap<SocketAddr, io::Error>,
    report: Box<dyn Fn(Vec<Problem>) + Send>,
}

impl HealthCheckServers {
    /// Creates the servers. `report` is called with all current problems after each change.
    pub(super) fn new(
        wanted: watch::Receiver<HealthChecks>,
        health: Arc<Health>,
        report: impl Fn(Vec<Problem>) + Send + 'static,
    ) -> Self {
        Self {
            wanted,
            health,
            tasks: JoinSet::new(),
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
            report: Box::new(report),
        }
    }

    /// Opens and closes sockets until the sender of the checks is dropped.
    pub(super) async fn run(mut self) {
        loop {
            self.update().await;
            (self.report)(self.problems());
            let again = sleep(RETRY_DELAY);
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                () = again, if !self.failed.is_empty() => {}
            }
        }
    }

    /// Closes sockets that are no longer wanted, and opens those that are missing.
    async fn update(&mut self) {
        let sockets = self.wanted.borrow_and_update().sockets();
        let gone: Vec<_> = self.open.extract_if(.., |at, _| !sockets.contains(at)).collect();
        for (at, task) in &gone {
            info!(%at, "health check port closed");
            task.abort();
        }
        for _ in &gone {
            // The socket is closed when its task has ended; the port may be needed at once.
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
        let state = PortState {
            port,
            checks: self.wanted.clone(),
            health: Arc::clone(&self.health),
        };
        // Every path is served, as by kube-proxy.
        Router::new().fallback(answer).with_state(state)
    }

    fn problems(&self) -> Vec<Problem> {
        let checks = self.wanted.borrow();
        let problem = |service: &ObjectKey, message| {
            let problem = Problem::new(lb_core::places::of_service(service), message);
            problem.of(service).kind(ProblemKind::HealthCheck)
        };
        let failed = self.failed.iter().filter_map(|(at, error)| {
            let (service, _) = checks.owner(at.port())?;
            let at = if at.ip().is_unspecified() {
                format!("port {}", at.port())
            } else {
                at.to_string()
            };
            let message = format!("the health check node port cannot be served at {at}: {error}");
            Some(problem(service, message))
        });
        let is_owner = |key: &ObjectKey, port| checks.owner(port).is_some_and(|(owner, _)| owner == key);
        let unserved = checks.services.iter().filter(|(key, check)| !is_owner(key, check.port));
        let unserved = unserved.map(|(key, check)| {
            let message = format!("another Service has the health check node port {}", check.port);
            problem(key, message)
        });
        failed.chain(unserved).collect()
    }
}

/// State of the handler of one port.
#[derive(Clone)]
struct PortState {
    port: u16,
    checks: watch::Receiver<HealthChecks>,
    health: Arc<Health>,
}

/// The response body, with kube-proxy's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: ServiceName<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct ServiceName<'a> {
    namespace: &'a str,
    name: &'a str,
}

async fn answer(State(state): State<PortState>) -> Response {
    let checks = state.checks.borrow();
    let Some((key, check)) = checks.owner(state.port) else {
        // The socket is about to be closed.
        return StatusCode::NOT_FOUND.into_response();
    };
    let endpoints = check.local_endpoints;
    let healthy = state.health.is_healthy(Instant::now());
    let status = if endpoints > 0 && healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = [
        (WEIGHT, endpoints.to_string()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".into()),
    ];
    let body = Body {
        service: ServiceName {
            namespace: &key.namespace,
            name: &key.name,
        },
        local_endpoints: endpoints,
        service_proxy_healthy: healthy,
    };
    (status, headers, axum::Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// Returns an address that no other test process uses.
    fn address(n: u8) -> IpAddr {
        let [.., a, b] = std::process::id().to_be_bytes();
        Ipv4Addr::new(127, 100 + n, a, b).into()
    }

    fn checks(services: &[(&str, u16, usize)], address: IpAddr) -> HealthChecks {
        let services = services.iter().map(|&(name, port, local_endpoints)| {
            let check = HealthCheck { port, local_endpoints };
            (ObjectKey::new("default", name), check)
        });
        HealthChecks {
            services: services.collect(),
            addresses: Some(vec![address]),
        }
    }

    /// Requests the health check, and returns status line and body; `None` if no server listens.
    async fn ask(ip: IpAddr, port: u16) -> Option<(String, serde_json::Value)> {
        let mut stream = TcpStream::connect((ip, port)).await.ok()?;
        let request = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.lines().next().unwrap().to_owned();
        Some((status, serde_json::from_str(body).unwrap()))
    }

    fn body(name: &str, endpoints: usize, healthy: bool) -> serde_json::Value {
        serde_json::json!({
            "service": {"namespace": "default", "name": name},
            "localEndpoints": endpoints,
            "serviceProxyHealthy": healthy,
        })
    }

    const GOOD: &str = "HTTP/1.1 200 OK";
    const BAD: &str = "HTTP/1.1 503 Service Unavailable";

    struct Setup {
        ip: IpAddr,
        wanted: watch::Sender<HealthChecks>,
        problems: watch::Receiver<Vec<Problem>>,
    }

    impl Setup {
        /// Starts servers with the health of an agent.
        fn new(n: u8, health: Health) -> Self {
            let (wanted, checks) = watch::channel(HealthChecks::default());
            let (sender, problems) = watch::channel(Vec::new());
            let servers = HealthCheckServers::new(checks, Arc::new(health), move |problems| {
                sender.send_replace(problems);
            });
            tokio::spawn(servers.run());
            let ip = address(n);
            Self { ip, wanted, problems }
        }

        /// Sets the checks, waits until they are served, and returns the problems.
        async fn want(&mut self, services: &[(&str, u16, usize)]) -> Vec<String> {
            // A report about the previous checks may be pending.
            tokio::task::yield_now().await;
            self.problems.mark_unchanged();
            self.wanted.send_replace(checks(services, self.ip));
            self.problems.changed().await.unwrap();
            self.problems.borrow().iter().map(ToString::to_string).collect()
        }
    }

    fn healthy() -> Health {
        Health::new(false, Instant::now())
    }

    #[tokio::test]
    async fn ports_are_opened_closed_and_reassigned() {
        let mut setup = Setup::new(0, healthy());
        let ip = setup.ip;
        assert_eq!(setup.want(&[("a", 1001, 2), ("b", 1002, 0)]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, Some((GOOD.into(), body("a", 2, true))));
        assert_eq!(ask(ip, 1002).await, Some((BAD.into(), body("b", 0, true))));
        // One Service is removed, and another gets its port at once.
        assert_eq!(setup.want(&[("b", 1001, 1)]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, Some((GOOD.into(), body("b", 1, true))));
        assert_eq!(ask(ip, 1002).await, None);
        assert_eq!(setup.want(&[]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, None);
    }

    #[tokio::test]
    async fn unhealthy_agent_fails_the_check() {
        let health = healthy();
        let long_ago = Instant::now().checked_sub(Duration::from_secs(3600)).unwrap();
        health.queued(long_ago);
        let mut setup = Setup::new(1, health);
        setup.want(&[("a", 1001, 2)]).await;
        assert_eq!(ask(setup.ip, 1001).await, Some((BAD.into(), body("a", 2, false))));
    }

    #[tokio::test]
    async fn port_in_use_is_reported_for_the_service() {
        let mut setup = Setup::new(2, healthy());
        let ip = setup.ip;
        let other = TcpListener::bind((ip, 1001)).await.unwrap();
        let problems = setup.want(&[("a", 1001, 2), ("b", 1002, 1)]).await;
        assert_eq!(problems.len(), 1);
        let expected = format!("Service default/a: the health check node port cannot be served at {ip}:1001: ");
        assert!(problems[0].starts_with(&expected), "{problems:?}");
        let problem = setup.problems.borrow()[0].clone();
        assert_eq!(problem.service, Some(ObjectKey::new("default", "a")));
        assert_eq!(problem.kind, ProblemKind::HealthCheck);
        assert_eq!(ask(ip, 1002).await, Some((GOOD.into(), body("b", 1, true))));
        drop(other);
        assert_eq!(setup.want(&[("a", 1001, 3), ("b", 1002, 1)]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, Some((GOOD.into(), body("a", 3, true))));
    }

    #[tokio::test]
    async fn port_claimed_twice_belongs_to_the_first_service() {
        let mut setup = Setup::new(3, healthy());
        let problems = setup.want(&[("a", 1001, 1), ("b", 1001, 1)]).await;
        let expected = "Service default/b: another Service has the health check node port 1001";
        assert_eq!(problems, [expected]);
        assert_eq!(ask(setup.ip, 1001).await, Some((GOOD.into(), body("a", 1, true))));
    }
}
