//! Virtual machines that run tests and the demo on other kernels.

mod console;
mod cpio;
mod initramfs;
mod job;

use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result};
use lb_tests::timeout_factor;

use self::console::{Console, Outcome};
pub(crate) use self::job::Job;
use self::job::{PROGRAM_LIMIT, Step};
use crate::kernels::Kernel;
use crate::libtest::{self, Tally};

/// Version of the kernel that replaces a machine's own if that cannot run lb.
pub(crate) const DEFAULT: &str = "6.12";

/// Time limit of a virtual machine, in the format of `timeout`.
const LIMIT: &str = "120m";
/// Time limit for a kernel that boots without a file system and fails.
const PROBE_LIMIT: &str = "10s";
/// Memory of each virtual machine.
const MEMORY: &str = "3G";
/// QEMU's emulation, with all processors in turn on one thread. With a thread each, one of four boots ended in `Oops: int3`;
/// the kernel patches its own code with such instructions, and a processor may have executed half patched code.
const EMULATION: &str = "tcg,thread=single";
/// The emulated processor. It lacks features that kernel and C library use if present although their emulation is slow, such
/// as copying by bytes (ERMS) and registers that each context switch has to save. This saves a tenth of the work, measured in
/// pairs of parallel runs.
///
/// `cmpxchg16b` (CX16) is off because QEMU 7.2 once left impossible flags after it, in the kernel's allocator: a double fault.
const EMULATED: &str = "max,cx16=off,erms=off,fsrm=off,smap=off,smep=off,umip=off,pku=off,xsave=off,avx=off,avx2=off";
/// Assumed slowness of an emulated machine, as a multiple of the native time.
const SLOW: u32 = 20;
/// Exit code of libtest if tests have failed. libtest has printed their names then.
const TESTS_FAILED: i32 = 101;
/// Exit code in a shell of a program that was killed by SIGKILL.
const KILLED: i32 = 128 + 9;

/// Returns the number of virtual machines that run in parallel: the number of processors of this machine, because an emulated
/// machine keeps one of them busy.
pub(crate) fn machines_in_parallel() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `job` on each of these kernels, [`machines_in_parallel`] of them in parallel.
pub(crate) fn run(versions: &[String], job: &Job) -> Vec<(String, Result<Tally>)> {
    let numbered: Vec<_> = versions.iter().enumerate().collect();
    let run_some = |numbered: &[(usize, &String)]| {
        thread::scope(|scope| {
            let started = numbered.iter().map(|&(number, version)| {
                let share = job.share(number, versions.len());
                (version, scope.spawn(move || on(version, &share)))
            });
            let machines: Vec<_> = started.collect();
            let results = machines.into_iter().map(|(version, machine)| {
                let result = machine
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("xtask has panicked")));
                (version.clone(), result)
            });
            results.collect::<Vec<_>>()
        })
    };
    numbered.chunks(machines_in_parallel()).flat_map(run_some).collect()
}

fn on(version: &str, job: &Job) -> Result<Tally> {
    let kernel = Kernel::get(version)?;
    let (accelerator, slow) = if kvm_works(&kernel) {
        ("kvm", 1)
    } else {
        (EMULATION, SLOW)
    };
    println!(
        "{version}: {} on {accelerator}, repetitions / {slow}, timeouts * {}",
        kernel.package,
        timeout_factor(slow)
    );
    let archive = initramfs::write(&kernel, job, slow).context("cannot make the first file system")?;
    let console = Console::new(version);
    let outcome = console.outcome();
    let mut command = machine(&kernel, accelerator, LIMIT);
    let initrd = format!("/proc/{}/fd/{}", std::process::id(), archive.as_raw_fd());
    command.args(["-smp", "2", "-m", MEMORY, "-initrd", &initrd]);
    let mut sum = libtest::run_showing(&mut command, console)?;
    let (passed, problems) = check_steps(&job.steps, &console::lock(&outcome), sum.failed > 0);
    for problem in &problems {
        println!("{version}: {problem}");
    }
    sum += Tally {
        passed,
        failed: problems.len() as u64,
    };
    Ok(sum)
}

