//! `bench`: builds the programs as they are delivered, measures them as root.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

use crate::artifacts::build_bench;
use crate::kubernetes;
use crate::privilege::{as_root, search_path};
use crate::setup::{self, Scope};
use crate::workspace::root;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Option<Which>,
    /// Folder for the results as JSON, and plots
    #[arg(long, global = true, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Fail where a limit is exceeded
    #[arg(long, global = true)]
    check: bool,
}

/// One benchmark; without it, all with their defaults.
#[derive(Debug, Clone, Subcommand)]
enum Which {
    /// From objects to maps: all Services at once, and one change
    Sync {
        /// Numbers of Services
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 30_000])]
        services: Vec<u32>,
        /// Endpoints of each Service
        #[arg(long, default_value_t = 10)]
        endpoints: u32,
    },
    /// Connections to a Service against direct ones, kube-proxy's rules, and the same work in C
    Connect(Sizes),
    /// Datagrams to a Service against direct ones, and the same work in C
    Udp(Sizes),
    /// Packets from outside against the same work in C, and requests of a client against kube-proxy's rules
    Nodeport {
        /// Number of other Services
        #[arg(long, default_value_t = 1_000)]
        services: u32,
        /// Rounds of each comparison
        #[arg(long, default_value_t = 200)]
        rounds: u32,
    },
    /// lb against the real kube-proxy on the objects of a real API server; Go builds these at the first time
    Kubernetes {
        /// Number of Services
        #[arg(long, default_value_t = 5_000)]
        services: u32,
        /// Endpoints of each Service
        #[arg(long, default_value_t = 10)]
        endpoints: u32,
        /// Changes of one endpoint
        #[arg(long, default_value_t = 100)]
        changes: u32,
    },
}

/// What `connect` and `udp` are measured with.
#[derive(Debug, Clone, clap::Args)]
struct Sizes {
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000, 10_000])]
    services: Vec<u32>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Rounds of each comparison
    #[arg(long, default_value_t = 200)]
    rounds: u32,
}

impl Sizes {
    fn numbers(&self) -> Vec<(&'static str, &u32)> {
        vec![("--endpoints", &self.endpoints), ("--rounds", &self.rounds)]
    }
}

impl Which {
    /// What `lb-bench` is called with.
    fn words(&self) -> Vec<OsString> {
        let (name, services, numbers) = match self {
            Self::Sync { services, endpoints } => ("sync", services, vec![("--endpoints", endpoints)]),
            Self::Connect(sizes) => ("connect", &sizes.services, sizes.numbers()),
            Self::Udp(sizes) => ("udp", &sizes.services, sizes.numbers()),
            Self::Nodeport { services, rounds } => ("nodeport", &vec![*services], vec![("--rounds", rounds)]),
            Self::Kubernetes {
                services,
                endpoints,
                changes,
            } => {
                let numbers = vec![("--endpoints", endpoints), ("--changes", changes)];
                ("kubernetes", &vec![*services], numbers)
            }
        };
        let services: Vec<_> = services.iter().map(u32::to_string).collect();
        let mut words = vec![name.to_owned(), "--services".to_owned(), services.join(",")];
        words.extend(
            numbers
                .into_iter()
                .flat_map(|(flag, number)| [flag.to_owned(), number.to_string()]),
        );
        words.into_iter().map(OsString::from).collect()
    }
}

/// Measures.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let ready = setup::run(Scope::All)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    let mut env = vec![("PATH", search_path())];
    // Not among those that are run when none is named: it needs Go.
    if matches!(args.which, Some(Which::Kubernetes { .. })) {
        if let Some(ask) = setup::ask_for_kubernetes()? {
            return Ok(ask);
        }
        env.push(("LB_KUBERNETES", kubernetes::build()?.into()));
    }
    let program = build_bench()?.program("lb-bench")?;
    let all = ["sync", "connect", "udp", "nodeport"].map(|name| vec![OsString::from(name)]);
    let benches = match &args.which {
        Some(which) => vec![which.words()],
        None => all.into(),
    };
    let mut well = true;
    for words in benches {
        let mut command = as_root(&program, &env, "the benchmark")?;
        command.current_dir(root()).args(words);
        command
            .arg("--out")
            .arg(&args.out)
            .args(args.check.then_some("--check"));
        well &= command.status().context("cannot run the benchmark")?.success();
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
