//! Servers and clients for the pods, nodes and outside clients of the test bed. Results are JSON; see `lb_tests::load`.

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
    /// Run TCP servers that write their name on each connection; print `ready` when all of them listen
    Serve(serve::Options),
    /// Run UDP servers that reply with their name and the payload; print `ready` when all of them listen
    ServeDatagrams(datagrams::Options),
    /// Create a socket and make the calls that standard input contains, one line of JSON each; print results as JSON
    ScriptedSocket(scripted_socket::Options),
    /// Connect one socket after another until a byte arrives on standard input, print their number, and keep the last ones
    /// until standard input ends
    Churn(churn::Options),
    /// Open connections and print a summary as JSON
    Connect(connect::Options),
    /// Build a cluster, print its name prefix, and remove it when standard input ends
    Cluster {
        /// Number of nodes
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Join the nodes by plain routes instead of VXLAN
        #[arg(long)]
        routes: bool,
        /// Number of pods on each node, named pod1 and so on, each with a server on port 8080
        #[arg(long, default_value_t = 0)]
        pods: u8,
    },
    /// Run the demo of `cargo xtask run`
    Demo {
        /// Path of the lb-agent binary
        #[arg(long)]
        agent: PathBuf,
        /// Directory of manifests
        #[arg(long, default_value = "examples")]
        examples: PathBuf,
        /// Check the demo for a few seconds instead of showing the live table
        #[arg(long)]
        check: bool,
        /// End the live table after this many seconds
        #[arg(long)]
        seconds: Option<u64>,
    },
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // A server or client with thousands of connections needs as many open files.
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
            let passed = demo::run(&demo::Options {
                agent,
                testbed,
                examples,
                check,
                seconds,
            })?;
            return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
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

/// Writes a line to standard output and flushes it.
fn print_line(line: &str) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("writing to standard output")
}
