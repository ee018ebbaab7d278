//! `test` and `bless`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
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
use crate::vm::{self, Job};

/// Whole-system tests at a time in one test program: each builds a cluster of its own.
const SYSTEM_TESTS: &str = "--test-threads=2";

/// A test that does more than usual where a variable says so.
#[derive(Debug, Clone)]
pub(crate) struct Long {
    /// The program that it is in.
    pub(crate) target: &'static str,
    /// Its name.
    pub(crate) test: &'static str,
    /// The variable, and its value.
    pub(crate) variable: (&'static str, String),
    /// It needs the control plane of Kubernetes.
    pub(crate) kubernetes: bool,
}

/// What golden tests have in the name of their file or of the test.
const GOLDEN: &str = "golden";

/// Arguments of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Leave out format, lints and documentation
    #[arg(long)]
    no_lint: bool,
    /// Check at the end that the demo works (as `cargo xtask run --check` does)
    #[arg(long)]
    demo: bool,
    /// Then also run the tests that need a kernel on Debian's kernel of this version, in a virtual machine; may be given
    /// several times
    #[arg(long, value_name = "VERSION")]
    vm: Vec<String>,
    /// Run nothing but the tests in virtual machines
    #[arg(long, requires = "vm", conflicts_with = "demo")]
    only_vm: bool,
    /// Also run the tests against the control plane of Kubernetes, which Go builds at the first time (five minutes)
    #[arg(long)]
    kubernetes: bool,
    /// Run nothing but the tests against Kubernetes
    #[arg(long, requires = "kubernetes", conflicts_with_all = ["demo", "vm"])]
    only_kubernetes: bool,
    /// Take the kernel of this machine for one that cannot run lb, to see what is done then
    #[arg(long, hide = true)]
    no_kernel: bool,
}

/// Runs every check; the last line tells how many passed.
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
            kernel = Kernel::look(args.no_kernel)?;
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
                bail!("the tests against it need a kernel that can run lb, and run in no virtual machine");
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
    let mut built = Built::default();
    sum += build(&mut built, args.kubernetes);
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
        let kubernetes = [("LB_KUBERNETES", control_plane), ("LB_IMAGE", image)];
        ran += tests(&built, &selection, kernel, &kubernetes);
    }
    if args.demo && kernel == Kernel::Native {
        sum += step("demo", || run::check_demo(agent.as_deref()));
    }
    // After the tests on this machine's own kernel: those keep all of its processors busy themselves.
    if !versions.is_empty() {
        ran += in_machines(&versions, agent.as_deref(), |release| {
            Job::tests(&built, release, filter)
        });
    }
    if args.demo && kernel == Kernel::Foreign {
        sum += in_machines(&versions[..1], agent.as_deref(), |release| {
            Job::demo(&release.programs()?)
        });
    }
    sum += some(ran);
    Ok(conclude(sum))
}

/// What ran, or a failure if nothing did.
fn some(ran: Tally) -> Tally {
    if ran == Tally::default() {
        return step("selection", || bail!("no test matches"));
    }
    ran
}

/// Where the tests that need a kernel run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// On this machine's own, and on others if so wanted.
    Native,
    /// On others alone: this machine's own cannot run them.
    Foreign,
}

