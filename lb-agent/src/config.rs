//! kube-proxy's configuration file: the keys that apply to lb.

mod file;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

use self::file::{File, Time};
use crate::node::addrs::NodePortAddresses;
use crate::node::nf_conntrack::NfConntrackSettings;
use crate::server::BindAddress;

/// The only version that exists.
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
/// The values that the kernel accepts.
const OOM_SCORES: std::ops::RangeInclusive<i32> = -1000..=1000;

/// The keys that are applied; the others are named in a warning.
const APPLIED: &[&str] = &[
    "apiVersion",
    "bindAddress",
    "clientConnection.kubeconfig",
    "conntrack.maxPerCore",
    "conntrack.min",
    "conntrack.tcpBeLiberal",
    "conntrack.tcpCloseWaitTimeout",
    "conntrack.tcpEstablishedTimeout",
    "conntrack.udpStreamTimeout",
    "conntrack.udpTimeout",
    "healthzBindAddress",
    "hostnameOverride",
    "kind",
    "metricsBindAddress",
    "nodePortAddresses",
    "oomScoreAdj",
];

/// `detectLocalMode`: how packets from pods of this node are recognized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectLocal {
    /// By `clusterCIDR`; if that is empty, as without the mode.
    ClusterCidr(Vec<IpNet>),
    /// By the Node's `podCIDRs`.
    NodeCidr,
    /// By the bridge that packets enter through.
    Bridge(String),
    /// By the prefix of the device name that packets enter through.
    DevicePrefix(String),
}

impl DetectLocal {
    /// Networks inside the cluster, in addition to this node's addresses and its pods. Modes that go by devices add none.
    #[must_use]
    pub fn inside(&self) -> &[IpNet] {
        match self {
            Self::ClusterCidr(networks) => networks,
            Self::NodeCidr | Self::Bridge(_) | Self::DevicePrefix(_) => &[],
        }
    }
}

/// The content of a file, with kube-proxy's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `clientConnection.kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `hostnameOverride`.
    pub node_name: Option<String>,
    /// `detectLocalMode`, `detectLocal` and `clusterCIDR`.
    pub detect_local: DetectLocal,
    /// `nodePortAddresses`.
    pub node_port_addresses: Option<NodePortAddresses>,
    /// `healthzBindAddress`.
    pub healthz: BindAddress,
    /// `metricsBindAddress`.
    pub metrics: BindAddress,
    /// `oomScoreAdj`; `None` if the file does not set it.
    pub oom_score_adj: Option<i32>,
    /// `conntrack`.
    pub conntrack: NfConntrackSettings,
    /// Keys that the file sets, and that have no effect.
    pub without_effect: Vec<String>,
}

/// An error of a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
    /// The file is not a valid configuration.
    #[error("{path}: {error}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The error in its text.
        error: ParseError,
    },
}

/// An error in the text of a configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The text is not YAML, a key is unknown, or a value has the wrong type.
    #[error("{at}{message}")]
    Text {
        /// The line and the key, if they are known.
        at: String,
        /// The error.
        message: String,
    },
    /// The object has another kind or version.
    #[error("{found} in place of {API_VERSION} {KIND}")]
    Kind {
        /// Version and kind of the object.
        found: String,
    },
    /// The value of a key is invalid.
    #[error("{key}: {message}")]
    Value {
        /// The key.
        key: &'static str,
        /// The error.
        message: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            node_name: None,
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            node_port_addresses: None,
            healthz: everywhere(Ipv4Addr::UNSPECIFIED.into()),
            metrics: everywhere(Ipv4Addr::LOCALHOST.into()),
            oom_score_adj: None,
            conntrack: NfConntrackSettings::default(),
            without_effect: Vec::new(),
        }
    }
}

