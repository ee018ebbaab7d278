//! Events on Services: what their owners must know, told where they look (`kubectl describe service`).
//!
//! The name of an Event follows from what it says, so that every node of a cluster that finds the same, and an agent
//! that starts again, make one Event together: who comes second is told that it exists.
//! (`kube::runtime::events::Recorder` names each by the time; a thousand nodes would make a thousand.)

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
use throttle::{REPEAT, Throttle, Verdict};

/// Who reports.
const CONTROLLER: &str = "lb-agent";
/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time until what could not be told is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// The longest note and instance that the API takes, in bytes.
const MAX_NOTE: usize = 1000;
const MAX_INSTANCE: usize = 128;

/// Where problems of Services are handed to the task that makes Events of them.
#[derive(Debug)]
pub struct Notices {
    told: watch::Sender<Vec<Problem>>,
}

impl Notices {
    /// Starts the task on the runtime of the caller; it ends with this.
    ///
    /// # Panics
    /// Outside of a runtime.
    #[must_use]
    pub fn start(client: kube::Client, node: &str, metrics: &Metrics) -> Self {
        let (told, problems) = watch::channel(Vec::new());
        let teller = Teller {
            client,
            node: node.to_owned(),
            problems,
            throttle: Throttle::new(Instant::now()),
            count: metrics.events(),
        };
        tokio::spawn(teller.run());
        Self { told }
    }

    /// Everything that is wrong now.
    pub fn tell(&self, problems: &[Problem]) {
        let of_services: Vec<_> = problems
            .iter()
            .filter(|problem| problem.service.is_some() && reason(problem.kind).is_some())
            .cloned()
            .collect();
        self.told.send_if_modified(|told| {
            let news = *told != of_services;
            *told = of_services;
            news
        });
    }
}

/// What an Event says.
#[derive(Debug, Clone, Copy)]
struct Reason {
    reason: &'static str,
    action: &'static str,
    /// It is so on this node, whatever others find.
    here: bool,
}

/// `None`: no business of a Service's owner.
fn reason(kind: ProblemKind) -> Option<Reason> {
    let of = |reason, action, here| Some(Reason { reason, action, here });
    match kind {
        ProblemKind::Source => of("InvalidService", "Read", false),
        ProblemKind::Conflict => of("AddressConflict", "Serve", false),
        ProblemKind::Map => of("FailedToServe", "Serve", true),
        // As kube-proxy names it.
        ProblemKind::HealthCheck => of("FailedToStartServiceHealthcheck", "Listen", true),
        ProblemKind::Node | ProblemKind::Sockets | ProblemKind::Server => None,
    }
}

/// What is equal in two nodes of one build.
fn hash(parts: &[&str]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// The beginning of a text, as long as the API takes it.
fn cut(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].to_owned()
}

