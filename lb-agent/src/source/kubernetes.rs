//! Objects from the API server: lists, then watches, of Services, EndpointSlices and Nodes.
//!
//! `kube`'s watcher does the paging, the bookmarks, the resumption and the new list after a 410; this module makes
//! batches of it. One event is one change. Only the model's fields of an object are kept, and of delivered objects only
//! the keys, so that a new list shows which objects are gone.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures::stream::{BoxStream, SelectAll, select_all};
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::core::DeserializeGuard;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch_objects};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::{debug, info};

use super::connect::{Connection, Failures, chain};
use super::convert::{self, ANNOTATION_TRIGGER_TIME, ConvertError, LABEL_HEADLESS, LABEL_SERVICE_PROXY_NAME, Quoted};
use lb_core::model::{Batch, Change, Kind, Object, ObjectId, ObjectKey, Problem};

/// The most changes that are applied at once, if more arrive while others are applied.
const MAX_CHANGES: usize = 1000;

/// Services, EndpointSlices and Nodes of a cluster.
///
/// - The first batch comes when all lists are complete, and has everything: a Service without its slices
///   would be served without backends.
/// - An object that cannot be used is a problem; its last usable version stays in force.
/// - A new list (after 410 Gone) is delivered as a whole, with the deletions since the last list.
pub struct KubernetesSource {
    events: SelectAll<BoxStream<'static, WatchEvent>>,
    failures: watch::Receiver<Failures>,
    /// Hosts of the URLs of the API servers.
    hosts: Vec<String>,
    /// Problems of these URLs.
    server: Option<Problem>,
    kinds: BTreeMap<Kind, KindState>,
    /// Problems of objects.
    broken: BTreeMap<ObjectId, Problem>,
    /// Contents of the next batch.
    pending: Pending,
    started: SystemTime,
    restarts: u64,
}

impl Debug for KubernetesSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesSource")
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

/// State of the objects of one kind.
#[derive(Debug, Default)]
struct KindState {
    /// Keys of all objects, including those that cannot be used.
    keys: HashSet<ObjectKey>,
    /// Keys received so far of a list that is being fetched.
    listing: Option<Listing>,
    /// At least one list was received completely.
    complete: bool,
}

#[derive(Debug, Default)]
struct Listing {
    keys: HashSet<ObjectKey>,
    changes: Vec<Change>,
}

/// Changes that were not delivered yet, at most one per object.
#[derive(Debug, Default)]
struct Pending {
    changes: BTreeMap<ObjectId, Change>,
    received: Option<Instant>,
    triggers: Vec<SystemTime>,
    /// The batch has news other than changes.
    news: bool,
}

/// One event of one watch.
struct WatchEvent {
    kind: Kind,
    event: Result<Event<WatchedObject>, watcher::Error>,
}

/// An object, or that it cannot be used.
struct WatchedObject {
    key: ObjectKey,
    /// `None` if a proxy ignores the object.
    object: Result<Option<Object>, String>,
    trigger: Option<SystemTime>,
}

/// Exponential backoff after errors, up to ten seconds; reset after a minute without an error. An event does not
/// reset it, since the first event of a list arrives before the list can fail.
struct WatchBackoff {
    builder: ExponentialBuilder,
    pauses: backon::ExponentialBackoff,
    last: Option<Instant>,
}

const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const RESET_AFTER: Duration = Duration::from_secs(60);

impl Default for WatchBackoff {
    fn default() -> Self {
        let builder = ExponentialBuilder::default()
            .with_min_delay(SHORTEST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .with_jitter()
            .without_max_times();
        Self {
            builder,
            pauses: builder.build(),
            last: None,
        }
    }
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self
            .last
            .replace(Instant::now())
            .is_some_and(|last| last.elapsed() > RESET_AFTER)
        {
            self.pauses = self.builder.build();
        }
        self.pauses.next()
    }
}

impl Backoff for WatchBackoff {
    fn reset(&mut self) {}
}

