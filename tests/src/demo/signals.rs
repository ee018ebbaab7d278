//! Ctrl-C and its like, as a flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static ARRIVED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: i32) {
    ARRIVED.store(true, Ordering::Relaxed);
}

/// The signals that ask the demo to end. While this lives, they only set a flag; then they act as before.
pub(super) struct Signals {
    before: Vec<(Signal, SigAction)>,
}

impl Signals {
    pub(super) fn install() -> Result<Self> {
        let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
        let mut before = Vec::new();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the handler stores to an atomic and does nothing else.
            let old = unsafe { sigaction(signal, &action) }.with_context(|| format!("handling {signal}"))?;
            before.push((signal, old));
        }
        Ok(Self { before })
    }

    /// Whether one of them has come.
    #[expect(
        clippy::unused_self,
        reason = "the flag means something only while the handlers are installed"
    )]
    pub(super) fn arrived(&self) -> bool {
        ARRIVED.load(Ordering::Relaxed)
    }

    /// Sleeps, but not on after a signal.
    pub(super) fn sleep(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.arrived() && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, action) in &self.before {
            // SAFETY: this is the action that was in force before.
            let _ = unsafe { sigaction(*signal, action) };
        }
    }
}
