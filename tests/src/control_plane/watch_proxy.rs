//! Between agents and the API server: a proxy that breaks connections off, and tells events of different objects in
//! another order and some twice.
//!
//! It does nothing that an agent must not be prepared for. The events of one object stay in their order; what is told
//! twice is the newest event of an object; a bookmark, an error and the end of a watch come after everything that was
//! held back. Plain HTTP, as whoever the kubeconfig says.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use futures::io::AsyncBufReadExt as _;
use futures::{Stream, StreamExt as _, stream};
use http::{StatusCode, header};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::ControlPlane;
use crate::Random;

/// Where it listens.
const PORT: u16 = 8001;
/// How long events are held back after the last of them.
const HELD: Duration = Duration::from_millis(150);
/// How many are.
const MOST_HELD: usize = 12;
/// A watch ends after so many events, on average.
const LENGTH: u64 = 40;
/// How many lines may wait for a slow agent.
const WAITING: usize = 1000;

/// What a mixer has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchProxyStats {
    /// Events that were told before one that is older.
    pub late: u64,
    /// Events that were told once more.
    pub repeated: u64,
    /// Watches that it has ended.
    pub ended: u64,
    /// Watches that the API server would not go on with: 410 Gone.
    pub gone: u64,
}

/// The proxy. It ends when this is dropped.
pub struct WatchProxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl fmt::Debug for WatchProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchProxy")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

struct Shared {
    client: kube::Client,
    mix: bool,
    random: Mutex<Random>,
    open: watch::Sender<bool>,
    late: AtomicU64,
    repeated: AtomicU64,
    ended: AtomicU64,
    gone: AtomicU64,
}

impl ControlPlane {
    /// Starts a proxy that is open, for agents that are `user`; with `random`, it mixes events.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn watch_proxy(&self, user: &str, random: Option<Random>) -> Result<WatchProxy> {
        let address = SocketAddr::new(self.address().into(), PORT);
        let shared = Arc::new(Shared {
            client: self.objects().client_of(&self.kubeconfig(user))?,
            mix: random.is_some(),
            random: Mutex::new(random.unwrap_or_else(|| Random::new(0))),
            open: watch::Sender::new(true),
            late: AtomicU64::default(),
            repeated: AtomicU64::default(),
            ended: AtomicU64::default(),
            gone: AtomicU64::default(),
        });
        let router = Router::new().fallback(forward).with_state(Arc::clone(&shared));
        let server = self.objects().run(async move {
            let listener = TcpListener::bind(address).await.context("listening")?;
            Ok(tokio::spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    eprintln!("mixer: {error}");
                }
            }))
        })?;
        Ok(WatchProxy {
            shared,
            address,
            server,
        })
    }
}

impl WatchProxy {
    /// Where agents find the API server.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ends all watches, and answers nobody any more.
    pub fn shut(&self) {
        self.shared.open.send_replace(false);
    }

    /// Serves again.
    pub fn open(&self) {
        self.shared.open.send_replace(true);
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> WatchProxyStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WatchProxyStats {
            late: count(&self.shared.late),
            repeated: count(&self.shared.repeated),
            ended: count(&self.shared.ended),
            gone: count(&self.shared.gone),
        }
    }
}

impl Drop for WatchProxy {
    fn drop(&mut self) {
        self.shut();
        self.server.abort();
    }
}

/// Hands a request on.
async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    if !*shared.open.borrow() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let path = request
        .uri()
        .path_and_query()
        .map(ToString::to_string)
        .unwrap_or_default();
    let method = request.method().clone();
    let watches = request
        .uri()
        .query()
        .is_some_and(|query| query.split('&').any(|word| word == "watch=true"));
    let Ok(body) = axum::body::to_bytes(request.into_body(), usize::MAX).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let onward = http::Request::builder()
        .method(method)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .body(body.to_vec());
    let Ok(onward) = onward else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    if !watches {
        let answer = shared.client.send(onward.map(Into::into)).await;
        return answer.map_or_else(|error| refusal(&shared, &error), |answer| answer.map(Body::new));
    }
    match shared.client.request_stream(onward).await {
        Err(error) => refusal(&shared, &error),
        Ok(lines) => {
            let (sender, receiver) = mpsc::channel(WAITING);
            tokio::spawn(mix(shared, lines.lines(), sender));
            let told = stream::unfold(receiver, async |mut receiver| {
                receiver
                    .recv()
                    .await
                    .map(|line| (Ok::<_, std::convert::Infallible>(line), receiver))
            });
            ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(told)).into_response()
        }
    }
}

