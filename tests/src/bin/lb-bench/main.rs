//! Benchmarks of lb on the kernel that runs, for `cargo xtask bench`: a table for people, JSON for machines.

mod bed;
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
mod udp;
mod worker;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures lb.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// From objects to maps: all Services at once, and one change
    Sync(sync::Options),
    /// One size of `sync`, in a process of its own so that memory is that of this size; writes JSON
    #[command(hide = true)]
    SyncOne(measure::Options),
    /// What a connection to a Service costs, against direct ones, kube-proxy's rules, and the same work in C
    Connect(sizes::Options),
    /// What datagrams to a Service cost, against direct ones, and the same work in C
    Udp(sizes::Options),
    /// What packets from outside cost, against the same work in C, and requests of a client against kube-proxy's rules
    Nodeport(nodeport::Options),
    /// lb against kube-proxy on the objects of a real API server
    #[cfg(feature = "kubernetes")]
    Kubernetes(kubernetes::Options),
    /// A client that connects all the time, and tells when another backend answers
    #[cfg(feature = "kubernetes")]
    #[command(hide = true)]
    Watch(kubernetes::watch::Options),
    /// A process that connects and sends, in the place that it was started in; takes orders and answers in JSON
    #[command(hide = true)]
    Worker(worker::Options),
    /// A client of HTTP, in the place that it was started in; takes orders and answers in JSON
    #[command(hide = true)]
    HttpClient,
    /// Reports the verified instructions of the programs that a command loads
    #[command(hide = true)]
    Observe(observe::Options),
    /// A server of HTTP
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
