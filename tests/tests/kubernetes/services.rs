//! Services: their ports, addresses, types and labels.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::control_plane::{Namespace, PodTemplate};
use lb_tests::eventually;
use lb_tests::{Connect, testbed};
use libc::ECONNREFUSED;
use serde_json::{Value, json};

use crate::Test;
use crate::fixture::{Backend, Fixture, Outcome, TARGET, Target, addresses, tcp, udp};

pub(crate) const TESTS: &[Test] = &[
    (
        "kubectl_applied_dns_service_is_served",
        kubectl_applied_dns_service_is_served,
    ),
    (
        "api_server_is_reached_by_its_service",
        api_server_is_reached_by_its_service,
    ),
    (
        "named_target_ports_may_differ_per_endpoint",
        named_target_ports_may_differ_per_endpoint,
    ),
    (
        "service_ports_can_be_added_and_removed",
        service_ports_can_be_added_and_removed,
    ),
    (
        "recreated_service_is_served_at_its_old_cluster_ip",
        recreated_service_is_served_at_its_old_cluster_ip,
    ),
    (
        "cluster_ip_moves_to_another_service",
        cluster_ip_moves_to_another_service,
    ),
    ("service_type_can_change", service_type_can_change),
    (
        "proxy_name_and_headless_labels_exclude_a_service",
        proxy_name_and_headless_labels_exclude_a_service,
    ),
    (
        "dual_stack_services_in_either_order_are_served",
        dual_stack_services_in_either_order_are_served,
    ),
    ("session_affinity_can_be_switched", session_affinity_can_be_switched),
    ("node_ports_are_served_on_each_node", node_ports_are_served_on_each_node),
    (
        "external_ips_use_cluster_policy_from_inside",
        external_ips_use_cluster_policy_from_inside,
    ),
    ("load_balancer_ip_mode_is_respected", load_balancer_ip_mode_is_respected),
    (
        "older_service_wins_an_address_conflict",
        older_service_wins_an_address_conflict,
    ),
];

/// Returns a spec with one TCP port, 80, of pods with the label `app: NAME`.
fn web(name: &str) -> Value {
    json!({"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": TARGET}]})
}

/// Returns `spec` with additions.
fn with(mut spec: Value, more: &[(&str, Value)]) -> Value {
    for (key, value) in more {
        spec[*key] = value.clone();
    }
    spec
}

/// Starts a backend on each of the two nodes: `NAME-1` and `NAME-2`, with the label `app: NAME`.
fn pair<'a>(fixture: &Fixture, namespace: &Namespace<'a>, name: &str) -> Result<[Backend<'a>; 2]> {
    let template = PodTemplate::app(name);
    Ok([
        fixture.backend(namespace, "n1", &format!("{name}-1"), &template)?,
        fixture.backend(namespace, "n2", &format!("{name}-2"), &template)?,
    ])
}

/// Several ports, one number in both protocols, named target ports.
fn kubectl_applied_dns_service_is_served(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("dns")?;
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "dns"},
        "spec": {
            "selector": {"app": "dns"},
            "clusterIP": "10.96.0.10",
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns"},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": "dns-tcp"},
                {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153},
            ],
        },
    });
    let output = fixture
        .control_plane
        .kubectl(&["apply", "--filename", "-"], &manifest.to_string())?;
    ensure!(output.contains("service/kube-dns created"), "{output}");
    let template = PodTemplate::app("dns")
        .port("dns", 5353, "UDP")
        .port("dns-tcp", 5353, "TCP");
    let _backends = [
        fixture.backend_at(&namespace, "n1", "dns-1", &template, &[5353, 9153])?,
        fixture.backend_at(&namespace, "n2", "dns-2", &template, &[5353, 9153])?,
    ];
    let at = |port| SocketAddr::from(([10, 96, 0, 10], port));
    let both = Outcome::names(&["dns-1", "dns-2"]);
    for target in [Target::Udp(at(53)), Target::Tcp(at(53)), Target::Tcp(at(9153))] {
        fixture.expect(&fixture.all_clients(), target, &both)?;
    }
    // A port that the address does not have in this protocol, or not at all.
    for target in [Target::Udp(at(9153)), Target::Tcp(at(54))] {
        fixture.expect(&fixture.all_clients(), target, &Outcome::Failed(ECONNREFUSED))?;
    }
    let output = fixture
        .control_plane
        .kubectl(&["delete", "--filename", "-"], &manifest.to_string())?;
    ensure!(output.contains("deleted"), "{output}");
    fixture.expect(&fixture.all_clients(), Target::Tcp(at(53)), &Outcome::NoRoute)
}

