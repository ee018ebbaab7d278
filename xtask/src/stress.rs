//! `stress`: the long runs of tests, as root.

use std::process::ExitCode;

use anyhow::Context as _;

use crate::artifacts::build_stress;
use crate::privilege::{as_root, search_path};
use crate::setup::{self, Scope};
use crate::test::{self, Long};
use crate::workspace::root;

/// How long the API server is away, in seconds.
const OUTAGE: u32 = 600;

/// How many SYNs nobody answers.
const SYNS: u32 = 1_000_000;

/// Arguments of `stress`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep the API server of Kubernetes away from agents for ten minutes, in place of that; this needs Go
    #[arg(long)]
    outage: bool,
    /// Send a million SYNs that nobody answers through maps of 100,000 while 1,000 connections are idle for a minute, in
    /// place of that
    #[arg(long, conflicts_with = "outage")]
    flood: bool,
    /// What `lb-stress` is called with; `--help` tells
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Builds and runs it; its exit code is that of this command.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let ready = setup::run(Scope::All)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    if args.outage {
        return test::long(Long {
            target: "kubernetes",
            test: "services_survive_api_server_outages",
            variable: ("LB_API_AWAY", OUTAGE.to_string()),
            kubernetes: true,
        });
    }
    if args.flood {
        return test::long(Long {
            target: "syn_flood",
            test: "connections_survive_a_flood_of_unanswered_syns",
            variable: ("LB_FLOOD", SYNS.to_string()),
            kubernetes: false,
        });
    }
    let program = build_stress()?.program("lb-stress")?;
    let mut command = as_root(&program, &[("PATH", search_path())], "the stress test")?;
    command.current_dir(root()).args(&args.arguments);
    let well = command.status().context("cannot run the stress test")?.success();
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
