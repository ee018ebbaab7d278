//! One client of the API server, over several URLs.
//!
//! Nothing here needs a Service address, since those work only after this client has fetched the Services.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tokio::sync::watch;
use tokio::time::timeout;
use tower::{BoxError, Service, ServiceBuilder};

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long it may take until an answer begins.
const ANSWER: Duration = Duration::from_secs(30);
/// Idle time before the first TCP keepalive probe, and the interval between probes.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Unanswered keepalive probes after which the kernel closes a connection.
const KEEPALIVE_TRIES: u32 = 3;

/// Address of the API server, and the credentials of the client.
#[derive(Debug, Clone, Default)]
pub struct ApiServerSettings {
    /// A kubeconfig file; without one, the service account of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// URLs of API servers of one cluster, tried in turn. If empty, the URL of the kubeconfig or the pod is used.
    pub servers: Vec<Uri>,
}

/// Reasons why a client cannot be created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The kubeconfig file cannot be used.
    #[error("kubeconfig {path}: {error}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The reason.
        error: KubeconfigError,
    },
    /// There is neither a kubeconfig file nor a service account.
    #[error("neither --manifests nor --kubeconfig is given, and this is no pod with a service account: {0}")]
    NoPod(#[source] kube::config::InClusterError),
    /// Only direct connections are made.
    #[error("the kubeconfig asks for the proxy {0}, which is not supported")]
    Proxy(Uri),
    /// Certificates, keys or tokens cannot be used.
    #[error("connecting to {server}: {error}")]
    Credentials {
        /// The server.
        server: Uri,
        /// The reason.
        error: Box<kube::Error>,
    },
}

/// The last error of every path, if its last request failed.
pub type Failures = BTreeMap<String, String>;

/// A client, and the state of its requests.
pub struct Connection {
    /// Sends each request to the servers in turn.
    pub client: Client,
    /// Changes when requests begin to fail, and when they succeed again.
    pub failures: watch::Receiver<Failures>,
    /// The servers.
    pub servers: Vec<Uri>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

/// Creates a client without sending a request. Must be called in a Tokio runtime.
///
/// # Errors
/// Returns [`ConnectError`] if the settings cannot be used.
pub async fn connect(settings: &ApiServerSettings) -> Result<Connection, ConnectError> {
    let base = match &settings.kubeconfig {
        Some(path) => {
            let wrong = |error| ConnectError::Kubeconfig {
                path: path.clone(),
                error,
            };
            let file = Kubeconfig::read_from(path).map_err(wrong)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(wrong)?
        }
        None => Config::incluster().map_err(ConnectError::NoPod)?,
    };
    if let Some(proxy) = base.proxy_url {
        return Err(ConnectError::Proxy(proxy));
    }
    let servers = if settings.servers.is_empty() {
        vec![base.cluster_url.clone()]
    } else {
        settings.servers.clone()
    };
    let clients = servers.iter().map(|server| {
        let mut config = base.clone();
        config.cluster_url = server.clone();
        one(&config).map_err(|error| ConnectError::Credentials {
            server: server.clone(),
            error: Box::new(error),
        })
    });
    let clients: Arc<[Client]> = clients.collect::<Result<_, _>>()?;
    let (noted, failures) = watch::channel(Failures::new());
    let in_turn = InTurn {
        clients,
        current: Arc::default(),
        noted: Arc::new(noted),
    };
    Ok(Connection {
        client: Client::new(in_turn, base.default_namespace),
        failures,
        servers,
    })
}

/// A client of one server: the one that `kube` builds, with TCP keepalive on its connections.
fn one(config: &Config) -> Result<Client, kube::Error> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT));
    http.set_keepalive(Some(KEEPALIVE));
    http.set_keepalive_interval(Some(KEEPALIVE));
    http.set_keepalive_retries(Some(KEEPALIVE_TRIES));
    let https = config.rustls_https_connector_with_connector(http)?;
    let client: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new()).build(https);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    Ok(ClientBuilder::new(service, config.default_namespace.clone()).build())
}

/// Sends requests to one server until it fails, then to the next.
#[derive(Clone)]
struct InTurn {
    clients: Arc<[Client]>,
    /// Index of the current server, modulo the number of servers.
    current: Arc<AtomicUsize>,
    noted: Arc<watch::Sender<Failures>>,
}

/// Whether a response has a status after which another server is tried.
fn is_unavailable(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
    )
}

impl InTurn {
    async fn send(self, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        // A request with a body is sent once: the body cannot be replayed, and the server may have received it.
        let tries = if parts.method == Method::GET {
            self.clients.len()
        } else {
            1
        };
        let mut body = Some(body);
        let mut result = Err(kube::Error::Service("there is no API server".into()));
        for _ in 0..tries {
            let at = self.current.load(Ordering::Relaxed);
            let request = Request::from_parts(parts.clone(), body.take().unwrap_or_else(Body::empty));
            let client = &self.clients[at % self.clients.len()];
            result = timeout(ANSWER, client.send(request))
                .await
                .unwrap_or_else(|_| Err(kube::Error::Service(format!("no answer in {ANSWER:?}").into())));
            if result.as_ref().is_ok_and(|response| !is_unavailable(response.status())) {
                break;
            }
            // Of several requests that fail at the same time only one advances to the next server.
            let next = at.wrapping_add(1);
            let _ = self
                .current
                .compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        self.note(path, &result);
        result
    }

    /// Records the error of a path, or removes it.
    fn note(&self, path: String, result: &Result<Response<Body>, kube::Error>) {
        let failure = match result {
            Err(error) => Some(chain(error)),
            // 410 Gone: the watcher fetches a new list, which is its normal operation.
            Ok(response) if response.status() == StatusCode::GONE => None,
            Ok(response) => {
                let status = response.status();
                (status.is_client_error() || status.is_server_error()).then(|| status.to_string())
            }
        };
        self.noted.send_if_modified(|noted| match failure {
            Some(text) if noted.get(&path) == Some(&text) => false,
            Some(text) => {
                noted.insert(path, text);
                true
            }
            None => noted.remove(&path).is_some(),
        });
    }
}

/// An error with its causes, without repetitions.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl Service<Request<Body>> for InTurn {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, kube::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), kube::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.clone().send(request).boxed()
    }
}

#[cfg(test)]
mod tests;
