//! `bench`: builds the benchmarks in release mode and runs them as root.

mod against;
mod compare;
mod figures;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Subcommand;

use self::against::{Against, Benchmark};
use crate::artifacts::build_bench;
use crate::kubernetes;
use crate::privilege::{as_root, search_path};
use crate::setup::{self, Scope};
use crate::upgrade::{self, Versions};
use crate::workspace::root;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    which: Option<Which>,
    /// Folder for the results as JSON, and plots
    #[arg(long, global = true, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Fail if a limit is exceeded
    #[arg(long, global = true, conflicts_with = "commit")]
    check: bool,
    #[command(flatten)]
    against: Against,
}

/// A benchmark. Without one, all of them run with their defaults, except `upgrade` and `kubernetes`.
#[derive(Debug, Clone, Subcommand)]
enum Which {
    /// Time from objects to maps, for all Services at once and for one change
    Sync {
        /// Numbers of Services
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 30_000])]
        services: Vec<u32>,
        /// Endpoints of each Service
        #[arg(long, default_value_t = 10)]
        endpoints: u32,
    },
    /// Connections to a Service, compared with direct ones, kube-proxy's rules, equal programs in C, and the floor of a hook
    Connect(Sizes),
    /// Datagrams to a Service, compared with direct ones and equal programs in C
    Udp(Sizes),
    /// Packets from outside, compared with equal programs in C, and requests of a client, compared with kube-proxy's rules
    Nodeport {
        /// Number of other Services
        #[arg(long, default_value_t = 1_000)]
        services: u32,
        #[command(flatten)]
        rounds: Rounds,
    },
    /// Starts that replace maps with many entries, those of an earlier layout too; the first run builds an earlier agent
    Upgrade {
        /// Conntrack entries of established flows, two per flow
        #[arg(long, default_value_t = 100_000)]
        conntrack: u32,
        /// Socket records
        #[arg(long, default_value_t = 50_000)]
        sockets: u32,
        /// Repetitions of each measurement
        #[arg(long, default_value_t = 3)]
        repetitions: u32,
    },
    /// lb and the real kube-proxy on the objects of a real API server; the first run builds these with Go
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

/// Numbers of Services that `connect` and `udp` measure by default, and those with `--against`.
const SERVICES: [u32; 3] = [1, 1_000, 10_000];
const SERVICES_AGAINST: [u32; 1] = [1_000];

/// Rounds of each comparison by default, and those of one run with `--against`.
const ROUNDS: u32 = 200;
const ROUNDS_AGAINST: u32 = 20;

/// Number of rounds.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
struct Rounds {
    /// Rounds of each comparison [default: 200, or 20 in each run of --against]
    #[arg(long)]
    rounds: Option<u32>,
}

impl Rounds {
    fn number(self, against: bool) -> u32 {
        self.rounds.unwrap_or(if against { ROUNDS_AGAINST } else { ROUNDS })
    }
}

/// Sizes that `connect` and `udp` measure.
#[derive(Debug, Clone, clap::Args)]
struct Sizes {
    /// Numbers of Services [default: 1,1000,10000, or 1000 with --against]
    #[arg(long, value_delimiter = ',')]
    services: Vec<u32>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    #[command(flatten)]
    rounds: Rounds,
}

impl Sizes {
    /// Returns the arguments of `lb-bench` for these sizes, without the rounds.
    fn arguments(&self, against: bool) -> Vec<OsString> {
        let default = if against { &SERVICES_AGAINST[..] } else { &SERVICES[..] };
        let services = if self.services.is_empty() {
            default
        } else {
            &self.services
        };
        flags(services, &[("--endpoints", self.endpoints)])
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            services: Vec::new(),
            endpoints: 10,
            rounds: Rounds::default(),
        }
    }
}

/// Returns `--services` with its list, and flags with a number each.
fn flags(services: &[u32], numbers: &[(&str, u32)]) -> Vec<OsString> {
    let services: Vec<_> = services.iter().map(u32::to_string).collect();
    let mut words = vec![OsString::from("--services"), services.join(",").into()];
    words.extend(number_flags(numbers));
    words
}

/// Returns flags with a number each.
fn number_flags(numbers: &[(&str, u32)]) -> Vec<OsString> {
    let words = numbers
        .iter()
        .flat_map(|(flag, number)| [(*flag).to_owned(), number.to_string()]);
    words.map(OsString::from).collect()
}

impl Which {
    /// Returns the benchmarks that run without a choice. `kubernetes` and `upgrade` are not among them, because they need Go and
    /// the history.
    fn all() -> [Self; 4] {
        [
            Self::Sync {
                services: vec![1_000, 10_000, 30_000],
                endpoints: 10,
            },
            Self::Connect(Sizes::default()),
            Self::Udp(Sizes::default()),
            Self::Nodeport {
                services: 1_000,
                rounds: Rounds::default(),
            },
        ]
    }

    /// Returns the benchmark as `--against` runs it, or nothing for those that have no figures of the data plane.
    fn to_compare(&self) -> Option<Benchmark> {
        let (name, arguments, rounds) = match self {
            Self::Connect(sizes) => ("connect", sizes.arguments(true), sizes.rounds),
            Self::Udp(sizes) => ("udp", sizes.arguments(true), sizes.rounds),
            Self::Nodeport { services, rounds } => ("nodeport", flags(&[*services], &[]), *rounds),
            Self::Sync { .. } | Self::Upgrade { .. } | Self::Kubernetes { .. } => return None,
        };
        Some(Benchmark {
            name,
            arguments,
            rounds: rounds.number(true),
        })
    }

