//! A program under ptrace(2): it can be made to die after any of its system calls, and any can be made to fail. The
//! registers are those of x86-64.

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

/// What happens at a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// The process is killed when the call has returned.
    Die,
    /// The call is not made, and returns ENOMEM.
    Fail,
}

/// A system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) number: i64,
    /// The first argument: the command, where it is bpf(2).
    pub(crate) first: u64,
}

/// How a run ended. Nothing of the process is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It was killed at the call that was chosen.
    Died,
    /// It came to its end, and was killed there.
    Done,
    /// It ended on its own, with this code.
    Exited(i32),
}

/// Where the call was chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chosen {
    /// Its number among those that count.
    pub(crate) at: u64,
    pub(crate) act: Act,
}

/// Runs a program until `done` says so when a call has returned; returns how it ended, and whether it came to the call
/// that was chosen.
pub(crate) fn run(
    command: &mut Command,
    chosen: Chosen,
    counts: impl Fn(Call) -> bool,
    done: impl Fn(Call) -> Result<bool>,
) -> Result<(Ended, bool)> {
    // SAFETY: one system call.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(io::Error::from)) };
    // Waited for by its id, below.
    let child = command.spawn().context("starting a program")?;
    let pid = Pid::from_raw(child.id().try_into()?);
    waitpid(pid, Some(WaitPidFlag::__WALL)).context("waiting for its start")?;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).context("PTRACE_SETOPTIONS")?;
    resume(pid, None)?;

    // Threads that are in a call, and whether it is the one that was chosen.
    let mut calls: HashMap<Pid, (Call, bool)> = HashMap::new();
    let (mut number, mut reached, mut killed) = (0, false, None);
    loop {
        // Of this thread's children, and their threads, alone.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        match waitpid(None, Some(flags)).context("waitpid")? {
            WaitStatus::Exited(who, code) if who == pid => return Ok((killed.unwrap_or(Ended::Exited(code)), reached)),
            WaitStatus::Signaled(who, signal, _) if who == pid => {
                let ended = killed.with_context(|| format!("the program died of {signal}"))?;
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
                        let here = counted && chosen.at == number;
                        number += u64::from(counted);
                        reached |= here;
                        if here && chosen.act == Act::Fail {
                            // No such call: the kernel makes none.
                            registers.orig_rax = u64::MAX;
                            gone_is_none(ptrace::setregs(thread, registers))?;
                        }
                        calls.insert(thread, (call, here));
                        None
                    }
                    Some((_, true)) if chosen.act == Act::Die => Some(Ended::Died),
                    Some((call, here)) => {
                        if here && let Some(mut registers) = gone_is_none(ptrace::getregs(thread))? {
                            registers.rax = (-i64::from(libc::ENOMEM)).cast_unsigned();
                            gone_is_none(ptrace::setregs(thread, registers))?;
                        }
                        done(call)?.then_some(Ended::Done)
                    }
                };
                if end.is_some() && killed.is_none() {
                    killed = end;
                    kill(pid, Signal::SIGKILL).context("killing")?;
                }
                resume(thread, None)?;
            }
            // A thread begins with a stop.
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

/// A thread that was killed in between cannot be asked any more.
fn gone_is_none<T>(result: nix::Result<T>) -> Result<Option<T>> {
    match result {
        Err(Errno::ESRCH) => Ok(None),
        other => other.map(Some).context("ptrace"),
    }
}