fn everywhere(ip: IpAddr) -> BindAddress {
    BindAddress { ip, port: None }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, or is not a valid configuration.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|error| ConfigError::Read {
            path: path.to_owned(),
            error,
        })?;
        Self::parse(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            error,
        })
    }

    /// Parses a text, YAML or JSON.
    ///
    /// # Errors
    /// If it is not a valid configuration.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let file: File = file::read(text)?;
        let set: Value = file::read(text)?;
        let File {
            api_version,
            kind,
            client_connection,
            hostname_override,
            bind_address,
            healthz_bind_address,
            metrics_bind_address,
            detect_local_mode,
            detect_local,
            cluster_cidr,
            node_port_addresses,
            oom_score_adj,
            conntrack,
            ..
        } = file;
        if (api_version.as_str(), kind.as_str()) != (API_VERSION, KIND) {
            let found = format!("{api_version:?} {kind:?}");
            return Err(ParseError::Kind { found });
        }
        let v6 = match non_empty(bind_address) {
            Some(text) => {
                let ip: IpAddr = text.parse().map_err(|_| value("bindAddress", "not an address"))?;
                ip.is_ipv6()
            }
            None => false,
        };
        let default = Self::default();
        let [any, own] = if v6 {
            [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST].map(|ip| everywhere(ip.into()))
        } else {
            [default.healthz, default.metrics]
        };
        let mode = non_empty(detect_local_mode);
        let detect_local = detect_local.unwrap_or_default();
        Ok(Self {
            kubeconfig: client_connection
                .and_then(|client| non_empty(client.kubeconfig))
                .map(PathBuf::from),
            node_name: non_empty(hostname_override).map(|name| name.trim().to_lowercase()),
            detect_local: match mode.as_deref() {
                None | Some("ClusterCIDR") => DetectLocal::ClusterCidr(cidrs(non_empty(cluster_cidr))?),
                Some("NodeCIDR") => DetectLocal::NodeCidr,
                Some("BridgeInterface") => DetectLocal::Bridge(detect_local.bridge_interface.unwrap_or_default()),
                Some("InterfaceNamePrefix") => {
                    DetectLocal::DevicePrefix(detect_local.interface_name_prefix.unwrap_or_default())
                }
                Some(other) => return Err(value("detectLocalMode", format!("{other:?} is unknown"))),
            },
            node_port_addresses: wanted(&node_port_addresses.unwrap_or_default())?,
            healthz: address("healthzBindAddress", non_empty(healthz_bind_address), any)?,
            metrics: address("metricsBindAddress", non_empty(metrics_bind_address), own)?,
            oom_score_adj: match oom_score_adj {
                Some(score) if !OOM_SCORES.contains(&score) => {
                    return Err(value("oomScoreAdj", format!("{score} is not between -1000 and 1000")));
                }
                score => score,
            },
            conntrack: conntrack_settings(&conntrack.unwrap_or_default(), default.conntrack),
            without_effect: without_effect(&set, mode.as_deref()),
        })
    }
}

/// Returns `None` for an empty text, which kube-proxy treats as unset.
fn non_empty(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

fn value(key: &'static str, message: impl Into<String>) -> ParseError {
    ParseError::Value {
        key,
        message: message.into(),
    }
}

fn address(key: &'static str, text: Option<String>, default: BindAddress) -> Result<BindAddress, ParseError> {
    match text {
        Some(text) => text.parse().map_err(|error| value(key, format!("{text:?} is {error}"))),
        None => Ok(default),
    }
}

fn cidrs(text: Option<String>) -> Result<Vec<IpNet>, ParseError> {
    let text = text.unwrap_or_default();
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words
        .map(|word| {
            word.parse()
                .map_err(|_| value("clusterCIDR", format!("{word:?} is not a network")))
        })
        .collect()
}

fn wanted(words: &[String]) -> Result<Option<NodePortAddresses>, ParseError> {
    if words.is_empty() {
        return Ok(None);
    }
    let wanted = words.join(",").parse();
    wanted
        .map(Some)
        .map_err(|error| value("nodePortAddresses", format!("{words:?} is {error}")))
}

fn conntrack_settings(set: &file::Conntrack, default: NfConntrackSettings) -> NfConntrackSettings {
    let file::Conntrack {
        max_per_core,
        min,
        tcp_established_timeout,
        tcp_close_wait_timeout,
        tcp_be_liberal,
        udp_timeout,
        udp_stream_timeout,
    } = set;
    // Zero leaves a setting unchanged.
    let time = |time: &Option<Time>, default: Duration| time.map_or(default, |Time(time)| time);
    NfConntrackSettings {
        max_per_core: max_per_core.unwrap_or(default.max_per_core),
        min: min.unwrap_or(default.min),
        tcp_established: time(tcp_established_timeout, default.tcp_established),
        tcp_close_wait: time(tcp_close_wait_timeout, default.tcp_close_wait),
        tcp_be_liberal: tcp_be_liberal.unwrap_or_default(),
        udp: time(udp_timeout, default.udp),
        udp_stream: time(udp_stream_timeout, default.udp_stream),
    }
}

/// Returns the keys that are set but not applied. `featureGates` counts as one key, and so does a list.
fn without_effect(set: &Value, detect_local_mode: Option<&str>) -> Vec<String> {
    let mut keys = BTreeSet::new();
    collect("", set, &mut keys);
    // lb recognizes sources by their addresses, not by the devices that packets enter through.
    let applied: &[&str] = match detect_local_mode {
        None | Some("ClusterCIDR") => &["clusterCIDR", "detectLocalMode"],
        Some("NodeCIDR") => &["detectLocalMode"],
        Some(_) => &[],
    };
    keys.retain(|key| !APPLIED.iter().chain(applied).any(|applied| applied == key));
    keys.into_iter().collect()
}

fn collect(path: &str, set: &Value, keys: &mut BTreeSet<String>) {
    match set {
        Value::Object(map) if path != "featureGates" => {
            for (key, value) in map {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                collect(&path, value, keys);
            }
        }
        set if is_zero(set) => {}
        _ => {
            keys.insert(path.to_owned());
        }
    }
}

/// Whether kube-proxy treats a value as unset; kubeadm writes every key, most of them with such a value.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

#[cfg(test)]
mod tests;
