//! Runs a program under ptrace(2), and kills it after a chosen system call or makes the call fail. The registers are
//! those of x86-64.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Fault at a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The process is killed after the call has returned.
    Die,
    /// The call is not executed and returns ENOMEM.
    Fail,
}

/// A system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) number: i64,
    /// First argument; for bpf(2) the command.
    pub(crate) first: u64,
}

/// How a run ended. The process is gone in each case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunEnd {
    /// The process was killed at the chosen call.
    Died,
    /// The process reached its goal, and was killed there.
    Done,
    /// The process exited on its own, with this code.
    Exited(i32),
}

/// The chosen call and the fault there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FaultPoint {
    /// Number of the call among the counted ones.
    pub(crate) at: u64,
    pub(crate) kind: FaultKind,
}

/// Runs a program until `done` returns true after a system call. Returns how the run ended, and whether the chosen call
/// was reached.
pub(crate) fn run(
    command: &mut Command,
    fault: FaultPoint,
    counts: impl Fn(Call) -> bool,
    done: impl Fn(Call) -> Result<bool>,
) -> Result<(RunEnd, bool)> {
    // SAFETY: the closure makes one system call, PTRACE_TRACEME, which is async-signal-safe.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(io::Error::from)) };
    // The child is reaped below by its process id.
    let child = command.spawn().context("starting a program")?;
    let pid = Pid::from_raw(child.id().try_into()?);
    waitpid(pid, Some(WaitPidFlag::__WALL)).context("waiting for its start")?;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).context("PTRACE_SETOPTIONS")?;
    resume(pid, None)?;

    // Threads that are inside a system call, and whether the call is the chosen one.
    let mut calls: HashMap<Pid, (Call, bool)> = HashMap::new();
    let (mut number, mut reached, mut killed) = (0, false, None);
    loop {
        // Waits for children of this thread and their threads only.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        match waitpid(None, Some(flags)).context("waitpid")? {
            WaitStatus::Exited(process, code) if process == pid => {
                return Ok((killed.unwrap_or(RunEnd::Exited(code)), reached));
            }
            WaitStatus::Signaled(process, signal, _) if process == pid => {
                let ended = killed.with_context(|| format!("the program was killed by {signal}"))?;
                return Ok((ended, reached));
            }
            WaitStatus::PtraceSyscall(thread) => {
                let end = match calls.remove(&thread) {
                    None => {
                        let Some(mut registers) = gone_is_none(ptrace::getregs(thread))? else {
                            continue;
                        };
                        let call = Call {
                            number: registers.orig_rax.cast_signed(),
                            first: registers.rdi,
                        };
                        let counted = counts(call);
                        let here = counted && fault.at == number;
                        number += u64::from(counted);
                        reached |= here;
                        if here && fault.kind == FaultKind::Fail {
                            // No system call has this number, so the kernel executes none.
                            registers.orig_rax = u64::MAX;
                            gone_is_none(ptrace::setregs(thread, registers))?;
                        }
                        calls.insert(thread, (call, here));
                        None
                    }
                    Some((_, true)) if fault.kind == FaultKind::Die => Some(RunEnd::Died),
                    Some((call, here)) => {
                        if here && let Some(mut registers) = gone_is_none(ptrace::getregs(thread))? {
                            registers.rax = (-i64::from(libc::ENOMEM)).cast_unsigned();
                            gone_is_none(ptrace::setregs(thread, registers))?;
                        }
                        done(call)?.then_some(RunEnd::Done)
                    }
                };
                if end.is_some() && killed.is_none() {
                    killed = end;
                    kill(pid, Signal::SIGKILL).context("killing")?;
                }
                resume(thread, None)?;
            }
            // A new thread begins with a stop.
            WaitStatus::Stopped(thread, Signal::SIGSTOP | Signal::SIGTRAP) | WaitStatus::PtraceEvent(thread, _, _) => {
                resume(thread, None)?;
            }
            WaitStatus::Stopped(thread, signal) => resume(thread, Some(signal))?,
            _ => {}
        }
    }
}

fn resume(thread: Pid, signal: Option<Signal>) -> Result<()> {
    gone_is_none(ptrace::syscall(thread, signal)).map(drop)
}

/// Maps ESRCH to `None`: the thread was killed in the meantime.
fn gone_is_none<T>(result: nix::Result<T>) -> Result<Option<T>> {
    match result {
        Err(Errno::ESRCH) => Ok(None),
        other => other.map(Some).context("ptrace"),
    }
}
