//! The numbers of Services that `connect` and `udp` measure, one after the other, each in both families.

use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use lb_core::model::Protocol;

use crate::objects::{Family, Services};
use crate::programs;
use crate::report::Reporting;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000, 10_000], value_parser = clap::value_parser!(u32).range(1..=100_000))]
    services: Vec<u32>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) endpoints: u32,
    /// Rounds of each comparison
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) rounds: u32,
    #[command(flatten)]
    pub(crate) reporting: Reporting,
}

/// Calls `measure` for each number of Services in each family, with the compiled C programs if a compiler is installed.
pub(crate) fn each(
    options: &Options,
    protocol: Protocol,
    mut measure: impl FnMut(Services, Option<&[u8]>, &ProgressBar) -> Result<()>,
) -> Result<()> {
    let object = match which::which(programs::CLANG) {
        Ok(_) => Some(programs::compile(programs::SOURCE)?),
        Err(_) => {
            eprintln!("clang is not installed, so programs in C are not compared");
            None
        }
    };
    let mut numbers = options.services.clone();
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        for family in Family::ALL {
            let bar = progress(format!("{number} Services, {}", family.label()))?;
            bar.set_message("rules and maps");
            let services = Services {
                number,
                endpoints: options.endpoints,
                family,
                protocol,
            };
            measure(services, object.as_deref(), &bar)?;
            bar.finish_and_clear();
        }
    }
    Ok(())
}

/// Returns a progress bar on standard error; it is hidden if that is no terminal.
pub(crate) fn progress(prefix: String) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {elapsed} {msg}").context("progress bar")?;
    let bar = ProgressBar::no_length().with_style(style.progress_chars("=> "));
    bar.set_prefix(prefix);
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
