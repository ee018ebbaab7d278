//! One size of `sync`: real programs and maps at a private pin path, filled by the agent's reconciler.

use std::io::{Write as _, stdout};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use lb_agent::heap;
use lb_agent::loader::{self, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::BpfMaps;
use lb_agent::source::manifests::ManifestSource;
use lb_common::abi::SizedMap;
use lb_core::maps::{Capacities, Maps as _};
use lb_core::model::{Batch, Protocol};
use lb_core::reconcile::{LARGE_BATCH, Reconciler};
use lb_tests::Cluster;
use serde::{Deserialize, Serialize};

use crate::numbers::percentile;
use crate::objects::{Family, NODE, Services};
use crate::process;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of Services
    #[arg(long)]
    pub(crate) services: u32,
    /// Endpoints of each Service
    #[arg(long)]
    pub(crate) endpoints: u32,
    /// Measured changes of one endpoint
    #[arg(long)]
    pub(crate) changes: u32,
    /// Read the objects from files, as `lb-agent run` does
    #[arg(long)]
    pub(crate) manifests: bool,
}

/// Cost of parsing manifests.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Parsed {
    /// Size of all files.
    pub(crate) bytes: u64,
    /// From files to objects, in seconds.
    pub(crate) seconds: f64,
}

/// Times and memory for one number of Services.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Number of Services.
    pub(crate) services: u32,
    /// Endpoints of each Service.
    pub(crate) endpoints: u32,
    /// Parsing of all objects from files; absent if they are created in memory.
    pub(crate) parsed: Option<Parsed>,
    /// The first batch, from objects to maps, in seconds.
    pub(crate) first_seconds: f64,
    /// Bytes that the first batch wrote to maps.
    pub(crate) first_bytes: u64,
    /// Time to apply one changed endpoint in seconds, median.
    pub(crate) change_p50_seconds: f64,
    /// Time to apply one changed endpoint in seconds, 99th percentile.
    pub(crate) change_p99_seconds: f64,
    /// Bytes that a change wrote, on average.
    pub(crate) change_bytes: f64,
    /// Resident memory of the process (`VmRSS`), including mapped arrays and all objects.
    pub(crate) resident_bytes: u64,
    /// Part of the resident memory that belongs to mapped maps; `map_bytes` includes it too.
    pub(crate) mapped_map_bytes: u64,
    /// Peak resident memory.
    pub(crate) peak_bytes: u64,
    /// Kernel memory of all maps (`memlock` in their `fdinfo`), including the mapped ones.
    pub(crate) map_bytes: u64,
}

impl Measured {
    /// Returns the resident memory without mapped maps.
    pub(crate) fn own_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.mapped_map_bytes)
    }
}

/// Number of unmeasured changes that warm up.
const WARM_UP: u32 = 20;

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let pins = PinPath::new(cluster.pin_path("n1"));
    let measured = {
        let lock = Lock::take(&pins)?;
        let maps = loader::load(OBJECT, &lock, &capacities(options), SocketLb::All)?;
        measure(maps, options)?
    };
    loader::cleanup(&pins)?;
    let json = serde_json::to_string(&measured).context("writing JSON")?;
    writeln!(stdout(), "{json}").context("writing to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Returns capacities for all Services and for the entries that are not freed yet.
fn capacities(options: &Options) -> Capacities {
    let backends = options.services * options.endpoints;
    Capacities::uniform(64)
        .with(SizedMap::Services, options.services + 16)
        .with(SizedMap::Frontends, 2 * options.services + 16)
        .with(SizedMap::Backends, backends + 256)
        .with(SizedMap::BackendSlots, backends + 256 * options.endpoints)
        .with(SizedMap::Sockets, 1024)
        .with(SizedMap::SocketsMore, 1024)
}

fn measure(maps: BpfMaps, options: &Options) -> Result<Measured> {
    let services = Services {
        number: options.services,
        endpoints: options.endpoints,
        family: Family::Ipv4,
        protocol: Protocol::Tcp,
    };
    let mut reconciler = Reconciler::adopt(maps, NODE)?;
    // In the agent, the source lives as long as the agent itself.
    let mut source = None;
    let (batch, parsed) = if options.manifests {
        let folder = tempfile::tempdir().context("making a folder for manifests")?;
        let bytes = services.write_manifests(folder.path())?;
        let start = Instant::now();
        let batch = source
            .insert(ManifestSource::new(vec![folder.path().to_owned()]))
            .rescan();
        let seconds = start.elapsed().as_secs_f64();
        (batch, Some(Parsed { bytes, seconds }))
    } else {
        let batch = Batch::of(services.objects().collect());
        (batch, None)
    };
    let before = reconciler.maps().written();
    let start = Instant::now();
    reconciler.apply(batch);
    let first = start.elapsed();
    // The agent does this after a large batch.
    if (2 * options.services) as usize >= LARGE_BATCH {
        heap::trim();
    }
    let first_bytes = reconciler.maps().written() - before;
    ensure!(reconciler.problems().is_empty(), "{:?}", reconciler.problems().first());
    let (usage, _) = reconciler.usage();
    ensure!(usage.backends == options.services * options.endpoints, "{usage:?}");

    let mut times = Vec::new();
    let mut written = 0;
    for change in 0..WARM_UP + options.changes {
        // A stride without a common factor with the number of Services spreads them well.
        let service = (u64::from(change) * 104_729 % u64::from(options.services)) as u32;
        let batch = Batch::of(vec![services.slice(service, Some(change))]);
        let before = reconciler.maps().written();
        let start = Instant::now();
        reconciler.apply(batch);
        let time = start.elapsed();
        if change >= WARM_UP {
            times.push(time);
            written += reconciler.maps().written() - before;
        }
        // The agent does this when a grace period has passed.
        reconciler.settle()?;
    }
    ensure!(reconciler.problems().is_empty(), "{:?}", reconciler.problems().first());
    times.sort_unstable();
    let measured = Measured {
        services: options.services,
        endpoints: options.endpoints,
        parsed,
        first_seconds: first.as_secs_f64(),
        first_bytes,
        change_p50_seconds: percentile(&times, 50).as_secs_f64(),
        change_p99_seconds: percentile(&times, 99).as_secs_f64(),
        change_bytes: written as f64 / f64::from(options.changes),
        resident_bytes: process::status_bytes("VmRSS")?,
        mapped_map_bytes: process::mapped_map_bytes()?,
        peak_bytes: process::status_bytes("VmHWM")?,
        map_bytes: process::map_bytes()?,
    };
    drop(source);
    Ok(measured)
}
