//! The short run of `cargo xtask stress`: lookups from every CPU while everything changes.

use anyhow::{Result, ensure};
use lb_agent::loader::PinPath;
use lb_stress::{Kind, NODE, Options};
use lb_tests::{Cluster, Random, scaled};

#[test]
fn no_lookup_misses_and_none_ends_at_a_strangers_backend() -> Result<()> {
    const LOOKUPS: u64 = 5_000_000;
    const CHANGES: u64 = 400;
    /// Every kind of change, and a death and a failure among them.
    const FEWEST: u64 = 60;
    let cluster = Cluster::builder().nodes(1).build()?;
    let options = Options {
        lookups: scaled(LOOKUPS),
        changes: scaled(CHANGES).max(FEWEST),
        seed: Random::from_env().number(),
    };
    let outcome = lb_stress::run(&PinPath::new(cluster.pin_path(NODE)), &options, |_| ())?;
    println!("{outcome}");
    ensure!(outcome.answers.bad() == 0, "{}", outcome.answers);
    ensure!(outcome.answers.lookups() >= options.lookups);
    // One of each kind at the least, and the map was full.
    for kind in Kind::ALL {
        ensure!(
            outcome.progress.changes.contains_key(&kind),
            "no change of {}",
            kind.text()
        );
    }
    ensure!(outcome.progress.adoptions > 0 && outcome.progress.failures > 0);
    ensure!(outcome.progress.fullest >= 100, "FRONTENDS was never full");
    Ok(())
}
