use super::*;

fn parsed(text: &str) -> Result<Config, ParseError> {
    Config::parse(&format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{text}"))
}

#[track_caller]
fn refused(text: &str) -> String {
    parsed(text).unwrap_err().to_string()
}

/// The ConfigMap of `kubeadm init --pod-network-cidr`: every key, most of them with an empty value.
const KUBEADM: &str = r#"
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
featureGates: {}
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"#;

/// Every key, each with a value that differs from unset.
const EVERYTHING: &str = r#"
featureGates: {SomeFeature: true}
clientConnection: {kubeconfig: /etc/kubeconfig, acceptContentTypes: a, contentType: b, qps: 5.5, burst: 10}
logging:
  format: json
  flushFrequency: 5s
  verbosity: 2
  vmodule: [{filePattern: "proxier*", verbosity: 4}]
  options:
    text: {splitStream: true, infoBufferSize: 1Ki}
    json: {splitStream: true, infoBufferSize: 1024}
hostnameOverride: Node-7
bindAddress: "::"
healthzBindAddress: 192.0.2.7
metricsBindAddress: "[::1]:9000"
bindAddressHardFail: true
enableProfiling: true
showHiddenMetricsForVersion: "1.35"
mode: nftables
iptables: {masqueradeBit: 14, masqueradeAll: true, localhostNodePorts: true, syncPeriod: 30s, minSyncPeriod: 1s}
ipvs:
  syncPeriod: 30s
  minSyncPeriod: 1s
  scheduler: rr
  excludeCIDRs: [10.0.0.0/8]
  strictARP: true
  tcpTimeout: 1s
  tcpFinTimeout: 1s
  udpTimeout: 1s
nftables: {masqueradeBit: 14, masqueradeAll: true, syncPeriod: 30s, minSyncPeriod: 1s}
winkernel: {networkName: a, sourceVip: b, enableDSR: true, rootHnsEndpointName: c, forwardHealthCheckVip: true}
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0, interfaceNamePrefix: veth}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
nodePortAddresses: [192.0.2.0/24, "fd00::/8"]
oomScoreAdj: -998
conntrack:
  maxPerCore: 0
  min: 1
  tcpEstablishedTimeout: 24h0m0s
  tcpCloseWaitTimeout: 1h30m
  tcpBeLiberal: true
  udpTimeout: 10s
  udpStreamTimeout: 1.5m
configSyncPeriod: 15m0s
portRange: 1-2
windowsRunAsService: true
"#;

/// The keys of [`EVERYTHING`] that are not applied.
const UNUSED: &[&str] = &[
    "bindAddressHardFail",
    "clientConnection.acceptContentTypes",
    "clientConnection.burst",
    "clientConnection.contentType",
    "clientConnection.qps",
    "clusterCIDR",
    "configSyncPeriod",
    "detectLocal.bridgeInterface",
    "detectLocal.interfaceNamePrefix",
    "detectLocalMode",
    "enableProfiling",
    "featureGates",
    "iptables.localhostNodePorts",
    "iptables.masqueradeAll",
    "iptables.masqueradeBit",
    "iptables.minSyncPeriod",
    "iptables.syncPeriod",
    "ipvs.excludeCIDRs",
    "ipvs.minSyncPeriod",
    "ipvs.scheduler",
    "ipvs.strictARP",
    "ipvs.syncPeriod",
    "ipvs.tcpFinTimeout",
    "ipvs.tcpTimeout",
    "ipvs.udpTimeout",
    "logging.flushFrequency",
    "logging.format",
    "logging.options.json.infoBufferSize",
    "logging.options.json.splitStream",
    "logging.options.text.infoBufferSize",
    "logging.options.text.splitStream",
    "logging.verbosity",
    "logging.vmodule",
    "mode",
    "nftables.masqueradeAll",
    "nftables.masqueradeBit",
    "nftables.minSyncPeriod",
    "nftables.syncPeriod",
    "portRange",
    "showHiddenMetricsForVersion",
    "windowsRunAsService",
    "winkernel.enableDSR",
    "winkernel.forwardHealthCheckVip",
    "winkernel.networkName",
    "winkernel.rootHnsEndpointName",
    "winkernel.sourceVip",
];

#[test]
fn file_of_kubeadm_sets_few_keys() {
    let expected = Config {
        kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
        detect_local: DetectLocal::ClusterCidr(vec!["10.244.0.0/16".parse().unwrap()]),
        ..Config::default()
    };
    assert_eq!(parsed(KUBEADM), Ok(expected));
}

#[test]
fn every_key_is_known_and_applied_or_named() {
    let seconds = Duration::from_secs;
    let expected = Config {
        kubeconfig: Some("/etc/kubeconfig".into()),
        node_name: Some("node-7".into()),
        detect_local: DetectLocal::Bridge("cni0".into()),
        node_port_addresses: Some("192.0.2.0/24,fd00::/8".parse().unwrap()),
        healthz: "192.0.2.7".parse().unwrap(),
        metrics: "[::1]:9000".parse().unwrap(),
        oom_score_adj: Some(-998),
        conntrack: NfConntrackSettings {
            max_per_core: 0,
            min: 1,
            tcp_established: seconds(86_400),
            tcp_close_wait: seconds(5400),
            tcp_be_liberal: true,
            udp: seconds(10),
            udp_stream: seconds(90),
        },
        without_effect: UNUSED.iter().map(|&key| key.to_owned()).collect(),
    };
    assert_eq!(parsed(EVERYTHING), Ok(expected));
}

