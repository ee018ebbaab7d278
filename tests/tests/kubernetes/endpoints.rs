//! Endpoints: which pods are reached, from which node, in which of their conditions.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Service;
use lb_tests::control_plane::{ENDPOINTS_PER_SLICE, Namespace, PodTemplate, slice_endpoints};
use lb_tests::eventually;
use lb_tests::{Connect, testbed};
use libc::{ECONNREFUSED, EHOSTUNREACH};
use serde_json::{Value, json};

use crate::Test;
use crate::fixture::{Backend, Fixture, Outcome, TARGET, tcp, udp};

pub(crate) const TESTS: &[Test] = &[
    (
        "service_without_endpoints_is_refused",
        service_without_endpoints_is_refused,
    ),
    ("readiness_gates_decide_readiness", readiness_gates_decide_readiness),
    (
        "publish_not_ready_addresses_serves_unready_pods",
        publish_not_ready_addresses_serves_unready_pods,
    ),
    ("host_network_pods_are_endpoints", host_network_pods_are_endpoints),
    (
        "replaced_pod_is_served_at_its_new_address",
        replaced_pod_is_served_at_its_new_address,
    ),
    (
        "terminating_endpoints_serve_when_none_is_ready",
        terminating_endpoints_serve_when_none_is_ready,
    ),
    (
        "local_policy_falls_back_to_local_terminating_endpoints",
        local_policy_falls_back_to_local_terminating_endpoints,
    ),
    (
        "internal_traffic_policy_can_be_switched",
        internal_traffic_policy_can_be_switched,
    ),
    (
        "topology_hints_select_endpoints_by_zone_and_node",
        topology_hints_select_endpoints_by_zone_and_node,
    ),
    (
        "endpoints_of_several_slices_are_merged",
        endpoints_of_several_slices_are_merged,
    ),
    (
        "duplicate_endpoints_in_manual_slices_count_once",
        duplicate_endpoints_in_manual_slices_count_once,
    ),
];

/// Creates a Service on port 80, TCP and UDP, of the pods with the label `app: web`, with additions to its spec.
fn web(namespace: &Namespace<'_>, more: &[(&str, Value)]) -> Result<Service> {
    let mut spec = json!({
        "selector": {"app": "web"},
        "ports": [
            {"name": "tcp", "port": 80, "targetPort": TARGET},
            {"name": "udp", "port": 80, "targetPort": TARGET, "protocol": "UDP"},
        ],
    });
    for (key, value) in more {
        spec[*key] = value.clone();
    }
    namespace.create_service("web", spec)
}

/// Starts a backend of the Service `web`.
fn backend<'a>(fixture: &Fixture, namespace: &Namespace<'a>, node: &str, name: &str) -> Result<Backend<'a>> {
    fixture.backend(namespace, node, name, &PodTemplate::app("web"))
}

fn names(names: &[&str]) -> Outcome {
    Outcome::names(names)
}

fn service_without_endpoints_is_refused(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("none")?;
    let service = web(&namespace, &[])?;
    let refused = Outcome::Failed(ECONNREFUSED);
    for target in [tcp(&service, 80)?, udp(&service, 80)?] {
        fixture.expect(&fixture.all_clients(), target, &refused)?;
    }
    let pod = backend(fixture, &namespace, "n3", "web")?;
    for target in [tcp(&service, 80)?, udp(&service, 80)?] {
        fixture.expect(&fixture.all_clients(), target, &names(&["web"]))?;
    }
    pod.kubelet.finish(&fixture.cluster)?;
    for target in [tcp(&service, 80)?, udp(&service, 80)?] {
        fixture.expect(&fixture.all_clients(), target, &refused)?;
    }
    Ok(())
}

fn readiness_gates_decide_readiness(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("ready")?;
    let target = tcp(&web(&namespace, &[])?, 80)?;
    let a = fixture.backend(&namespace, "n1", "a", &PodTemplate::app("web").gate("test/gate"))?;
    let b = backend(fixture, &namespace, "n2", "b")?;
    fixture.expect(&fixture.all_clients(), target, &names(&["b"]))?;
    a.kubelet.set_condition("test/gate", true)?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a", "b"]))?;
    b.kubelet.set_ready(false)?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a"]))?;
    a.kubelet.set_condition("test/gate", false)?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::Failed(ECONNREFUSED))?;
    b.kubelet.set_ready(true)?;
    fixture.expect(&fixture.all_clients(), target, &names(&["b"]))
}

