//! Tests on other kernels, in virtual machines.

mod cpio;
mod image;
mod kernel;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write, stdout};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};

use self::image::{ENDED, Job};
use self::kernel::Kernel;
use crate::artifacts::{Built, TestProgram};
use crate::libtest::{self, Tally};

/// How long a virtual machine may run, as `timeout` reads it.
const LIMIT: &str = "60m";
/// How long a kernel may take to find that it has no file system.
const PROBE_LIMIT: &str = "10s";
/// Memory of each.
const MEMORY: &str = "2G";
/// QEMU's emulation, its processors in turn on one thread. With a thread each, one of four boots ended in `Oops: int3`;
/// the kernel patches its own code with such instructions, and may have been seen half patched.
const EMULATION: &str = "tcg,thread=single";
/// How many times slower than the machine itself an emulated one is taken to be.
const SLOW: u32 = 20;
/// Exit code of libtest when tests have failed, of which it has told.
const TESTS_FAILED: i32 = 101;

/// The test programs that a kernel has a say in, in the order of what is best known first.
const TARGETS: [&str; 8] = [
    "programs",
    "sockets",
    "inspection",
    "races",
    "stress",
    "faults",
    "restart",
    "bed",
];

/// Those of them that were built.
fn concerned(built: &Built) -> Vec<&TestProgram> {
    let tests = built.tests.iter().filter(|test| test.package == "lb-tests");
    let place = |test: &TestProgram| TARGETS.iter().position(|target| *target == test.target);
    let mut tests: Vec<_> = tests
        .filter_map(|test| place(test).map(|place| (place, test)))
        .collect();
    tests.sort_by_key(|(place, _)| *place);
    tests.into_iter().map(|(_, test)| test).collect()
}

/// Runs the tests that need a kernel on each of these, side by side.
pub(crate) fn run(versions: &[String], built: &Built, filter: Option<&str>) -> Vec<(String, Result<Tally>)> {
    thread::scope(|scope| {
        let machines: Vec<_> = versions
            .iter()
            .map(|version| (version, scope.spawn(move || on(version, built, filter))))
            .collect();
        machines
            .into_iter()
            .map(|(version, machine)| {
                let result = machine
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("xtask has panicked")));
                (version.clone(), result)
            })
            .collect()
    })
}

fn on(version: &str, built: &Built, filter: Option<&str>) -> Result<Tally> {
    let kernel = Kernel::get(version)?;
    let tests = concerned(built);
    let programs = built.programs()?;
    let (accelerator, slow) = if kvm_works(&kernel) {
        ("kvm", 1)
    } else {
        (EMULATION, SLOW)
    };
    println!("{version}: {} on {accelerator}", kernel.package);
    let job = Job {
        tests: &tests,
        programs: &programs,
        filter,
        slow,
    };
    let archive = kernel::cache().join(format!("{version}.cpio"));
    image::write(&archive, &kernel, &job).context("cannot make the first file system")?;
    let screen = Screen::new(version);
    let codes = Arc::clone(&screen.codes);
    let mut command = machine(&kernel, accelerator, LIMIT);
    command.args(["-smp", "2", "-m", MEMORY, "-initrd"]).arg(&archive);
    let ran = libtest::run_showing(&mut command, screen);
    // A hundred megabytes that nobody needs again.
    let _ = fs::remove_file(&archive);
    let mut sum = ran?;
    let codes = codes.lock().unwrap_or_else(PoisonError::into_inner);
    for test in &tests {
        let trouble = match codes.get(&test.target).copied() {
            Some(0 | TESTS_FAILED) => continue,
            Some(code) => format!("ended with {code}"),
            None => format!("did not end (all together may take {LIMIT})"),
        };
        println!("{version}: {} {trouble}", test.target);
        sum.failed += 1;
    }
    Ok(sum)
}

/// A virtual machine that ends after `limit` at the latest; its console is standard output.
fn machine(kernel: &Kernel, accelerator: &str, limit: &str) -> Command {
    let mut command = Command::new("timeout");
    command
        // In the foreground: an interrupt from the keyboard reaches the virtual machine as well.
        .args(["--foreground", "--kill-after=5", limit])
        .args(["qemu-system-x86_64", "-accel", accelerator, "-cpu", "max"])
        .args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none"])
        .args(["-no-reboot", "-append", "console=ttyS0 quiet panic=-1", "-kernel"])
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

/// Shows each line of a virtual machine with the version of its kernel before it, and notes how programs ended.
#[derive(Debug)]
struct Screen {
    version: String,
    codes: Arc<Mutex<BTreeMap<String, i32>>>,
}

impl Screen {
    fn new(version: &str) -> Self {
        Self {
            version: version.to_owned(),
            codes: Arc::default(),
        }
    }

    fn note(&self, line: &str) {
        if let Some((name, code)) = line.strip_prefix(ENDED).and_then(|end| end.split_once(' '))
            && let Ok(code) = code.parse()
        {
            let mut codes = self.codes.lock().unwrap_or_else(PoisonError::into_inner);
            codes.insert(name.to_owned(), code);
        }
    }
}

/// Gets whole lines.
impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let line = text.trim_end();
        self.note(line);
        if !line.is_empty() {
            writeln!(stdout(), "[{}] {line}", self.version)?;
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
    fn ends_are_noted() {
        let mut screen = Screen::new("6.1");
        screen.write_all(b"lb-vm: ended races 101\r\n").unwrap();
        screen.write_all(b"lb-vm: ended bed 0\r\n").unwrap();
        screen.write_all(b"anything else\n").unwrap();
        let codes = screen.codes.lock().unwrap();
        assert_eq!(
            *codes,
            BTreeMap::from([("races".to_owned(), 101), ("bed".to_owned(), 0)])
        );
    }
}
