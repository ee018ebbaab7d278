//! Kubernetes Events for problems of Services, which `kubectl describe service` shows to their owners.
//!
//! The name of an Event is derived from its content. Nodes of a cluster that find the same problem, and an agent that is
//! restarted, therefore create one Event together: the second writer gets `AlreadyExists`.
//! (`kube::runtime::events::Recorder` names each Event by the time; a thousand nodes would create a thousand.)

mod throttle;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, ObjectMeta, PostParams};
use prometheus::IntCounterVec;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::server::Metrics;
use lb_core::model::{ObjectKey, Problem, ProblemKind};
use throttle::{Decision, REPEAT, Throttle};

/// The reporting controller of all Events.
const CONTROLLER: &str = "lb-agent";
/// Timeout of a request to the API server.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Delay before an Event that could not be created is tried again.
const RETRY_DELAY: Duration = Duration::from_secs(60);
/// The longest note and reporting instance that the API accepts, in bytes.
const MAX_NOTE: usize = 1000;
const MAX_INSTANCE: usize = 128;

/// Handle of the task that publishes problems of Services as Events.
#[derive(Debug)]
pub struct KubeEvents {
    problems: watch::Sender<Vec<Problem>>,
}

impl KubeEvents {
    /// Starts the task on the runtime of the caller; it ends when the handle is dropped.
    ///
    /// # Panics
    /// If called outside of a Tokio runtime.
    #[must_use]
    pub fn start(client: kube::Client, node: &str, metrics: &Metrics) -> Self {
        let (sender, problems) = watch::channel(Vec::new());
        let publisher = Publisher {
            client,
            node: node.to_owned(),
            problems,
            throttle: Throttle::new(Instant::now()),
            counter: metrics.events(),
        };
        tokio::spawn(publisher.run());
        Self { problems: sender }
    }

    /// Replaces the current problems. Those of no Service, and those of the node, become no Events.
    pub fn set(&self, problems: &[Problem]) {
        let of_services: Vec<_> = problems
            .iter()
            .filter(|problem| problem.service.is_some() && reason(problem.kind).is_some())
            .cloned()
            .collect();
        self.problems.send_if_modified(|current| {
            let changed = *current != of_services;
            *current = of_services;
            changed
        });
    }
}

/// Reason and action of an Event.
#[derive(Debug, Clone, Copy)]
struct Reason {
    reason: &'static str,
    action: &'static str,
    /// Whether the problem concerns this node only, so that the note names it.
    node_only: bool,
}

/// Returns the reason of an Event, or `None` if a problem of this kind does not concern the owner of a Service.
fn reason(kind: ProblemKind) -> Option<Reason> {
    let of = |reason, action, node_only| {
        Some(Reason {
            reason,
            action,
            node_only,
        })
    };
    match kind {
        ProblemKind::Source => of("InvalidService", "Read", false),
        ProblemKind::Conflict => of("AddressConflict", "Serve", false),
        ProblemKind::Map => of("FailedToServe", "Serve", true),
        // As kube-proxy names it.
        ProblemKind::HealthCheck => of("FailedToStartServiceHealthcheck", "Listen", true),
        ProblemKind::Node | ProblemKind::Sockets | ProblemKind::Server => None,
    }
}

/// Returns a hash that is equal on all nodes with the same build.
fn hash(parts: &[&str]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// Returns the beginning of a text, of at most `max` bytes.
fn cut(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].to_owned()
}

/// Returns the Event of a problem, or `None` if the problem does not concern the owner of a Service.
fn event(problem: &Problem, service: &ObjectKey, uid: Option<String>, node: &str) -> Option<Event> {
    let Reason {
        reason,
        action,
        node_only,
    } = reason(problem.kind)?;
    let note = if node_only {
        format!("node {node}: {}", problem.message)
    } else {
        problem.message.clone()
    };
    let digest = hash(&[uid.as_deref().unwrap_or_default(), reason, &note]);
    Some(Event {
        metadata: ObjectMeta {
            namespace: Some(service.namespace.to_string()),
            name: Some(format!("{}.{digest:016x}", service.name)),
            ..ObjectMeta::default()
        },
        regarding: Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(service.namespace.to_string()),
            name: Some(service.name.to_string()),
            uid,
            ..ObjectReference::default()
        }),
        event_time: Some(MicroTime(Timestamp::now())),
        type_: Some("Warning".into()),
        reason: Some(reason.into()),
        action: Some(action.into()),
        note: Some(cut(&note, MAX_NOTE)),
        reporting_controller: Some(CONTROLLER.into()),
        reporting_instance: Some(cut(node, MAX_INSTANCE)),
        ..Event::default()
    })
}

