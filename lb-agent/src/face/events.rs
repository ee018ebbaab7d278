//! Events on Services: what their owners must know, told where they look (`kubectl describe service`).
//!
//! The name of an Event follows from what it says, so that every node of a cluster that finds the same, and an agent
//! that starts again, make one Event together: who comes second is told that it exists.
//! (`kube::runtime::events::Recorder` names each by the time; a thousand nodes would make a thousand.)

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use prometheus::IntCounterVec;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Metrics;
use super::throttle::{REPEAT, Throttle, Verdict};
use crate::model::{ObjectKey, Problem, ProblemKind};

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
        // Without the uid, `kubectl describe` would not find the Event.
        let Some(found) = services.get_metadata_opt(&service.name).await? else {
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
