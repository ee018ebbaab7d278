//! Grace periods: all programs that ran when a grace period began have ended when it has passed.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::watch;

use super::sys::GraceMap;
use lb_core::maps::{Epoch, MapError};

#[derive(Debug, Default)]
struct Progress {
    passed: Epoch,
    failed: Option<io::ErrorKind>,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that waits for grace periods, so that the reconciler does not.
#[derive(Debug)]
pub struct GraceThread {
    requested: Epoch,
    requests: Sender<Epoch>,
    shared: Arc<Shared>,
    passed: watch::Receiver<Epoch>,
}

impl GraceThread {
    /// Starts the thread. It ends when this value is dropped.
    ///
    /// # Errors
    /// If the maps for grace periods cannot be created, which needs `CAP_BPF`.
    pub fn start() -> io::Result<Self> {
        let map = GraceMap::new()?;
        let (requests, wanted) = mpsc::channel::<Epoch>();
        let (reports, passed) = watch::channel(0);
        let shared = Arc::new(Shared::default());
        let progress = Arc::clone(&shared);
        thread::Builder::new().name("lb-grace".into()).spawn(move || {
            while let Ok(epoch) = wanted.recv() {
                // One grace period serves all requests that were made before it begins.
                let epoch = wanted.try_iter().last().unwrap_or(epoch);
                let result = map.synchronize();
                match &result {
                    Ok(()) => progress.lock().passed = epoch,
                    Err(error) => progress.lock().failed = Some(error.kind()),
                }
                progress.changed.notify_all();
                if result.is_err() {
                    return;
                }
                reports.send_replace(epoch);
            }
        })?;
        Ok(Self {
            requested: 0,
            requests,
            shared,
            passed,
        })
    }

    /// Requests a grace period that begins now, and returns its epoch.
    pub fn begin(&mut self) -> Epoch {
        self.requested += 1;
        // If the thread has ended, `wait` returns the reason.
        self.requests.send(self.requested).ok();
        self.requested
    }

    /// Returns the newest epoch that a grace period has passed.
    #[must_use]
    pub fn passed(&self) -> Epoch {
        self.shared.lock().passed
    }

    /// Returns a receiver of [`Self::passed`].
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Epoch> {
        self.passed.clone()
    }

    /// Blocks until a grace period has passed the epoch, for some 10 ms.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if the system call that waits for the programs failed.
    pub fn wait(&self, epoch: Epoch) -> Result<(), MapError> {
        let mut progress = self.shared.lock();
        while progress.passed < epoch {
            if let Some(kind) = progress.failed {
                return Err(MapError::Call {
                    map: "(grace)",
                    call: "BPF_MAP_UPDATE_ELEM of an array of maps",
                    source: kind.into(),
                });
            }
            progress = self
                .shared
                .changed
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}
