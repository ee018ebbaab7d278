//! Settings of the process and the host that kube-proxy makes too.

use tracing::{info, warn};

use crate::config::Config;
use crate::node::nf_conntrack::NfConntrack;
use crate::node::oom;

/// Sets the OOM score of this process and returns the settings of nf_conntrack, which the caller applies.
///
/// Without a cluster and without a configuration file nothing is set, and `None` is returned.
pub(super) fn tune(config: Option<&Config>, in_cluster: bool) -> Option<NfConntrack> {
    let config = match config {
        Some(config) => config,
        None if in_cluster => &Config::default(),
        None => return None,
    };
    let score = config.oom_score_adj;
    match oom::set_score(score.unwrap_or(oom::DEFAULT)) {
        Ok(()) => {}
        Err(error) if score.is_some() => warn!(%error, score, "failed to set oomScoreAdj"),
        Err(error) => info!(%error, "oom_score_adj is left unchanged"),
    }
    Some(NfConntrack::new(&config.conntrack))
}
