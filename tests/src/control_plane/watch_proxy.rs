//! A proxy between agents and the API server that ends watches, reorders events of different objects, and repeats events.
//!
//! An agent must tolerate everything that it does. The events of one object stay in their order, and only the newest event
//! of an object is repeated. A bookmark, an error and the end of a watch follow after all events that were held back.
//! Agents connect by plain HTTP; the proxy authenticates with the user of a kubeconfig.

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

/// Port of the proxy.
const PORT: u16 = 8001;
/// Time without a new event after which pending events are released.
const RELEASE_AFTER: Duration = Duration::from_millis(150);
/// The highest number of pending events.
const MAX_PENDING: usize = 12;
/// Number of events after which the proxy ends a watch, on average.
const EVENTS_PER_WATCH: u64 = 40;
/// Capacity of the queue of lines to an agent.
const QUEUE: usize = 1000;

/// Counters of a [`WatchProxy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchProxyStats {
    /// Events that were sent before an older one.
    pub reordered: u64,
    /// Events that were sent twice.
    pub repeated: u64,
    /// Watches that the proxy has ended.
    pub ended: u64,
    /// Watches that the API server has ended or refused with 410 Gone.
    pub gone: u64,
}

/// A proxy between agents and the API server. Dropping this ends it.
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
    reorder: bool,
    random: Mutex<Random>,
    open: watch::Sender<bool>,
    reordered: AtomicU64,
    repeated: AtomicU64,
    ended: AtomicU64,
    gone: AtomicU64,
}

impl ControlPlane {
    /// Starts a proxy that authenticates as `user`. With `random`, it reorders and repeats events and ends watches.
    ///
    /// # Errors
    /// If the proxy cannot listen.
    pub fn watch_proxy(&self, user: &str, random: Option<Random>) -> Result<WatchProxy> {
        let address = SocketAddr::new(self.address().into(), PORT);
        let shared = Arc::new(Shared {
            client: self.objects().client_of(&self.kubeconfig(user))?,
            reorder: random.is_some(),
            random: Mutex::new(random.unwrap_or_else(|| Random::new(0))),
            open: watch::Sender::new(true),
            reordered: AtomicU64::default(),
            repeated: AtomicU64::default(),
            ended: AtomicU64::default(),
            gone: AtomicU64::default(),
        });
        let router = Router::new().fallback(forward).with_state(Arc::clone(&shared));
        let server = self.objects().run(async move {
            let listener = TcpListener::bind(address).await.context("listening")?;
            Ok(tokio::spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    eprintln!("watch proxy: {error}");
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
    /// Returns the URL of the proxy, which agents use as API server.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ends all watches, and answers further requests with 503 Service Unavailable.
    pub fn close(&self) {
        self.shared.open.send_replace(false);
    }

    /// Serves requests again, after [`Self::close`].
    pub fn open(&self) {
        self.shared.open.send_replace(true);
    }

    /// Returns the counters.
    #[must_use]
    pub fn stats(&self) -> WatchProxyStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WatchProxyStats {
            reordered: count(&self.shared.reordered),
            repeated: count(&self.shared.repeated),
            ended: count(&self.shared.ended),
            gone: count(&self.shared.gone),
        }
    }
}

impl Drop for WatchProxy {
    fn drop(&mut self) {
        self.close();
        self.server.abort();
    }
}

/// Forwards a request to the API server.
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
    let is_watch = request
        .uri()
        .query()
        .is_some_and(|query| query.split('&').any(|word| word == "watch=true"));
    let Ok(body) = axum::body::to_bytes(request.into_body(), usize::MAX).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let forwarded = http::Request::builder()
        .method(method)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .body(body.to_vec());
    let Ok(forwarded) = forwarded else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    if !is_watch {
        let response = shared.client.send(forwarded.map(Into::into)).await;
        return response.map_or_else(
            |error| error_response(&shared, &error),
            |response| response.map(Body::new),
        );
    }
    match shared.client.request_stream(forwarded).await {
        Err(error) => error_response(&shared, &error),
        Ok(lines) => {
            let (sender, receiver) = mpsc::channel(QUEUE);
            tokio::spawn(forward_events(shared, lines.lines(), sender));
            let lines = stream::unfold(receiver, async |mut receiver| {
                receiver
                    .recv()
                    .await
                    .map(|line| (Ok::<_, std::convert::Infallible>(line), receiver))
            });
            ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(lines)).into_response()
        }
    }
}

/// Returns the API server's own error response, or 503 Service Unavailable if it did not respond.
fn error_response(shared: &Shared, error: &kube::Error) -> Response {
    let kube::Error::Api(status) = error else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if code == StatusCode::GONE {
        shared.gone.fetch_add(1, Ordering::Relaxed);
    }
    (code, axum::Json(status)).into_response()
}

/// Forwards the events of one watch to the agent.
async fn forward_events(
    shared: Arc<Shared>,
    mut lines: impl Stream<Item = std::io::Result<String>> + Unpin,
    to: mpsc::Sender<String>,
) {
    let mut open = shared.open.subscribe();
    let mut pending = PendingEvents::default();
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            () = tokio::time::sleep(RELEASE_AFTER), if !pending.is_empty() => {
                if !pending.release(&shared, &to).await { return }
                continue;
            }
            () = closed(&mut open) => None,
        };
        let Some(Ok(line)) = line else { break };
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        if event["type"] == "ERROR" && event["object"]["code"] == 410 {
            shared.gone.fetch_add(1, Ordering::Relaxed);
        }
        let key = &event["object"]["metadata"];
        let is_change = matches!(event["type"].as_str(), Some("ADDED" | "MODIFIED" | "DELETED"));
        if !shared.reorder || !is_change {
            if !pending.release(&shared, &to).await || to.send(line + "\n").await.is_err() {
                return;
            }
            continue;
        }
        pending.add(format!("{}/{}", key["namespace"], key["name"]), line + "\n");
        let (full, ends) = (pending.len() >= MAX_PENDING, shared.chance(EVENTS_PER_WATCH));
        if full && !pending.release(&shared, &to).await {
            return;
        }
        if ends {
            shared.ended.fetch_add(1, Ordering::Relaxed);
            break;
        }
    }
    pending.release(&shared, &to).await;
}

