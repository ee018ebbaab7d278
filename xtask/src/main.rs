//! Everything a person types while working on lb: `cargo xtask setup | test | bless | run | bench | fuzz | stress | image |
//! clean`.

mod artifacts;
mod bench;
mod command;
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
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and shows lb")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing to build and test; does nothing when all is there
    Setup(setup::Args),
    /// Check format, lints and documentation, then run all tests (those that need the kernel as root)
    Test(test::Args),
    /// Accept the present output of the golden tests as right
    Bless,
    /// Show lb at work on this machine; with ARGS, run the agent itself
    Run(run::Args),
    /// Measure lb on this machine
    Bench(bench::Args),
    /// Look for input that breaks lb
    Fuzz(fuzz::Args),
    /// Look frontends up from every CPU while the maps change; fail if one lookup misses
    Stress(stress::Args),
    /// Build the agent as a container image
    Image(image::Args),
    /// Remove what interrupted tests left on this machine
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
