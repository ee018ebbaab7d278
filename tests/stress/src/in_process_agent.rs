//! The loader, maps and reconciler of lb-agent in this process, on a pin path of their own.

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, EbpfLog, Loader, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::{BpfMaps, PinnedMaps};
use lb_common::abi::SizedMap;
use lb_core::maps::faulty::{Fault, FaultyMaps};
use lb_core::maps::{Capacities, Maps as _};
use lb_core::model::{Batch, Change};
use lb_core::reconcile::Reconciler;
use lb_core::verify::verify;

/// Name of the agent's node.
pub const NODE: &str = "n1";

/// Capacities of the maps at the first start: small, so that FRONTENDS can become full, and indexes, ids and slots are soon used
/// again.
pub const CAPACITIES: Capacities = Capacities::uniform(64)
    .with(SizedMap::Services, 76)
    .with(SizedMap::Frontends, 100)
    .with(SizedMap::Backends, 192)
    .with(SizedMap::BackendSlots, 256);

/// The pinned maps and the reconciler that writes them.
pub struct InProcessAgent {
    /// `None` between the end of one reconciler and the start of the next.
    reconciler: Option<Reconciler<FaultyMaps<BpfMaps>>>,
    lock: Lock,
    /// The capacities of the maps.
    capacities: Capacities,
}

impl InProcessAgent {
    /// Loads lb's programs and creates or adopts the maps below a pin path.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(pins: &PinPath) -> Result<Self> {
        let lock = Lock::take(pins)?;
        let mut agent = Self {
            reconciler: None,
            lock,
            capacities: CAPACITIES,
        };
        agent.restart()?;
        Ok(agent)
    }

    /// Starts again as after `kill -9`: only the pins of the old agent remain.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn restart(&mut self) -> Result<()> {
        drop(self.reconciler.take());
        let maps = loader::load(OBJECT, &self.lock, &self.capacities, SocketLb::All)?;
        let maps = FaultyMaps::new(maps, 0, Fault::None);
        self.reconciler = Some(Reconciler::adopt(maps, NODE)?);
        Ok(())
    }

    /// Replaces the maps that do not have these capacities, as a running agent does.
    ///
    /// # Errors
    /// If the last restart has failed, the kernel refuses, or a map does not get its capacity.
    pub fn resize(&mut self, capacities: Capacities) -> Result<()> {
        let loader = Loader::new(OBJECT, &self.lock, SocketLb::All, EbpfLog::Off)?;
        let reconciler = self.reconciler.as_mut().context("the last restart has failed")?;
        let needed = reconciler.needed();
        let problems = reconciler.replace_maps(|maps| loader.resize(&mut maps.inner, &capacities, &needed))?;
        ensure!(problems.is_empty(), "{problems:?}");
        let present = reconciler.maps().capacities();
        ensure!(
            present == capacities,
            "the maps have {present:?}, not {capacities:?}; {needed:?} are needed"
        );
        self.capacities = capacities;
        Ok(())
    }

    /// Returns the capacities of the maps.
    #[must_use]
    pub fn capacities(&self) -> &Capacities {
        &self.capacities
    }

    /// Returns the reconciler.
    ///
    /// # Errors
    /// If the last restart has failed.
    pub fn reconciler(&mut self) -> Result<&mut Reconciler<FaultyMaps<BpfMaps>>> {
        self.reconciler.as_mut().context("the last restart has failed")
    }

    /// Applies changes as one batch of a source that is complete.
    ///
    /// # Errors
    /// If the last restart has failed.
    pub fn apply(&mut self, changes: Vec<Change>) -> Result<()> {
        self.reconciler()?.apply(Batch::of(changes));
        Ok(())
    }

    /// Waits until everything that is pending free is free, and checks that the maps have the desired state and that an
    /// empty batch writes nothing.
    ///
    /// # Errors
    /// If the maps differ; the message contains the differences.
    pub fn check(&mut self) -> Result<()> {
        let reconciler = self.reconciler()?;
        reconciler.settle()?;
        let problems: Vec<_> = reconciler.problems().into_iter().filter(is_failure).collect();
        ensure!(problems.is_empty(), "{problems:?}");
        let drifts = verify(reconciler.desired(), &reconciler.maps().dump()?);
        ensure!(drifts.is_empty(), "the maps differ from the desired state: {drifts:?}");
        let before = reconciler.maps().written();
        self.apply(Vec::new())?;
        let written = self.reconciler()?.maps().written() - before;
        ensure!(written == 0, "{written} bytes were written without a change");
        Ok(())
    }

    /// Opens the pinned maps for a reader.
    ///
    /// # Errors
    /// If the maps cannot be opened.
    pub fn open(&self) -> Result<PinnedMaps> {
        Ok(PinnedMaps::open(&self.lock.pins().maps())?)
    }

    /// Returns the lock, which has the pin path.
    #[must_use]
    pub fn lock(&self) -> &Lock {
        &self.lock
    }
}

/// Returns whether a problem is a failure. A conflict of two Services over an address is reported too, but expected.
fn is_failure(problem: &lb_core::model::Problem) -> bool {
    problem.message.contains("the maps are not up to date")
}