fn publish_not_ready_addresses_serves_unready_pods(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("published")?;
    let target = tcp(&web(&namespace, &[("publishNotReadyAddresses", json!(true))])?, 80)?;
    let pods = [
        backend(fixture, &namespace, "n1", "a")?,
        backend(fixture, &namespace, "n2", "b")?,
    ];
    let both = names(&["a", "b"]);
    fixture.expect(&fixture.all_clients(), target, &both)?;
    pods[0].kubelet.set_ready(false)?;
    eventually("the pod is not ready", || {
        let pod = fixture
            .control_plane
            .kubectl(&["get", "pod", "a", "--namespace", "published"], "")?;
        ensure!(pod.contains("0/1"), "{pod}");
        Ok(())
    })?;
    fixture.expect(&fixture.all_clients(), target, &both)?;
    // Terminating pods too: with publishNotReadyAddresses such an endpoint counts as ready in every state of its pod.
    pods[0].kubelet.terminate()?;
    eventually("the endpoint is terminating", || {
        let slices = namespace.slices("web")?;
        let conditions = slice_endpoints(&slices).filter_map(|endpoint| endpoint.conditions.as_ref());
        ensure!(
            conditions.filter(|is| is.terminating == Some(true)).count() == 1,
            "{slices:?}"
        );
        Ok(())
    })?;
    fixture.expect(&fixture.all_clients(), target, &both)?;
    namespace.patch_service("web", json!({"spec": {"publishNotReadyAddresses": false}}))?;
    fixture.expect(&fixture.all_clients(), target, &names(&["b"]))
}

fn host_network_pods_are_endpoints(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("host")?;
    let port = 18_080;
    let ports = json!([{"port": 80, "targetPort": port}]);
    let service = namespace.create_service("web", json!({"selector": {"app": "web"}, "ports": ports}))?;
    let template = PodTemplate::app("web").host_network();
    let pods = ["n1", "n2"].map(|node| fixture.backend_at(&namespace, node, &format!("on-{node}"), &template, &[port]));
    let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &names(&["on-n1", "on-n2"]))?;
    pods[0].kubelet.set_ready(false)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &names(&["on-n2"]))?;
    // A host-network pod is local to its node for traffic policies.
    namespace.patch_service("web", json!({"spec": {"internalTrafficPolicy": "Local"}}))?;
    fixture.expect(
        &fixture.clients_on("n1"),
        tcp(&service, 80)?,
        &Outcome::Failed(EHOSTUNREACH),
    )?;
    fixture.expect(&fixture.clients_on("n2"), tcp(&service, 80)?, &names(&["on-n2"]))
}

/// Each replacement has another address and is on the other node.
fn replaced_pod_is_served_at_its_new_address(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("replaced")?;
    let service = web(&namespace, &[])?;
    let mut old = backend(fixture, &namespace, "n1", "web-0")?;
    for number in 1..=3 {
        let name = format!("web-{number}");
        let new = backend(fixture, &namespace, ["n1", "n2"][number % 2], &name)?;
        old.kubelet.terminate()?;
        old.kubelet.finish(&fixture.cluster)?;
        fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &names(&[&name]))?;
        fixture.expect(&fixture.all_clients(), udp(&service, 80)?, &names(&[&name]))?;
        old = new;
    }
    Ok(())
}

fn terminating_endpoints_serve_when_none_is_ready(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("terminating")?;
    let target = tcp(&web(&namespace, &[])?, 80)?;
    let at = target.address();
    let a = backend(fixture, &namespace, "n1", "a")?;
    let b = backend(fixture, &namespace, "n2", "b")?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a", "b"]))?;
    let held = testbed().hold(fixture.pod_on("n2"), &[at], 50)?;
    a.kubelet.terminate()?;
    fixture.expect(&fixture.all_clients(), target, &names(&["b"]))?;
    // Established connections stay.
    let held = held.finish()?;
    ensure!(
        (held.held, held.live) == (50, 50) && held.live_per_backend.len() == 2,
        "{held:?}"
    );
    b.kubelet.set_ready(false)?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a"]))?;
    // A terminating pod that fails its readiness probe no longer serves.
    a.kubelet.set_ready(false)?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::Failed(ECONNREFUSED))?;
    b.kubelet.set_ready(true)?;
    fixture.expect(&fixture.all_clients(), target, &names(&["b"]))?;
    a.kubelet.finish(&fixture.cluster)?;
    b.kubelet.terminate()?;
    fixture.expect(&fixture.all_clients(), target, &names(&["b"]))
}

