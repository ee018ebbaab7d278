//! Builds with cargo, and the paths of the programs that they produce.

use std::collections::HashMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use cargo_metadata::{Message, Metadata, MetadataCommand, Package, PackageId, TargetKind};

use crate::command::cargo;
use crate::testbed::Programs;
use crate::workspace::root;

/// Name of the agent's program.
const AGENT: &str = "lb-agent";

/// C compilers of the client that resolves names: the compiler, its flag for linking, and the name of the program. The one
/// with musl is static, because musl's loader is not installed in the places that tests run in.
const RESOLVERS: [(&str, &str, &str); 2] = [
    ("cc", "-pie", "lb-resolve-glibc"),
    ("musl-gcc", "-static", "lb-resolve-musl"),
];

/// A test program: an executable that cargo builds from one target with tests.
#[derive(Debug)]
pub(crate) struct TestProgram {
    /// Name of the package.
    pub(crate) package: String,
    /// Folder of the package.
    pub(crate) dir: PathBuf,
    /// Name of cargo's target: the library, the program or the file in `tests/`.
    pub(crate) target: String,
    /// Path of the executable.
    pub(crate) path: PathBuf,
}

impl TestProgram {
    /// Returns true for tests that change the machine: whole-system tests, and those that load programs into the kernel.
    pub(crate) fn needs_root(&self) -> bool {
        self.package == "lb-tests" || self.target.starts_with("kernel_")
    }

    /// Returns true for tests that start the control plane of Kubernetes.
    pub(crate) fn needs_kubernetes(&self) -> bool {
        self.package == "lb-tests" && self.target.starts_with("kubernetes")
    }
}

/// The executables of a build.
#[derive(Debug, Default)]
pub(crate) struct Built {
    /// Test programs; those that need root come last.
    pub(crate) tests: Vec<TestProgram>,
    /// Programs by name.
    programs: HashMap<String, PathBuf>,
}

impl Built {
    /// Returns the programs that the test bed starts.
    pub(crate) fn programs(&self) -> anyhow::Result<Programs> {
        Ok(Programs {
            agent: self.program(AGENT)?,
            testbed: self.program("lb-testbed")?,
        })
    }

    /// Returns names and paths of all programs that are no tests.
    pub(crate) fn all_programs(&self) -> impl Iterator<Item = (&str, &PathBuf)> {
        self.programs.iter().map(|(name, path)| (name.as_str(), path))
    }

    /// Builds the client of each C library's resolver, into the folder of the test bed's program.
    fn add_resolvers(&mut self) -> anyhow::Result<()> {
        let source = root().join("tests/clients/resolve.c");
        let beside = self.program("lb-testbed")?;
        for (compiler, linked, name) in RESOLVERS {
            let made = beside.with_file_name(name);
            let mut command = Command::new(compiler);
            command
                .args(["-O2", "-Wall", "-Werror", linked, "-o"])
                .arg(&made)
                .arg(&source);
            let done = command.status().with_context(|| format!("cannot run {compiler}"))?;
            ensure!(done.success(), "{compiler} cannot compile {}", source.display());
            self.programs.insert(name.to_owned(), made);
        }
        Ok(())
    }

    /// Returns the path of a program.
    pub(crate) fn program(&self, name: &str) -> anyhow::Result<PathBuf> {
        let made = self.programs.get(name);
        made.cloned()
            .with_context(|| format!("the build did not produce {name}"))
    }
}

/// Packages of a build that concern programs of the kernel only, which build scripts compile.
const NO_KERNEL_PROGRAMS: [&str; 5] = ["--workspace", "--exclude", "lb-ebpf", "--exclude", "lb-probe"];

/// Builds all tests and programs, with these features of `lb-tests` in addition. One call of cargo builds them all, so that
/// dependencies have the features of the whole workspace.
pub(crate) fn build_tests(features: &[&str]) -> anyhow::Result<Built> {
    let mut command = cargo();
    command
        .arg("build")
        .args(NO_KERNEL_PROGRAMS)
        .args(["--all-targets", "--features"])
        .arg(test_features(features));
    let mut built = build_by(command)?;
    built.add_resolvers()?;
    Ok(built)
}

/// Returns the features of a build of all tests.
fn test_features(more: &[&str]) -> String {
    let names = ["bench"].iter().chain(more);
    names
        .map(|name| format!("lb-tests/{name}"))
        .collect::<Vec<_>>()
        .join(",")
}

/// Builds the agent of another checkout of this repository into this workspace's target folder, replacing the agent that is
/// there. With the features of [`build_tests`], dependencies are those of this workspace's tests.
pub(crate) fn build_agent_of(source: &Path, features: &[&str]) -> anyhow::Result<PathBuf> {
    build_agent_in(source, &test_features(features))
}

/// Builds this workspace's agent with one more feature, `more`, and replaces the agent in the target folder. With the other
/// features of [`build_tests`], dependencies are those of the tests.
pub(crate) fn build_agent_with(more: &str, features: &[&str]) -> anyhow::Result<PathBuf> {
    build_agent_in(&root(), &format!("{},{AGENT}/{more}", test_features(features)))
}

