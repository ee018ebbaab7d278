//! `observe`: the verified instructions of the programs that a command loads, for `cargo xtask bench --against`.
//!
//! The command may be a benchmark of another version of lb, which need not know that it is observed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::programs::loaded_programs;

use crate::process::program_ids_of;

/// Time between two looks at the open programs of the command. A benchmark keeps its programs for seconds.
const INTERVAL: Duration = Duration::from_millis(50);

/// Prefix of the names of lb's programs; those in C have others.
const PREFIX: &str = "lb_";

/// Options of `observe`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// File for the result: a JSON object with the verified instructions by program
    #[arg(long)]
    to: PathBuf,
    /// Command to run and observe
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs the command and writes the result; the exit code is success if that of the command is.
///
/// # Errors
/// If the command cannot be run, or the kernel does not report its programs.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let (program, arguments) = options.command.split_first().context("no command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .spawn()
        .with_context(|| format!("running {}", program.display()))?;
    let (mut known, mut verified) = (BTreeSet::new(), BTreeMap::new());
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for the command")? {
            break status;
        }
        let ids = program_ids_of(child.id());
        if !ids.is_subset(&known) {
            add(&ids, &mut verified)?;
            known.extend(ids);
        }
        thread::sleep(INTERVAL);
    };
    let json = serde_json::to_string(&verified).context("writing JSON")?;
    fs::write(&options.to, json).with_context(|| format!("writing {}", options.to.display()))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Adds the verified instructions of lb's programs among `ids`. A program that is loaded several times counts with the
/// highest number.
fn add(ids: &BTreeSet<u32>, verified: &mut BTreeMap<String, u32>) -> Result<()> {
    for program in loaded_programs() {
        // Another process may unload a program between the two calls that list it.
        let Ok(program) = program else { continue };
        let name = program.name_as_str().unwrap_or_default();
        if ids.contains(&program.id()) && name.starts_with(PREFIX) {
            let number = program
                .verified_instruction_count()
                .context("this kernel does not report verified instructions")?;
            let known = verified.entry(name.to_owned()).or_default();
            *known = number.max(*known);
        }
    }
    Ok(())
}
