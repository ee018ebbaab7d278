//! Grace periods: when everything that a program may still hold from before is out of use.

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

/// A thread that waits for grace periods, so that no publication has to.
#[derive(Debug)]
pub struct GraceThread {
    requested: Epoch,
    requests: Sender<Epoch>,
    shared: Arc<Shared>,
    passed: watch::Receiver<Epoch>,
}

impl GraceThread {
    /// Starts the thread. It ends when this is dropped.
    ///
    /// # Errors
    /// Where the maps that give the grace cannot be made (`CAP_BPF`).
    pub fn start() -> io::Result<Self> {
        let map = GraceMap::new()?;
        let (requests, wanted) = mpsc::channel::<Epoch>();
        let (told, passed) = watch::channel(0);
        let shared = Arc::new(Shared::default());
        let progress = Arc::clone(&shared);
        thread::Builder::new().name("lb-grace".into()).spawn(move || {
            while let Ok(epoch) = wanted.recv() {
                // One period serves all that asked before it begins.
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
                told.send_replace(epoch);
            }
        })?;
        Ok(Self {
            requested: 0,
            requests,
            shared,
            passed,
        })
    }

    /// Asks for a period that begins now.
    pub fn begin(&mut self) -> Epoch {
        self.requested += 1;
        // Where the thread has ended, `wait` says why.
        self.requests.send(self.requested).ok();
        self.requested
    }

    /// The newest request that a period has served.
    #[must_use]
    pub fn passed(&self) -> Epoch {
        self.shared.lock().passed
    }

    /// To be told when [`Self::passed`] changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Epoch> {
        self.passed.clone()
    }

    /// Blocks until a request is served; some 10 ms.
    ///
    /// # Errors
    /// Where the system call that gives the grace has failed.
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