/// What the API server refused, refused the same way; if it is not there, so is this.
fn refusal(shared: &Shared, error: &kube::Error) -> Response {
    let kube::Error::Api(status) = error else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if code == StatusCode::GONE {
        shared.gone.fetch_add(1, Ordering::Relaxed);
    }
    (code, axum::Json(status)).into_response()
}

/// Tells the events of one watch.
async fn mix(
    shared: Arc<Shared>,
    mut lines: impl Stream<Item = std::io::Result<String>> + Unpin,
    to: mpsc::Sender<String>,
) {
    let mut open = shared.open.subscribe();
    let mut held = Held::default();
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            () = tokio::time::sleep(HELD), if !held.is_empty() => {
                if !held.release(&shared, &to).await { return }
                continue;
            }
            () = shut(&mut open) => None,
        };
        let Some(Ok(line)) = line else { break };
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        if event["type"] == "ERROR" && event["object"]["code"] == 410 {
            shared.gone.fetch_add(1, Ordering::Relaxed);
        }
        let key = &event["object"]["metadata"];
        let is_change = matches!(event["type"].as_str(), Some("ADDED" | "MODIFIED" | "DELETED"));
        if !shared.mix || !is_change {
            if !held.release(&shared, &to).await || to.send(line + "\n").await.is_err() {
                return;
            }
            continue;
        }
        held.add(format!("{}/{}", key["namespace"], key["name"]), line + "\n");
        let (full, ends) = (held.len() >= MOST_HELD, shared.chance(LENGTH));
        if full && !held.release(&shared, &to).await {
            return;
        }
        if ends {
            shared.ended.fetch_add(1, Ordering::Relaxed);
            break;
        }
    }
    held.release(&shared, &to).await;
}

/// Returns when nobody is to be served any more.
async fn shut(open: &mut watch::Receiver<bool>) {
    // That the other end is gone means the same.
    let _ = open.wait_for(|open| !open).await;
}

impl Shared {
    /// Happens once in so many times.
    fn chance(&self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn below(&self, end: u64) -> u64 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).below(end)
    }
}

/// Events that wait.
#[derive(Debug, Default)]
struct Held {
    /// Object and line, as they came.
    events: VecDeque<(String, String)>,
    /// The newest of each object that was told.
    told: HashMap<String, String>,
}

impl Held {
    fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    fn len(&self) -> usize {
        self.events.len()
    }

    fn add(&mut self, key: String, line: String) {
        self.events.push_back((key, line));
    }

    /// Tells all of them, in an order in which each object's events are as they were; false if nobody listens.
    async fn release(&mut self, shared: &Shared, to: &mpsc::Sender<String>) -> bool {
        while !self.events.is_empty() {
            let any = shared.below(self.events.len() as u64) as usize;
            // The first event of that object.
            let key = self.events[any].0.clone();
            let first = self.events.iter().position(|(other, _)| *other == key).unwrap_or(any);
            if first > 0 {
                shared.late.fetch_add(1, Ordering::Relaxed);
            }
            let Some((key, line)) = self.events.remove(first) else {
                break;
            };
            self.told.insert(key, line.clone());
            if to.send(line).await.is_err() {
                return false;
            }
            if shared.chance(3) {
                let nth = shared.below(self.told.len() as u64) as usize;
                let again = self.told.values().nth(nth).cloned().unwrap_or_default();
                shared.repeated.fetch_add(1, Ordering::Relaxed);
                if to.send(again).await.is_err() {
                    return false;
                }
            }
        }
        true
    }
}
