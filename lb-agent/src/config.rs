//! kube-proxy's configuration file, as far as it means something here.

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
use crate::node::addrs::Wanted;
use crate::node::nf_conntrack;
use crate::server::BindAddress;

/// The one version there is.
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
/// What the kernel takes.
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

/// `detectLocalMode`: which packets come from pods of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectLocal {
    /// By `clusterCIDR`; where that is empty, as if nothing was said.
    ClusterCidr(Vec<IpNet>),
    /// By the Node's `podCIDRs`.
    NodeCidr,
    /// What comes in by a bridge.
    Bridge(String),
    /// What comes in by devices whose name begins so.
    DevicePrefix(String),
}

impl DetectLocal {
    /// Networks that are inside the cluster, besides this node's addresses and its pods. What is told by devices adds none.
    #[must_use]
    pub fn inside(&self) -> &[IpNet] {
        match self {
            Self::ClusterCidr(networks) => networks,
            Self::NodeCidr | Self::Bridge(_) | Self::DevicePrefix(_) => &[],
        }
    }
}

/// What a file says, with kube-proxy's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `clientConnection.kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `hostnameOverride`.
    pub node_name: Option<String>,
    /// `detectLocalMode`, `detectLocal` and `clusterCIDR`.
    pub detect_local: DetectLocal,
    /// `nodePortAddresses`.
    pub node_port_addresses: Option<Wanted>,
    /// `healthzBindAddress`.
    pub healthz: BindAddress,
    /// `metricsBindAddress`.
    pub metrics: BindAddress,
    /// `oomScoreAdj`; `None` where the file does not say it.
    pub oom_score_adj: Option<i32>,
    /// `conntrack`.
    pub conntrack: nf_conntrack::Settings,
    /// Keys of the file that say something, and have no effect.
    pub without_effect: Vec<String>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It is no such configuration.
    #[error("{path}: {error}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: ParseError,
    },
}

/// A text that is no such configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It is no YAML, a key is unknown, or its value is of the wrong kind.
    #[error("{at}{message}")]
    Text {
        /// The line and the key, where they are known.
        at: String,
        /// What is wrong.
        message: String,
    },
    /// Another kind of object, or another version of it.
    #[error("{found} in place of {API_VERSION} {KIND}")]
    Kind {
        /// What it is.
        found: String,
    },
    /// The value of a key makes no sense.
    #[error("{key}: {message}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
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
            conntrack: nf_conntrack::Settings::default(),
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
    /// Where it cannot be read, or is no such configuration.
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

    /// Reads a text, YAML or JSON.
    ///
    /// # Errors
    /// Where it is no such configuration.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let file: File = file::read(text)?;
        let said: Value = file::read(text)?;
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
        let v6 = match said_text(bind_address) {
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
        let mode = said_text(detect_local_mode);
        let detect_local = detect_local.unwrap_or_default();
        Ok(Self {
            kubeconfig: client_connection
                .and_then(|client| said_text(client.kubeconfig))
                .map(PathBuf::from),
            node_name: said_text(hostname_override).map(|name| name.trim().to_lowercase()),
            detect_local: match mode.as_deref() {
                None | Some("ClusterCIDR") => DetectLocal::ClusterCidr(cidrs(said_text(cluster_cidr))?),
                Some("NodeCIDR") => DetectLocal::NodeCidr,
                Some("BridgeInterface") => DetectLocal::Bridge(detect_local.bridge_interface.unwrap_or_default()),
                Some("InterfaceNamePrefix") => {
                    DetectLocal::DevicePrefix(detect_local.interface_name_prefix.unwrap_or_default())
                }
                Some(other) => return Err(value("detectLocalMode", format!("{other:?} is unknown"))),
            },
            node_port_addresses: wanted(&node_port_addresses.unwrap_or_default())?,
            healthz: address("healthzBindAddress", said_text(healthz_bind_address), any)?,
            metrics: address("metricsBindAddress", said_text(metrics_bind_address), own)?,
            oom_score_adj: match oom_score_adj {
                Some(score) if !OOM_SCORES.contains(&score) => {
                    return Err(value("oomScoreAdj", format!("{score} is not between -1000 and 1000")));
                }
                score => score,
            },
            conntrack: tracking(&conntrack.unwrap_or_default(), default.conntrack),
            without_effect: without_effect(&said, mode.as_deref()),
        })
    }
}

/// To kube-proxy, an empty text is one that was not said.
fn said_text(text: Option<String>) -> Option<String> {
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
                .map_err(|_| value("clusterCIDR", format!("{word:?} is no network")))
        })
        .collect()
}

fn wanted(words: &[String]) -> Result<Option<Wanted>, ParseError> {
    if words.is_empty() {
        return Ok(None);
    }
    let wanted = words.join(",").parse();
    wanted
        .map(Some)
        .map_err(|error| value("nodePortAddresses", format!("{words:?} is {error}")))
}

fn tracking(said: &file::Conntrack, default: nf_conntrack::Settings) -> nf_conntrack::Settings {
    let file::Conntrack {
        max_per_core,
        min,
        tcp_established_timeout,
        tcp_close_wait_timeout,
        tcp_be_liberal,
        udp_timeout,
        udp_stream_timeout,
    } = said;
    // Zero leaves a setting as it is.
    let time = |said: &Option<Time>, default: Duration| said.map_or(default, |Time(time)| time);
    nf_conntrack::Settings {
        max_per_core: max_per_core.unwrap_or(default.max_per_core),
        min: min.unwrap_or(default.min),
        tcp_established: time(tcp_established_timeout, default.tcp_established),
        tcp_close_wait: time(tcp_close_wait_timeout, default.tcp_close_wait),
        tcp_be_liberal: tcp_be_liberal.unwrap_or_default(),
        udp: time(udp_timeout, default.udp),
        udp_stream: time(udp_stream_timeout, default.udp_stream),
    }
}

/// The keys that say something and are not applied. `featureGates` is one, and so is a list.
fn without_effect(said: &Value, detect_local_mode: Option<&str>) -> Vec<String> {
    let mut keys = BTreeSet::new();
    collect("", said, &mut keys);
    // Sources are told by their addresses, not by the devices that they come in by.
    let applied: &[&str] = match detect_local_mode {
        None | Some("ClusterCIDR") => &["clusterCIDR", "detectLocalMode"],
        Some("NodeCIDR") => &["detectLocalMode"],
        Some(_) => &[],
    };
    keys.retain(|key| !APPLIED.iter().chain(applied).any(|applied| applied == key));
    keys.into_iter().collect()
}

fn collect(path: &str, said: &Value, keys: &mut BTreeSet<String>) {
    match said {
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
        said if is_zero(said) => {}
        _ => {
            keys.insert(path.to_owned());
        }
    }
}

/// What kube-proxy does not tell from a key that is not there; kubeadm writes all keys down.
fn is_zero(said: &Value) -> bool {
    match said {
        Value::Null => true,
        Value::Bool(said) => !said,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s"),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

#[cfg(test)]
mod tests;