struct Publisher {
    client: kube::Client,
    node: String,
    problems: watch::Receiver<Vec<Problem>>,
    throttle: Throttle,
    counter: IntCounterVec,
}

impl Publisher {
    async fn run(mut self) {
        loop {
            let wait = self.round().await;
            let wait = sleep(wait.saturating_duration_since(Instant::now()));
            tokio::select! {
                changed = self.problems.changed() => if changed.is_err() {
                    return;
                },
                () = wait => {}
            }
        }
    }

    /// Publishes the problems that the throttle admits now, and returns the time of the next round.
    async fn round(&mut self) -> Instant {
        let problems = self.problems.borrow_and_update().clone();
        let mut next = Instant::now() + REPEAT;
        for problem in &problems {
            let Some(service) = &problem.service else { continue };
            let what = hash(&[problem.kind.label(), &problem.message]);
            match self.throttle.admit(service, what, Instant::now()) {
                Decision::Published(again) | Decision::Later(again) => next = next.min(again),
                Decision::Now => match self.publish(problem, service).await {
                    Ok(()) => self.count("published"),
                    Err(error) => {
                        warn!(%service, error, "failed to create an Event");
                        self.count("failed");
                        self.throttle.failed(service, what);
                        next = next.min(Instant::now() + RETRY_DELAY);
                    }
                },
            }
        }
        self.throttle.expire(Instant::now());
        next
    }

    fn count(&self, result: &str) {
        self.counter.with_label_values(&[result]).inc();
    }

