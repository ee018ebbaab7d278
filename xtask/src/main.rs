//! The commands of a developer of lb: `cargo xtask setup | test | bless | run | bench | fuzz | stress | image | clean`.
//!
//! One module per command. The modules that they share are below them: `setup` makes the toolchain and the tools present,
//! `artifacts` builds, `commits` checks other commits out, `upgrade` builds their agents, `libtest` and `vm` run tests, `testbed` wraps
//! the test bed of the package `lb-tests`, `kernels` fetches kernels, `privilege` and `command` start processes, and `workspace` has
//! the paths.

mod artifacts;
mod bench;
mod command;
mod commits;
mod fuzz;
mod image;
mod kernel_support;
mod kernels;
mod kubernetes;
mod libtest;
mod privilege;
mod run;
mod setup;
mod stress;
mod test;
mod testbed;
mod upgrade;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests, measures and demonstrates lb")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the missing tools for building and testing; do nothing if none is missing
    Setup(setup::Args),
    /// Check format, lints and documentation, then run all tests; those that need the kernel run as root
    Test(test::Args),
    /// Write the current output of the golden tests to their files; review it with `git diff`
    Bless,
    /// Run the demo on this machine; with ARGS, run the agent itself
    Run(run::Args),
    /// Measure lb on this machine
    Bench(bench::Args),
    /// Feed random manifests, changes and packets to lb
    Fuzz(fuzz::Args),
    /// Look up frontends from every CPU while the maps change; fail if a lookup misses
    Stress(stress::Args),
    /// Build the container image of the agent
    Image(image::Args),
    /// Remove the namespaces, pins and cgroups that interrupted tests left on this machine
    Clean,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Setup(args) => setup::install(&args),
        Command::Test(args) => test::run(&args),
        Command::Bless => test::bless(),
        Command::Run(args) => run::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Stress(args) => stress::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Clean => run::clean(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