/// Returns when the proxy is closed.
async fn closed(open: &mut watch::Receiver<bool>) {
    // An error means that the proxy was dropped, which also ends the watch.
    let _ = open.wait_for(|open| !open).await;
}

impl Shared {
    /// Returns true once in `one_in` cases.
    fn chance(&self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn below(&self, end: u64) -> u64 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).below(end)
    }
}

/// Events that are held back.
#[derive(Debug, Default)]
struct PendingEvents {
    /// Object and line of each event, in the order of arrival.
    events: VecDeque<(String, String)>,
    /// The newest event of each object that was sent.
    sent: HashMap<String, String>,
}

impl PendingEvents {
    fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    fn len(&self) -> usize {
        self.events.len()
    }

    fn add(&mut self, key: String, line: String) {
        self.events.push_back((key, line));
    }

    /// Sends all events in a random order that keeps the order of each object's events. Returns false if the agent has
    /// closed the watch.
    async fn release(&mut self, shared: &Shared, to: &mpsc::Sender<String>) -> bool {
        while !self.events.is_empty() {
            let any = shared.below(self.events.len() as u64) as usize;
            // The first event of that object.
            let key = self.events[any].0.clone();
            let first = self.events.iter().position(|(other, _)| *other == key).unwrap_or(any);
            if first > 0 {
                shared.reordered.fetch_add(1, Ordering::Relaxed);
            }
            let Some((key, line)) = self.events.remove(first) else {
                break;
            };
            self.sent.insert(key, line.clone());
            if to.send(line).await.is_err() {
                return false;
            }
            if shared.chance(3) {
                let nth = shared.below(self.sent.len() as u64) as usize;
                let again = self.sent.values().nth(nth).cloned().unwrap_or_default();
                shared.repeated.fetch_add(1, Ordering::Relaxed);
                if to.send(again).await.is_err() {
                    return false;
                }
            }
        }
        true
    }
}
