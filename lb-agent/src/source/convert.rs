//! From API objects to the model, with validation.
//!
//! The API server validates what it stores, but a manifest has met no API server, and an old one was more lenient than
//! a new one. Therefore everything is checked here, by the rules of `k8s.io/kubernetes/pkg/apis/core/validation` and
//! `.../discovery/validation` as far as they matter to a proxy. Conversion stops at the first error.

use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use lb_core::intern;
use lb_core::model::{
    Endpoint, EndpointLocation, EndpointPort, EndpointSlice, Node, ObjectKey, Protocol, Service, ServicePort,
    ServiceType, TrafficPolicy,
};

/// Label of an EndpointSlice that names its Service.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label of a Service that another proxy serves.
pub const LABEL_SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of a Service (or slice) that no proxy serves.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label of a Node that names its zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Taint that the cluster autoscaler puts on a Node that it is about to delete.
pub const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
/// Annotation of an EndpointSlice: the time of the event that caused its last change (RFC 3339).
pub const ANNOTATION_TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`, in seconds.
pub const DEFAULT_AFFINITY_TIMEOUT: u32 = 10_800;
/// The longest session affinity timeout, in seconds.
pub const MAX_AFFINITY_TIMEOUT: u32 = 86_400;

/// Longest namespace, Service name or port name, in bytes.
const LABEL_MAX: usize = 63;
/// Longest name of a Node or EndpointSlice, in bytes.
const SUBDOMAIN_MAX: usize = 253;
/// Longest piece of input that is quoted in a message, in characters.
const QUOTE_MAX: usize = 80;

/// A field of an object with an invalid value. Displays as `field: reason`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct ConvertError {
    /// Path of the field, such as `spec.ports[1].port` or `metadata.labels["kubernetes.io/service-name"]`.
    pub field: String,
    /// The reason.
    pub reason: Reason,
}

/// Reasons why a field is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The field is absent or empty.
    #[error("missing")]
    Missing,
    /// A port is given without a name, though there are several.
    #[error("missing (ports must be named when there are several)")]
    MissingPortName,
    /// A number is out of range.
    #[error("{value} is not in {min}..={max}")]
    OutOfRange {
        /// The number.
        value: i64,
        /// The least that is valid.
        min: i64,
        /// The greatest that is valid.
        max: i64,
    },
    /// A string is none of the values of an enumeration.
    #[error("{} is not one of {}", Quoted(.value), .allowed.join(", "))]
    Unknown {
        /// The string.
        value: String,
        /// The values that are valid.
        allowed: &'static [&'static str],
    },
    /// A string is not an IP address (IPv4 in dotted form without leading zeros, or IPv6 without a zone).
    #[error("{} is not an IP address", Quoted(.0))]
    NotAnAddress(String),
    /// A string is not an address with a prefix length.
    #[error("{} is not a CIDR", Quoted(.0))]
    NotACidr(String),
    /// A valid address of a kind that the field does not permit.
    #[error("{address} is {class}, which cannot be used here")]
    AddressClass {
        /// The address.
        address: IpAddr,
        /// What kind of address it is, with an article.
        class: &'static str,
    },
    /// An address of the other family.
    #[error("{address} is not an {family} address")]
    WrongFamily {
        /// The address.
        address: IpAddr,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// Two addresses of one family in a field that permits one of each.
    #[error("{0} is a second address of the same family")]
    SameFamily(IpAddr),
    /// A string is longer than Kubernetes allows.
    #[error("{} is longer than {max} bytes", Quoted(.value))]
    TooLong {
        /// The string.
        value: String,
        /// The limit in bytes.
        max: usize,
    },
    /// A string is not a DNS label (RFC 1123) or subdomain.
    #[error("{} is not a DNS {}", Quoted(.value), if *.dots { "name (lower-case letters, digits, '-' and '.')" } else { "label (lower-case letters, digits and '-')" })]
    NotDns {
        /// The string.
        value: String,
        /// Whether dots are valid.
        dots: bool,
    },
    /// A value that must be unique occurs twice.
    #[error("{} is there twice", Quoted(.0))]
    Duplicate(String),
}

/// Displays a string in quotes, escaped, and truncated if it is long, so that input cannot forge a log line.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars().take(QUOTE_MAX).flat_map(char::escape_debug) {
            f.write_char(c)?;
        }
        f.write_char('"')?;
        if self.0.chars().nth(QUOTE_MAX).is_some() {
            f.write_str("...")?;
        }
        Ok(())
    }
}

type Result<T, E = ConvertError> = std::result::Result<T, E>;

/// A `v1` Service.
///
/// A Service that has no cluster IP yet (or ever, in a manifest) has empty `cluster_ips`, as a headless one has.
///
/// # Errors
/// Returns the first invalid field.
pub fn service(object: &v1::Service) -> Result<Service> {
    let meta = &object.metadata;
    let key = namespaced_key(meta, false)?;
    let spec = object.spec.as_ref().ok_or_else(|| missing("spec"))?;
    let service_type = match set(spec.type_.as_deref()) {
        None | Some("ClusterIP") => ServiceType::ClusterIp,
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        Some("ExternalName") => ServiceType::ExternalName,
        Some(other) => {
            return Err(unknown(
                "spec.type",
                other,
                &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"],
            ));
        }
    };
    let (cluster_ips, headless) = cluster_ips(spec)?;
    let mut ports = service_ports(spec.ports.as_deref().unwrap_or_default())?;
    if !matches!(service_type, ServiceType::NodePort | ServiceType::LoadBalancer) {
        ports.iter_mut().for_each(|port| port.node_port = None);
    }
    let is_balanced = service_type == ServiceType::LoadBalancer;
    if ports.is_empty() && !headless && service_type != ServiceType::ExternalName {
        return Err(missing("spec.ports"));
    }
    Ok(Service {
        created: meta.creation_timestamp.as_ref().map(|time| time.0.as_second()),
        service_type,
        cluster_ips: cluster_ips.into(),
        external_ips: external_ips(spec)?,
        load_balancer_ips: if is_balanced {
            load_balancer_ips(object)?
        } else {
            Box::default()
        },
        source_ranges: if is_balanced {
            source_ranges(spec)
        } else {
            Box::default()
        },
        ports: ServicePort::shared(ports),
        affinity_timeout: affinity_timeout(spec)?,
        internal_policy: traffic_policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref())?,
        external_policy: traffic_policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref())?,
        other_proxy: label(meta, LABEL_SERVICE_PROXY_NAME).is_some(),
        headless_label: label(meta, LABEL_HEADLESS).is_some(),
        health_check_node_port: health_check_node_port(spec)?,
        key,
    })
}

/// Converts a `discovery.k8s.io/v1` EndpointSlice; `None` if a proxy ignores it: address type FQDN, or no
/// label that names a Service.
///
/// # Errors
/// Returns the first invalid field.
pub fn endpoint_slice(object: &discovery::EndpointSlice) -> Result<Option<EndpointSlice>> {
    let key = namespaced_key(&object.metadata, true)?;
    let ipv6 = match object.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => return Ok(None),
        "" => return Err(missing("addressType")),
        other => return Err(unknown("addressType", other, &["IPv4", "IPv6", "FQDN"])),
    };
    let Some(service) = label(&object.metadata, LABEL_SERVICE_NAME).filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    check_name(service, false, || format!("metadata.labels[\"{LABEL_SERVICE_NAME}\"]"))?;
    let endpoints = object
        .endpoints
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, e)| endpoint(i, e, ipv6))
        .collect::<Result<_>>()?;
    let given = object.ports.as_deref().unwrap_or_default();
    let mut names = HashSet::with_capacity(given.len());
    let ports = given
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let name = p.name.as_deref().unwrap_or_default();
            if !name.is_empty() {
                check_name(name, false, || format!("ports[{i}].name"))?;
            }
            if !names.insert(name) {
                return Err(duplicate(format!("ports[{i}].name"), name));
            }
            Ok(EndpointPort {
                name: intern::text(name),
                protocol: protocol(p.protocol.as_deref(), || format!("ports[{i}].protocol"))?,
                port: p.port.map(|n| port(n, || format!("ports[{i}].port"))).transpose()?,
            })
        })
        .collect::<Result<_>>()?;
    let ports = EndpointPort::shared(ports);
    Ok(Some(EndpointSlice {
        service: service.into(),
        ipv6,
        endpoints,
        ports,
        key,
    }))
}

/// A `v1` Node.
///
/// # Errors
/// Returns the first invalid field.
pub fn node(object: &v1::Node) -> Result<Node> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(missing("metadata.name"));
    }
    check_name(name, true, || "metadata.name".to_owned())?;
    let addresses = object
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten())
        .enumerate()
        .filter(|(_, a)| matches!(a.type_.as_str(), "InternalIP" | "ExternalIP"))
        .map(|(i, a)| address(&a.address, || format!("status.addresses[{i}].address")))
        .collect::<Result<_>>()?;
    let spec = object.spec.as_ref();
    let several = spec.and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
    let pod_cidrs = if several.is_empty() {
        set(spec.and_then(|spec| spec.pod_cidr.as_deref()))
            .map(|text| cidr(text, || "spec.podCIDR".to_owned()))
            .transpose()?
            .into_iter()
            .collect()
    } else {
        several
            .iter()
            .enumerate()
            .map(|(i, text)| cidr(text, || format!("spec.podCIDRs[{i}]")))
            .collect::<Result<_>>()?
    };
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let leaving =
        object.metadata.deletion_timestamp.is_some() || taints.iter().any(|taint| taint.key == TAINT_TO_BE_DELETED);
    Ok(Node {
        name: name.into(),
        addresses,
        pod_cidrs,
        zone: set(label(&object.metadata, LABEL_ZONE)).map(intern::text),
        leaving,
    })
}

/// `spec.clusterIPs`, or `spec.clusterIP` if the former is absent, and whether the Service is headless.
fn cluster_ips(spec: &v1::ServiceSpec) -> Result<(Vec<IpAddr>, bool)> {
    let several = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = [spec.cluster_ip.clone().unwrap_or_default()];
    let (given, is_list) = if several.is_empty() {
        (&single[..], false)
    } else {
        (several, true)
    };
    let field = |i: usize| {
        if is_list {
            format!("spec.clusterIPs[{i}]")
        } else {
            "spec.clusterIP".to_owned()
        }
    };
    match given {
        [only] if only == "None" => return Ok((Vec::new(), true)),
        [only] if only.is_empty() => return Ok((Vec::new(), false)),
        _ => {}
    }
    let mut ips: Vec<IpAddr> = Vec::with_capacity(given.len());
    for (i, text) in given.iter().enumerate() {
        let ip = address(text, || field(i))?;
        check_class(ip, || field(i))?;
        if ips.iter().any(|other| other.is_ipv6() == ip.is_ipv6()) {
            return Err(error(field(i), Reason::SameFamily(ip)));
        }
        ips.push(ip);
    }
    Ok((ips, false))
}

/// An address that packets can be sent to, from anywhere.
fn check_class(address: IpAddr, field: impl FnOnce() -> String) -> Result<()> {
    let class = if address.is_unspecified() {
        "the unspecified address"
    } else if address.is_loopback() {
        "a loopback address"
    } else if address.is_multicast() {
        "a multicast address"
    } else if address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
        "the broadcast address"
    } else {
        return Ok(());
    };
    Err(error(field(), Reason::AddressClass { address, class }))
}

/// `spec.externalIPs`.
fn external_ips(spec: &v1::ServiceSpec) -> Result<Box<[IpAddr]>> {
    let given = spec.external_ips.iter().flatten().enumerate();
    given
        .map(|(i, text)| {
            let field = || format!("spec.externalIPs[{i}]");
            let ip = address(text, field)?;
            check_class(ip, field)?;
            Ok(ip)
        })
        .collect()
}

/// The addresses in `status.loadBalancer.ingress` that a proxy serves: if `ipMode` is `Proxy`, the load balancer
/// sends to node ports, and its own address must not be short-circuited (KEP-1860).
fn load_balancer_ips(object: &v1::Service) -> Result<Box<[IpAddr]>> {
    let status = object.status.as_ref();
    let ingress = status
        .and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref())
        .unwrap_or_default();
    ingress
        .iter()
        .enumerate()
        .filter(|(_, ingress)| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
        .filter_map(|(i, ingress)| Some((i, set(ingress.ip.as_deref())?)))
        .map(|(i, text)| {
            let field = || format!("status.loadBalancer.ingress[{i}].ip");
            let ip = address(text, field)?;
            check_class(ip, field)?;
            Ok(ip)
        })
        .collect()
}

/// `spec.loadBalancerSourceRanges`. The API server accepts surrounding blanks and empty strings. An invalid range is no
/// reason not to serve the Service.
fn source_ranges(spec: &v1::ServiceSpec) -> Box<[Arc<str>]> {
    let given = spec.load_balancer_source_ranges.iter().flatten();
    let given = given.map(|text| text.trim()).filter(|text| !text.is_empty());
    given.map(Arc::from).collect()
}

fn service_ports(given: &[v1::ServicePort]) -> Result<Vec<ServicePort>> {
    let mut names = HashSet::with_capacity(given.len());
    let mut numbers = HashSet::with_capacity(given.len());
    let mut node_ports = HashSet::new();
    given
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let field = |name: &str| format!("spec.ports[{i}].{name}");
            let name = p.name.as_deref().unwrap_or_default();
            if name.is_empty() {
                if given.len() > 1 {
                    return Err(error(field("name"), Reason::MissingPortName));
                }
            } else {
                check_name(name, false, || field("name"))?;
            }
            if !names.insert(name) {
                return Err(duplicate(field("name"), name));
            }
            let protocol = protocol(p.protocol.as_deref(), || field("protocol"))?;
            let number = port(p.port, || field("port"))?;
            if !numbers.insert((protocol, number)) {
                return Err(duplicate(field("port"), &format!("{number}/{protocol}")));
            }
            let node_port = match p.node_port {
                None | Some(0) => None,
                Some(n) => Some(port(n, || field("nodePort"))?),
            };
            if let Some(n) = node_port
                && !node_ports.insert((protocol, n))
            {
                return Err(duplicate(field("nodePort"), &format!("{n}/{protocol}")));
            }
            Ok(ServicePort {
                name: intern::text(name),
                protocol,
                port: number,
                node_port,
            })
        })
        .collect()
}

/// `spec.healthCheckNodePort`, which has a meaning for load balancers with `externalTrafficPolicy: Local` only.
fn health_check_node_port(spec: &v1::ServiceSpec) -> Result<Option<u16>> {
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    if spec.type_.as_deref() != Some("LoadBalancer") || !is_local {
        return Ok(None);
    }
    let given = spec.health_check_node_port.filter(|number| *number != 0);
    given
        .map(|number| port(number, || "spec.healthCheckNodePort".to_owned()))
        .transpose()
}

fn affinity_timeout(spec: &v1::ServiceSpec) -> Result<Option<u32>> {
    match set(spec.session_affinity.as_deref()) {
        None | Some("None") => Ok(None),
        Some("ClientIP") => {
            let given = spec
                .session_affinity_config
                .as_ref()
                .and_then(|config| config.client_ip.as_ref())
                .and_then(|client_ip| client_ip.timeout_seconds);
            let Some(value) = given else {
                return Ok(Some(DEFAULT_AFFINITY_TIMEOUT));
            };
            match u32::try_from(value) {
                Ok(seconds @ 1..=MAX_AFFINITY_TIMEOUT) => Ok(Some(seconds)),
                _ => Err(error(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    Reason::OutOfRange {
                        value: value.into(),
                        min: 1,
                        max: MAX_AFFINITY_TIMEOUT.into(),
                    },
                )),
            }
        }
        Some(other) => Err(unknown("spec.sessionAffinity", other, &["None", "ClientIP"])),
    }
}

fn traffic_policy(field: &'static str, value: Option<&str>) -> Result<TrafficPolicy> {
    match set(value) {
        None | Some("Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(unknown(field, other, &["Cluster", "Local"])),
    }
}

fn endpoint(i: usize, given: &discovery::Endpoint, ipv6: bool) -> Result<Endpoint> {
    let mut first = None;
    for (j, text) in given.addresses.iter().enumerate() {
        let field = || format!("endpoints[{i}].addresses[{j}]");
        let ip = address(text, field)?;
        if ip.is_ipv6() != ipv6 {
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            return Err(error(field(), Reason::WrongFamily { address: ip, family }));
        }
        if let Some(class) = not_an_endpoint(ip) {
            return Err(error(field(), Reason::AddressClass { address: ip, class }));
        }
        first.get_or_insert(ip);
    }
    let address = first.ok_or_else(|| missing(format!("endpoints[{i}].addresses")))?;
    let node = set(given.node_name.as_deref());
    if let Some(name) = node {
        check_name(name, true, || format!("endpoints[{i}].nodeName"))?;
    }
    let hints = given.hints.as_ref();
    let conditions = given.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    Ok(Endpoint {
        address,
        ready,
        serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        location: EndpointLocation {
            node: node.map(Into::into),
            for_zones: hints
                .and_then(|hints| hints.for_zones.as_deref())
                .map_or_else(Box::default, |zones| shared(zones.iter().map(|zone| &*zone.name))),
            for_nodes: hints
                .and_then(|hints| hints.for_nodes.as_deref())
                .map_or_else(Box::default, |nodes| shared(nodes.iter().map(|node| &*node.name))),
        }
        .shared(),
    })
}

/// Interned texts, sorted.
fn shared<'a>(texts: impl Iterator<Item = &'a str>) -> Box<[Arc<str>]> {
    let mut texts: Vec<_> = texts.map(intern::text).collect();
    texts.sort_unstable();
    texts.dedup();
    texts.into()
}

/// The reason why an address cannot be an endpoint (`ValidateEndpointIP` upstream).
fn not_an_endpoint(ip: IpAddr) -> Option<&'static str> {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if ip.is_unspecified() {
        Some("the unspecified address")
    } else if ip.is_loopback() {
        Some("a loopback address")
    } else if link_local {
        Some("a link-local address")
    } else if ip.is_multicast() {
        Some("a multicast address")
    } else if ip == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
        Some("the broadcast address")
    } else {
        None
    }
}

/// Namespace and name of an object whose name is a DNS label, or with `dots` a DNS subdomain.
fn namespaced_key(meta: &ObjectMeta, dots: bool) -> Result<ObjectKey> {
    let name = meta.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(missing("metadata.name"));
    }
    check_name(name, dots, || "metadata.name".to_owned())?;
    let namespace = set(meta.namespace.as_deref()).unwrap_or("default");
    check_name(namespace, false, || "metadata.namespace".to_owned())?;
    Ok(ObjectKey::new(namespace, name))
}

fn label<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(name).map(String::as_str)
}

/// Kubernetes treats an empty string as an absent one.
fn set(value: Option<&str>) -> Option<&str> {
    value.filter(|text| !text.is_empty())
}

fn check_name(name: &str, dots: bool, field: impl FnOnce() -> String) -> Result<()> {
    let max = if dots { SUBDOMAIN_MAX } else { LABEL_MAX };
    if name.len() > max {
        let value = name.to_owned();
        return Err(error(field(), Reason::TooLong { value, max }));
    }
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inner)
    };
    let valid = if dots { name.split('.').all(label) } else { label(name) };
    if valid {
        Ok(())
    } else {
        let value = name.to_owned();
        Err(error(field(), Reason::NotDns { value, dots }))
    }
}

fn port(value: i32, field: impl FnOnce() -> String) -> Result<u16> {
    u16::try_from(value).ok().filter(|&port| port != 0).ok_or_else(|| {
        let (min, max) = (1, u16::MAX.into());
        let value = value.into();
        error(field(), Reason::OutOfRange { value, min, max })
    })
}

fn protocol(value: Option<&str>, field: impl FnOnce() -> String) -> Result<Protocol> {
    match set(value) {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(unknown(field(), other, &["TCP", "UDP", "SCTP"])),
    }
}

fn address(text: &str, field: impl FnOnce() -> String) -> Result<IpAddr> {
    match text.parse() {
        // An IPv4-mapped address means different things to different readers; upstream refuses it too.
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => Err(error(field(), Reason::NotAnAddress(text.into()))),
        Ok(ip) => Ok(ip),
        Err(_) => Err(error(field(), Reason::NotAnAddress(text.into()))),
    }
}

fn cidr(text: &str, field: impl FnOnce() -> String) -> Result<IpNet> {
    text.parse().map_err(|_| error(field(), Reason::NotACidr(text.into())))
}

fn error(field: impl Into<String>, reason: Reason) -> ConvertError {
    ConvertError {
        field: field.into(),
        reason,
    }
}

fn missing(field: impl Into<String>) -> ConvertError {
    error(field, Reason::Missing)
}

fn duplicate(field: String, value: &str) -> ConvertError {
    error(field, Reason::Duplicate(value.to_owned()))
}

fn unknown(field: impl Into<String>, value: &str, allowed: &'static [&'static str]) -> ConvertError {
    let value = value.to_owned();
    error(field, Reason::Unknown { value, allowed })
}
