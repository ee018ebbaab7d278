//! `test`, which runs every check, and `bless`, which accepts the output of golden tests.

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

use crate::artifacts::{Built, TestProgram, build_agent_for_image, build_release, build_tests};
use crate::command::{cargo, clean_command};
use crate::image;
use crate::kernel_support;
use crate::kubernetes;
use crate::libtest::{self, Tally};
use crate::privilege::{as_root, search_path};
use crate::run;
use crate::setup::{self, Scope};
use crate::upgrade::{self, Versions};
use crate::vm::{self, Job};

/// Flag for the number of whole-system tests that one test program runs in parallel: each builds a cluster of its own.
const SYSTEM_TESTS: &str = "--test-threads=2";

/// A test that a variable makes longer than usual.
#[derive(Debug, Clone)]
pub(crate) struct LongTest {
    /// Test program that contains it.
    pub(crate) target: &'static str,
    /// Name of the test.
    pub(crate) test: &'static str,
    /// Name and value of the variable.
    pub(crate) variable: (&'static str, String),
    /// True if it needs the Kubernetes control plane.
    pub(crate) kubernetes: bool,
}

/// Part of the name of a golden test, or of its file.
const GOLDEN: &str = "golden";

/// Arguments of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run only the tests with this text in their name
    filter: Option<String>,
    /// Skip format, lints and documentation
    #[arg(long)]
    no_lint: bool,
    /// Also check that the demo works (as `cargo xtask run --check` does)
    #[arg(long)]
    demo: bool,
    /// Also run the tests that need a kernel on Debian's kernel of this version, in a virtual machine; can be repeated
    #[arg(long, value_name = "VERSION")]
    vm: Vec<String>,
    /// Also run in virtual machines the tests that do not depend on the kernel's version
    #[arg(long, requires = "vm")]
    vm_all: bool,
    /// Run only the tests in virtual machines
    #[arg(long, requires = "vm", conflicts_with = "demo")]
    only_vm: bool,
    /// Also run the tests with the Kubernetes control plane; the first run builds it with Go (five minutes)
    #[arg(long)]
    kubernetes: bool,
    /// Run only the tests with the Kubernetes control plane
    #[arg(long, requires = "kubernetes", conflicts_with_all = ["demo", "vm"])]
    only_kubernetes: bool,
    /// Also replace the agents of the commits in tests/upgrade/versions by this one, and this one by one with a later layout of
    /// maps and back, under load
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "all")]
    upgrade: Option<Versions>,
    /// Treat the kernel of this machine as one that cannot run lb, to test the replacement by a virtual machine
    #[arg(long, hide = true)]
    no_kernel: bool,
}