    async fn publish(&self, problem: &Problem, service: &ObjectKey) -> Result<(), String> {
        match timeout(TIMEOUT, self.try_publish(problem, service)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs())),
        }
    }

    async fn try_publish(&self, problem: &Problem, service: &ObjectKey) -> kube::Result<()> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), &service.namespace);
        // Without the uid, `kubectl describe` would not find the Event. Upstream's role for a Service proxy lets it list
        // Services, not get one.
        let named = ListParams::default().fields(&format!("metadata.name={}", service.name));
        let Some(found) = services.list_metadata(&named).await?.items.pop() else {
            debug!(%service, "deleted before an Event could be created");
            return Ok(());
        };
        let Some(event) = event(problem, service, found.metadata.uid, &self.node) else {
            return Ok(());
        };
        let events: Api<Event> = Api::namespaced(self.client.clone(), &service.namespace);
        match events.create(&PostParams::default(), &event).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            result => result.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::{Arc, Mutex};

    use axum::extract::State;
    use axum::http::{StatusCode, Uri};
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use serde_json::{Value, json};

    use super::*;
    use crate::server::{bind, serve};

    /// An API server, with the Events that were created.
    #[derive(Clone, Default)]
    struct ApiServer(Arc<Mutex<Vec<Value>>>);

    impl ApiServer {
        async fn services(uri: Uri) -> Json<Value> {
            let (_, name) = uri.query().unwrap().split_once("metadata.name%3D").unwrap();
            let service = json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-of-{name}")}});
            Json(json!({
                "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList", "metadata": {},
                "items": if name == "gone" { vec![] } else { vec![service] },
            }))
        }

        async fn event(State(Self(events)): State<Self>, Json(event): Json<Value>) -> (StatusCode, Json<Value>) {
            let mut events = events.lock().unwrap();
            let name = &event["metadata"]["name"];
            if events.iter().any(|known| known["metadata"]["name"] == *name) {
                let status = json!({
                    "apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409,
                });
                return (StatusCode::CONFLICT, Json(status));
            }
            events.push(event.clone());
            (StatusCode::CREATED, Json(event))
        }

        fn routes(&self) -> Router {
            Router::new()
                .route("/api/v1/namespaces/default/services", get(Self::services))
                .route("/apis/events.k8s.io/v1/namespaces/default/events", post(Self::event))
                .with_state(self.clone())
        }
    }

    fn problem(service: &str, kind: ProblemKind, message: &str) -> Problem {
        let problem = Problem::new(format!("Service default/{service}"), message);
        problem.of(&ObjectKey::new("default", service)).kind(kind)
    }

    /// Runs the agents of some nodes, one after the other, with the same problems. Returns the Events in the API server,
    /// and the counters of published and failed Events.
    async fn publish(nodes: &[&str], problems: &[Problem]) -> (Vec<Value>, [u64; 2]) {
        let server = ApiServer::default();
        let at = (Ipv4Addr::LOCALHOST, 0).into();
        let listener = bind::listen(at).unwrap();
        let at = listener.local_addr().unwrap();
        drop(listener);
        let serving = tokio::spawn(serve::serve(at, server.routes()).unwrap());
        let uri: Uri = format!("http://{at}").parse().unwrap();
        let client = kube::Client::try_from(kube::Config::new(uri)).unwrap();
        let metrics = Metrics::new().unwrap();
        for node in nodes {
            let (sender, problems) = watch::channel(problems.to_vec());
            let mut publisher = Publisher {
                client: client.clone(),
                node: (*node).to_owned(),
                problems,
                throttle: Throttle::new(Instant::now()),
                counter: metrics.events(),
            };
            publisher.round().await;
            // Without a change no request is sent.
            publisher.round().await;
            drop(sender);
        }
        serving.abort();
        let count = |result| metrics.events().with_label_values(&[result]).get();
        let events = server.0.lock().unwrap().clone();
        (events, ["published", "failed"].map(count))
    }

    #[tokio::test]
    async fn event_regards_the_service_with_its_uid() {
        let conflict = problem("web", ProblemKind::Conflict, "10.96.0.1:80/TCP is default/older's");
        let (events, counts) = publish(&["n1"], &[conflict]).await;
        assert_eq!(counts, [1, 0]);
        let [event] = &*events else { panic!("{events:?}") };
        assert_eq!(
            event["regarding"],
            json!({"apiVersion": "v1", "kind": "Service", "namespace": "default", "name": "web", "uid": "uid-of-web"})
        );
        for (field, expected) in [
            ("reason", "AddressConflict"),
            ("action", "Serve"),
            ("type", "Warning"),
            ("note", "10.96.0.1:80/TCP is default/older's"),
            ("reportingController", "lb-agent"),
            ("reportingInstance", "n1"),
        ] {
            assert_eq!(event[field], expected, "{field}");
        }
        assert!(event["eventTime"].is_string());
    }

    #[tokio::test]
    async fn problems_of_all_nodes_share_an_event_and_problems_of_one_node_do_not() {
        let problems = [
            problem("web", ProblemKind::Conflict, "an address is another's"),
            problem("web", ProblemKind::Source, "a field is wrong"),
            problem("web", ProblemKind::HealthCheck, "the port is taken"),
            problem("full", ProblemKind::Map, "no room"),
        ];
        let (events, counts) = publish(&["n1", "n2", "n1"], &problems).await;
        assert_eq!(counts, [12, 0]);
        let mut notes: Vec<_> = events.iter().map(|event| event["note"].as_str().unwrap()).collect();
        notes.sort_unstable();
        assert_eq!(
            notes,
            [
                "a field is wrong",
                "an address is another's",
                "node n1: no room",
                "node n1: the port is taken",
                "node n2: no room",
                "node n2: the port is taken",
            ]
        );
        let reasons: Vec<_> = events.iter().map(|event| event["reason"].as_str().unwrap()).collect();
        assert!(reasons.contains(&"FailedToStartServiceHealthcheck"), "{reasons:?}");
    }

    #[tokio::test]
    async fn deleted_service_gets_no_event() {
        let (events, counts) = publish(&["n1"], &[problem("gone", ProblemKind::Map, "no room")]).await;
        assert_eq!((events, counts), (Vec::new(), [1, 0]));
    }

    #[tokio::test]
    async fn long_note_is_cut_at_a_character_boundary() {
        let (events, counts) = publish(&["n1"], &[problem("web", ProblemKind::Source, &"ä".repeat(600))]).await;
        assert_eq!(counts, [1, 0]);
        assert_eq!(events[0]["note"].as_str().unwrap().len(), MAX_NOTE);
    }

    #[tokio::test]
    async fn only_problems_of_services_become_events() {
        let metrics = Metrics::new().unwrap();
        let client = kube::Client::try_from(kube::Config::new(Uri::from_static("http://127.0.0.1:9"))).unwrap();
        let events = KubeEvents::start(client, "n1", &metrics);
        events.set(&[
            problem("web", ProblemKind::Server, "x"),
            Problem::new("somewhere", "y").kind(ProblemKind::Map),
        ]);
        assert_eq!(*events.problems.borrow(), []);
        let ours = problem("web", ProblemKind::Map, "z");
        events.set(std::slice::from_ref(&ours));
        assert_eq!(*events.problems.borrow(), [ours]);
    }
}