fn build_agent_in(source: &Path, features: &str) -> anyhow::Result<PathBuf> {
    let mut command = cargo();
    command
        .current_dir(source)
        .arg("build")
        .args(NO_KERNEL_PROGRAMS)
        .args(["--bin", AGENT, "--features", features, "--target-dir"])
        .arg(root().join("target"));
    build_by(command)?.program(AGENT)
}

/// Builds the programs as for the image. If the agent was built already, it is used.
pub(crate) fn build_release(agent: Option<&Path>) -> anyhow::Result<Built> {
    let Some(agent) = agent else {
        return build_for_image(&["-p", "lb-agent", "-p", "lb-tests", "--bins"]);
    };
    let mut built = build_for_image(&["-p", "lb-tests", "--bins"])?;
    built.programs.insert(AGENT.to_owned(), agent.to_owned());
    Ok(built)
}

/// Arguments of cargo for the benchmarks and the programs that they start.
const BENCH: [&str; 14] = [
    "build",
    "--release",
    "-p",
    "lb-agent",
    "-p",
    "lb-tests",
    "--bin",
    "lb-agent",
    "--bin",
    "lb-testbed",
    "--bin",
    "lb-bench",
    "--features",
    "lb-tests/bench,lb-tests/kubernetes",
];

/// Builds the benchmarks and the programs that they start, optimized like the programs in a release.
pub(crate) fn build_bench() -> anyhow::Result<Built> {
    build(&BENCH)
}

/// Builds the benchmarks of another checkout of this repository into a target folder of its own.
pub(crate) fn build_bench_of(source: &Path, target: &Path) -> anyhow::Result<Built> {
    let mut command = cargo();
    command.current_dir(source).args(BENCH).arg("--target-dir").arg(target);
    build_by(command)
}

/// Builds the stress test, also optimized: more changes per second find more.
pub(crate) fn build_stress() -> anyhow::Result<Built> {
    build(&[
        "build",
        "--release",
        "-p",
        "lb-tests",
        "--bin",
        "lb-stress",
        "--features",
        "lb-tests/stress",
    ])
}

/// Builds the agent of the container image: statically linked with the C library of this machine, and without paths of this
/// machine in it. The target is named explicitly, so that the flags do not apply to build scripts and macros.
pub(crate) fn build_agent_for_image() -> anyhow::Result<PathBuf> {
    build_for_image(&["-p", "lb-agent", "--bin", "lb-agent"])?.program(AGENT)
}

fn build_for_image(what: &[&str]) -> anyhow::Result<Built> {
    let mut flags = vec![OsString::from("-Ctarget-feature=+crt-static")];
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(env::home_dir()?.join(".cargo")));
    for (path, name) in [(Some(root()), "lb"), (home, "cargo")] {
        let Some(path) = path else { continue };
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(path);
        flag.push(format!("=/{name}"));
        flags.push(flag);
    }
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let mut command = cargo();
    command
        .args(["build", "--profile", "image", "--target", &target])
        .args(what)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsStr::new("\x1f")));
    build_by(command)
}

fn build(arguments: &[&str]) -> anyhow::Result<Built> {
    let mut command = cargo();
    command.args(arguments);
    build_by(command)
}

fn build_by(mut command: Command) -> anyhow::Result<Built> {
    let packages = packages()?;
    let mut child = command
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("cargo has no output")?;
    let mut built = Built::default();
    for message in Message::parse_stream(BufReader::new(stdout)) {
        let Message::CompilerArtifact(artifact) = message.context("cannot read cargo's messages")? else {
            continue;
        };
        let Some(path) = artifact.executable else {
            continue;
        };
        if !artifact.profile.test {
            built.programs.insert(artifact.target.name, path.into());
        } else if !artifact.target.kind.contains(&TargetKind::Bench)
            && let Some((package, dir)) = packages.get(&artifact.package_id)
        {
            built.tests.push(TestProgram {
                package: package.clone(),
                dir: dir.clone(),
                target: artifact.target.name,
                path: path.into(),
            });
        }
    }
    if !child.wait().context("cannot wait for cargo")?.success() {
        bail!("the build failed");
    }
    built
        .tests
        .sort_by(|a, b| (a.needs_root(), &a.package, &a.target).cmp(&(b.needs_root(), &b.package, &b.target)));
    Ok(built)
}

/// Returns cargo's description of the workspace.
fn metadata() -> anyhow::Result<Metadata> {
    MetadataCommand::new()
        .current_dir(root())
        .no_deps()
        .exec()
        .context("cannot read the workspace")
}

/// Returns the description of one package of the workspace.
pub(crate) fn package(name: &str) -> anyhow::Result<Package> {
    let package = metadata()?.packages.into_iter().find(|package| package.name == name);
    package.with_context(|| format!("there is no package {name}"))
}

/// Returns name and folder of each package of the workspace.
fn packages() -> anyhow::Result<HashMap<PackageId, (String, PathBuf)>> {
    let described = metadata()?.packages.into_iter().map(|package| {
        let dir = package
            .manifest_path
            .parent()
            .map_or_else(root, |dir| Path::new(dir).to_path_buf());
        (package.id, (package.name.to_string(), dir))
    });
    Ok(described.collect())
}
