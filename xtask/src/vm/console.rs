//! What a virtual machine writes: shown line by line, and looked through for the end of programs and for complaints of
//! the kernel.

use std::collections::BTreeMap;
use std::io::{self, Write, stdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::job::ENDED;

/// What the kernel writes when something is wrong with it.
const COMPLAINTS: [&str; 4] = [
    "Kernel panic - not syncing",
    "Oops: ",
    "BUG: ",
    "general protection fault",
];

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Exit codes of the programs that have ended.
    pub(super) codes: BTreeMap<String, i32>,
    /// The first complaint of the kernel.
    pub(super) complaint: Option<String>,
}

impl Outcome {
    fn note(&mut self, line: &str) {
        if let Some((name, code)) = line.strip_prefix(ENDED).and_then(|end| end.split_once(' '))
            && let Ok(code) = code.parse()
        {
            self.codes.insert(name.to_owned(), code);
        }
        if self.complaint.is_none() && COMPLAINTS.iter().any(|complaint| line.contains(complaint)) {
            self.complaint = Some(line.to_owned());
        }
    }
}

/// What is shared with a console.
pub(super) fn lock(outcome: &Mutex<Outcome>) -> MutexGuard<'_, Outcome> {
    outcome.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows each line with the version of the kernel and the time since the start before it. Gets whole lines.
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

    /// What is found, while it is.
    pub(super) fn outcome(&self) -> Arc<Mutex<Outcome>> {
        Arc::clone(&self.outcome)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.trim_end();
        lock(&self.outcome).note(line);
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
    fn ends_and_the_first_complaint_are_noted() {
        let mut outcome = Outcome::default();
        for line in [
            "lb-vm: ended lb-tests/races 101",
            "lb-vm: ended lb-tests/testbed 0",
            "anything else",
            "[    9.1] Oops: int3: 0000 [#1] PREEMPT SMP",
            "[    9.2] Kernel panic - not syncing: Fatal exception",
        ] {
            outcome.note(line);
        }
        let codes = [("lb-tests/races".to_owned(), 101), ("lb-tests/testbed".to_owned(), 0)];
        assert_eq!(outcome.codes, BTreeMap::from(codes));
        assert_eq!(
            outcome.complaint.as_deref(),
            Some("[    9.1] Oops: int3: 0000 [#1] PREEMPT SMP")
        );
    }
}