fn local_policy_falls_back_to_local_terminating_endpoints(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("terminating-local")?;
    let target = tcp(&web(&namespace, &[("internalTrafficPolicy", json!("Local"))])?, 80)?;
    let a = backend(fixture, &namespace, "n1", "a")?;
    let b = backend(fixture, &namespace, "n2", "b")?;
    fixture.expect(&fixture.clients_on("n1"), target, &names(&["a"]))?;
    fixture.expect(&fixture.clients_on("n2"), target, &names(&["b"]))?;
    // A ready endpoint on another node does not count.
    a.kubelet.terminate()?;
    fixture.expect(&fixture.clients_on("n1"), target, &names(&["a"]))?;
    let c = backend(fixture, &namespace, "n1", "c")?;
    fixture.expect(&fixture.clients_on("n1"), target, &names(&["c"]))?;
    c.kubelet.terminate()?;
    fixture.expect(&fixture.clients_on("n1"), target, &names(&["a", "c"]))?;
    a.kubelet.finish(&fixture.cluster)?;
    c.kubelet.finish(&fixture.cluster)?;
    fixture.expect(&fixture.clients_on("n1"), target, &Outcome::Failed(EHOSTUNREACH))?;
    fixture.expect(&fixture.clients_on("n2"), target, &names(&["b"]))?;
    drop(b);
    Ok(())
}

fn internal_traffic_policy_can_be_switched(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("local")?;
    let service = web(&namespace, &[])?;
    let targets = [tcp(&service, 80)?, udp(&service, 80)?];
    let _a = backend(fixture, &namespace, "n1", "a")?;
    let _c = backend(fixture, &namespace, "n3", "c")?;
    for _ in 0..2 {
        for target in targets {
            fixture.expect(&fixture.all_clients(), target, &names(&["a", "c"]))?;
        }
        namespace.patch_service("web", json!({"spec": {"internalTrafficPolicy": "Local"}}))?;
        for target in targets {
            fixture.expect(&fixture.clients_on("n1"), target, &names(&["a"]))?;
            fixture.expect(&fixture.clients_on("n2"), target, &Outcome::Failed(EHOSTUNREACH))?;
        }
        namespace.patch_service("web", json!({"spec": {"internalTrafficPolicy": "Cluster"}}))?;
    }
    Ok(())
}

/// Zone a has the first node, zone b the second and the third.
fn topology_hints_select_endpoints_by_zone_and_node(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("distribution")?;
    let target = tcp(&web(&namespace, &[])?, 80)?;
    let _a = backend(fixture, &namespace, "n1", "a")?;
    let b = backend(fixture, &namespace, "n2", "b")?;
    let c = backend(fixture, &namespace, "n3", "c")?;
    let all = names(&["a", "b", "c"]);
    let expect = |first: &Outcome, second: &Outcome| {
        fixture.expect(&fixture.clients_on("n1"), target, first)?;
        fixture.expect(&fixture.clients_on("n2"), target, second)
    };
    let set = |distribution: Option<&str>| {
        namespace.patch_service("web", json!({"spec": {"trafficDistribution": distribution}}))
    };
    expect(&all, &all)?;
    // Endpoints are distributed as the zones have processors: a third and two thirds.
    let annotate = |mode: Option<&str>| {
        let annotations = json!({"service.kubernetes.io/topology-mode": mode});
        namespace.patch_service("web", json!({"metadata": {"annotations": annotations}}))
    };
    annotate(Some("Auto"))?;
    expect(&names(&["a"]), &names(&["b", "c"]))?;
    annotate(None)?;
    expect(&all, &all)?;
    for zone in ["PreferClose", "PreferSameZone"] {
        set(Some(zone))?;
        expect(&names(&["a"]), &names(&["b", "c"]))?;
        set(None)?;
        expect(&all, &all)?;
    }
    set(Some("PreferSameNode"))?;
    expect(&names(&["a"]), &names(&["b"]))?;
    // If this node has none, the endpoints of its zone are used.
    b.kubelet.set_ready(false)?;
    expect(&names(&["a"]), &names(&["c"]))?;
    // If the zone has none, all endpoints are used.
    c.kubelet.set_ready(false)?;
    expect(&names(&["a"]), &names(&["a"]))?;
    c.kubelet.set_ready(true)?;
    set(Some("PreferSameZone"))?;
    expect(&names(&["a"]), &names(&["c"]))?;
    // A node moves to another zone, or out of all zones.
    let moves = || -> Result<()> {
        for (zone, outcome) in [(Some("a"), ["a"].as_slice()), (None, &["a", "c"])] {
            fixture.control_plane.set_zone("n2", zone)?;
            expect(&names(&["a"]), &names(outcome))?;
        }
        Ok(())
    };
    let moved = moves();
    fixture.control_plane.set_zone("n2", Some("b"))?;
    moved?;
    expect(&names(&["a"]), &names(&["c"]))
}