impl KubernetesSource {
    /// Creates a source that uses this connection. Must be called in a Tokio runtime.
    #[must_use]
    pub fn new(connection: &Connection) -> Self {
        let client = &connection.client;
        // As in kube-proxy: the API server leaves out Services of other proxies.
        let ours = format!("!{LABEL_SERVICE_PROXY_NAME},!{LABEL_HEADLESS}");
        let ours = watcher::Config::default().labels(&ours);
        let service = |object: &v1::Service| {
            let service = convert::service(object)?;
            Ok(Some(Object::Service(Arc::new(service))))
        };
        let slice = |object: &discovery::EndpointSlice| {
            let slice = convert::endpoint_slice(object)?;
            Ok(slice.map(|slice| Object::EndpointSlice(Arc::new(slice))))
        };
        let node = |object: &v1::Node| Ok(Some(Object::Node(Arc::new(convert::node(object)?))));
        let events = [
            follow(Kind::Service, Api::all(client.clone()), ours.clone(), service),
            follow(Kind::EndpointSlice, Api::all(client.clone()), ours, slice),
            follow(Kind::Node, Api::all(client.clone()), watcher::Config::default(), node),
        ];
        let hosts = connection.servers.iter().filter_map(|server| server.host());
        let hosts = hosts.map(|host| host.trim_matches(['[', ']']).to_owned()).collect();
        Self::of(events, connection.failures.clone(), hosts)
    }

    /// Creates a source from streams of events.
    fn of(
        events: impl IntoIterator<Item = BoxStream<'static, WatchEvent>>,
        failures: watch::Receiver<Failures>,
        hosts: Vec<String>,
    ) -> Self {
        Self {
            events: select_all(events),
            failures,
            hosts,
            server: None,
            kinds: [Kind::Service, Kind::EndpointSlice, Kind::Node]
                .map(|kind| (kind, KindState::default()))
                .into(),
            broken: BTreeMap::new(),
            pending: Pending::default(),
            started: SystemTime::now(),
            restarts: 0,
        }
    }

    /// Waits for the next batch: changes, or only a change of problems. All events that arrived in the meantime are one
    /// batch. Until all lists are complete, a batch has problems only.
    ///
    /// May be dropped at any point without the loss of a change.
    pub async fn next(&mut self) -> Batch {
        while !self.pending.news && (self.pending.changes.is_empty() || !self.is_complete()) {
            tokio::select! {
                Some(event) = self.events.next() => {
                    self.record(event);
                    while self.pending.changes.len() < MAX_CHANGES
                        && let Some(Some(event)) = self.events.next().now_or_never()
                    {
                        self.record(event);
                    }
                }
                Ok(()) = self.failures.changed() => self.pending.news = true,
            }
        }
        self.batch()
    }

    /// Number of watches that failed and were restarted; a new list after 410 Gone counts as one.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Whether all lists were received at least once.
    fn is_complete(&self) -> bool {
        self.kinds.values().all(|known| known.complete)
    }

    fn batch(&mut self) -> Batch {
        let complete = self.is_complete();
        self.pending.news = false;
        let mut batch = Batch {
            complete,
            problems: self.problems(),
            ..Batch::default()
        };
        if complete {
            let Pending {
                changes,
                received,
                triggers,
                news: _,
            } = std::mem::take(&mut self.pending);
            batch.changes = changes.into_values().collect();
            batch.received = received;
            batch.triggers = triggers;
        }
        batch
    }

    fn problems(&self) -> Vec<Problem> {
        let failures = self.failures.borrow();
        let failures = failures
            .iter()
            .map(|(path, error)| Problem::new(format!("API server, {path}"), error));
        failures
            .chain(self.server.iter().chain(self.broken.values()).cloned())
            .collect()
    }

    fn record(&mut self, WatchEvent { kind, event }: WatchEvent) {
        match event {
            Err(error) => {
                debug!(?kind, error = chain(&error), "watching");
                self.restarts += 1;
            }
            Ok(Event::Init) => self.state_of(kind).listing = Some(Listing::default()),
            Ok(Event::InitApply(seen)) => {
                let id = ObjectId {
                    kind,
                    key: seen.key.clone(),
                };
                let change = self.change(&id, seen.object);
                if let Some(listing) = &mut self.state_of(kind).listing {
                    listing.keys.insert(id.key);
                    listing.changes.extend(change);
                }
            }
            Ok(Event::InitDone) => self.listed(kind),
            Ok(Event::Apply(seen)) => {
                let id = ObjectId { kind, key: seen.key };
                if let Some(change) = self.change(&id, seen.object) {
                    self.pending.changes.insert(id.clone(), change);
                    self.pending.received.get_or_insert_with(Instant::now);
                    // Events from before the start of this agent do not count as its latency.
                    let trigger = seen.trigger.filter(|trigger| *trigger > self.started);
                    self.pending.triggers.extend(trigger);
                }
                self.state_of(kind).keys.insert(id.key);
            }
            Ok(Event::Delete(seen)) => {
                self.state_of(kind).keys.remove(&seen.key);
                self.pending.received.get_or_insert_with(Instant::now);
                self.gone(ObjectId { kind, key: seen.key });
            }
        }
    }