/// Runs every check; the last line has the numbers of passed and failed ones.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.kubernetes
        && let Some(ask) = setup::ask_for_kubernetes()?
    {
        return Ok(ask);
    }
    let mut sum = set_up(Scope::of(&args.vm));
    if sum.failed > 0 {
        return Ok(conclude(sum));
    }
    let filter = args.filter.as_deref();
    let mut kernel = Kernel::Native;
    let mut versions = args.vm.clone();
    if !args.only_vm {
        sum += step("kernel", || {
            kernel = Kernel::probe(args.no_kernel)?;
            Ok(())
        });
    }
    if kernel == Kernel::Foreign && versions.is_empty() {
        versions.push(vm::DEFAULT.to_owned());
        let ready = set_up(Scope::Machines);
        sum += ready;
        if ready.failed > 0 {
            return Ok(conclude(sum));
        }
    }
    if kernel == Kernel::Native && !args.only_vm {
        sum += step("leftovers", run::clean_as_root);
    }
    if !args.no_lint && !args.only_vm && !args.only_kubernetes {
        sum += lints();
    }
    let (mut control_plane, mut image, mut agent) = (None, None, None);
    if args.kubernetes {
        sum += step("control plane of Kubernetes", || {
            control_plane = Some(kubernetes::build()?);
            if kernel == Kernel::Foreign {
                bail!("the tests with it need a kernel that can run lb, and do not run in virtual machines");
            }
            Ok(())
        });
        sum += step("image", || {
            let built = build_agent_for_image()?;
            image = Some(image::write_default(&built)?);
            agent = Some(built);
            Ok(())
        });
        if sum.failed > 0 {
            return Ok(conclude(sum));
        }
    }
    let mut features = Vec::new();
    features.extend(args.kubernetes.then_some("kubernetes"));
    let (mut earlier, mut made_up) = (None, None);
    if let Some(versions) = args.upgrade {
        sum += step("agents of earlier commits", || {
            earlier = Some(env::join_paths(upgrade::build(versions, &features)?)?);
            Ok(())
        });
        sum += step("agent with a later layout", || {
            made_up = Some(upgrade::build_made_up(&features)?);
            Ok(())
        });
        // Not for the earlier commits, which may not have it; and without agents, the tests would fail once more.
        features.extend((earlier.is_some() && made_up.is_some()).then_some("upgrade"));
    }
    let mut built = Built::default();
    sum += build(&mut built, &features);
    if built.tests.is_empty() {
        return Ok(conclude(sum));
    }
    let mut ran = Tally::default();
    if !args.only_vm {
        let selection = if args.only_kubernetes {
            Selection::Kubernetes(filter)
        } else {
            Selection::Filter(filter)
        };
        let paths = [
            ("LB_KUBERNETES", control_plane.map(OsString::from)),
            ("LB_IMAGE", image.map(OsString::from)),
            ("LB_EARLIER_AGENTS", earlier),
            ("LB_MADE_UP_LAYOUT_AGENT", made_up.map(OsString::from)),
        ];
        ran += tests(&built, &selection, kernel, &paths);
    }
    if args.demo && kernel == Kernel::Native {
        sum += step("demo", || run::check_demo(agent.as_deref()));
    }
    // Virtual machines come after the tests on this machine's own kernel, which keep all of its processors busy.
    if !versions.is_empty() {
        ran += in_machines(&versions, agent.as_deref(), |release| {
            Job::tests(&built, release, filter, args.vm_all)
        });
    }
    if args.demo && kernel == Kernel::Foreign {
        sum += in_machines(&versions[..1], agent.as_deref(), |release| {
            Job::demo(&release.programs()?)
        });
    }
    sum += fail_if_empty(ran);
    Ok(conclude(sum))
}

/// Returns the counts, or a failure if no test ran.
fn fail_if_empty(ran: Tally) -> Tally {
    if ran == Tally::default() {
        return step("selection", || bail!("no test matches"));
    }
    ran
}

/// Kernels that run the tests that need one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// This machine's own kernel, and those that the arguments ask for.
    Native,
    /// Only kernels in virtual machines, because this machine's own cannot run lb.
    Foreign,
}

impl Kernel {
    /// Probes this machine's kernel, unless it is `refused` by an argument, and prints the reason if it cannot run lb.
    fn probe(refused: bool) -> anyhow::Result<Self> {
        let why = if refused {
            Some("--no-kernel was given".to_owned())
        } else {
            kernel_support::shortcoming()?
        };
        Ok(why.map_or(Self::Native, |why| {
            println!("this machine's kernel cannot run lb ({why}): the tests that need one run in a virtual machine");
            Self::Foreign
        }))
    }
}

fn set_up(scope: Scope) -> Tally {
    step("setup", || match setup::run(scope)? {
        ExitCode::SUCCESS => Ok(()),
        _ => bail!("the setup is not complete"),
    })
}

