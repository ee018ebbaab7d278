//! The product on a pin path of its own, without a process of its own.

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::{self, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::{BpfMaps, PinnedMaps};
use lb_agent::maps::faulty::{Fault, FaultyMaps};
use lb_agent::maps::{Capacities, Maps as _};
use lb_agent::model::{Batch, Change};
use lb_agent::reconcile::Reconciler;
use lb_agent::verify::verify;

/// The node that the product thinks it runs on.
pub const NODE: &str = "n1";

/// Small, so that FRONTENDS can be full, and indexes, ids and slots are soon used again.
pub const CAPACITIES: Capacities = Capacities {
    services: 76,
    frontends: 100,
    backends: 192,
    backend_slots: 256,
    sockets: 64,
    sockets_more: 64,
    udp_flows: 64,
    affinity: 64,
    conntrack: 64,
    conntrack_new: 64,
};

/// The pinned maps, and the reconciler that writes them.
pub struct InProcessAgent {
    /// `None` between the death of one and the start of the next.
    reconciler: Option<Reconciler<FaultyMaps<BpfMaps>>>,
    lock: Lock,
}

impl InProcessAgent {
    /// Loads the product's programs and makes, or adopts, the maps below a pin path.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(pins: &PinPath) -> Result<Self> {
        let lock = Lock::take(pins)?;
        let mut agent = Self { reconciler: None, lock };
        agent.restart()?;
        Ok(agent)
    }

    /// What `kill -9` and the start of the next agent do: nothing of the old one is left but what is pinned.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn restart(&mut self) -> Result<()> {
        drop(self.reconciler.take());
        let maps = loader::load(OBJECT, &self.lock, &CAPACITIES, SocketLb::All)?;
        let maps = FaultyMaps::new(maps, 0, Fault::None);
        self.reconciler = Some(Reconciler::adopt(maps, NODE)?);
        Ok(())
    }

    /// The reconciler.
    ///
    /// # Errors
    /// If the last restart has failed.
    pub fn reconciler(&mut self) -> Result<&mut Reconciler<FaultyMaps<BpfMaps>>> {
        self.reconciler.as_mut().context("the last restart has failed")
    }

    /// Applies changes as a whole, from a source that has told everything.
    ///
    /// # Errors
    /// If the last restart has failed.
    pub fn apply(&mut self, changes: Vec<Change>) -> Result<()> {
        self.reconciler()?.apply(Batch::of(changes));
        Ok(())
    }

    /// Waits until everything that is out of use is free again, and fails unless the maps are as desired and the same
    /// once more writes nothing.
    ///
    /// # Errors
    /// With the differences.
    pub fn check(&mut self) -> Result<()> {
        let reconciler = self.reconciler()?;
        reconciler.settle()?;
        let problems: Vec<_> = reconciler.problems().into_iter().filter(is_failure).collect();
        ensure!(problems.is_empty(), "{problems:?}");
        let drifts = verify(reconciler.desired(), &reconciler.maps().dump()?);
        ensure!(drifts.is_empty(), "the maps are not as they should be: {drifts:?}");
        let before = reconciler.maps().written();
        self.apply(Vec::new())?;
        let written = self.reconciler()?.maps().written() - before;
        ensure!(written == 0, "{written} bytes were written for nothing");
        Ok(())
    }

    /// A reader's own view of the maps.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn open(&self) -> Result<PinnedMaps> {
        Ok(PinnedMaps::open(&self.lock.pins().maps())?)
    }

    /// The lock, and with it the pin path.
    #[must_use]
    pub fn lock(&self) -> &Lock {
        &self.lock
    }
}

/// Where two Services claim an address, that is told and nothing is wrong.
fn is_failure(problem: &lb_agent::model::Problem) -> bool {
    problem.message.contains("not served as it should be")
}
