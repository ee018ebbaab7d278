//! Servers and clients for pods, nodes and outside clients of the test bed. Answers are JSON; see `lb_tests::load`.

mod churn;
mod connect;
mod datagrams;
mod hold;
mod scripted_socket;
mod serve;

use std::env::current_exe;
use std::io::{Read as _, Write as _, stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use lb_tests::{Cluster, Testbed, Underlay, demo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Helper processes of lb's test bed.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// TCP servers that write their name on each connection; prints `ready` when all of them listen
    Serve(serve::Options),
    /// UDP servers that send back what they get, after their name; prints `ready` when all of them listen
    ServeDatagrams(datagrams::Options),
    /// A socket that makes the calls that standard input says, a line of JSON each; answers are lines of JSON
    ScriptedSocket(scripted_socket::Options),
    /// Connects socket after socket until a byte comes on standard input, tells how many, and holds the last until it ends
    Churn(churn::Options),
    /// Opens connections and tells as JSON how they went
    Connect(connect::Options),
    /// Builds a cluster, prints its name prefix, and removes it when standard input ends
    Cluster {
        /// Number of nodes
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Join the nodes by plain routes in place of VXLAN
        #[arg(long)]
        routes: bool,
        /// Number of pods on each node, named pod1 and so on, with a server on port 8080 each
        #[arg(long, default_value_t = 0)]
        pods: u8,
    },
    /// The demo, as `cargo xtask run` shows it
    Demo {
        /// The lb-agent binary
        #[arg(long)]
        agent: PathBuf,
        /// The folder of manifests
        #[arg(long, default_value = "examples")]
        examples: PathBuf,
        /// Verify for a few seconds in place of the live table
        #[arg(long)]
        check: bool,
        /// End the live table after so many seconds
        #[arg(long)]
        seconds: Option<u64>,
    },
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // A server or client of thousands of connections needs as many files.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")?;
    match arguments.command {
        Command::Serve(options) => serve::run(&options)?,
        Command::ServeDatagrams(options) => datagrams::run(&options)?,
        Command::ScriptedSocket(options) => scripted_socket::run(&options)?,
        Command::Churn(options) => churn::run(&options)?,
        Command::Connect(options) => connect::run(&options)?,
        Command::Cluster { nodes, routes, pods } => {
            let underlay = if routes { Underlay::Routes } else { Underlay::Vxlan };
            cluster(nodes, underlay, pods)?;
        }
        Command::Demo {
            agent,
            examples,
            check,
            seconds,
        } => {
            let testbed = current_exe().context("finding this program")?;
            let well = demo::run(&demo::Options {
                agent,
                testbed,
                examples,
                check,
                seconds,
            })?;
            return Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn cluster(nodes: u8, underlay: Underlay, pods: u8) -> Result<()> {
    let cluster = Cluster::builder()
        .nodes(nodes)
        .underlay(underlay)
        .client(true)
        .build()?;
    let testbed = Testbed::new(current_exe().context("finding this program")?);
    let mut servers = Vec::new();
    for node in cluster.nodes() {
        for number in 1..=pods {
            let name = format!("pod{number}");
            let pod = cluster.add_pod(node.name(), &name)?;
            servers.push(testbed.serve(&pod, &[&format!("0.0.0.0:8080={}-{name}", node.name())])?);
        }
    }
    print_line(cluster.prefix())?;
    print_line("ready")?;
    stdin().read_to_end(&mut Vec::new()).context("reading standard input")?;
    Ok(())
}

/// Writes a line at once.
fn print_line(line: &str) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("writing to standard output")
}