/// The Service that the API server creates for itself, with a slice that it writes itself.
fn api_server_is_reached_by_its_service(fixture: &Fixture) -> Result<()> {
    let url = "https://10.96.0.1/readyz";
    let arguments = ["--silent", "--show-error", "--fail", "--insecure", url];
    for node in ["n1", "n2"] {
        let output = eventually("an answer of the API server", || {
            fixture.node(node).run("curl", &arguments)
        })?;
        ensure!(output == "ok", "{output}");
    }
    Ok(())
}

fn named_target_ports_may_differ_per_endpoint(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("named")?;
    let ports = json!([{"port": 80, "targetPort": "http"}]);
    let service = namespace.create_service("web", json!({"selector": {"app": "web"}, "ports": ports}))?;
    let template = |port| PodTemplate::app("web").port("http", port, "TCP");
    let _a = fixture.backend_at(&namespace, "n1", "a", &template(8081), &[8081])?;
    let _b = fixture.backend_at(&namespace, "n2", "b", &template(8082), &[8082])?;
    // A pod without a port of that name is no endpoint.
    let _c = fixture.backend(&namespace, "n2", "c", &PodTemplate::app("web"))?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &Outcome::names(&["a", "b"]))
}

fn service_ports_can_be_added_and_removed(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("ports")?;
    let service = namespace.create_service("web", web("web"))?;
    let _backends = pair(fixture, &namespace, "web")?;
    let both = Outcome::names(&["web-1", "web-2"]);
    let refused = Outcome::Failed(ECONNREFUSED);
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &both)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 81)?, &refused)?;
    let set = |ports: &[(&str, u16, &str)]| {
        let port = |&(name, port, protocol): &(&str, u16, &str)| json!({"name": name, "port": port, "protocol": protocol, "targetPort": TARGET});
        let ports: Vec<_> = ports.iter().map(port).collect();
        namespace.patch_service("web", json!({"spec": {"ports": ports}}))
    };
    set(&[("http", 80, "TCP"), ("more", 81, "TCP"), ("more-udp", 81, "UDP")])?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 81)?, &both)?;
    fixture.expect(&fixture.all_clients(), udp(&service, 81)?, &both)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &both)?;
    set(&[("more", 81, "TCP")])?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &refused)?;
    fixture.expect(&fixture.all_clients(), udp(&service, 81)?, &refused)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 81)?, &both)?;
    // Another number for the port of this name.
    set(&[("more", 82, "TCP")])?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 82)?, &both)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 81)?, &refused)
}

fn recreated_service_is_served_at_its_old_cluster_ip(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("again")?;
    let service = namespace.create_service("web", web("old"))?;
    let target = tcp(&service, 80)?;
    let address = addresses(&service)?[0];
    let _old = fixture.backend(&namespace, "n1", "old", &PodTemplate::app("old"))?;
    let _new = fixture.backend(&namespace, "n2", "new", &PodTemplate::app("new"))?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::names(&["old"]))?;
    namespace.delete_service("web")?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::NoRoute)?;
    namespace.create_service("web", with(web("new"), &[("clusterIP", json!(address))]))?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::names(&["new"]))?;
    // Deleted and created at once: the agent may not see the state in between.
    namespace.delete_service("web")?;
    namespace.create_service("web", with(web("old"), &[("clusterIP", json!(address))]))?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::names(&["old"]))
}

fn cluster_ip_moves_to_another_service(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("handed")?;
    let service = namespace.create_service("first", web("first"))?;
    let target = tcp(&service, 80)?;
    let address = addresses(&service)?[0];
    let _backends = [
        fixture.backend(&namespace, "n1", "first", &PodTemplate::app("first"))?,
        fixture.backend(&namespace, "n2", "second", &PodTemplate::app("second"))?,
    ];
    fixture.expect(&fixture.all_clients(), target, &Outcome::names(&["first"]))?;
    namespace.delete_service("first")?;
    namespace.create_service("second", with(web("second"), &[("clusterIP", json!(address))]))?;
    fixture.expect(&fixture.all_clients(), target, &Outcome::names(&["second"]))
}

