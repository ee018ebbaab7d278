//! Tests and the demo on other kernels, in virtual machines.

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

/// The version of the kernel that serves where the machine's own does not.
pub(crate) const DEFAULT: &str = "6.12";

/// How long a virtual machine may run, as `timeout` reads it.
const LIMIT: &str = "50m";
/// How long a kernel may take to find that it has no file system.
const PROBE_LIMIT: &str = "10s";
/// Memory of each.
const MEMORY: &str = "3G";
/// QEMU's emulation, its processors in turn on one thread. With a thread each, one of four boots ended in `Oops: int3`;
/// the kernel patches its own code with such instructions, and may have been seen half patched.
const EMULATION: &str = "tcg,thread=single";
/// The processor there: without what kernel and C library use wherever it is, though emulated it only costs, such as copying
/// by bytes (ERMS), and registers that each change of process has to save. A tenth less work, in pairs of runs side by side.
const EMULATED: &str = "max,erms=off,fsrm=off,smap=off,smep=off,umip=off,pku=off,xsave=off,avx=off,avx2=off";
/// How many times slower than the machine itself an emulated one is taken to be.
const SLOW: u32 = 20;
/// Exit code of libtest when tests have failed, of which it has told.
const TESTS_FAILED: i32 = 101;
/// Exit code in a shell of what was killed by SIGKILL.
const KILLED: i32 = 128 + 9;

/// How many virtual machines run side by side: as many as this machine has processors, since an emulated one keeps one
/// of them busy.
pub(crate) fn at_a_time() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Does `job` on each of these kernels, [`at_a_time`].
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
    numbered.chunks(at_a_time()).flat_map(run_some).collect()
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
    let (passed, troubles) = judge(&job.steps, &console::lock(&outcome), sum.failed > 0);
    for trouble in &troubles {
        println!("{version}: {trouble}");
    }
    sum += Tally {
        passed,
        failed: troubles.len() as u64,
    };
    Ok(sum)
}

/// How many steps passed that do not tell of it themselves, and what is wrong with others; `failed`: some tests have
/// failed, and told so.
fn judge(steps: &[Step], outcome: &Outcome, failed: bool) -> (u64, Vec<String>) {
    let mut passed = 0;
    let mut troubles = Vec::new();
    let mut ended = true;
    for step in steps {
        let name = &step.name;
        match outcome.codes.get(name) {
            Some(0) => passed += u64::from(!step.tells),
            Some(&TESTS_FAILED) if step.tells && failed => {}
            Some(&KILLED) => troubles.push(format!("{name} was killed (it may run {PROGRAM_LIMIT} s)")),
            Some(code) => troubles.push(format!("{name} ended with {code}")),
            None if ended => {
                ended = false;
                let why = outcome.complaint.as_ref();
                let why = why.map_or_else(
                    || format!("all together may take {LIMIT}"),
                    |line| format!("the kernel says: {line}"),
                );
                troubles.push(format!("{name} did not end ({why})"));
            }
            None => troubles.push(format!("{name} was not run")),
        }
    }
    (passed, troubles)
}

/// A virtual machine that ends after `limit` at the latest, and with the thread that starts it; its console is standard
/// output.
fn machine(kernel: &Kernel, accelerator: &str, limit: &str) -> Command {
    let processor = if accelerator == EMULATION { EMULATED } else { "max" };
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM", "timeout"])
        // In the foreground: an interrupt from the keyboard reaches the virtual machine as well.
        .args(["--foreground", "--kill-after=5", limit])
        .args(["qemu-system-x86_64", "-accel", accelerator, "-cpu", processor])
        .args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none"])
        .args(["-no-reboot", "-append", "console=ttyS0 quiet oops=panic panic=-1", "-kernel"])
        .arg(&kernel.image);
    command
}

/// Whether KVM runs this kernel. Being there is not enough: within some virtual machines nothing happens. Without a
/// file system the kernel gives up at once, and the virtual machine ends.
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

    fn step(name: &str, tells: bool) -> Step {
        Step {
            name: name.to_owned(),
            program: "/bin/true".into(),
            arguments: Vec::new(),
            env: Vec::new(),
            dir: "/".into(),
            tells,
            shared: false,
        }
    }

    fn outcome(codes: &[(&str, i32)], complaint: Option<&str>) -> Outcome {
        Outcome {
            codes: codes.iter().map(|&(name, code)| (name.to_owned(), code)).collect(),
            complaint: complaint.map(str::to_owned),
        }
    }

    #[test]
    fn what_is_shared_runs_on_one_machine_each() {
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
    fn every_step_must_end_well_or_tell_of_its_failures() {
        let steps = [step("tests", true), step("demo", false)];
        let ended = |tests, demo| outcome(&[("tests", tests), ("demo", demo)], None);
        assert_eq!(judge(&steps, &ended(0, 0), false), (1, vec![]));
        assert_eq!(judge(&steps, &ended(101, 0), true), (1, vec![]));
        // It says that tests have failed, and no result of it came.
        assert_eq!(
            judge(&steps, &ended(101, 0), false),
            (1, vec!["tests ended with 101".to_owned()])
        );
        assert_eq!(
            judge(&steps, &ended(0, 101), true),
            (0, vec!["demo ended with 101".to_owned()])
        );
        let killed = "tests was killed (it may run 900 s)".to_owned();
        assert_eq!(judge(&steps, &ended(137, 0), false), (1, vec![killed]));
    }

    #[test]
    fn a_machine_that_stops_fails_the_step_that_ran_and_all_after_it() {
        let steps = [step("a", true), step("b", true), step("c", true)];
        let (_, troubles) = judge(
            &steps,
            &outcome(&[("a", 0)], Some("Kernel panic - not syncing: x")),
            false,
        );
        assert_eq!(
            troubles,
            [
                "b did not end (the kernel says: Kernel panic - not syncing: x)",
                "c was not run"
            ]
        );
        let (_, troubles) = judge(&steps[1..], &outcome(&[], None), false);
        assert_eq!(troubles, ["b did not end (all together may take 50m)", "c was not run"]);
    }
}
