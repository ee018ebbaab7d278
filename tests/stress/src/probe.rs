//! The program that looks frontends up in the maps of lb.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{FrontendKey, SizedMap, map_name, map_spec};
use lb_core::maps::Capacities;
use lb_probe::{LookupRequest, PROGRAM, TALLY, Tally, Verdict};
use zerocopy::{FromZeros as _, IntoBytes as _};

/// The object file of the kernel programs, which the build script creates.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-probe"));

/// One of this many lookups pauses between two reads; a power of two.
const LOOKUPS_PER_LINGER: u32 = 8192;

const TALLY_SIZE: usize = size_of::<Tally>();

/// The loaded lookup program.
pub struct Probe {
    programs: Ebpf,
    tally: PerCpuArray<MapData, [u8; TALLY_SIZE]>,
    /// The results of the probes that this one has replaced.
    earlier: LookupCounts,
}

impl Probe {
    /// Loads the program with the maps that are pinned in a directory and have these capacities.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load(maps: &Path, capacities: &Capacities) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for (name, size) in [
            (map_name::FILTER, map_spec::FILTER.default_capacity()),
            (map_name::FRONTENDS, capacities[SizedMap::Frontends]),
            (map_name::SERVICES, capacities[SizedMap::Services]),
            (map_name::BACKEND_SLOTS, capacities[SizedMap::BackendSlots]),
            (map_name::BACKENDS, capacities[SizedMap::Backends]),
        ] {
            let pin = maps.join(name);
            // Without a pinned map, the loader would create a new one, which the agent does not write.
            ensure!(pin.exists(), "{} is not pinned", pin.display());
            loader.map_max_entries(name, size).map_pin_path(name, pin);
        }
        let mut programs = loader.load(OBJECT).context("loading the probe")?;
        let program: &mut SchedClassifier = programs
            .program_mut(PROGRAM)
            .context("the object has no lookup program")?
            .try_into()?;
        program.load().context("loading the probe")?;
        let tally = programs.take_map(TALLY).context("the object has no map TALLY")?;
        Ok(Self {
            programs,
            tally: tally.try_into()?,
            earlier: LookupCounts::default(),
        })
    }

    /// Continues with another probe, whose results are added to those of this one.
    ///
    /// # Errors
    /// If the results cannot be read.
    pub(crate) fn replace_by(&mut self, new: Self) -> Result<()> {
        let earlier = self.counts()?;
        *self = Self { earlier, ..new };
        Ok(())
    }

    /// Looks a frontend up `times` times, on the CPU of the calling thread. The second byte of the address of its backends is
    /// `owner`.
    ///
    /// # Errors
    /// If the program cannot be run.
    pub(crate) fn look_up(&self, key: FrontendKey, owner: u8, times: u32) -> Result<()> {
        let mut request = LookupRequest::new_zeroed();
        request.key = key;
        request.owner = u32::from_ne_bytes([0, owner, 0, 0]);
        request.mask = u32::from_ne_bytes([0, 0xff, 0, 0]);
        request.linger_mask = LOOKUPS_PER_LINGER - 1;
        let program: &SchedClassifier = self
            .programs
            .program(PROGRAM)
            .context("the object has no lookup program")?
            .try_into()?;
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(request.as_bytes()),
                repeat: times,
                ..TestRunOptions::new()
            })
            .context("BPF_PROG_TEST_RUN of the probe")?;
        ensure!(result.return_value == 0, "the probe refused the request");
        Ok(())
    }

    /// Returns the results so far, of all CPUs and of the replaced probes.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn counts(&self) -> Result<LookupCounts> {
        let mut counts = self.earlier.clone();
        for bytes in self.tally.get(&0, 0).context("reading the tally")?.iter() {
            let tally: Tally = zerocopy::transmute!(*bytes);
            for (sum, count) in counts.counts.iter_mut().zip(tally.counts) {
                *sum += count;
            }
            if tally.verdict != Verdict::Good as u32 {
                counts.newest = Some(tally);
            }
        }
        Ok(counts)
    }
}

/// The results of the lookups of a [`Probe`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LookupCounts {
    /// Number of lookups, in the order of [`Verdict::ALL`].
    counts: [u64; Verdict::COUNT],
    /// The newest lookup that was not good, of one of the CPUs that had such.
    newest: Option<Tally>,
}

impl LookupCounts {
    /// Returns the number of lookups with a verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> u64 {
        self.counts[verdict as usize]
    }

    /// Returns the number of all lookups.
    #[must_use]
    pub fn lookups(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the number of lookups that were not good.
    #[must_use]
    pub fn bad(&self) -> u64 {
        self.lookups() - self.count(Verdict::Good)
    }
}

impl fmt::Display for LookupCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lookups, {} of them bad", self.lookups(), self.bad())?;
        for verdict in Verdict::ALL.into_iter().filter(|verdict| *verdict != Verdict::Good) {
            if self.count(verdict) > 0 {
                write!(f, "; {}: {}", verdict.text(), self.count(verdict))?;
            }
        }
        if let Some(tally) = &self.newest {
            let verdict = Verdict::ALL
                .get(tally.verdict as usize)
                .map_or("", |verdict| verdict.text());
            write!(
                f,
                "; for example {verdict}: service {}, slot {}, {}, backend {} of generation {}, which is {} now",
                tally.service,
                tally.slot,
                Ipv4Addr::from(tally.addr.to_ne_bytes()),
                tally.backend,
                tally.slot_generation,
                tally.backend_generation
            )?;
        }
        Ok(())
    }
}
