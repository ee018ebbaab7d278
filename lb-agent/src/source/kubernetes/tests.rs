//! Events in all orders that an API server can send them, and a model of their meaning.

use futures::stream;
use proptest::prelude::*;

use super::*;
use lb_core::model::{Node, Service};
use lb_core::testing;

/// A source of these events, which come as fast as they are taken.
fn source(events: Vec<WatchEvent>) -> KubernetesSource {
    // More may come.
    let events = stream::iter(events).chain(stream::pending()).boxed();
    let (keep, failures) = watch::channel(Failures::new());
    std::mem::forget(keep);
    KubernetesSource::of([events], failures, vec!["10.96.0.1".into()])
}

fn event(kind: Kind, event: Event<WatchedObject>) -> WatchEvent {
    WatchEvent { kind, event: Ok(event) }
}

fn seen(object: Object) -> WatchedObject {
    WatchedObject {
        key: object.id().key,
        object: Ok(Some(object)),
        trigger: None,
    }
}

fn broken(name: &str) -> WatchedObject {
    WatchedObject {
        key: ObjectKey::new("default", name),
        object: Err("spec.ports: missing".into()),
        trigger: None,
    }
}

fn service(name: &str, ip: &str) -> Object {
    testing::service(name, ip).into()
}

fn set(object: Object) -> WatchEvent {
    event(object.id().kind, Event::Apply(seen(object)))
}

fn delete(object: Object) -> WatchEvent {
    event(object.id().kind, Event::Delete(seen(object)))
}

/// A list of one kind.
fn list(kind: Kind, objects: impl IntoIterator<Item = WatchedObject>) -> Vec<WatchEvent> {
    let objects = objects.into_iter().map(Event::InitApply);
    let events = [Event::Init].into_iter().chain(objects).chain([Event::InitDone]);
    events.map(|listed| event(kind, listed)).collect()
}

/// Lists of all kinds; Services as given.
fn lists(services: impl IntoIterator<Item = WatchedObject>) -> Vec<WatchEvent> {
    let mut events = list(Kind::Service, services);
    events.extend(list(Kind::EndpointSlice, []));
    events.extend(list(Kind::Node, []));
    events
}

/// The next batch, if there is one now.
fn now(source: &mut KubernetesSource) -> Option<Batch> {
    source.next().now_or_never()
}

/// All batches that there are now.
fn all(source: &mut KubernetesSource) -> Vec<Batch> {
    std::iter::from_fn(|| now(source)).collect()
}

#[tokio::test]
async fn nothing_is_told_before_everything_is_known() {
    let mut events = list(Kind::Service, [seen(service("a", "10.96.0.9"))]);
    events.extend(list(
        Kind::EndpointSlice,
        [seen(testing::slice("a", &["10.0.0.1"]).into())],
    ));
    assert!(all(&mut source(events)).is_empty(), "Nodes are not listed");

    let mut events = lists([seen(service("a", "10.96.0.9"))]);
    events.push(set(service("b", "10.96.0.10")));
    let batches = all(&mut source(events));
    assert_eq!(batches.len(), 1);
    assert!(batches[0].complete && batches[0].problems.is_empty());
    assert_eq!(batches[0].changes.len(), 2);
}

#[tokio::test]
async fn a_cluster_without_objects_is_complete_too() {
    let batches = all(&mut source(lists([])));
    assert_eq!(batches, [Batch::of(Vec::new())]);
}

#[tokio::test]
async fn the_last_word_on_an_object_counts() {
    let mut source = source(lists([]));
    now(&mut source).unwrap();
    source.record(set(service("a", "10.96.0.9")));
    source.record(set(service("a", "10.96.0.10")));
    source.record(set(service("b", "10.96.0.11")));
    source.record(delete(service("b", "10.96.0.11")));
    source.pending.news = true;
    let batch = now(&mut source).unwrap();
    assert!(batch.received.is_some());
    let gone = service("b", "10.96.0.11").id();
    assert_eq!(
        batch.changes,
        [Change::Set(service("a", "10.96.0.10")), Change::Remove(gone)]
    );
}

