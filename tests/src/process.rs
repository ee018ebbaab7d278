//! Child processes that end with their guard.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A child process. Dropping this kills and reaps the process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    lines: Option<Receiver<String>>,
}

impl Process {
    /// Starts a command with its own settings of standard input and output.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self {
            name,
            child,
            lines: None,
        })
    }

    /// Starts a command and reads its standard output line by line; see [`Self::line`].
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn spawn_reading(command: &mut Command) -> Result<Self> {
        let mut process = Self::spawn(command.stdout(Stdio::piped()))?;
        let stdout = process.child.stdout.take().context("no standard output")?;
        let (sender, receiver) = mpsc::channel();
        // The thread ends when all writers of the pipe have closed it, or the receiver was dropped.
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
    /// If the program cannot be started, ends, or is not ready in time.
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

    /// Waits for the next line of the standard output and returns it.
    ///
    /// # Errors
    /// If no line arrives in time, the output has ended, or the process was not started to be read.
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

    /// Returns the lines that were written so far and not returned yet, without waiting.
    pub(crate) fn pending_lines(&self) -> impl Iterator<Item = String> {
        self.lines.iter().flat_map(Receiver::try_iter)
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Takes the standard input, if it is a pipe and was not taken before. Dropping it closes the pipe.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Returns whether the process has not ended yet.
    ///
    /// # Errors
    /// If waiting for the process fails.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Waits until the process ends.
    ///
    /// # Errors
    /// If it has not ended in time; it continues to run.
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

    /// Sends SIGTERM and waits until the process ends.
    ///
    /// # Errors
    /// If it does not end in time; it is killed then.
    pub fn stop(mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// Kills the process by SIGKILL and reaps it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait().with_context(|| format!("reaping {}", self.name))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both calls fail only for a process that was already reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
