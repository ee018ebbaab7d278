//! A child process that does not outlive its guard.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running child process. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    lines: Option<Receiver<String>>,
}

impl Process {
    /// Starts a command as it is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self {
            name,
            child,
            lines: None,
        })
    }

    /// Starts a command whose standard output is read line by line; see [`Self::line`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn_reading(command: &mut Command) -> Result<Self> {
        let mut process = Self::spawn(command.stdout(Stdio::piped()))?;
        let stdout = process.child.stdout.take().context("no standard output")?;
        let (sender, receiver) = mpsc::channel();
        // Ends when all writers of the pipe are gone, or nobody listens any more.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        process.lines = Some(receiver);
        Ok(process)
    }

    /// Starts a command and waits until it has written the line `ready`.
    ///
    /// # Errors
    /// When it cannot be started, ends, or is not ready in time.
    pub fn spawn_ready(command: &mut Command, timeout: Duration) -> Result<Self> {
        let mut process = Self::spawn_reading(command)?;
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if process.line(left)? == "ready" {
                return Ok(process);
            }
        }
    }

    /// The next line of its standard output.
    ///
    /// # Errors
    /// When none came in time, there will be no more, or the output is not read.
    pub fn line(&mut self, timeout: Duration) -> Result<String> {
        let lines = self.lines.as_ref().context("the output is not read")?;
        match lines.recv_timeout(timeout) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                bail!("{} wrote no line within {timeout:?}", self.name)
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.wait(Duration::from_secs(1));
                bail!("{} has ended its output ({status:?})", self.name)
            }
        }
    }

    /// The lines written so far that nobody has taken yet.
    pub fn pending_lines(&self) -> impl Iterator<Item = String> {
        self.lines.iter().flat_map(Receiver::try_iter)
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard input, if that is a pipe and was not taken before. Dropping it closes it.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Whether it has not ended yet.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended in time (it runs on).
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} has not ended within {timeout:?}", self.name);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks it to end by SIGTERM and waits.
    ///
    /// # Errors
    /// When it does not end in time; it is killed then.
    pub fn stop(mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// Kills it by SIGKILL and reaps it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait().with_context(|| format!("reaping {}", self.name))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has been reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
