//! Benchmarks of lb on the running kernel, for `cargo xtask bench`. Each prints a table and writes its results as JSON.

mod connect;
mod cost;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod measure;
mod nodeport;
mod numbers;
mod objects;
mod observe;
mod process;
mod programs;
mod report;
mod scenario;
mod sizes;
mod sync;
mod testbed;
mod udp;
mod upgrade;
mod worker;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Benchmarks of lb
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Time from objects to maps, for all Services at once and for one change
    Sync(sync::Options),
    /// One size of `sync`, in a process of its own so that its memory is that of this size; writes JSON
    #[command(hide = true)]
    SyncOne(measure::Options),
    /// Connections to a Service, compared with direct ones, kube-proxy's rules, equal programs in C, and the floor of a hook
    Connect(sizes::Options),
    /// Datagrams to a Service, compared with direct ones and equal programs in C
    Udp(sizes::Options),
    /// Packets from outside, compared with equal programs in C, and requests of a client, compared with kube-proxy's rules
    Nodeport(nodeport::Options),
    /// Starts that replace maps with many conntrack entries and socket records while clients connect
    Upgrade(upgrade::Options),
    /// lb and kube-proxy on the objects of a real API server
    #[cfg(feature = "kubernetes")]
    Kubernetes(kubernetes::Options),
    /// A client that connects continuously and reports when another backend answers
    #[cfg(feature = "kubernetes")]
    #[command(hide = true)]
    Watch(kubernetes::watch::Options),
    /// A process that connects and sends in the namespace that it was started in; receives orders and replies in JSON
    #[command(hide = true)]
    Worker(worker::Options),
    /// An HTTP client in the namespace that it was started in; receives orders and replies in JSON
    #[command(hide = true)]
    HttpClient,
    /// Reports the verified instructions of the programs that a command loads
    #[command(hide = true)]
    Observe(observe::Options),
    /// An HTTP server
    #[command(hide = true)]
    HttpServer,
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Sync(options) => sync::run(&options),
        Command::SyncOne(options) => measure::run(&options),
        Command::Connect(options) => connect::run(&options),
        Command::Udp(options) => udp::run(&options),
        Command::Nodeport(options) => nodeport::run(&options),
        Command::Upgrade(options) => upgrade::run(&options),
        #[cfg(feature = "kubernetes")]
        Command::Kubernetes(options) => kubernetes::run(&options),
        #[cfg(feature = "kubernetes")]
        Command::Watch(options) => kubernetes::watch::run(&options),
        Command::Worker(options) => worker::run(&options),
        Command::Observe(options) => observe::run(&options),
        Command::HttpClient => nodeport::http::run_client(),
        Command::HttpServer => nodeport::http::run_server(),
    }
}