/// Returns the number of passed steps without a summary of their own, and a line for each step that went wrong. `failed`:
/// tests have failed and their summary was counted.
fn check_steps(steps: &[Step], outcome: &Outcome, failed: bool) -> (u64, Vec<String>) {
    let mut passed = 0;
    let mut problems = Vec::new();
    let mut ended = true;
    for step in steps {
        let name = &step.name;
        match outcome.codes.get(name) {
            Some(0) => passed += u64::from(!step.prints_summary),
            Some(&TESTS_FAILED) if step.prints_summary && failed => {}
            Some(&KILLED) => problems.push(format!("{name} was killed (it is limited to {PROGRAM_LIMIT} s)")),
            Some(code) => problems.push(format!("{name} ended with {code}")),
            None if ended => {
                ended = false;
                let why = outcome.kernel_error.as_ref();
                let why = why.map_or_else(
                    || format!("all steps together are limited to {LIMIT}"),
                    |line| format!("the kernel reported: {line}"),
                );
                problems.push(format!("{name} did not end ({why})"));
            }
            None => problems.push(format!("{name} was not run")),
        }
    }
    (passed, problems)
}

/// Returns the command of a virtual machine. It ends after `limit` at the latest, and with the thread that starts it. Its
/// console is standard output.
fn machine(kernel: &Kernel, accelerator: &str, limit: &str) -> Command {
    let processor = if accelerator == EMULATION { EMULATED } else { "max" };
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM", "timeout"])
        // In the foreground, so that an interrupt from the keyboard reaches the virtual machine as well.
        .args(["--foreground", "--kill-after=5", limit])
        .args(["qemu-system-x86_64", "-accel", accelerator, "-cpu", processor])
        .args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none"])
        .args(["-no-reboot", "-append", "console=ttyS0 quiet oops=panic panic=-1", "-kernel"])
        .arg(&kernel.image);
    command
}

/// Returns true if KVM runs this kernel. The presence of /dev/kvm is not enough: within some virtual machines a guest never
/// makes progress. The probe boots without a file system, so the kernel panics at once and the virtual machine ends.
fn kvm_works(kernel: &Kernel) -> bool {
    Path::new("/dev/kvm").exists()
        && machine(kernel, "kvm", PROBE_LIMIT)
            .args(["-m", "512M"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, prints_summary: bool) -> Step {
        Step {
            name: name.to_owned(),
            program: "/bin/true".into(),
            arguments: Vec::new(),
            env: Vec::new(),
            dir: "/".into(),
            prints_summary,
            shared: false,
        }
    }

    fn outcome(codes: &[(&str, i32)], kernel_error: Option<&str>) -> Outcome {
        Outcome {
            codes: codes.iter().map(|&(name, code)| (name.to_owned(), code)).collect(),
            kernel_error: kernel_error.map(str::to_owned),
        }
    }

    #[test]
    fn shared_steps_run_on_one_machine_each() {
        let mut steps = ["a", "b", "c", "d"].map(|name| step(name, true));
        for at in [1, 2, 3] {
            steps[at].shared = true;
        }
        let job = Job {
            steps: steps.into(),
            files: Vec::new(),
            env: Vec::new(),
        };
        let names = |machine, machines| -> Vec<String> {
            let share = job.share(machine, machines);
            share.steps.into_iter().map(|step| step.name).collect()
        };
        assert_eq!(names(0, 2), ["a", "b", "d"]);
        assert_eq!(names(1, 2), ["a", "c"]);
        assert_eq!(names(0, 1), ["a", "b", "c", "d"]);
    }

    #[test]
    fn step_must_succeed_or_have_its_failures_counted() {
        let steps = [step("tests", true), step("demo", false)];
        let ended = |tests, demo| outcome(&[("tests", tests), ("demo", demo)], None);
        assert_eq!(check_steps(&steps, &ended(0, 0), false), (1, vec![]));
        assert_eq!(check_steps(&steps, &ended(101, 0), true), (1, vec![]));
        // The exit code means failed tests, but no summary was counted.
        assert_eq!(
            check_steps(&steps, &ended(101, 0), false),
            (1, vec!["tests ended with 101".to_owned()])
        );
        assert_eq!(
            check_steps(&steps, &ended(0, 101), true),
            (0, vec!["demo ended with 101".to_owned()])
        );
        let killed = "tests was killed (it is limited to 900 s)".to_owned();
        assert_eq!(check_steps(&steps, &ended(137, 0), false), (1, vec![killed]));
    }

    #[test]
    fn stopped_machine_fails_the_current_step_and_all_after_it() {
        let steps = [step("a", true), step("b", true), step("c", true)];
        let (_, problems) = check_steps(
            &steps,
            &outcome(&[("a", 0)], Some("Kernel panic - not syncing: x")),
            false,
        );
        assert_eq!(
            problems,
            [
                "b did not end (the kernel reported: Kernel panic - not syncing: x)",
                "c was not run"
            ]
        );
        let (_, problems) = check_steps(&steps[1..], &outcome(&[], None), false);
        assert_eq!(
            problems,
            [
                "b did not end (all steps together are limited to 120m)",
                "c was not run"
            ]
        );
    }
}
