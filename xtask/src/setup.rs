//! `setup`: installs the eBPF toolchain and the programs that tests start.

mod plan;

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use lb_ebpf_build::toolchain::{self, EbpfToolchain};

use self::plan::{Action, COMPILER_OF_C, Host, MACHINE_TOOLS, NIGHTLY, TOOLS, Tool, plan};
use crate::command::{CommandLine, clean_command};
use crate::kernels;
use crate::kubernetes;
use crate::privilege::{is_root, search_path};
use crate::workspace::root;

/// Arguments of `setup`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also install the programs for virtual machines, and fetch Debian's kernel of this version; can be repeated
    #[arg(long, value_name = "VERSION")]
    vm: Vec<String>,
    /// Also build the Kubernetes control plane; this needs Go
    #[arg(long)]
    kubernetes: bool,
}

/// Purpose of a setup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Building: the eBPF toolchain.
    Build,
    /// Building, and the programs that tests and the demo start.
    All,
    /// Everything, and the programs for virtual machines.
    Machines,
}

impl Scope {
    /// Returns the scope for tests on this machine, and in virtual machines if there are kernels for them.
    pub(crate) fn of(machines: &[String]) -> Self {
        if machines.is_empty() { Self::All } else { Self::Machines }
    }
}

/// Exit code if a person has to act first.
const BY_HAND: u8 = 2;

/// Runs the command `setup`.
pub(crate) fn install(args: &Args) -> anyhow::Result<ExitCode> {
    if args.kubernetes
        && let Some(ask) = ask_for_kubernetes()?
    {
        return Ok(ask);
    }
    let ready = run(Scope::of(&args.vm))?;
    if ready == ExitCode::SUCCESS {
        kernels::fetch_missing(&args.vm)?;
        if args.kubernetes {
            kubernetes::build()?;
        }
        name_optional();
    }
    Ok(ready)
}

/// Runs the missing actions and prints a line for each. Returns quickly if nothing is missing.
pub(crate) fn run(scope: Scope) -> anyhow::Result<ExitCode> {
    let host = examine(scope);
    let actions = match plan(&host) {
        Ok(actions) => actions,
        Err(by_hand) => return Ok(ask(&by_hand)),
    };
    if actions.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if !is_root() && actions.iter().any(|action| action.command().as_root) {
        let lines: Vec<_> = actions.iter().map(|action| action.command().to_string()).collect();
        return Ok(ask(&lines));
    }
    for action in &actions {
        if let Action::Packages(names) = action
            && !packages_known(names)?
        {
            return Ok(ask(&[
                format!(
                    "apt lacks some of the packages {}; install their programs in another way",
                    names.join(" ")
                ),
                format!("(this also installs the eBPF compiler: {NIGHTLY})"),
            ]));
        }
        println!("setup: {}", action.headline());
        action.command().run_quietly().with_context(|| action.hint())?;
    }
    let left = plan(&examine(scope));
    if left.as_ref().is_ok_and(Vec::is_empty) {
        return Ok(ExitCode::SUCCESS);
    }
    bail!("all actions of setup succeeded, but these are still necessary: {left:?}");
}

/// Names the optional programs that are missing, and their purpose.
pub(crate) fn name_optional() {
    let Tool { program, package } = COMPILER_OF_C;
    if !has(program) {
        println!("setup: `cargo xtask bench` compares with C only if {program} is installed (package {package})");
    }
}

/// Reports how to install the C compiler, if it is missing: `bench --against` needs it.
pub(crate) fn ask_for_c_compiler() -> Option<ExitCode> {
    let Tool { program, package } = COMPILER_OF_C;
    (!has(program)).then(|| ask(&[format!("sudo apt-get install {package}")]))
}

/// Returns true if a program of this name is installed.
fn has(program: &str) -> bool {
    env::split_paths(&search_path()).any(|dir| dir.join(program).is_file())
}

/// Prints the instructions for a person before the Kubernetes control plane can be built, and returns the exit code; nothing
/// if it can be built already.
pub(crate) fn ask_for_kubernetes() -> anyhow::Result<Option<ExitCode>> {
    Ok(kubernetes::missing()?.map(|line| ask(&[line])))
}

