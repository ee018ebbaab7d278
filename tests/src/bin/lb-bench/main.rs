//! Benchmarks of lb on the kernel that runs, for `cargo xtask bench`: a table for people, JSON for machines.

mod connect;
mod measure;
mod objects;
mod process;
mod sync;

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
    Connect(connect::Options),
    /// A process that connects, in the place that it was started in; takes orders and answers in JSON
    #[command(hide = true)]
    ConnectWorker,
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Sync(options) => sync::run(&options),
        Command::SyncOne(options) => measure::run(&options),
        Command::Connect(options) => connect::run(&options),
        Command::ConnectWorker => connect::run_worker(),
    }
}