impl Kernel {
    /// Looks at this machine's kernel, unless it is `refused` from the beginning, and tells what follows.
    fn look(refused: bool) -> anyhow::Result<Self> {
        let why = if refused {
            Some("this is what --no-kernel asks for".to_owned())
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
        let features = "lb-tests/bench,lb-tests/kubernetes,lb-tests/stress";
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

fn build(built: &mut Built, kubernetes: bool) -> Tally {
    step("build", || {
        *built = build_tests(kubernetes)?;
        Ok(())
    })
}

/// Has the golden tests accept what they see.
pub(crate) fn bless() -> anyhow::Result<ExitCode> {
    if setup::run(Scope::All)? != ExitCode::SUCCESS {
        bail!("the setup is not complete");
    }
    let mut built = Built::default();
    let mut sum = build(&mut built, false);
    if !built.tests.is_empty() {
        sum += some(tests(&built, &Selection::Golden, Kernel::Native, &[]));
    }
    Ok(conclude(sum))
}

/// Runs one test for longer, or with more, than all tests do.
pub(crate) fn long(long: Long) -> anyhow::Result<ExitCode> {
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
    sum += build(&mut built, kubernetes);
    if sum.failed == 0 {
        let files = [("LB_KUBERNETES", control_plane)];
        sum += some(tests(&built, &Selection::Long(long), Kernel::Native, &files));
    }
    Ok(conclude(sum))
}

/// Which tests to run.
#[derive(Debug)]
enum Selection<'a> {
    /// All, or those that contain this.
    Filter(Option<&'a str>),
    /// Those against Kubernetes, or those of them that contain this.
    Kubernetes(Option<&'a str>),
    /// One that does more than usual.
    Long(Long),
    /// Golden tests, which are to write down what they see.
    Golden,
}

impl Selection<'_> {
    /// The filter for the tests of `program`.
    fn filter(&self, program: &str) -> Option<&str> {
        match self {
            Self::Filter(filter) | Self::Kubernetes(filter) => *filter,
            Self::Long(long) => Some(long.test),
            Self::Golden => (!program.contains(GOLDEN)).then_some(GOLDEN),
        }
    }
}

/// Does on these kernels what `job` makes of the programs as they are delivered, with this agent if there is one already.
fn in_machines(versions: &[String], agent: Option<&Path>, job: impl FnOnce(&Built) -> anyhow::Result<Job>) -> Tally {
    println!("== build for virtual machines");
    let job = match build_release(agent).and_then(|release| job(&release)) {
        Ok(job) => job,
        Err(error) => {
            println!("build for virtual machines: {error:#}");
            return Tally::one(false);
        }
    };
    println!("== virtual machines, {} at a time", vm::at_a_time());
    let mut sum = Tally::default();
    for (version, result) in vm::run(versions, &job) {
        let tally = counted(&format!("Linux {version}"), || result);
        println!("{} passed, {} failed", tally.passed, tally.failed);
        sum += tally;
    }
    sum
}

/// Runs tests; those that need a kernel only on this machine's own. `files` are told by these variables, those that there
/// are.
fn tests(built: &Built, selection: &Selection<'_>, kernel: Kernel, files: &[(&'static str, Option<PathBuf>)]) -> Tally {
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
    let files = files
        .iter()
        .filter_map(|(name, path)| Some((*name, path.clone()?.into())));
    env.extend(files);
    match selection {
        Selection::Golden => env.push(("LB_BLESS", "1".into())),
        Selection::Long(Long {
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
                // It tells what it did.
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

/// The command that runs `program` as `cargo test` would, as root where that is needed.
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

/// A check by a command's exit code.
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

/// One check, under a headline.
fn step(title: &str, check: impl FnOnce() -> anyhow::Result<()>) -> Tally {
    counted(title, || check().map(|()| Tally::one(true)))
}

/// Some checks, under a headline; an error counts as one that failed.
fn counted(title: &str, checks: impl FnOnce() -> anyhow::Result<Tally>) -> Tally {
    println!("== {title}");
    checks().unwrap_or_else(|error| {
        println!("{title}: {error:#}");
        Tally::one(false)
    })
}

/// The last line, and the exit code.
fn conclude(sum: Tally) -> ExitCode {
    println!("{} passed, {} failed", sum.passed, sum.failed);
    ExitCode::from(u8::from(sum.failed > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_tests_are_found_by_file_or_by_name() {
        assert_eq!(Selection::Golden.filter("golden_policy"), None);
        assert_eq!(Selection::Golden.filter("lb_agent"), Some("golden"));
        assert_eq!(Selection::Filter(Some("snat")).filter("golden_policy"), Some("snat"));
    }

    #[test]
    fn errors_count() {
        let failed = step("a step that fails", || bail!("on purpose"));
        assert_eq!(failed, Tally { passed: 0, failed: 1 });
        assert_eq!(conclude(failed), ExitCode::from(1));
        assert_eq!(conclude(step("a step", || Ok(()))), ExitCode::SUCCESS);
    }
}
