//! Flags that kube-proxy has too, and its configuration file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use tracing::warn;

use crate::config::{Config, ConfigError};
use crate::server::{BindAddress, NotAnAddress, ServerSettings};

/// Addresses of the HTTP servers, and kube-proxy's configuration.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// Configuration file of kube-proxy (KubeProxyConfiguration, kubeproxy.config.k8s.io/v1alpha1). Flags take precedence;
    /// a warning lists keys without effect
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address that serves /healthz and /livez; empty to disable [default: 0.0.0.0:10256, on IPv4 and IPv6]
    #[arg(long, value_name = "ADDRESS")]
    healthz_bind_address: Option<Listen>,
    /// Address that serves /metrics, /proxyMode and /healthz; empty to disable [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS")]
    metrics_bind_address: Option<Listen>,
    /// Count connections by Service port in /metrics: two series for each
    #[arg(long)]
    service_metrics: bool,
}

/// An address, or `None` for the empty text.
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
    /// Reads the file, if there is one, and logs the keys that have no effect.
    pub(super) fn read(&self) -> Result<Option<Config>, ConfigError> {
        let Some(path) = &self.config else { return Ok(None) };
        let config = Config::read(path)?;
        if !config.without_effect.is_empty() {
            let keys = config.without_effect.join(", ");
            warn!(config = %path.display(), keys, "some keys have no effect");
        }
        Ok(Some(config))
    }

    /// Settings of the HTTP servers: flags, or else the file.
    pub(super) fn servers(&self, config: &Config) -> ServerSettings {
        let address = |flag: Option<Listen>, file| flag.map_or(Some(file), |Listen(address)| address);
        ServerSettings {
            healthz: address(self.healthz_bind_address, config.healthz),
            metrics: address(self.metrics_bind_address, config.metrics),
            per_service: self.service_metrics,
        }
    }
}