    fn state_of(&mut self, kind: Kind) -> &mut KindState {
        self.kinds.entry(kind).or_default()
    }

    /// Converts an object; records a problem and returns `None` if it cannot be used.
    fn change(&mut self, id: &ObjectId, object: Result<Option<Object>, String>) -> Option<Change> {
        if object.is_ok() && self.broken.remove(id).is_some() {
            self.pending.news = true;
        }
        match object {
            Ok(Some(object)) => Some(Change::Set(object)),
            Ok(None) => Some(Change::Remove(id.clone())),
            Err(error) => {
                let mut problem = Problem::new(id.to_string(), error);
                if id.kind == Kind::Service {
                    problem = problem.of(&id.key);
                }
                if self.broken.get(id) != Some(&problem) {
                    self.broken.insert(id.clone(), problem);
                    self.pending.news = true;
                }
                None
            }
        }
    }

    fn gone(&mut self, id: ObjectId) {
        self.pending.news |= self.broken.remove(&id).is_some();
        self.pending.changes.insert(id.clone(), Change::Remove(id));
    }

    /// Completes a list: objects that it does not contain are deleted.
    fn listed(&mut self, kind: Kind) {
        let known = self.state_of(kind);
        let Some(Listing { keys, changes }) = known.listing.take() else {
            return;
        };
        let before = std::mem::replace(&mut known.keys, keys);
        let gone: Vec<_> = before.into_iter().filter(|key| !known.keys.contains(key)).collect();
        info!(?kind, objects = known.keys.len(), "listed");
        known.complete = true;
        for change in changes {
            let id = match &change {
                Change::Set(object) => object.id(),
                Change::Remove(id) => id.clone(),
            };
            self.pending.changes.insert(id, change);
        }
        for key in gone {
            self.gone(ObjectId { kind, key });
        }
        // Also if there is no object at all.
        self.pending.news |= self.is_complete();
        if kind == Kind::Service {
            self.look_for_own_server();
        }
    }

    /// Reports API server URLs with a Service address, which works only while a proxy serves it.
    fn look_for_own_server(&mut self) {
        let services = self.pending.changes.values().filter_map(|change| match change {
            Change::Set(Object::Service(service)) => Some(service),
            _ => None,
        });
        let mut addresses = services.flat_map(|service| service.cluster_ips.iter().map(move |ip| (ip, &service.key)));
        self.server = addresses
            .find(|(ip, _)| self.hosts.contains(&ip.to_string()))
            .map(|(ip, service)| {
                let message = format!(
                    "{ip} is the address of Service {service}, which has to be served before it can be reached: name \
                     the servers themselves by --kube-apiserver"
                );
                Problem::new("API server", message)
            });
    }
}

/// Watches all objects of a kind.
fn follow<K>(
    kind: Kind,
    api: Api<DeserializeGuard<K>>,
    config: watcher::Config,
    convert: impl Fn(&K) -> Result<Option<Object>, ConvertError> + Send + 'static,
) -> BoxStream<'static, WatchEvent>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let see = move |DeserializeGuard(object): DeserializeGuard<K>| match object {
        Ok(object) => WatchedObject {
            key: key(object.meta()),
            trigger: trigger(object.meta()),
            object: convert(&object).map_err(|error| error.to_string()),
        },
        Err(invalid) => WatchedObject {
            key: key(&invalid.metadata),
            trigger: None,
            object: Err(format!("not as the API defines it: {}", Quoted(&invalid.error))),
        },
    };
    let event = move |event| match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(see(object)),
        Event::Apply(object) => Event::Apply(see(object)),
        Event::Delete(object) => Event::Delete(see(object)),
    };
    watch_objects(api, config)
        .backoff(WatchBackoff::default())
        .map(move |result| WatchEvent {
            kind,
            event: result.map(&event),
        })
        .boxed()
}

fn key(meta: &ObjectMeta) -> ObjectKey {
    ObjectKey::new(
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

/// Time of the event that caused the last change of an EndpointSlice.
fn trigger(meta: &ObjectMeta) -> Option<SystemTime> {
    let time: Timestamp = meta.annotations.as_ref()?.get(ANNOTATION_TRIGGER_TIME)?.parse().ok()?;
    Some(time.into())
}

#[cfg(test)]
mod tests;