/// Prints instructions for a person, and returns the exit code for that.
fn ask(lines: &[String]) -> ExitCode {
    eprintln!("setup: something is missing that setup cannot install itself. Run, in this order:");
    for line in lines {
        eprintln!("    {line}");
    }
    ExitCode::from(BY_HAND)
}

/// Returns true if apt lists these packages, if necessary after fetching the package lists.
fn packages_known(names: &[&'static str]) -> anyhow::Result<bool> {
    let show = CommandLine::new(
        ["apt-cache", "show", "--no-all-versions"]
            .into_iter()
            .chain(names.iter().copied()),
    );
    if show.run_quietly().is_ok() {
        return Ok(true);
    }
    println!("setup: fetching the package lists");
    CommandLine::new(["apt-get", "update"]).run_quietly()?;
    Ok(show.run_quietly().is_ok())
}

/// Examines this machine.
fn examine(scope: Scope) -> Host {
    let found = toolchain::rustup_home().and_then(|home| toolchain::choose(&home));
    let linker = match (&found, toolchain::linker()) {
        (_, None) => false,
        (Some(EbpfToolchain::Linked(dir)), Some(linker)) => can_link(dir, &linker),
        (Some(EbpfToolchain::Nightly(_)) | None, Some(_)) => true,
    };
    let (tools, machine_tools) = match scope {
        Scope::Build => (&[][..], &[][..]),
        Scope::All => (&TOOLS[..], &[][..]),
        Scope::Machines => (&TOOLS[..], &MACHINE_TOOLS[..]),
    };
    Host {
        toolchain: found,
        rustup: has("rustup"),
        compiler: toolchain::has_core(Path::new("/usr")),
        linker,
        missing: tools
            .iter()
            .chain(machine_tools)
            .filter(|tool| !has(tool.program))
            .copied()
            .collect(),
        apt: has("apt-get"),
        systemd: Path::new("/run/systemd/system").is_dir(),
    }
}

/// Returns true if `linker` can read the output of the compiler of `toolchain`. It links a small program to find out, once
/// for each pair of the two.
fn can_link(toolchain: &Path, linker: &Path) -> bool {
    let stamp = [&toolchain.join("bin/rustc"), linker]
        .map(|path| format!("{} {:?}\n", path.display(), modified_at(path)))
        .concat();
    let dir = root().join("target/xtask");
    let file = dir.join("links");
    if fs::read_to_string(&file).is_ok_and(|known| known == stamp) {
        return true;
    }
    match try_link(&dir, linker) {
        Ok(()) => {
            // Without the stamp the next setup takes longer, which is no reason to fail.
            let _ = fs::write(file, stamp);
            true
        }
        Err(error) => {
            println!(
                "setup: {} cannot link the output of the eBPF compiler: {error:#}",
                linker.display()
            );
            false
        }
    }
}

/// Returns the time of a file's last change, since 1970.
fn modified_at(path: &Path) -> Option<Duration> {
    fs::metadata(path)
        .ok()?
        .modified()
        .ok()?
        .duration_since(UNIX_EPOCH)
        .ok()
}

/// Compiles and links a small eBPF program.
fn try_link(dir: &Path, linker: &Path) -> anyhow::Result<()> {
    const PROGRAM: &str = r#"
        #![no_std]
        #![no_main]
        #[unsafe(no_mangle)]
        #[unsafe(link_section = "socket")]
        fn probe(ctx: *const u32) -> u32 { if ctx.is_null() { 0 } else { u32::from_be(7) } }
        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo<'_>) -> ! { loop {} }
    "#;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let source = dir.join("probe.rs");
    fs::write(&source, PROGRAM).with_context(|| format!("cannot write {}", source.display()))?;
    let output = clean_command("rustup")
        .args([
            "run",
            toolchain::LINKED,
            "rustc",
            "--edition",
            "2024",
            "-O",
            "--target",
            toolchain::TARGET,
        ])
        .args([
            OsStr::new("-C"),
            OsStr::new(&format!("linker={}", linker.display())),
            OsStr::new("-o"),
        ])
        .args([dir.join("probe"), source])
        .output()
        .context("cannot run rustup")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end())
}
