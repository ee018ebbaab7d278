//! A lock-free reader of the pinned maps, and the checks that it may make.
//!
//! A dump is not atomic: one entry in it may be older than another. So the reader takes dump after dump, and checks
//! only what two consecutive dumps agree on. If both contain the same frontend, leading to the same service entry and
//! name, with the same slots and the same backends, then all of these were in the maps at the instant between the two
//! dumps: an entry that changed never returns to its old value, since generations move on (and a range is reused only
//! after a grace period, which is longer than two dumps). That chain must then be consistent. A single dump is enough
//! to check that a permanent frontend is present.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lb_agent::maps::bpf::PinnedMaps;
use lb_common::abi::{Addr, Backend, BackendSlot, Frontend, FrontendKey, FrontendKind, Name, Service, SetWord};
use lb_common::logic::generation;
use lb_core::maps::Dump;

/// A permanent frontend, served by backends with this second byte in their addresses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Always {
    pub(crate) key: FrontendKey,
    pub(crate) owner: u8,
}

/// A thread that dumps the maps until it is stopped.
pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

/// Counts of the reader's checks.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Number of dumps.
    pub(crate) dumps: u64,
    /// Number of chains that two dumps agreed on.
    pub(crate) chains: u64,
}

impl Reader {
    pub(crate) fn start(maps: PinnedMaps, always: Vec<Always>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut seen = Seen::default();
            let mut before: Option<Dump> = None;
            while !stopped.load(Ordering::Relaxed) {
                let now = maps.dump()?;
                check_dump(before.as_ref(), &now, &always, &mut seen)?;
                before = Some(now);
                // Leaves CPU time to the other threads.
                thread::sleep(Duration::from_micros(200));
            }
            Ok(seen)
        });
        Self { stop, thread }
    }

    /// Returns whether the reader has ended, which means an error; [`Self::stop`] returns it.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    pub(crate) fn stop(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the reader has panicked"))?
    }
}

/// All entries that a frontend leads to.
#[derive(Debug, PartialEq)]
struct Chain {
    frontend: Frontend,
    service: Option<Service>,
    name: Option<Name>,
    /// Each slot of the three sets, and of the one in the frontend, with its backend; `None` if one is out of range.
    sets: Vec<Vec<(Option<BackendSlot>, Option<Backend>)>>,
}

impl Chain {
    fn of(dump: &Dump, frontend: Frontend) -> Self {
        let service = dump.service(frontend.service).copied();
        let mut words = service.unwrap_or_default().set_words().to_vec();
        // The set in a frontend is ignored if its slots are those of another service.
        let first = dump.slots.get(frontend.set.base as usize);
        if first.is_some_and(|slot| slot.service == frontend.service) {
            words.push(frontend.set);
        }
        let member = |slot: u32| {
            let slot = dump.slots.get(slot as usize).copied();
            let backend = slot.and_then(|slot| dump.backends.get(slot.backend.id as usize).copied());
            (slot, backend)
        };
        let set = |word: SetWord| {
            (word.base..word.base.saturating_add(word.len.into()))
                .map(member)
                .collect()
        };
        Self {
            frontend,
            service,
            name: dump.names.get(&frontend.service).copied(),
            sets: words.into_iter().map(set).collect(),
        }
    }

    fn check(&self) -> Result<()> {
        let Frontend {
            service: index,
            kind,
            pad,
            set: _,
        } = self.frontend;
        ensure!(pad == [0; 3], "bytes in the padding");
        let kind = FrontendKind::from_u8(kind).context("unknown frontend kind")?;
        if kind.is_mark() {
            ensure!(index.is_none(), "a mark leads to a service");
            return Ok(());
        }
        let service = self.service.context("the service is out of range")?;
        ensure!(
            !index.is_none() && generation::is_live(service.generation),
            "the service is not live"
        );
        let name = self.name.context("the service has no name")?;
        ensure!(
            name.generation == service.generation,
            "the name belongs to another service"
        );
        for (slot, backend) in self.sets.iter().flatten() {
            let (Some(slot), Some(backend)) = (slot, backend) else {
                bail!("a slot or a backend is out of range");
            };
            ensure!(
                generation::is_current(backend.generation, slot.backend.generation),
                "{slot:?} leads to a removed backend: {backend:?}"
            );
            ensure!(generation::is_sealed(backend), "{backend:?} has a broken seal");
            ensure!(
                (slot.addr, slot.port) == (backend.addr, backend.port),
                "{slot:?} leads to another backend: {backend:?}"
            );
            ensure!(
                backend.service == index,
                "{slot:?} leads to a backend of another service: {backend:?}"
            );
        }
        Ok(())
    }

    fn check_owner(&self, owner: u8) -> Result<()> {
        let [internal, ..] = &self.sets[..] else {
            bail!("no sets");
        };
        ensure!(!internal.is_empty(), "the set is empty");
        let belongs_to_owner = |addr: Addr| addr.to_v4().is_some_and(|bytes| bytes[1] == owner);
        let foreign: Vec<_> = internal
            .iter()
            .filter(|(slot, _)| slot.is_none_or(|slot| !belongs_to_owner(slot.addr)))
            .collect();
        ensure!(
            foreign.is_empty(),
            "it leads to backends of another service: {foreign:?}"
        );
        Ok(())
    }
}

/// Checks a dump on its own, and together with the previous one.
fn check_dump(before: Option<&Dump>, now: &Dump, always: &[Always], seen: &mut Seen) -> Result<()> {
    seen.dumps += 1;
    for Always { key, .. } in always {
        ensure!(now.frontends.contains_key(key), "{key:?} is missing");
    }
    let Some(before) = before else { return Ok(()) };
    for (key, frontend) in &now.frontends {
        let Some(frontend_before) = before.frontends.get(key) else {
            continue;
        };
        let chain = Chain::of(now, *frontend);
        if chain != Chain::of(before, *frontend_before) {
            continue;
        }
        seen.chains += 1;
        chain.check().with_context(|| format!("{key:?} -> {chain:?}"))?;
        if let Some(Always { owner, .. }) = always.iter().find(|always| always.key == *key) {
            chain
                .check_owner(*owner)
                .with_context(|| format!("{key:?} -> {chain:?}"))?;
        }
    }
    Ok(())
}
