//! Looks frontends up on every CPU while lb's maps change, for `cargo xtask stress`: the long run of the test `stress`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use lb_agent::loader::PinPath;
use lb_stress::{NODE, Options, resize_rounds};
use lb_tests::{Cluster, monotonic_ns};

/// Look frontends up on every CPU while the maps change, and fail if a lookup misses or finds a backend of another Service
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Number of lookups
    #[arg(long, default_value_t = 100_000_000)]
    lookups: u64,
    /// Smallest number of changes
    #[arg(long, default_value_t = 10_000)]
    changes: u64,
    /// Seed of all choices: equal seeds make equal choices [default: from the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// Also grow every map fourfold and shrink it again: one map at a time, then all together
    #[arg(long)]
    resize: bool,
    /// Number of times that all maps grow and shrink
    #[arg(long, value_name = "ROUNDS", default_value_t = 20, requires = "resize")]
    resizes: usize,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let options = Options {
        lookups: arguments.lookups,
        changes: arguments.changes,
        seed: arguments.seed.unwrap_or_else(monotonic_ns),
        resizes: resize_rounds(if arguments.resize { arguments.resizes } else { 0 }),
    };
    println!("use --seed {} to repeat these choices", options.seed);
    let cluster = Cluster::builder().nodes(1).build()?;
    let pins = PinPath::new(cluster.pin_path(NODE));
    let bar = ProgressBar::new(options.lookups);
    let style = "{elapsed_precise} {bar:40} {human_pos}/{human_len} lookups, {eta} left\n{msg}";
    bar.set_style(ProgressStyle::with_template(style).context("the progress bar's template")?);
    let (start, mut last_message) = (Instant::now(), Instant::now());
    // A resize looks for lb's programs at all devices of the network namespace.
    let report = cluster.node(NODE).within(|| {
        lb_stress::run(&pins, &options, |progress| {
            bar.set_position(progress.lookups);
            if last_message.elapsed() > Duration::from_millis(200) {
                last_message = Instant::now();
                bar.set_message(progress.to_string());
            }
        })
    })?;
    bar.finish_and_clear();
    let report = report?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{report}");
    let rate = report.counts.lookups() as f64 / seconds;
    println!("{seconds:.1} s, {} lookups per second", HumanCount(rate as u64));
    Ok(if report.counts.bad() == 0 {
        println!("no lookup missed or found a backend of another Service");
        ExitCode::SUCCESS
    } else {
        println!("FAILED");
        ExitCode::FAILURE
    })
}
