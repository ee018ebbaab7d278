//! Other interfaces of the agents for a cluster: health, health check node ports, metrics, Events.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::events::v1::Event;
use lb_tests::Netns;
use lb_tests::control_plane::{Namespace, PodTemplate};
use lb_tests::eventually;
use lb_tests::http::{Response, get};
use serde_json::{Value, json};

use crate::Test;
use crate::fixture::{Fixture, TARGET};

pub(crate) const TESTS: &[Test] = &[
    (
        "node_marked_for_deletion_fails_healthz",
        node_marked_for_deletion_fails_healthz,
    ),
    (
        "health_check_node_port_counts_local_endpoints",
        health_check_node_port_counts_local_endpoints,
    ),
    ("programming_latency_is_measured", programming_latency_is_measured),
    (
        "address_conflict_is_one_event_for_all_nodes",
        address_conflict_is_one_event_for_all_nodes,
    ),
];

const NODES: [&str; 2] = ["n1", "n2"];

/// Sends a request to a node's own loopback.
fn get_local(node: &Netns, port: u16, path: &str) -> Result<Response> {
    get(node, (IpAddr::from(Ipv4Addr::LOCALHOST), port).into(), path)
}

fn node_marked_for_deletion_fails_healthz(fixture: &Fixture) -> Result<()> {
    let node = fixture.node("n2");
    let healthz = |status: u16| {
        eventually(&format!("/healthz returns {status}"), || {
            let response = get_local(node, 10256, "/healthz")?;
            ensure!(response.status == status, "{response:?}");
            let body: Value = response.json()?;
            ensure!(body["nodeEligible"] == json!(status == 200), "{body}");
            ensure!(
                get_local(node, 10256, "/livez")?.status == 200,
                "/livez must return 200"
            );
            Ok(())
        })
    };
    let taint = |taints: Value| {
        let change = json!({"spec": {"taints": taints}});
        fixture
            .control_plane
            .objects()
            .patch_global::<Node>("n2", change, false)
    };
    healthz(200)?;
    taint(json!([{"key": "ToBeDeletedByClusterAutoscaler", "value": "1", "effect": "NoSchedule"}]))?;
    healthz(503)?;
    ensure!(
        get_local(fixture.node("n1"), 10256, "/healthz")?.status == 200,
        "the other node must stay healthy"
    );
    taint(json!(null))?;
    healthz(200)
}

fn health_check_node_port_counts_local_endpoints(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("health-checks")?;
    let spec = json!({
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "selector": {"app": "web"},
        "ports": [{"port": 80, "targetPort": TARGET}],
    });
    let service = namespace.create_service("web", spec)?;
    let port = |service: &Service| service.spec.as_ref()?.health_check_node_port;
    let port = u16::try_from(port(&service).context("the API server allocated no port")?)?;
    let expect_counts = |expected: [usize; 2]| {
        eventually(&format!("endpoints {expected:?}"), || {
            for (node, endpoints) in NODES.into_iter().zip(expected) {
                let response = get_local(fixture.node(node), port, "/")?;
                let body: Value = response.json()?;
                ensure!(body["localEndpoints"] == json!(endpoints), "{node}: {body}");
                ensure!(
                    body["service"] == json!({"namespace": "health-checks", "name": "web"}),
                    "{body}"
                );
                ensure!(response.status == if endpoints > 0 { 200 } else { 503 }, "{response:?}");
            }
            Ok(())
        })
    };
    expect_counts([0, 0])?;
    let pod = |node, name| namespace.start_pod(&fixture.cluster, node, name, &PodTemplate::app("web"));
    let pods = [pod("n1", "web-1")?, pod("n1", "web-2")?, pod("n2", "web-3")?];
    for pod in &pods {
        pod.set_ready(true)?;
    }
    expect_counts([2, 1])?;
    pods[2].terminate()?;
    expect_counts([2, 0])?;
    pods[0].set_ready(false)?;
    expect_counts([1, 0])?;
    namespace.patch_service("web", json!({"spec": {"externalTrafficPolicy": "Cluster"}}))?;
    eventually("no process listens", || {
        for node in NODES {
            ensure!(get_local(fixture.node(node), port, "/").is_err(), "{node}");
        }
        Ok(())
    })
}

/// Returns a metric of a node's agent; zero if it is absent.
fn metric(node: &Netns, name: &str) -> Result<f64> {
    let response = get_local(node, 10249, "/metrics")?;
    let line = response
        .body
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.map(str::parse).transpose()?.unwrap_or_default())
}

fn programming_latency_is_measured(fixture: &Fixture) -> Result<()> {
    const MEASURED: [&str; 2] = [
        "lb_event_to_map_seconds_count",
        "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}",
    ];
    let namespace = fixture.control_plane.namespace("measured")?;
    let measured =
        |node| -> Result<Vec<f64>> { MEASURED.iter().map(|name| metric(fixture.node(node), name)).collect() };
    let before = [measured("n1")?, measured("n2")?];
    let spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": TARGET}]});
    namespace.create_service("web", spec)?;
    let pod = namespace.start_pod(&fixture.cluster, "n1", "web", &PodTemplate::app("web"))?;
    pod.set_ready(true)?;
    for (node, before) in NODES.into_iter().zip(&before) {
        eventually("the latency is measured", || {
            for ((name, before), now) in MEASURED.iter().zip(before).zip(measured(node)?) {
                ensure!(now > *before, "{node}: {name}: {before}, then {now}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn conflicts(namespace: &Namespace<'_>) -> Result<Vec<Event>> {
    let mut events = namespace.objects().list::<Event>(namespace.name(), "")?;
    events.retain(|event| event.reason.as_deref() == Some("AddressConflict"));
    Ok(events)
}

fn address_conflict_is_one_event_for_all_nodes(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("conflicts")?;
    let spec = json!({"externalIPs": ["192.0.2.77"], "ports": [{"port": 80}]});
    let services = [
        namespace.create_service("one", spec.clone())?,
        namespace.create_service("other", spec)?,
    ];
    let published = |node| metric(fixture.node(node), "lb_events_total{result=\"published\"}");
    let event = eventually("the loser has an Event", || {
        let event = conflicts(&namespace)?.pop().context("no Event")?;
        for node in NODES {
            ensure!(published(node)? >= 1.0, "{node} has published no Event");
        }
        Ok(event)
    })?;
    ensure!(
        conflicts(&namespace)?.len() == 1,
        "each node created an Event of its own"
    );
    let regarding = event.regarding.context("an Event that regards nothing")?;
    let loser = services.iter().find(|service| service.metadata.uid == regarding.uid);
    let loser = loser.context("an Event that regards another object")?;
    ensure!(loser.metadata.name == regarding.name, "{regarding:?}");
    let name = regarding.name.unwrap_or_default();
    let output = fixture
        .control_plane
        .kubectl(&["--namespace", "conflicts", "describe", "service", &name], "")?;
    ensure!(
        output.contains("AddressConflict") && output.contains("192.0.2.77"),
        "{output}"
    );
    Ok(())
}
