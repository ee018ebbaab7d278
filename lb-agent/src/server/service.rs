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
use lb_core::desired::HealthCheck;
use lb_core::model::{ObjectKey, Problem, ProblemKind};

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
    fn owner(&self, port: u16) -> Option<(&ObjectKey, &HealthCheck)> {
        self.services.iter().find(|(_, check)| check.port == port)
    }

    /// The sockets that this takes.
    fn sockets(&self) -> BTreeSet<SocketAddr> {
        let everywhere = [IpAddr::from(Ipv6Addr::UNSPECIFIED)];
        let addresses = self.addresses.as_deref().unwrap_or(&everywhere);
        let ports = self.services.values().map(|check| check.port);
        let at = |port| addresses.iter().map(move |ip| SocketAddr::new(*ip, port));
        ports.flat_map(at).collect()
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
        let problem = |service: &ObjectKey, message| {
            let problem = Problem::new(format!("Service {service}"), message);
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
    let Some((key, check)) = checks.owner(asked.port) else {
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// An address that no other test of this machine takes.
    fn address(n: u8) -> IpAddr {
        let [.., a, b] = std::process::id().to_be_bytes();
        Ipv4Addr::new(127, 100 + n, a, b).into()
    }

    fn checks(services: &[(&str, u16, usize)], address: IpAddr) -> Checks {
        let services = services.iter().map(|&(name, port, local_endpoints)| {
            let check = HealthCheck { port, local_endpoints };
            (ObjectKey::new("default", name), check)
        });
        Checks {
            services: services.collect(),
            addresses: Some(vec![address]),
        }
    }

    /// Status line and body; `None` where nobody listens.
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
        wanted: watch::Sender<Checks>,
        problems: watch::Receiver<Vec<Problem>>,
    }

    impl Setup {
        /// Starts servers; `health` is of the agent.
        fn new(n: u8, health: Health) -> Self {
            let (wanted, checks) = watch::channel(Checks::default());
            let (told, problems) = watch::channel(Vec::new());
            let servers = CheckServers::new(checks, Arc::new(health), move |problems| {
                told.send_replace(problems);
            });
            tokio::spawn(servers.run());
            let ip = address(n);
            Self { ip, wanted, problems }
        }

        /// Asks for checks, and waits until they are served; what is wrong then.
        async fn want(&mut self, services: &[(&str, u16, usize)]) -> Vec<String> {
            // Of what was asked for before.
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
    async fn ports_open_close_and_pass_on() {
        let mut setup = Setup::new(0, healthy());
        let ip = setup.ip;
        assert_eq!(setup.want(&[("a", 1001, 2), ("b", 1002, 0)]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, Some((GOOD.into(), body("a", 2, true))));
        assert_eq!(ask(ip, 1002).await, Some((BAD.into(), body("b", 0, true))));
        // One goes, the other takes its port at once.
        assert_eq!(setup.want(&[("b", 1001, 1)]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, Some((GOOD.into(), body("b", 1, true))));
        assert_eq!(ask(ip, 1002).await, None);
        assert_eq!(setup.want(&[]).await, [""; 0]);
        assert_eq!(ask(ip, 1001).await, None);
    }

    #[tokio::test]
    async fn an_agent_that_does_not_keep_up_is_not_asked_for() {
        let health = healthy();
        let long_ago = Instant::now().checked_sub(Duration::from_secs(3600)).unwrap();
        health.queued(long_ago);
        let mut setup = Setup::new(1, health);
        setup.want(&[("a", 1001, 2)]).await;
        assert_eq!(ask(setup.ip, 1001).await, Some((BAD.into(), body("a", 2, false))));
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_the_services_problem() {
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
    async fn of_two_that_claim_a_port_the_first_has_it() {
        let mut setup = Setup::new(3, healthy());
        let problems = setup.want(&[("a", 1001, 1), ("b", 1001, 1)]).await;
        let expected = "Service default/b: another Service has the health check node port 1001";
        assert_eq!(problems, [expected]);
        assert_eq!(ask(setup.ip, 1001).await, Some((GOOD.into(), body("a", 1, true))));
    }
}
