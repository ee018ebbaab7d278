//! The short run of `cargo xtask stress`: lookups from every CPU while the maps change in every way.

use anyhow::{Result, ensure};
use lb_agent::loader::PinPath;
use lb_stress::{ChangeKind, NODE, Options};
use lb_tests::{Cluster, Random, scaled_count};

#[test]
fn lookups_never_miss_or_return_a_foreign_backend() -> Result<()> {
    const LOOKUPS: u64 = 5_000_000;
    const CHANGES: u64 = 400;
    /// Enough for every kind of change, a kill and a failure.
    const FEWEST: u64 = 60;
    let cluster = Cluster::builder().nodes(1).build()?;
    let options = Options {
        lookups: scaled_count(LOOKUPS),
        changes: scaled_count(CHANGES).max(FEWEST),
        seed: Random::from_env().next_u64(),
    };
    let report = lb_stress::run(&PinPath::new(cluster.pin_path(NODE)), &options, |_| ())?;
    println!("{report}");
    ensure!(report.counts.bad() == 0, "{}", report.counts);
    ensure!(report.counts.lookups() >= options.lookups);
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