/// ClusterIP, ExternalName, headless, NodePort and back.
fn service_type_can_change(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("types")?;
    let service = namespace.create_service("web", web("web"))?;
    let _backends = pair(fixture, &namespace, "web")?;
    let both = Outcome::names(&["web-1", "web-2"]);
    let gone = Outcome::NoRoute;
    let target = tcp(&service, 80)?;
    let address = addresses(&service)?[0];
    fixture.expect(&fixture.all_clients(), target, &both)?;
    // Only this type releases the cluster IP.
    let external_name = json!({"spec": {
        "type": "ExternalName", "externalName": "example.org", "clusterIP": null, "clusterIPs": null,
        "ipFamilies": null, "ipFamilyPolicy": null,
    }});
    let cluster_ip = json!({"spec": {"type": "ClusterIP", "externalName": null, "clusterIP": address}});
    let headless = json!({"spec": {"type": "ClusterIP", "externalName": null, "clusterIP": "None"}});
    for _ in 0..2 {
        namespace.patch_service("web", external_name.clone())?;
        fixture.expect(&fixture.all_clients(), target, &gone)?;
        namespace.patch_service("web", cluster_ip.clone())?;
        fixture.expect(&fixture.all_clients(), target, &both)?;
    }
    namespace.patch_service("web", external_name.clone())?;
    namespace.patch_service("web", headless)?;
    fixture.expect(&fixture.all_clients(), target, &gone)?;
    namespace.patch_service("web", external_name)?;
    namespace.patch_service("web", cluster_ip)?;
    fixture.expect(&fixture.all_clients(), target, &both)?;
    let service = namespace.patch_service("web", json!({"spec": {"type": "NodePort"}}))?;
    let port = node_port(&service)?;
    let at = |number: u8| Target::Tcp(([192, 168, 77, number], port).into());
    fixture.expect(&fixture.clients_on("n1"), at(1), &both)?;
    namespace.patch_service("web", json!({"spec": {"type": "ClusterIP"}}))?;
    fixture.expect(&fixture.clients_on("n1"), at(1), &Outcome::Failed(ECONNREFUSED))?;
    fixture.expect(&fixture.all_clients(), target, &both)
}

/// Returns the node port of a Service's first port.
fn node_port(service: &k8s_openapi::api::core::v1::Service) -> Result<u16> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let port = ports.filter_map(|port| port.node_port).next().unwrap_or_default();
    ensure!(port > 0, "no node port: {service:?}");
    Ok(u16::try_from(port)?)
}

/// A Service with the label of another proxy or of a headless Service is not served while it has that label.
fn proxy_name_and_headless_labels_exclude_a_service(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("labels")?;
    let service = namespace.create_service("web", web("web"))?;
    let _backends = pair(fixture, &namespace, "web")?;
    let both = Outcome::names(&["web-1", "web-2"]);
    let target = tcp(&service, 80)?;
    fixture.expect(&fixture.all_clients(), target, &both)?;
    for label in [
        "service.kubernetes.io/service-proxy-name",
        "service.kubernetes.io/headless",
    ] {
        // The value of the label does not matter.
        for value in ["other", ""] {
            namespace.patch_service("web", json!({"metadata": {"labels": {label: value}}}))?;
            fixture.expect(&fixture.all_clients(), target, &Outcome::NoRoute)?;
        }
        namespace.patch_service("web", json!({"metadata": {"labels": {label: null}}}))?;
        fixture.expect(&fixture.all_clients(), target, &both)?;
        // Created with the label.
        let labels = json!({label: "x"});
        let labelled = namespace.create_labelled_service("labelled", labels, web("web"))?;
        fixture.expect(&fixture.all_clients(), tcp(&labelled, 80)?, &Outcome::NoRoute)?;
        namespace.delete_service("labelled")?;
    }
    Ok(())
}

fn dual_stack_services_in_either_order_are_served(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("families")?;
    let _backends = pair(fixture, &namespace, "web")?;
    let both = Outcome::names(&["web-1", "web-2"]);
    for (name, families) in [("four", ["IPv4", "IPv6"]), ("six", ["IPv6", "IPv4"])] {
        let more = [
            ("ipFamilyPolicy", json!("RequireDualStack")),
            ("ipFamilies", json!(families)),
        ];
        let service = namespace.create_service(name, with(web("web"), &more))?;
        let all = addresses(&service)?;
        ensure!(all.len() == 2 && all[0].is_ipv4() == (families[0] == "IPv4"), "{all:?}");
        for address in all {
            fixture.expect(&fixture.all_clients(), Target::Tcp((address, 80).into()), &both)?;
        }
    }
    // One family alone, then both, then one again.
    let more = [
        ("ipFamilyPolicy", json!("SingleStack")),
        ("ipFamilies", json!(["IPv6"])),
    ];
    let service = namespace.create_service("alone", with(web("web"), &more))?;
    ensure!(addresses(&service)?.len() == 1, "{service:?}");
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &both)?;
    let service = namespace.patch_service("alone", json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}}))?;
    let all = addresses(&service)?;
    ensure!(all.len() == 2 && all[1].is_ipv4(), "{all:?}");
    let second = Target::Tcp((all[1], 80).into());
    fixture.expect(&fixture.all_clients(), second, &both)?;
    let one = json!({"spec": {"ipFamilyPolicy": "SingleStack", "clusterIPs": [all[0]], "ipFamilies": ["IPv6"]}});
    namespace.patch_service("alone", one)?;
    fixture.expect(&fixture.all_clients(), second, &Outcome::NoRoute)?;
    fixture.expect(&fixture.all_clients(), Target::Tcp((all[0], 80).into()), &both)
}

