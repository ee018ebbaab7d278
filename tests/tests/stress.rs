//! The short runs of `cargo xtask stress`: lookups from every CPU while the maps change in every way, and while they grow and
//! shrink.

use anyhow::{Result, ensure};
use lb_agent::loader::PinPath;
use lb_common::abi::SizedMap;
use lb_stress::{ChangeKind, NODE, Options, Report};
use lb_tests::{Cluster, Random, scaled_count};

/// Runs lookups and changes in the network namespace of a node, and fails if a lookup was bad.
fn run(options: &Options) -> Result<Report> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let pins = PinPath::new(cluster.pin_path(NODE));
    let report = cluster.node(NODE).within(|| lb_stress::run(&pins, options, |_| ()))??;
    println!("{report}");
    ensure!(report.counts.bad() == 0, "{}", report.counts);
    ensure!(report.counts.lookups() >= options.lookups);
    Ok(report)
}

#[test]
fn lookups_never_miss_or_return_a_foreign_backend() -> Result<()> {
    const LOOKUPS: u64 = 5_000_000;
    const CHANGES: u64 = 400;
    /// Enough for every kind of change, a kill and a failure.
    const FEWEST: u64 = 60;
    let report = run(&Options {
        lookups: scaled_count(LOOKUPS),
        changes: scaled_count(CHANGES).max(FEWEST),
        seed: Random::from_env().next_u64(),
        resizes: Vec::new(),
    })?;
    // At least one change of each kind, and the map was full.
    for kind in ChangeKind::ALL {
        ensure!(
            report.progress.changes.contains_key(&kind),
            "no change of {}",
            kind.text()
        );
    }
    ensure!(report.progress.adoptions > 0 && report.progress.failures > 0);
    ensure!(report.progress.fullest >= 100, "FRONTENDS was never full");
    Ok(())
}

#[test]
fn lookups_never_miss_while_maps_grow_and_shrink() -> Result<()> {
    const RESIZES: [&[SizedMap]; 3] = [&[SizedMap::Services], &[SizedMap::BackendSlots], SizedMap::ALL];
    let options = Options {
        lookups: scaled_count(1_000_000),
        changes: scaled_count(100),
        seed: 1,
        resizes: RESIZES.to_vec(),
    };
    let report = run(&options)?;
    ensure!(report.progress.resizes == 2 * RESIZES.len() as u64);
    // Change 48 ends the agent while all maps are large.
    ensure!(report.progress.adoptions > 0, "no agent adopted the maps");
    Ok(())
}