#[tokio::test]
async fn a_new_list_tells_what_is_gone() {
    let mut events = lists(["a", "b", "c"].map(|name| seen(service(name, "10.96.0.9"))));
    let first = all(&mut source(lists([])));
    assert_eq!(first.len(), 1);
    events.extend(list(Kind::Service, [broken("b"), seen(service("c", "10.96.0.10"))]));
    let mut source = source(events);
    let mut changes = BTreeMap::new();
    let mut last = Batch::default();
    for batch in all(&mut source) {
        changes.extend(batch.changes.iter().map(|change| match change {
            Change::Set(object) => (object.id(), Some(object.clone())),
            Change::Remove(id) => (id.clone(), None),
        }));
        last = batch;
    }
    let of = |name: &str| changes[&service(name, "10.96.0.9").id()].clone();
    assert_eq!(of("a"), None);
    assert_eq!(
        of("b"),
        Some(service("b", "10.96.0.9")),
        "what it said last stays in force"
    );
    assert_eq!(of("c"), Some(service("c", "10.96.0.10")));
    assert_eq!(last.problems.len(), 1);
    assert_eq!(last.problems[0].service, Some(ObjectKey::new("default", "b")));
}

#[tokio::test]
async fn a_broken_object_is_a_problem_until_it_is_mended_or_gone() {
    let mut source = source(lists([broken("a"), broken("b")]));
    let problems = |source: &mut KubernetesSource| now(source).map(|batch| batch.problems.len());
    assert_eq!(problems(&mut source), Some(2));
    source.record(event(Kind::Service, Event::Apply(broken("a"))));
    assert_eq!(problems(&mut source), None, "nothing new");
    source.record(set(service("a", "10.96.0.9")));
    assert_eq!(problems(&mut source), Some(1));
    source.record(event(Kind::Service, Event::Delete(broken("b"))));
    assert_eq!(problems(&mut source), Some(0));
}

#[tokio::test]
async fn what_cannot_be_fetched_is_told_and_what_works_again_too() {
    let (failures, seen) = watch::channel(Failures::new());
    let mut source = KubernetesSource::of([stream::pending().boxed()], seen, Vec::new());
    assert_eq!(now(&mut source), None);
    failures.send_modify(|all| drop(all.insert("/api/v1/services".into(), "refused".into())));
    let batch = now(&mut source).unwrap();
    assert!(!batch.complete);
    assert_eq!(batch.problems[0].to_string(), "API server, /api/v1/services: refused");
    failures.send_modify(BTreeMap::clear);
    assert!(now(&mut source).unwrap().problems.is_empty());
}

#[tokio::test]
async fn an_api_server_behind_a_service_address_is_a_problem() {
    let batches = all(&mut source(lists([seen(service("kubernetes", "10.96.0.1"))])));
    let problem = batches[0].problems[0].to_string();
    assert!(
        problem.contains("default/kubernetes") && problem.contains("--kube-apiserver"),
        "{problem}"
    );
}

#[tokio::test]
async fn only_what_happens_while_the_agent_runs_is_timed() {
    let mut source = source(lists([]));
    assert_eq!(now(&mut source).unwrap().received, None);
    let before = source.started - Duration::from_secs(5);
    let after = source.started + Duration::from_secs(5);
    for (name, trigger) in [("a", before), ("b", after)] {
        let mut slice = seen(testing::slice(name, &["10.0.0.1"]).into());
        slice.trigger = Some(trigger);
        source.record(event(Kind::EndpointSlice, Event::Apply(slice)));
    }
    let pending = std::mem::take(&mut source.pending);
    assert_eq!(pending.triggers, [after]);
    assert!(pending.received.is_some());
}

#[test]
fn the_trigger_time_is_read_with_its_fraction() {
    let mut meta = ObjectMeta::default();
    assert_eq!(trigger(&meta), None);
    let annotation = |text: &str| Some([(ANNOTATION_TRIGGER_TIME.to_owned(), text.to_owned())].into());
    meta.annotations = annotation("2026-11-21T20:00:00.25Z");
    let since = trigger(&meta).unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(since, Duration::from_millis(1_795_291_200_250));
    meta.annotations = annotation("yesterday");
    assert_eq!(trigger(&meta), None);
}

#[test]
fn pauses_grow_to_ten_seconds_and_no_further() {
    let mut backoff = WatchBackoff::default();
    let all: Vec<_> = backoff.by_ref().take(20).collect();
    assert!(all[0] < 2 * SHORTEST_PAUSE + Duration::from_millis(1), "{all:?}");
    assert!(all[19] >= LONGEST_PAUSE && all[19] <= 2 * LONGEST_PAUSE, "{all:?}");
    backoff.reset();
    assert!(
        backoff.next().unwrap() >= LONGEST_PAUSE,
        "an event in between is no reason to hurry"
    );
}

