//! The console of a virtual machine: printed line by line, and searched for the end of programs and for errors of the
//! kernel.

use std::collections::BTreeMap;
use std::io::{self, Write, stdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::job::ENDED;

/// Messages of the kernel about its own errors.
const KERNEL_ERRORS: [&str; 4] = [
    "Kernel panic - not syncing",
    "Oops: ",
    "BUG: ",
    "general protection fault",
];

/// Results that the console has shown so far.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Exit codes of the programs that have ended.
    pub(super) codes: BTreeMap<String, i32>,
    /// First error of the kernel.
    pub(super) kernel_error: Option<String>,
}

impl Outcome {
    fn record(&mut self, line: &str) {
        if let Some((name, code)) = line.strip_prefix(ENDED).and_then(|end| end.split_once(' '))
            && let Ok(code) = code.parse()
        {
            self.codes.insert(name.to_owned(), code);
        }
        if self.kernel_error.is_none() && KERNEL_ERRORS.iter().any(|kernel_error| line.contains(kernel_error)) {
            self.kernel_error = Some(line.to_owned());
        }
    }
}

/// Locks the outcome that a console shares with its creator.
pub(super) fn lock(outcome: &Mutex<Outcome>) -> MutexGuard<'_, Outcome> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writer that prints each line with the kernel's version and the time since the start before it. It must receive whole
/// lines.
#[derive(Debug)]
pub(super) struct Console {
    version: String,
    begin: Instant,
    outcome: Arc<Mutex<Outcome>>,
}

impl Console {
    pub(super) fn new(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            begin: Instant::now(),
            outcome: Arc::default(),
        }
    }

    /// Returns the outcome, which grows while the console is written.
    pub(super) fn outcome(&self) -> Arc<Mutex<Outcome>> {
        Arc::clone(&self.outcome)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.trim_end();
        lock(&self.outcome).record(line);
        if !line.is_empty() {
            let seconds = self.begin.elapsed().as_secs();
            let (minutes, seconds) = (seconds / 60, seconds % 60);
            writeln!(stdout(), "[{} {minutes:02}:{seconds:02}] {line}", self.version)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_steps_and_the_first_kernel_error_are_recorded() {
        let mut outcome = Outcome::default();
        for line in [
            "lb-vm: ended lb-tests/races 101",
            "lb-vm: ended lb-tests/testbed 0",
            "anything else",
            "[    9.1] Oops: int3: 0000 [#1] PREEMPT SMP",
            "[    9.2] Kernel panic - not syncing: Fatal exception",
        ] {
            outcome.record(line);
        }
        let codes = [("lb-tests/races".to_owned(), 101), ("lb-tests/testbed".to_owned(), 0)];
        assert_eq!(outcome.codes, BTreeMap::from(codes));
        assert_eq!(
            outcome.kernel_error.as_deref(),
            Some("[    9.1] Oops: int3: 0000 [#1] PREEMPT SMP")
        );
    }
}
