//! Sources of API objects: parsing, validation, and changes since the last scan.
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

use self::connect::{ApiServerSettings, ConnectError, connect};
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

/// Manifests, and the watcher that reports changes.
#[derive(Debug)]
pub struct Files {
    watcher: Watcher,
    /// Taken by the reading thread while it reads.
    source: Arc<Mutex<ManifestSource>>,
    reading: Option<JoinHandle<Batch>>,
    /// Whether the manifests were read at least once.
    was_read: bool,
}

impl Source {
    /// Follows manifests. Must be called in a Tokio runtime.
    #[must_use]
    pub fn manifests(paths: &[PathBuf]) -> Self {
        // Watching begins before the first scan, so that no change is missed in between.
        let watcher = Watcher::new(paths);
        if let Some(why) = watcher.degraded() {
            warn!("changes of manifests are polled for: {why}");
        }
        Self::Manifests(Box::new(Files {
            watcher,
            source: Arc::new(Mutex::new(ManifestSource::new(paths.to_vec()))),
            reading: None,
            was_read: false,
        }))
    }

    /// Follows the API server. Must be called in a Tokio runtime.
    ///
    /// # Errors
    /// Returns [`ConnectError`] if the settings cannot be used. An unreachable server is no error.
    pub async fn kubernetes(settings: &ApiServerSettings) -> Result<Self, ConnectError> {
        let connection = connect(settings).await?;
        let servers: Vec<_> = connection.servers.iter().map(ToString::to_string).collect();
        info!(servers = servers.join(" "), "watching the API");
        let source = KubernetesSource::new(&connection);
        Ok(Self::Kubernetes(Box::new(source), connection.client))
    }

    /// Returns whether the objects are read from files, so that the first batch arrives at once.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Manifests(_))
    }

    /// The client of the API server, shared with other users; `None` without an API server.
    #[must_use]
    pub fn client(&self) -> Option<kube::Client> {
        match self {
            Self::Manifests(_) => None,
            Self::Kubernetes(_, client) => Some(client.clone()),
        }
    }

    /// Number of times that a watch of the API was restarted.
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
    /// If the reading thread panicked.
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
                let changed = if self.was_read {
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
        self.was_read = true;
        batch
    }
}

#[cfg(test)]
mod tests;