    /// Returns the arguments of `lb-bench`.
    fn words(&self) -> Vec<OsString> {
        let with_rounds = |mut words: Vec<OsString>, rounds: Rounds| {
            words.extend(["--rounds".into(), rounds.number(false).to_string().into()]);
            words
        };
        let (name, arguments) = match self {
            Self::Sync { services, endpoints } => ("sync", flags(services, &[("--endpoints", *endpoints)])),
            Self::Connect(sizes) => ("connect", with_rounds(sizes.arguments(false), sizes.rounds)),
            Self::Udp(sizes) => ("udp", with_rounds(sizes.arguments(false), sizes.rounds)),
            Self::Nodeport { services, rounds } => ("nodeport", with_rounds(flags(&[*services], &[]), *rounds)),
            Self::Upgrade {
                conntrack,
                sockets,
                repetitions,
            } => {
                let numbers = [
                    ("--conntrack", *conntrack),
                    ("--sockets", *sockets),
                    ("--repetitions", *repetitions),
                ];
                ("upgrade", number_flags(&numbers))
            }
            Self::Kubernetes {
                services,
                endpoints,
                changes,
            } => {
                let numbers = [("--endpoints", *endpoints), ("--changes", *changes)];
                ("kubernetes", flags(&[*services], &numbers))
            }
        };
        [vec![name.into()], arguments].concat()
    }
}

/// Runs the benchmarks, or compares this workspace with a commit.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let ready = setup::run(Scope::All)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    let all = Which::all();
    let benchmarks = args.which.as_ref().map_or(&all[..], std::slice::from_ref);
    if let Some(commit) = &args.against.commit {
        if let Some(ask) = setup::ask_for_c_compiler() {
            return Ok(ask);
        }
        let to_compare: Vec<_> = benchmarks.iter().filter_map(Which::to_compare).collect();
        if to_compare.is_empty() {
            bail!("--against compares connect, udp and nodeport: choose one of them, or none for all three");
        }
        return against::run(&args.against, commit, &to_compare, &args.out);
    }
    let mut env = vec![("PATH", search_path())];
    if matches!(args.which, Some(Which::Kubernetes { .. })) {
        if let Some(ask) = setup::ask_for_kubernetes()? {
            return Ok(ask);
        }
        env.push(("LB_KUBERNETES", kubernetes::build()?.into()));
    }
    if matches!(args.which, Some(Which::Upgrade { .. })) {
        let mut agents = upgrade::build(Versions::Oldest, &[])?;
        env.push(("LB_EARLIER_AGENT", agents.pop().context("no earlier agent")?.into()));
    }
    let program = build_bench()?.program("lb-bench")?;
    let mut well = true;
    for benchmark in benchmarks {
        let mut command = as_root(&program, &env, "the benchmark")?;
        command.current_dir(root()).args(benchmark.words());
        command
            .arg("--out")
            .arg(&args.out)
            .args(args.check.then_some("--check"));
        well &= command.status().context("cannot run the benchmark")?.success();
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Cli::try_parse_from(["bench"].iter().chain(words)).map(|cli| cli.args)
    }

    fn words(which: &Which) -> String {
        let words = which.words();
        words.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn benchmarks_have_their_defaults_on_the_command_line_and_without() {
        let udp = parse(&["udp"]).unwrap().which.unwrap();
        assert_eq!(words(&udp), "udp --services 1,1000,10000 --endpoints 10 --rounds 200");
        let sync = parse(&["sync"]).unwrap().which.unwrap();
        let nodeport = parse(&["nodeport"]).unwrap().which.unwrap();
        let [all_sync, _, all_udp, all_nodeport] = Which::all();
        assert_eq!(words(&sync), words(&all_sync));
        assert_eq!(words(&udp), words(&all_udp));
        assert_eq!(words(&nodeport), words(&all_nodeport));
    }

    #[test]
    fn upgrade_has_the_numbers_of_the_documented_figures() {
        let upgrade = parse(&["upgrade", "--sockets", "7"]).unwrap().which.unwrap();
        assert_eq!(
            words(&upgrade),
            "upgrade --conntrack 100000 --sockets 7 --repetitions 3"
        );
        assert!(upgrade.to_compare().is_none());
    }

    #[test]
    fn comparison_is_shorter_unless_flags_ask_for_more() {
        let args = parse(&["connect", "--against", "8ec0a92"]).unwrap();
        assert_eq!(args.against.commit.as_deref(), Some("8ec0a92"));
        let benchmark = args.which.unwrap().to_compare().unwrap();
        assert_eq!(benchmark.arguments, ["--services", "1000", "--endpoints", "10"]);
        assert_eq!((benchmark.name, benchmark.rounds), ("connect", 20));
        let args = parse(&["connect", "--services", "1", "--rounds", "50", "--against", "x"]).unwrap();
        let benchmark = args.which.unwrap().to_compare().unwrap();
        assert_eq!(benchmark.arguments, ["--services", "1", "--endpoints", "10"]);
        assert_eq!(benchmark.rounds, 50);
        assert!(parse(&["sync"]).unwrap().which.unwrap().to_compare().is_none());
    }

    #[test]
    fn comparison_takes_ten_pairs_or_more() {
        assert!(parse(&["--against", "x", "--pairs", "10"]).is_ok());
        assert!(parse(&["--against", "x", "--pairs", "9"]).is_err());
        assert!(parse(&["--against", "x", "--check"]).is_err());
    }
}
