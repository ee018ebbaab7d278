//! Test programs: running them, and reading libtest's summary.

use std::io::{BufRead as _, BufReader, Write, stdout};
use std::ops::AddAssign;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;

/// Numbers of passed and failed checks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Number of checks that passed.
    pub(crate) passed: u64,
    /// Number of checks that failed.
    pub(crate) failed: u64,
}

impl Tally {
    /// Returns the counts of one check.
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

/// Parses libtest's line `test result: ...`. An ignored test counts as failed, so that no test is skipped silently.
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

/// Runs a test program, prints its output as it arrives, and returns the counts. A program that fails without a summary
/// counts as one failed check.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Tally> {
    run_showing(command, stdout())
}

/// Runs a test program as [`run`] does, and writes its output to `screen` line by line.
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
            // If the output cannot be written any more, the counts still matter.
            let _ = screen.write_all(&line).and_then(|()| screen.flush());
            if let Some(tally) = parse_result(&String::from_utf8_lossy(&line)) {
                let _ = sender.send(tally);
            }
            line.clear();
        }
    });
    let status = child.wait().context("cannot wait for the tests")?;
    // A process that a test left running may keep the pipe open, so the wait is limited.
    let mut sum = Tally::default();
    while let Ok(tally) = lines.recv_timeout(Duration::from_secs(2)) {
        sum += tally;
    }
    if reader.is_finished() {
        let _ = reader.join();
    }
    if !status.success() && sum.failed == 0 {
        eprintln!("the test program failed without a summary ({status})");
        sum.failed = 1;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_parsed_and_ignored_tests_fail() {
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
    fn crash_counts_as_a_failure() {
        assert_eq!(shell("kill -9 $$"), Tally { passed: 0, failed: 1 });
    }

    #[test]
    fn leftover_process_does_not_block() {
        let began = std::time::Instant::now();
        shell("sleep 20 & :");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
