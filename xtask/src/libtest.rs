//! Running a program of tests, and reading what it says at its end.

use std::io::{BufRead as _, BufReader, Write, stdout};
use std::ops::AddAssign;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;

/// Counts of checks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Checks that passed.
    pub(crate) passed: u64,
    /// Checks that did not.
    pub(crate) failed: u64,
}

impl Tally {
    /// One check.
    pub(crate) fn one(passed: bool) -> Self {
        Self {
            passed: u64::from(passed),
            failed: u64::from(!passed),
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Reads libtest's line `test result: ...`. An ignored test counts as failed: nothing is skipped silently.
pub(crate) fn parse_result(line: &str) -> Option<Tally> {
    let (_, counts) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
    let count = |name: &str| {
        counts
            .split("; ")
            .find_map(|part| part.strip_suffix(name)?.trim().parse::<u64>().ok())
    };
    Some(Tally {
        passed: count("passed")?,
        failed: count("failed")? + count("ignored")?,
    })
}

/// Runs `command`, shows its output as it comes, and counts. One that fails without saying so counts as one failed
/// check.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Tally> {
    run_showing(command, stdout())
}

/// The same with the output shown in `screen`, which gets it line by line.
pub(crate) fn run_showing(command: &mut Command, mut screen: impl Write + Send + 'static) -> anyhow::Result<Tally> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let output = child.stdout.take().context("no output")?;
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            // Nobody left to show it to: the counts still matter.
            let _ = screen.write_all(&line).and_then(|()| screen.flush());
            if let Some(tally) = parse_result(&String::from_utf8_lossy(&line)) {
                let _ = sender.send(tally);
            }
            line.clear();
        }
    });
    let status = child.wait().context("cannot wait for the tests")?;
    // A process that a test left running may hold the pipe open: do not wait for it for ever.
    let mut sum = Tally::default();
    while let Ok(tally) = lines.recv_timeout(Duration::from_secs(2)) {
        sum += tally;
    }
    if reader.is_finished() {
        let _ = reader.join();
    }
    if !status.success() && sum.failed == 0 {
        eprintln!("the tests ended with {status}");
        sum.failed = 1;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines() {
        let ok = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.00s\n";
        assert_eq!(parse_result(ok), Some(Tally { passed: 3, failed: 0 }));
        let bad = "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 1.02s";
        assert_eq!(parse_result(bad), Some(Tally { passed: 12, failed: 3 }));
        assert_eq!(parse_result("test result::tests::parse ... ok"), None);
        assert_eq!(parse_result("running 3 tests"), None);
        assert_eq!(parse_result("test result: ok. nothing"), None);
    }

    fn shell(script: &str) -> Tally {
        run_showing(Command::new("sh").args(["-c", script]), std::io::sink()).unwrap()
    }

    #[test]
    fn counts_add_up() {
        let line = "test result: ok. 1 passed; 0 failed; 0 ignored";
        assert_eq!(
            shell(&format!("echo '{line}'; echo '{line}'")),
            Tally { passed: 2, failed: 0 }
        );
    }

    #[test]
    fn a_crash_is_a_failure() {
        assert_eq!(shell("kill -9 $$"), Tally { passed: 0, failed: 1 });
    }

    #[test]
    fn a_leftover_process_does_not_block() {
        let began = std::time::Instant::now();
        shell("sleep 20 & :");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
