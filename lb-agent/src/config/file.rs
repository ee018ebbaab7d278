//! Every key that a file may have: k8s.io/kube-proxy/config/v1alpha1, k8s.io/component-base/config/v1alpha1 and
//! k8s.io/component-base/logs/api/v1 of Kubernetes 1.36. Any other key is an error.
#![expect(dead_code, reason = "keys without effect are only checked")]

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, de};
use serde_path_to_error::Track;
use serde_saphyr::{MessageFormatter as _, UserMessageFormatter};

use super::ParseError;

/// A duration in Go's notation (`1h30m`), not negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let time: SignedDuration = text
            .parse()
            .map_err(|_| de::Error::custom(format!("{text:?} is not a duration such as 1h30m")))?;
        let time = Duration::try_from(time).map_err(|_| de::Error::custom(format!("{text:?} is negative")))?;
        Ok(Self(time))
    }
}

/// Defines structs of optional keys, and rejects unknown ones. Keys have the names of the file, in camel case; keys
/// without effect are only checked.
macro_rules! keys {
    ($($(#[$doc:meta])* $name:ident { $($(#[$attr:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Default, Deserialize)]
            #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
            pub(super) struct $name {
                $($(#[$attr])* pub(super) $field: Option<$type>,)*
            }
        )*
    };
}

/// The file. Only `apiVersion` and `kind` are mandatory.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub(super) api_version: String,
    #[serde(default)]
    pub(super) kind: String,
    pub(super) feature_gates: Option<BTreeMap<String, bool>>,
    pub(super) client_connection: Option<ClientConnection>,
    pub(super) logging: Option<Logging>,
    pub(super) hostname_override: Option<String>,
    pub(super) bind_address: Option<String>,
    pub(super) healthz_bind_address: Option<String>,
    pub(super) metrics_bind_address: Option<String>,
    pub(super) bind_address_hard_fail: Option<bool>,
    pub(super) enable_profiling: Option<bool>,
    pub(super) show_hidden_metrics_for_version: Option<String>,
    pub(super) mode: Option<String>,
    pub(super) iptables: Option<Iptables>,
    pub(super) ipvs: Option<Ipvs>,
    pub(super) nftables: Option<Nftables>,
    pub(super) winkernel: Option<Winkernel>,
    pub(super) detect_local_mode: Option<String>,
    pub(super) detect_local: Option<DetectLocal>,
    #[serde(rename = "clusterCIDR")]
    pub(super) cluster_cidr: Option<String>,
    pub(super) node_port_addresses: Option<Vec<String>>,
    pub(super) oom_score_adj: Option<i32>,
    pub(super) conntrack: Option<Conntrack>,
    pub(super) config_sync_period: Option<Time>,
    pub(super) port_range: Option<String>,
    pub(super) windows_run_as_service: Option<bool>,
}

keys! {
    /// Connection to the API server.
    ClientConnection {
        kubeconfig: String,
        accept_content_types: String,
        content_type: String,
        qps: f64,
        burst: i32,
    }
    /// Options of the log.
    Logging {
        format: String,
        // A duration as text, or a number of nanoseconds.
        flush_frequency: IgnoredAny,
        verbosity: u32,
        vmodule: Vec<VerbosityOfFiles>,
        options: LogOptions,
    }
    VerbosityOfFiles {
        file_pattern: String,
        verbosity: u32,
    }
    LogOptions {
        text: LogOutput,
        json: LogOutput,
    }
    LogOutput {
        split_stream: bool,
        // A quantity: a text or a number.
        info_buffer_size: IgnoredAny,
    }
    Iptables {
        masquerade_bit: i32,
        masquerade_all: bool,
        localhost_node_ports: bool,
        sync_period: Time,
        min_sync_period: Time,
    }
    Ipvs {
        sync_period: Time,
        min_sync_period: Time,
        scheduler: String,
        #[serde(rename = "excludeCIDRs")]
        exclude_cidrs: Vec<String>,
        #[serde(rename = "strictARP")]
        strict_arp: bool,
        tcp_timeout: Time,
        tcp_fin_timeout: Time,
        udp_timeout: Time,
    }
    Nftables {
        masquerade_bit: i32,
        masquerade_all: bool,
        sync_period: Time,
        min_sync_period: Time,
    }
    Winkernel {
        network_name: String,
        source_vip: String,
        #[serde(rename = "enableDSR")]
        enable_dsr: bool,
        root_hns_endpoint_name: String,
        forward_health_check_vip: bool,
    }
    DetectLocal {
        bridge_interface: String,
        interface_name_prefix: String,
    }
    Conntrack {
        max_per_core: u32,
        min: u32,
        tcp_established_timeout: Time,
        tcp_close_wait_timeout: Time,
        tcp_be_liberal: bool,
        udp_timeout: Time,
        udp_stream_timeout: Time,
    }
}

/// Parses a text.
///
/// # Errors
/// If it is not YAML, a key is unknown, or a value has the wrong type.
pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, ParseError> {
    let mut track = Track::new();
    let result = serde_saphyr::with_deserializer_from_str(text, |deserializer| {
        T::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track))
    });
    result.map_err(|error| {
        let message = UserMessageFormatter.format_message(&error).into_owned();
        // Without the list of all keys that would be valid.
        let message = message
            .split_once(", expected one of")
            .map_or(&*message, |(what, _)| what);
        let line = error.location().map(|at| format!("line {}: ", at.line()));
        let path = track.path().to_string();
        let key = (path != ".").then(|| format!("{path}: "));
        ParseError::Text {
            at: line.into_iter().chain(key).collect(),
            message: message.to_owned(),
        }
    })
}
