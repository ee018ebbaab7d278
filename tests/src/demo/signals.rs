//! SIGINT, SIGTERM and SIGHUP as a flag.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static ARRIVED: AtomicBool = AtomicBool::new(false);

extern "C" fn set_flag(_signal: i32) {
    ARRIVED.store(true, Ordering::Relaxed);
}

/// Handlers of the signals that end the demo. While this exists, they only set a flag; dropping it restores the actions
/// from before.
pub(super) struct Signals {
    before: Vec<(Signal, SigAction)>,
}

impl Signals {
    pub(super) fn install() -> Result<Self> {
        let action = SigAction::new(SigHandler::Handler(set_flag), SaFlags::SA_RESTART, SigSet::empty());
        let mut before = Vec::new();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the handler is async-signal-safe: it only stores to an atomic.
            let old = unsafe { sigaction(signal, &action) }.with_context(|| format!("handling {signal}"))?;
            before.push((signal, old));
        }
        Ok(Self { before })
    }

    /// Returns whether one of the signals has arrived.
    #[expect(
        clippy::unused_self,
        reason = "the flag is valid only while the handlers are installed"
    )]
    pub(super) fn arrived(&self) -> bool {
        ARRIVED.load(Ordering::Relaxed)
    }

    /// Sleeps until the time is over or a signal arrives.
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
            // SAFETY: `action` is the action that `sigaction` returned in `install`, so its handler is still valid.
            let _ = unsafe { sigaction(*signal, action) };
        }
    }
}
