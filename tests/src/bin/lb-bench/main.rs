//! Benchmarks of lb on the kernel that runs, for `cargo xtask bench`: a table for people, JSON for machines.

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
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Sync(options) => sync::run(&options),
        Command::SyncOne(options) => measure::run(&options),
    }
}
