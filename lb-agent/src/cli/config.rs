//! The flags that kube-proxy has too, and its configuration file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use tracing::{info, warn};

use crate::config::{Config, ConfigError};
use crate::node::nf_conntrack::Conntrack;
use crate::node::oom;
use crate::server::{BindAddress, NotAnAddress, Settings};

/// What load balancers, probes and those who watch are told, and kube-proxy's configuration.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// Configuration file of kube-proxy (KubeProxyConfiguration, kubeproxy.config.k8s.io/v1alpha1); flags win over it. Keys
    /// without effect are named in a warning
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where /healthz and /livez are served; nowhere if empty [default: 0.0.0.0:10256, on IPv4 and IPv6]
    #[arg(long, value_name = "ADDRESS")]
    healthz_bind_address: Option<Listen>,
    /// Where /metrics, /proxyMode and /healthz are served; nowhere if empty [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS")]
    metrics_bind_address: Option<Listen>,
    /// Metrics count connections by Service port too: two series for each
    #[arg(long)]
    service_metrics: bool,
}

/// An address, or nothing.
#[derive(Debug, Clone, Copy)]
struct Listen(Option<BindAddress>);

impl FromStr for Listen {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address)))
    }
}

impl ConfigArgs {
    /// The file, if there is one; what has no effect is said.
    pub(super) fn read(&self) -> Result<Option<Config>, ConfigError> {
        let Some(path) = &self.config else { return Ok(None) };
        let config = Config::read(path)?;
        if !config.without_effect.is_empty() {
            let keys = config.without_effect.join(", ");
            warn!(config = %path.display(), keys, "some keys have no effect here");
        }
        Ok(Some(config))
    }

    /// Where the servers listen. `needs_node`: see [`Settings`].
    pub(super) fn face(&self, config: &Config, needs_node: bool) -> Settings {
        let address = |flag: Option<Listen>, file| flag.map_or(Some(file), |Listen(address)| address);
        Settings {
            healthz: address(self.healthz_bind_address, config.healthz),
            metrics: address(self.metrics_bind_address, config.metrics),
            per_service: self.service_metrics,
            needs_node,
        }
    }
}

/// Sets what is the kernel's of this process and this machine, as kube-proxy does. Without a cluster and without a file,
/// it stays as it is.
pub(super) fn tune(config: Option<&Config>, in_cluster: bool) -> Option<Conntrack> {
    let config = match config {
        Some(config) => config,
        None if in_cluster => &Config::default(),
        None => return None,
    };
    let score = config.oom_score_adj;
    match oom::set_score(score.unwrap_or(oom::DEFAULT)) {
        Ok(()) => {}
        Err(error) if score.is_some() => warn!(%error, score, "oomScoreAdj cannot be set"),
        Err(error) => info!(%error, "oom_score_adj stays as it is"),
    }
    Some(Conntrack::new(&config.conntrack))
}