fn lints() -> Tally {
    let mut sum = step("format", || call(cargo().args(["fmt", "--all", "--check"])));
    sum += step("lints", || {
        let features = "lb-tests/bench,lb-tests/kubernetes,lb-tests/stress,lb-tests/upgrade";
        call(cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--features",
            features,
            "--",
            "-D",
            "warnings",
        ]))
    });
    sum += step("documentation", || {
        call(
            cargo()
                .args(["doc", "--workspace", "--no-deps", "--features", "lb-tests/kubernetes"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    });
    sum
}

fn build(built: &mut Built, features: &[&str]) -> Tally {
    step("build", || {
        *built = build_tests(features)?;
        Ok(())
    })
}

/// Runs the golden tests so that they accept their output.
pub(crate) fn bless() -> anyhow::Result<ExitCode> {
    if setup::run(Scope::All)? != ExitCode::SUCCESS {
        bail!("the setup is not complete");
    }
    let mut built = Built::default();
    let mut sum = build(&mut built, &[]);
    if !built.tests.is_empty() {
        sum += fail_if_empty(tests(&built, &Selection::Golden, Kernel::Native, &[]));
    }
    Ok(conclude(sum))
}

/// Runs one test for longer, or with more load, than `test` does.
pub(crate) fn run_long(long: LongTest) -> anyhow::Result<ExitCode> {
    let kubernetes = long.kubernetes;
    if kubernetes && let Some(ask) = setup::ask_for_kubernetes()? {
        return Ok(ask);
    }
    let mut control_plane = None;
    let mut sum = Tally::default();
    if kubernetes {
        sum += step("control plane of Kubernetes", || {
            control_plane = Some(kubernetes::build()?);
            Ok(())
        });
    }
    let mut built = Built::default();
    sum += build(&mut built, if kubernetes { &["kubernetes"] } else { &[] });
    if sum.failed == 0 {
        let files = [("LB_KUBERNETES", control_plane.map(OsString::from))];
        sum += fail_if_empty(tests(&built, &Selection::Long(long), Kernel::Native, &files));
    }
    Ok(conclude(sum))
}

/// Selection of tests.
#[derive(Debug)]
enum Selection<'a> {
    /// All tests, or those with this text in their name.
    Filter(Option<&'a str>),
    /// The tests with the Kubernetes control plane, or those of them with this text in their name.
    Kubernetes(Option<&'a str>),
    /// One test that runs for longer than usual.
    Long(LongTest),
    /// Golden tests, which write their output to their files.
    Golden,
}

impl Selection<'_> {
    /// Returns libtest's filter for the tests of `program`.
    fn filter(&self, program: &str) -> Option<&str> {
        match self {
            Self::Filter(filter) | Self::Kubernetes(filter) => *filter,
            Self::Long(long) => Some(long.test),
            Self::Golden => (!program.contains(GOLDEN)).then_some(GOLDEN),
        }
    }
}

/// Runs on these kernels the job that `job` makes of the release programs, with this agent if it is built already.
fn in_machines(versions: &[String], agent: Option<&Path>, job: impl FnOnce(&Built) -> anyhow::Result<Job>) -> Tally {
    println!("== build for virtual machines");
    let job = match build_release(agent).and_then(|release| job(&release)) {
        Ok(job) => job,
        Err(error) => {
            println!("build for virtual machines: {error:#}");
            return Tally::one(false);
        }
    };
    println!("== virtual machines, {} in parallel", vm::machines_in_parallel());
    let mut sum = Tally::default();
    for (version, result) in vm::run(versions, &job) {
        let tally = counted(&format!("Linux {version}"), || result);
        println!("{} passed, {} failed", tally.passed, tally.failed);
        sum += tally;
    }
    sum
}

/// Runs tests on this machine; those that need a kernel only if its own can run them. The variables in `paths` are set if they
/// have a value.
fn tests(
    built: &Built,
    selection: &Selection<'_>,
    kernel: Kernel,
    paths: &[(&'static str, Option<OsString>)],
) -> Tally {
    let mut ran = Tally::default();
    let mut env = vec![("PATH", search_path())];
    match built.programs() {
        Ok(programs) => {
            env.push(("LB_AGENT", programs.agent.into()));
            env.push(("LB_TESTBED", programs.testbed.into()));
        }
        Err(error) => {
            ran += step("programs", || Err(error));
        }
    }
    env.extend(paths.iter().filter_map(|(name, value)| Some((*name, value.clone()?))));
    match selection {
        Selection::Golden => env.push(("LB_BLESS", "1".into())),
        Selection::Long(LongTest {
            variable: (name, value),
            ..
        }) => env.push((name, value.into())),
        Selection::Filter(_) | Selection::Kubernetes(_) => {}
    }
    let wanted = |program: &TestProgram| match selection {
        Selection::Kubernetes(_) => program.needs_kubernetes(),
        Selection::Long(long) => program.target == long.target,
        Selection::Filter(_) | Selection::Golden => true,
    };
    let here = |program: &&TestProgram| (kernel == Kernel::Native || !program.needs_root()) && wanted(program);
    for program in built.tests.iter().filter(here) {
        let title = format!("tests of {} ({})", program.package, program.target);
        ran += counted(&title, || {
            let mut command = test_command(program, &env)?;
            command.args(selection.filter(&program.target));
            if matches!(selection, Selection::Long(_)) {
                // Its output describes the run.
                command.arg("--nocapture");
            }
            libtest::run(&mut command)
        });
    }
    if let Selection::Filter(filter) = selection {
        ran += counted("examples in the documentation", || {
            let mut command = cargo();
            command
                .args([
                    "test",
                    "--doc",
                    "--workspace",
                    "--exclude",
                    "lb-ebpf",
                    "--exclude",
                    "lb-probe",
                    "--",
                ])
                .args(*filter);
            libtest::run(&mut command)
        });
    }
    ran
}

/// Returns the command that runs `program` as `cargo test` would, as root if it needs that.
fn test_command(program: &TestProgram, env: &[(&str, OsString)]) -> anyhow::Result<Command> {
    let mut env = env.to_vec();
    env.push(("CARGO_MANIFEST_DIR", program.dir.clone().into()));
    env.push(("CARGO_PKG_NAME", program.package.clone().into()));
    let mut command = if program.needs_root() {
        let what = format!("the test program {} of {}", program.target, program.package);
        let mut command = as_root(&program.path, &env, &what)?;
        command.arg(SYSTEM_TESTS);
        command
    } else {
        let mut command = clean_command(&program.path);
        command.envs(env);
        command
    };
    command.current_dir(&program.dir);
    Ok(command)
}

/// Runs a command as a check: fails if the command does.
fn call(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_os_string();
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if status.success() {
        return Ok(());
    }
    bail!("failed ({status})")
}

/// Runs one check under a headline.
fn step(title: &str, check: impl FnOnce() -> anyhow::Result<()>) -> Tally {
    counted(title, || check().map(|()| Tally::one(true)))
}

/// Runs checks under a headline; an error counts as one failed check.
fn counted(title: &str, checks: impl FnOnce() -> anyhow::Result<Tally>) -> Tally {
    println!("== {title}");
    checks().unwrap_or_else(|error| {
        println!("{title}: {error:#}");
        Tally::one(false)
    })
}

/// Prints the last line and returns the exit code.
fn conclude(sum: Tally) -> ExitCode {
    println!("{} passed, {} failed", sum.passed, sum.failed);
    ExitCode::from(u8::from(sum.failed > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_tests_are_selected_by_file_or_by_name() {
        assert_eq!(Selection::Golden.filter("golden_policy"), None);
        assert_eq!(Selection::Golden.filter("lb_agent"), Some("golden"));
        assert_eq!(Selection::Filter(Some("snat")).filter("golden_policy"), Some("snat"));
    }

    #[test]
    fn errors_count_as_failures() {
        let failed = step("a step that fails", || bail!("on purpose"));
        assert_eq!(failed, Tally { passed: 0, failed: 1 });
        assert_eq!(conclude(failed), ExitCode::from(1));
        assert_eq!(conclude(step("a step", || Ok(()))), ExitCode::SUCCESS);
    }
}
