//! The fixture itself: controllers create slices from the pods that it reports.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::discovery::v1::Endpoint;
use lb_tests::control_plane::{ENDPOINTS_PER_SLICE, Namespace, PodTemplate, slice_endpoints};
use lb_tests::eventually;
use serde_json::json;

use crate::Test;
use crate::fixture::Fixture;

pub(crate) const TESTS: &[Test] = &[
    (
        "endpoint_slices_follow_pod_conditions",
        endpoint_slices_follow_pod_conditions,
    ),
    (
        "endpoint_slice_controller_splits_slices",
        endpoint_slice_controller_splits_slices,
    ),
    ("kubectl_lists_the_nodes", kubectl_lists_the_nodes),
];

/// Waits until both endpoints of a Service, one of each family, have these conditions: ready, serving, terminating.
fn wait_for(namespace: &Namespace<'_>, conditions: [bool; 3]) -> Result<Vec<Endpoint>> {
    eventually(&format!("ready, serving, terminating {conditions:?}"), || {
        let endpoints: Vec<_> = slice_endpoints(&namespace.slices("web")?).cloned().collect();
        ensure!(endpoints.len() == 2, "{endpoints:?}");
        for endpoint in &endpoints {
            let found = endpoint.conditions.as_ref().context("no conditions")?;
            let found = [found.ready, found.serving, found.terminating].map(|is| is == Some(true));
            ensure!(found == conditions, "{endpoint:?}");
        }
        Ok(endpoints)
    })
}

fn endpoint_slices_follow_pod_conditions(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("slices")?;
    let ports = json!([{"name": "http", "port": 80, "targetPort": "web"}]);
    let spec = json!({"selector": {"app": "web"}, "ipFamilyPolicy": "RequireDualStack", "ports": ports});
    let service = namespace.create_service("web", spec)?;
    let addresses = service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
    ensure!(addresses.len() == 2, "{addresses:?}");

    let template = PodTemplate::app("web").port("web", 8080, "TCP").gate("test/gate");
    let pod = namespace.start_pod(&fixture.cluster, "n3", "web", &template)?;
    wait_for(&namespace, [false, false, false])?;
    pod.set_ready(true)?;
    pod.set_condition("test/gate", true)?;
    let endpoints = wait_for(&namespace, [true, true, false])?;
    for endpoint in &endpoints {
        ensure!(endpoint.node_name.as_deref() == Some("n3"), "{endpoint:?}");
        ensure!(endpoint.zone.as_deref() == Some("b"), "{endpoint:?}");
    }
    let mut found: Vec<_> = endpoints
        .iter()
        .flat_map(|endpoint| endpoint.addresses.clone())
        .collect();
    found.sort();
    ensure!(found == pod.addresses().map(|address| address.to_string()), "{found:?}");
    pod.set_condition("test/gate", false)?;
    wait_for(&namespace, [false, false, false])?;
    pod.set_condition("test/gate", true)?;
    pod.terminate()?;
    wait_for(&namespace, [false, true, true])?;
    pod.set_ready(false)?;
    wait_for(&namespace, [false, false, true])?;
    pod.finish(&fixture.cluster)?;
    eventually("no endpoint", || {
        let endpoints = slice_endpoints(&namespace.slices("web")?).count();
        ensure!(endpoints == 0, "{endpoints}");
        Ok(())
    })
}

fn endpoint_slice_controller_splits_slices(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("small")?;
    let spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]});
    namespace.create_service("web", spec)?;
    let count = ENDPOINTS_PER_SLICE + 1;
    for number in 0..count {
        let pod = namespace.start_pod(
            &fixture.cluster,
            "n1",
            &format!("web-{number}"),
            &PodTemplate::app("web"),
        )?;
        pod.set_ready(true)?;
    }
    eventually("two slices with all endpoints", || {
        let slices = namespace.slices("web")?;
        ensure!(
            slices.len() >= 2 && slice_endpoints(&slices).count() == count,
            "{slices:?}"
        );
        Ok(())
    })
}

fn kubectl_lists_the_nodes(fixture: &Fixture) -> Result<()> {
    let columns = "custom-columns=:.metadata.name,:.spec.podCIDRs,:.status.addresses[0].address";
    let output = fixture
        .control_plane
        .kubectl(&["get", "nodes", "--no-headers", "--output", columns], "")?;
    let nodes: Vec<Vec<_>> = output.lines().map(|line| line.split_whitespace().collect()).collect();
    let expected = [1, 2, 3].map(|number| {
        [
            format!("n{number}"),
            format!("[10.10.{number}.0/24 fd00:10:10:{number}::/64]"),
            format!("192.168.77.{number}"),
        ]
        .join(" ")
    });
    let found: Vec<_> = nodes.iter().map(|words| words.join(" ").replace(",", " ")).collect();
    ensure!(found == expected, "{found:?}, not {expected:?}");
    Ok(())
}