/// The Event of a problem; `None` where nobody is told.
fn event(problem: &Problem, service: &ObjectKey, uid: Option<String>, node: &str) -> Option<Event> {
    let Reason { reason, action, here } = reason(problem.kind)?;
    let note = if here {
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

struct Teller {
    client: kube::Client,
    node: String,
    problems: watch::Receiver<Vec<Problem>>,
    throttle: Throttle,
    count: IntCounterVec,
}

impl Teller {
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

    /// Tells what may be told now; when to look again.
    async fn round(&mut self) -> Instant {
        let problems = self.problems.borrow_and_update().clone();
        let mut next = Instant::now() + REPEAT;
        for problem in &problems {
            let Some(service) = &problem.service else { continue };
            let what = hash(&[problem.kind.label(), &problem.message]);
            match self.throttle.ask(service, what, Instant::now()) {
                Verdict::Told(again) | Verdict::Later(again) => next = next.min(again),
                Verdict::Now => match self.publish(problem, service).await {
                    Ok(()) => self.note("published"),
                    Err(error) => {
                        warn!(%service, error, "an Event could not be made");
                        self.note("failed");
                        self.throttle.failed(service, what);
                        next = next.min(Instant::now() + AGAIN);
                    }
                },
            }
        }
        self.throttle.forget(Instant::now());
        next
    }

    fn note(&self, result: &str) {
        self.count.with_label_values(&[result]).inc();
    }

    async fn publish(&self, problem: &Problem, service: &ObjectKey) -> Result<(), String> {
        match timeout(PATIENCE, self.try_publish(problem, service)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        }
    }

    async fn try_publish(&self, problem: &Problem, service: &ObjectKey) -> kube::Result<()> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), &service.namespace);
        // Without the uid, `kubectl describe` would not find the Event. Upstream's role for a Service proxy lets it list
        // Services, not get one.
        let named = ListParams::default().fields(&format!("metadata.name={}", service.name));
        let Some(found) = services.list_metadata(&named).await?.items.pop() else {
            debug!(%service, "gone before its owner could be told");
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

    /// An API server, and the Events that it was told.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<Vec<Value>>>);

    impl Server {
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

    /// Agents of some nodes, one after the other, that find the same; what the API server has then, and what came of
    /// it: published and failed.
    async fn told(nodes: &[&str], problems: &[Problem]) -> (Vec<Value>, [u64; 2]) {
        let server = Server::default();
        let at = (Ipv4Addr::LOCALHOST, 0).into();
        let listener = bind::listen(at).unwrap();
        let at = listener.local_addr().unwrap();
        drop(listener);
        let serving = tokio::spawn(serve::serve(at, server.routes()).unwrap());
        let uri: Uri = format!("http://{at}").parse().unwrap();
        let client = kube::Client::try_from(kube::Config::new(uri)).unwrap();
        let metrics = Metrics::new().unwrap();
        for node in nodes {
            let (told, problems) = watch::channel(problems.to_vec());
            let mut teller = Teller {
                client: client.clone(),
                node: (*node).to_owned(),
                problems,
                throttle: Throttle::new(Instant::now()),
                count: metrics.events(),
            };
            teller.round().await;
            // Nothing new: nothing is asked.
            teller.round().await;
            drop(told);
        }
        serving.abort();
        let count = |result| metrics.events().with_label_values(&[result]).get();
        let events = server.0.lock().unwrap().clone();
        (events, ["published", "failed"].map(count))
    }

    #[tokio::test]
    async fn the_owner_finds_what_is_wrong_at_the_service() {
        let conflict = problem("web", ProblemKind::Conflict, "10.96.0.1:80/TCP is default/older's");
        let (events, counts) = told(&["n1"], &[conflict]).await;
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
    async fn what_all_nodes_find_is_one_event_and_what_one_finds_its_own() {
        let problems = [
            problem("web", ProblemKind::Conflict, "an address is another's"),
            problem("web", ProblemKind::Source, "a field is wrong"),
            problem("web", ProblemKind::HealthCheck, "the port is taken"),
            problem("full", ProblemKind::Map, "no room"),
        ];
        let (events, counts) = told(&["n1", "n2", "n1"], &problems).await;
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
    async fn a_service_that_is_gone_has_no_owner() {
        let (events, counts) = told(&["n1"], &[problem("gone", ProblemKind::Map, "no room")]).await;
        assert_eq!((events, counts), (Vec::new(), [1, 0]));
    }

    #[tokio::test]
    async fn what_is_too_long_is_cut_where_a_character_ends() {
        let (events, counts) = told(&["n1"], &[problem("web", ProblemKind::Source, &"ä".repeat(600))]).await;
        assert_eq!(counts, [1, 0]);
        assert_eq!(events[0]["note"].as_str().unwrap().len(), MAX_NOTE);
    }

    #[tokio::test]
    async fn problems_of_the_node_are_nobodys_business() {
        let metrics = Metrics::new().unwrap();
        let client = kube::Client::try_from(kube::Config::new(Uri::from_static("http://127.0.0.1:9"))).unwrap();
        let notices = Notices::start(client, "n1", &metrics);
        notices.tell(&[
            problem("web", ProblemKind::Server, "x"),
            Problem::new("somewhere", "y").kind(ProblemKind::Map),
        ]);
        assert_eq!(*notices.told.borrow(), []);
        let ours = problem("web", ProblemKind::Map, "z");
        notices.tell(std::slice::from_ref(&ours));
        assert_eq!(*notices.told.borrow(), [ours]);
    }
}