fn session_affinity_can_be_switched(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("affinity")?;
    let service = namespace.create_service("web", web("web"))?;
    let _backends = pair(fixture, &namespace, "web")?;
    let target = tcp(&service, 80)?;
    let both = Outcome::names(&["web-1", "web-2"]);
    fixture.expect(&fixture.all_clients(), target, &both)?;
    for _ in 0..2 {
        namespace.patch_service("web", json!({"spec": {"sessionAffinity": "ClientIP"}}))?;
        eventually("each client has one backend", || {
            for netns in fixture.all_clients() {
                let Outcome::Names(names) = target.outcome(netns)? else {
                    anyhow::bail!("{target} does not answer");
                };
                ensure!(names.len() == 1, "{names:?} from {}", netns.name());
            }
            Ok(())
        })?;
        fixture.verify()?;
        // Each client keeps its backend.
        for netns in fixture.all_clients() {
            let first = target.outcome(netns)?;
            for _ in 0..3 {
                let next = target.outcome(netns)?;
                ensure!(next == first, "{first:?}, then {next:?}");
            }
        }
        namespace.patch_service("web", json!({"spec": {"sessionAffinity": "None"}}))?;
        fixture.expect(&fixture.all_clients(), target, &both)?;
    }
    Ok(())
}

/// At the addresses of each node, for its pods and itself: the decisions at connect().
fn node_ports_are_served_on_each_node(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("nodeports")?;
    let ports = json!([
        {"name": "http", "port": 80, "targetPort": TARGET, "nodePort": 30080},
        {"name": "udp", "port": 80, "targetPort": TARGET, "nodePort": 30080, "protocol": "UDP"},
    ]);
    let families = [("ipFamilyPolicy", json!("RequireDualStack")), ("ports", ports)];
    let spec = with(with(web("web"), &families), &[("type", json!("NodePort"))]);
    let service = namespace.create_service("web", spec)?;
    // The backend is on the third node and reached from both others.
    let _backend = fixture.backend(&namespace, "n3", "web", &PodTemplate::app("web"))?;
    let web = Outcome::names(&["web"]);
    let served = |port: u16, expected: &Outcome| -> Result<()> {
        for name in ["n1", "n2"] {
            let node = fixture.cluster.node(name);
            let gateways: [SocketAddr; 2] = [(node.gateway(), port).into(), (node.gateway6(), port).into()];
            let own: [SocketAddr; 2] = [(node.address(), port).into(), (node.address6(), port).into()];
            for at in own.into_iter().chain(gateways) {
                fixture.expect(&fixture.clients_on(name), Target::Tcp(at), expected)?;
            }
            fixture.expect(&fixture.clients_on(name), Target::Udp(own[0]), expected)?;
            let loopback = Target::Tcp(([127, 0, 0, 1], port).into());
            fixture.expect(&[fixture.node(name)], loopback, expected)?;
            // Loopback in a pod is the pod's own.
            fixture.expect(&[fixture.pod_on(name)], loopback, &Outcome::Failed(ECONNREFUSED))?;
        }
        Ok(())
    };
    served(30080, &web)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &web)?;
    // Another node port replaces the old one, which is refused from then on.
    let ports = json!([{"name": "http", "port": 80, "targetPort": TARGET, "nodePort": 30081}]);
    namespace.patch_service("web", json!({"spec": {"ports": ports}}))?;
    let own = |port| Target::Tcp((fixture.cluster.node("n1").address(), port).into());
    fixture.expect(&fixture.clients_on("n1"), own(30081), &web)?;
    fixture.expect(&fixture.clients_on("n1"), own(30080), &Outcome::Failed(ECONNREFUSED))
}

