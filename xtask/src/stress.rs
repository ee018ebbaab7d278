//! `stress`: tests that run for longer or with more load than in `test`, as root.

use std::process::ExitCode;

use anyhow::Context as _;

use crate::artifacts::build_stress;
use crate::privilege::{as_root, search_path};
use crate::setup::{self, Scope};
use crate::test::{self, LongTest};
use crate::workspace::root;

/// Downtime of the API server in seconds.
const OUTAGE: u32 = 600;

/// Number of SYNs that receive no reply.
const SYNS: u32 = 1_000_000;

/// Number of times that maps grow and shrink while clients connect.
const RESIZES: u32 = 20;

/// Arguments of `stress`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Instead, disconnect the agents from the Kubernetes API server for ten minutes; this needs Go
    #[arg(long)]
    outage: bool,
    /// Instead, send a million unreplied SYNs through maps of 100,000 entries while 1,000 connections are idle for a minute
    #[arg(long, conflicts_with = "outage")]
    flood: bool,
    /// Also grow every map fourfold and shrink it again, 20 times: during the lookups, then while clients connect
    #[arg(long, conflicts_with_all = ["outage", "flood"])]
    resize: bool,
    /// Arguments of `lb-stress`; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Builds and runs the stress test; fails if it does.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let ready = setup::run(Scope::All)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    if args.outage {
        return test::run_long(LongTest {
            target: "kubernetes",
            test: "services_survive_api_server_outages",
            variable: ("LB_API_AWAY", OUTAGE.to_string()),
            kubernetes: true,
        });
    }
    if args.flood {
        return test::run_long(LongTest {
            target: "syn_flood",
            test: "connections_survive_a_flood_of_unanswered_syns",
            variable: ("LB_FLOOD", SYNS.to_string()),
            kubernetes: false,
        });
    }
    let program = build_stress()?.program("lb-stress")?;
    let mut command = as_root(&program, &[("PATH", search_path())], "the stress test")?;
    command.current_dir(root());
    if args.resize {
        command.arg("--resize");
    }
    command.args(&args.arguments);
    if !command.status().context("cannot run the stress test")?.success() {
        return Ok(ExitCode::FAILURE);
    }
    if args.resize {
        return test::run_long(LongTest {
            target: "map_resize",
            test: "maps_grow_and_shrink_under_load_without_a_failed_connection",
            variable: ("LB_RESIZES", RESIZES.to_string()),
            kubernetes: false,
        });
    }
    Ok(ExitCode::SUCCESS)
}
