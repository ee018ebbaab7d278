//! Where API objects come from: parsing, validation, and what changed since the last look.
//!
//! A source hands [`Batch`]es of validated objects to the index. It knows nothing of maps, and it treats everything it
//! reads as untrusted: bad input becomes a [`Problem`](lb_core::model::Problem), never a panic.

pub mod connect;
pub mod convert;
pub mod kubernetes;
pub mod manifests;
pub(crate) mod parse;
pub mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tracing::{info, warn};

use self::connect::{ConnectError, Settings, connect};
use self::kubernetes::KubernetesSource;
use self::manifests::ManifestSource;
use self::watch::Watcher;
use lb_core::model::Batch;

/// Either of the sources, followed as it changes.
pub enum Source {
    /// Files.
    Manifests(Box<Files>),
    /// The API server.
    Kubernetes(Box<KubernetesSource>, kube::Client),
}

/// Manifests, and the watch that tells when to look at them.
#[derive(Debug)]
pub struct Files {
    watcher: Watcher,
    /// With whoever reads, which may take a while.
    source: Arc<Mutex<ManifestSource>>,
    reading: Option<JoinHandle<Batch>>,
    /// They were read once.
    told: bool,
}

impl Source {
    /// Manifests. To be called in a Tokio runtime.
    #[must_use]
    pub fn manifests(paths: &[PathBuf]) -> Self {
        // Watching begins before the first look, so that no change falls in between.
        let watcher = Watcher::new(paths);
        if let Some(why) = watcher.degraded() {
            warn!("changes of manifests are polled for: {why}");
        }
        Self::Manifests(Box::new(Files {
            watcher,
            source: Arc::new(Mutex::new(ManifestSource::new(paths.to_vec()))),
            reading: None,
            told: false,
        }))
    }

    /// The API server. To be called in a Tokio runtime.
    ///
    /// # Errors
    /// Where the settings cannot be used; a server that cannot be reached is none.
    pub async fn kubernetes(settings: &Settings) -> Result<Self, ConnectError> {
        let connection = connect(settings).await?;
        let servers: Vec<_> = connection.servers.iter().map(ToString::to_string).collect();
        info!(servers = servers.join(" "), "watching the API");
        let source = KubernetesSource::new(&connection);
        Ok(Self::Kubernetes(Box::new(source), connection.client))
    }

    /// Whether the first batch comes at once, and does not depend on others.
    #[must_use]
    pub fn is_here(&self) -> bool {
        matches!(self, Self::Manifests(_))
    }

    /// The client of the API server, for others to use too; `None` without one.
    #[must_use]
    pub fn client(&self) -> Option<kube::Client> {
        match self {
            Self::Manifests(_) => None,
            Self::Kubernetes(_, client) => Some(client.clone()),
        }
    }

    /// How often a watch of the API had to be begun anew.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        match self {
            Self::Manifests(_) => 0,
            Self::Kubernetes(source, _) => source.restarts(),
        }
    }

    /// Waits for the next batch. May be dropped at any point without the loss of a change.
    ///
    /// # Errors
    /// Where reading has panicked.
    pub async fn next(&mut self) -> Result<Batch, JoinError> {
        match self {
            Self::Manifests(files) => files.next().await,
            Self::Kubernetes(source, _) => Ok(source.next().await),
        }
    }
}

impl Files {
    async fn next(&mut self) -> Result<Batch, JoinError> {
        let reading = match &mut self.reading {
            Some(reading) => reading,
            none => {
                let changed = if self.told {
                    self.watcher.changed().await
                } else {
                    Vec::new()
                };
                let source = Arc::clone(&self.source);
                let read = move || {
                    source
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .rescan_forced(&changed)
                };
                none.insert(spawn_blocking(read))
            }
        };
        let batch = reading.await;
        self.reading = None;
        self.told = true;
        batch
    }
}

#[cfg(test)]
mod tests;