/// Changes of a cluster, and the events by which the API server reports them.
#[derive(Debug, Clone)]
enum Happening {
    /// Service `n` gets address `m`.
    Set(u8, u8),
    Delete(u8),
    /// A repeated event, as after a resumed watch.
    Repeat,
    /// Changes without events, then a new list, as after 410 Gone.
    Missed(Vec<(u8, Option<u8>)>),
    /// A new list that breaks off after this many objects, and another list.
    Broken(usize),
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let happening = prop_oneof![
        4 => (0..6_u8, 0..9_u8).prop_map(|(n, m)| Happening::Set(n, m)),
        2 => (0..6_u8).prop_map(Happening::Delete),
        1 => Just(Happening::Repeat),
        1 => prop::collection::vec((0..6_u8, prop::option::of(0..9_u8)), 0..4).prop_map(Happening::Missed),
        1 => (0..4_usize).prop_map(Happening::Broken),
    ];
    prop::collection::vec(happening, 0..30)
}

proptest! {
    /// Whatever the events and their division into batches: at the end, the sum of the batches is the state of the
    /// cluster.
    #[test]
    fn the_sum_of_all_batches_is_a_fresh_list(happenings in happenings(), cut in any::<u64>()) {
        let object = |n: u8, m: u8| service(&format!("s{n}"), &format!("10.96.1.{m}"));
        let mut truth: BTreeMap<u8, u8> = BTreeMap::new();
        let mut events = lists([]);
        let relist = |truth: &BTreeMap<u8, u8>| list(Kind::Service, truth.iter().map(|(n, m)| seen(object(*n, *m))));
        for happening in happenings {
            match happening {
                Happening::Set(n, m) => {
                    truth.insert(n, m);
                    events.push(set(object(n, m)));
                }
                Happening::Delete(n) => {
                    if let Some(m) = truth.remove(&n) {
                        events.push(delete(object(n, m)));
                    }
                }
                Happening::Repeat => {
                    if let Some((n, m)) = truth.last_key_value() {
                        events.push(set(object(*n, *m)));
                    }
                }
                Happening::Missed(changes) => {
                    for (n, m) in changes {
                        match m {
                            Some(m) => truth.insert(n, m),
                            None => truth.remove(&n),
                        };
                    }
                    events.extend(relist(&truth));
                }
                Happening::Broken(some) => {
                    let mut part = relist(&truth);
                    part.truncate(1 + some.min(truth.len()));
                    events.extend(part);
                    events.push(WatchEvent { kind: Kind::Service, event: Err(watcher::Error::NoResourceVersion) });
                    events.extend(relist(&truth));
                }
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut source = source(Vec::new());
            let mut state: BTreeMap<ObjectId, Object> = BTreeMap::new();
            let mut take = |batch: Batch| {
                for change in batch.changes {
                    match change {
                        Change::Set(object) => drop(state.insert(object.id(), object)),
                        Change::Remove(id) => drop(state.remove(&id)),
                    }
                }
            };
            for (i, event) in events.into_iter().enumerate() {
                source.record(event);
                if cut >> (i % 64) & 1 == 1 && source.is_complete() {
                    take(source.batch());
                }
            }
            take(source.batch());
            let expected: Vec<_> = truth.iter().map(|(n, m)| object(*n, *m)).collect();
            prop_assert_eq!(state.into_values().collect::<Vec<_>>(), expected);
            Ok(())
        })?;
    }
}

#[test]
fn objects_of_all_kinds_have_the_key_that_the_model_gives_them() {
    let meta = |namespace: Option<&str>| ObjectMeta {
        name: Some("x".into()),
        namespace: namespace.map(Into::into),
        ..ObjectMeta::default()
    };
    let node = Object::Node(Arc::new(Node {
        name: "x".into(),
        addresses: Vec::new(),
        pod_cidrs: Vec::new(),
        zone: None,
        leaving: false,
    }));
    assert_eq!(key(&meta(None)), node.id().key);
    let service = Object::Service(Arc::new(Service::new(ObjectKey::new("ns", "x"))));
    assert_eq!(key(&meta(Some("ns"))), service.id().key);
}