/// Pods and nodes reach external addresses as they do cluster IPs, with every external traffic policy.
fn external_ips_use_cluster_policy_from_inside(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("external")?;
    let first: SocketAddr = "198.51.100.10:80".parse()?;
    let second: SocketAddr = "198.51.100.11:80".parse()?;
    let more = [("externalIPs", json!([first.ip()]))];
    let _backends = pair(fixture, &namespace, "web")?;
    let both = Outcome::names(&["web-1", "web-2"]);
    let gone = Outcome::NoRoute;
    let service = namespace.create_service("web", with(web("web"), &more))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(first), &both)?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(second), &gone)?;
    namespace.patch_service("web", json!({"spec": {"externalIPs": [second.ip()]}}))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(second), &both)?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(first), &gone)?;
    let local = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}});
    namespace.patch_service("web", local)?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(second), &both)?;
    namespace.patch_service("web", json!({"spec": {"externalIPs": null}}))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(second), &gone)?;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &both)
}

/// Addresses that a cloud controller writes into the status, except those with `ipMode: Proxy`, where the load balancer
/// itself answers.
fn load_balancer_ip_mode_is_respected(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("balancer")?;
    let at: SocketAddr = "203.0.113.10:80".parse()?;
    let more = [
        ("type", json!("LoadBalancer")),
        ("allocateLoadBalancerNodePorts", json!(false)),
    ];
    let service = namespace.create_service("web", with(web("web"), &more))?;
    ensure!(node_port(&service).is_err(), "{service:?}");
    let _backends = pair(fixture, &namespace, "web")?;
    let both = Outcome::names(&["web-1", "web-2"]);
    let gone = Outcome::NoRoute;
    fixture.expect(&fixture.all_clients(), tcp(&service, 80)?, &both)?;
    let set = |ingress: Value| {
        let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        namespace.patch_service_status("web", status)
    };
    for (mode, outcome) in [("VIP", &both), ("Proxy", &gone), ("VIP", &both)] {
        set(json!([{"ip": at.ip(), "ipMode": mode}]))?;
        fixture.expect(&fixture.all_clients(), Target::Tcp(at), outcome)?;
    }
    set(json!([{"hostname": "example.org"}]))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(at), &gone)?;
    // VIP is the default mode.
    set(json!([{"ip": at.ip()}]))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(at), &both)?;
    // Node ports of a load-balancer Service are served if they are allocated.
    let service = namespace.patch_service("web", json!({"spec": {"allocateLoadBalancerNodePorts": true}}))?;
    let own = Target::Tcp((fixture.cluster.node("n2").address(), node_port(&service)?).into());
    fixture.expect(&fixture.clients_on("n2"), own, &both)?;
    namespace.patch_service("web", json!({"spec": {"type": "ClusterIP"}}))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(at), &gone)?;
    fixture.expect(&fixture.clients_on("n2"), own, &Outcome::Failed(ECONNREFUSED))
}

/// The older Service has the address. When it is deleted, the other one gets the address, and no connection fails.
fn older_service_wins_an_address_conflict(fixture: &Fixture) -> Result<()> {
    let namespace = fixture.control_plane.namespace("claims")?;
    let at: SocketAddr = "198.51.100.20:80".parse()?;
    let claim = |name| with(web(name), &[("externalIPs", json!([at.ip()]))]);
    let _backends = [
        fixture.backend(&namespace, "n1", "older", &PodTemplate::app("older"))?,
        fixture.backend(&namespace, "n2", "younger", &PodTemplate::app("younger"))?,
    ];
    // Age decides before the name: with equal ages, the Service with the lower name would have the address.
    namespace.create_service("z", claim("older"))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(at), &Outcome::names(&["older"]))?;
    sleep(Duration::from_millis(1100));
    namespace.create_service("a", claim("younger"))?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(at), &Outcome::names(&["older"]))?;
    let connect = Connect::to(&[at]).rate(200.0);
    let loads = fixture.pods().into_iter().map(|pod| testbed().start(pod, &connect));
    let loads = loads.collect::<Result<Vec<_>>>()?;
    namespace.delete_service("z")?;
    fixture.expect(&fixture.all_clients(), Target::Tcp(at), &Outcome::names(&["younger"]))?;
    for load in loads {
        let summary = load.stop()?;
        summary.all_well()?;
        ensure!(summary.reached("younger") > 0, "{summary:?}");
    }
    Ok(())
}