fn endpoints_of_several_slices_are_merged(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("several")?;
    let target = tcp(&web(&namespace, &[])?, 80)?;
    let count = ENDPOINTS_PER_SLICE + 2;
    let mut pods = Vec::new();
    let mut all = Vec::new();
    for number in 0..count {
        let name = format!("web-{number}");
        pods.push(backend(fixture, &namespace, ["n1", "n2", "n3"][number % 3], &name)?);
        all.push(name);
    }
    let expect = |all: &[String]| {
        let all: Vec<_> = all.iter().map(String::as_str).collect();
        fixture.expect(&fixture.all_clients(), target, &names(&all))
    };
    expect(&all)?;
    let slices = namespace.slices("web")?;
    ensure!(slices.len() >= 2, "{slices:?}");
    // Removed from the first on, so that slices become empty and are merged.
    for _ in 1..count {
        pods.remove(0).kubelet.finish(&fixture.cluster)?;
        all.remove(0);
        expect(&all)?;
    }
    Ok(())
}

/// A Service without a selector and with manual slices. One endpoint is in two of them, as it is while a controller
/// moves it.
fn duplicate_endpoints_in_manual_slices_count_once(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("by-hand")?;
    let ports = json!([{"port": 80, "targetPort": TARGET}]);
    let target = tcp(&namespace.create_service("web", json!({"ports": ports}))?, 80)?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::Failed(ECONNREFUSED))?;
    let pods = [
        backend(fixture, &namespace, "n1", "a")?,
        backend(fixture, &namespace, "n3", "c")?,
    ];
    let [a, c] = [&pods[0], &pods[1]].map(|pod| pod.kubelet.addresses()[0]);
    let apply = |name: &str, endpoints: &[(IpAddr, bool)]| {
        let endpoint =
            |&(address, ready): &(IpAddr, bool)| json!({"addresses": [address], "conditions": {"ready": ready}});
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "by-hand", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"port": TARGET}],
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        });
        fixture
            .control_plane
            .kubectl(&["apply", "--filename", "-"], &slice.to_string())
    };
    apply("one", &[(a, true)])?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a"]))?;
    apply("two", &[(a, true), (c, true)])?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a", "c"]))?;
    // An endpoint in two slices is selected as often as any other.
    let at = target.address();
    let summary = testbed().connect(fixture.pod_on("n1"), &Connect::to(&[at]).count(4000))?;
    summary.all_well()?;
    let share = summary.reached("a");
    ensure!((1800..=2200).contains(&share), "{share} of 4000");
    apply("one", &[])?;
    fixture.expect(&fixture.all_clients(), target, &names(&["a", "c"]))?;
    apply("two", &[(c, true)])?;
    fixture.expect(&fixture.all_clients(), target, &names(&["c"]))?;
    let delete = ["delete", "endpointslice", "one", "two", "--namespace", "by-hand"];
    fixture.control_plane.kubectl(&delete, "")?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::Failed(ECONNREFUSED))
}