#[test]
fn empty_file_has_the_defaults_of_kube_proxy() {
    assert_eq!(parsed(""), Ok(Config::default()));
    assert_eq!(parsed("conntrack: null\nclientConnection:\n"), Ok(Config::default()));
    assert_eq!(Config::default().healthz.with_port(10256).to_string(), "0.0.0.0:10256");
    assert_eq!(
        Config::default().metrics.with_port(10249).to_string(),
        "127.0.0.1:10249"
    );
}

#[test]
fn an_ipv6_node_has_ipv6_defaults() {
    let config = parsed("bindAddress: '::'").unwrap();
    assert_eq!(config.healthz.with_port(1).to_string(), "[::]:1");
    assert_eq!(config.metrics.with_port(1).to_string(), "[::1]:1");
}

#[test]
fn local_traffic_is_detected_in_one_of_four_ways() {
    for (text, expected) in [
        ("detectLocalMode: NodeCIDR", DetectLocal::NodeCidr),
        ("detectLocalMode: ClusterCIDR", DetectLocal::ClusterCidr(Vec::new())),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}",
            DetectLocal::DevicePrefix("veth".into()),
        ),
    ] {
        assert_eq!(parsed(text).unwrap().detect_local, expected, "{text}");
    }
    for (text, inside, unused) in [
        ("", &[][..], &[][..]),
        ("clusterCIDR: 10.244.0.0/16", &["10.244.0.0/16"], &[]),
        (
            "clusterCIDR: 10.244.0.0/16\ndetectLocalMode: ClusterCIDR",
            &["10.244.0.0/16"],
            &[],
        ),
        (
            "clusterCIDR: 10.244.0.0/16\ndetectLocalMode: NodeCIDR",
            &[],
            &["clusterCIDR"],
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
            &[],
            &["detectLocal.bridgeInterface", "detectLocalMode"],
        ),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}",
            &[],
            &["detectLocal.interfaceNamePrefix", "detectLocalMode"],
        ),
    ] {
        let config = parsed(text).unwrap();
        let inside: Vec<IpNet> = inside.iter().map(|net| net.parse().unwrap()).collect();
        assert_eq!(config.detect_local.inside(), inside, "{text}");
        assert_eq!(config.without_effect, unused, "{text}");
    }
    assert_eq!(
        refused("detectLocalMode: Magic"),
        "detectLocalMode: \"Magic\" is unknown"
    );
}

#[test]
fn node_port_addresses_may_be_primary() {
    let config = parsed("nodePortAddresses: [primary]").unwrap();
    assert_eq!(config.node_port_addresses, Some(NodePortAddresses::Primary));
    assert_eq!(parsed("nodePortAddresses: []").unwrap().node_port_addresses, None);
}

#[test]
fn json_is_accepted() {
    let text = format!(r#"{{"apiVersion": "{API_VERSION}", "kind": "{KIND}", "oomScoreAdj": 5}}"#);
    assert_eq!(Config::parse(&text).unwrap().oom_score_adj, Some(5));
}

#[test]
fn errors_name_line_and_key() {
    for (text, expected) in [
        ("mode: \"\"\nfoo: 1", ["line 4: ", "unknown field `foo`"]),
        (
            "conntrack:\n  maxPerKern: 1",
            ["line 4: conntrack", "unknown field `maxPerKern`"],
        ),
        ("oomScoreAdj: many", ["line 3: oomScoreAdj: ", "i32"]),
        ("conntrack:\n  udpTimeout: -3s", ["line 4: ", "\"-3s\" is negative"]),
        (
            "conntrack:\n  udpTimeout: soon",
            ["line 4: ", "\"soon\" is not a duration"],
        ),
        ("conntrack: {min: -1}", ["line 3: conntrack.min: ", ""]),
        ("mode: a\nmode: b", ["line 4: ", "mode"]),
        ("mode: [", ["line ", ""]),
        ("oomScoreAdj: 1001", ["oomScoreAdj: ", "1001"]),
        (
            "healthzBindAddress: localhost",
            ["healthzBindAddress: ", "\"localhost\""],
        ),
        (
            "metricsBindAddress: '1.2.3.4:x'",
            ["metricsBindAddress: ", "\"1.2.3.4:x\""],
        ),
        ("bindAddress: everywhere", ["bindAddress: ", "not an address"]),
        ("clusterCIDR: 10.0.0.0/33", ["clusterCIDR: ", "\"10.0.0.0/33\""]),
        (
            "nodePortAddresses: [primary, 10.0.0.0/8]",
            ["nodePortAddresses: ", "primary"],
        ),
    ] {
        let message = refused(text);
        assert!(
            message.starts_with(expected[0]) && message.contains(expected[1]),
            "{text}: {message}"
        );
        assert!(
            !message.contains("expected one of") && !message.contains('\n'),
            "{message}"
        );
    }
}

#[test]
fn other_kinds_are_refused() {
    for text in [
        "apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration",
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration",
        "{}",
    ] {
        let error = Config::parse(text).unwrap_err();
        assert!(matches!(error, ParseError::Kind { .. }), "{error}");
    }
    assert!(Config::parse("").is_err());
}

#[test]
fn errors_name_the_file() {
    let error = Config::read(Path::new("/nowhere/config.yaml")).unwrap_err().to_string();
    assert!(error.starts_with("/nowhere/config.yaml: "), "{error}");
}
