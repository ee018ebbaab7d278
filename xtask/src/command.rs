//! Commands of other programs: command lines as data, which can be printed before they run, and cargo in a clean environment.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::process::{self, Stdio};

use anyhow::{Context as _, bail};

use crate::workspace::root;

/// A command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommandLine {
    /// Environment variables of this command. `$PATH` in a value is replaced by the current search path.
    pub(crate) env: Vec<(&'static str, String)>,
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
    /// True if the program needs root.
    pub(crate) as_root: bool,
}

impl CommandLine {
    /// Returns a command that needs no privileges.
    pub(crate) fn new<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            env: Vec::new(),
            words: words.into_iter().map(str::to_owned).collect(),
            as_root: false,
        }
    }

    /// Sets the environment variable `name` to `value`.
    pub(crate) fn env(mut self, name: &'static str, value: &str) -> Self {
        self.env.push((name, value.to_owned()));
        self
    }

    /// Marks the command as one that needs root.
    pub(crate) fn root(mut self) -> Self {
        self.as_root = true;
        self
    }

    /// Runs the command in the workspace's folder. Its output is part of the error if it fails.
    pub(crate) fn run_quietly(&self) -> anyhow::Result<()> {
        let [program, arguments @ ..] = self.words.as_slice() else {
            bail!("an empty command");
        };
        let mut command = clean_command(program);
        command.args(arguments).stdin(Stdio::null());
        for (name, value) in &self.env {
            let path = env::var("PATH").unwrap_or_default();
            command.env(name, value.replace("$PATH", &path));
        }
        let output = command.output().with_context(|| format!("cannot run {program}"))?;
        if output.status.success() {
            return Ok(());
        }
        let text = [output.stdout, output.stderr].concat();
        bail!(
            "`{self}` failed ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&text).trim_end()
        );
    }
}

/// Formats the command for a shell, with sudo if it needs root.
impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.as_root {
            f.write_str("sudo ")?;
        }
        for (name, value) in &self.env {
            write!(f, "{name}={} ", quoted(value))?;
        }
        for (index, word) in self.words.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{}", quoted(word))?;
        }
        Ok(())
    }
}

/// Quotes `word` for the shell; `$PATH` is not quoted.
fn quoted(word: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || "-_=+:./,@%$".contains(c);
    if !word.is_empty() && word.chars().all(bare) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Returns a command of `program` in the workspace's folder, without the variables that `cargo run` sets for xtask. With
/// them, some build scripts would run again at every change between `cargo xtask` and plain `cargo`.
pub(crate) fn clean_command(program: impl AsRef<OsStr>) -> process::Command {
    let mut command = process::Command::new(program);
    command.current_dir(root());
    let of_xtask = |name: &str| {
        [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_BIN_",
            "CARGO_CRATE_",
            "CARGO_PRIMARY_",
        ]
        .iter()
        .any(|prefix| name.starts_with(prefix))
    };
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(of_xtask) {
            command.env_remove(name);
        }
    }
    command
}

/// Returns a command of the cargo that runs xtask.
pub(crate) fn cargo() -> process::Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = clean_command(cargo);
    command.stdin(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_formatted_for_a_shell() {
        let command = CommandLine::new(["apt-get", "install", "nginx-light"])
            .root()
            .env("RUNLEVEL", "1");
        assert_eq!(command.to_string(), "sudo RUNLEVEL=1 apt-get install nginx-light");
        let command = CommandLine::new(["cargo", "install", "it's"]).env("PATH", "/opt/bin:$PATH");
        assert_eq!(command.to_string(), r"PATH=/opt/bin:$PATH cargo install 'it'\''s'");
    }

    #[test]
    fn error_contains_the_output() {
        let command = CommandLine::new(["sh", "-c", "echo out; echo err >&2; exit 3"]);
        let error = command.run_quietly().unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("out\nerr"), "{error}");
    }

    #[test]
    fn variables_reach_the_program() {
        let command =
            CommandLine::new(["sh", "-c", r#"test "$PATH" != "${PATH#/opt/x:/}""#]).env("PATH", "/opt/x:$PATH");
        command.run_quietly().unwrap();
    }
}
