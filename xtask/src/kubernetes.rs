//! The Kubernetes control plane for tests, built from its own source by Go.
//!
//! `tests/kubernetes/go.mod` has its version, `tests/kubernetes/etcd/go.mod` that of etcd, and
//! `tests/kubernetes/helm/go.mod` that of Helm. The programs are kept below `target/kubernetes`, in a folder named after
//! all three versions.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::command::clean_command;
use crate::privilege::search_path;
use crate::workspace::root;

/// Default folder of Go's programs by its installation instructions.
const GO_FOLDER: &str = "/usr/local/go/bin";
/// Instructions for installing Go.
const HOW: &str = "see https://go.dev/dl (Debian's own packages may be too old), and put its folder `bin` into PATH";

/// A program, its Go package, and the time of its first build on two processors.
struct Source {
    program: &'static str,
    package: &'static str,
    module: Module,
    time: &'static str,
}

/// A Go module of this repository.
#[derive(Clone, Copy)]
enum Module {
    Kubernetes,
    Etcd,
    Helm,
}

impl Module {
    /// Returns the module's folder.
    fn folder(self) -> PathBuf {
        let kubernetes = root().join("tests/kubernetes");
        match self {
            Self::Kubernetes => kubernetes,
            Self::Etcd => kubernetes.join("etcd"),
            Self::Helm => kubernetes.join("helm"),
        }
    }

    /// Returns the required module that determines the version.
    fn requires(self) -> &'static str {
        match self {
            Self::Kubernetes => "k8s.io/kubernetes",
            Self::Etcd => "go.etcd.io/etcd/server/v3",
            Self::Helm => "helm.sh/helm/v3",
        }
    }

    fn manifest(self) -> Result<String> {
        let path = self.folder().join("go.mod");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Returns the version that is built, such as `v1.36.3`.
    fn version(self) -> Result<String> {
        let manifest = self.manifest()?;
        let version = required(&manifest, self.requires());
        Ok(version
            .with_context(|| format!("go.mod does not require {}", self.requires()))?
            .to_owned())
    }

    /// Returns the flags of Go's linker.
    fn linker_flags(self, version: &str) -> String {
        match self {
            // Clients may refuse a server without a version.
            Self::Kubernetes => {
                let minor = version.split('.').nth(1).unwrap_or_default();
                let package = "k8s.io/component-base/version";
                format!(
                    "-s -w -X {package}.gitVersion={version} -X {package}.gitMajor=1 -X {package}.gitMinor={minor} \
                     -X k8s.io/client-go/pkg/version.gitVersion={version}"
                )
            }
            Self::Etcd | Self::Helm => "-s -w".to_owned(),
        }
    }
}

/// All programs that are built.
const SOURCES: [Source; 6] = [
    Source {
        program: "etcd",
        package: "go.etcd.io/etcd/server/v3",
        module: Module::Etcd,
        time: "half a minute",
    },
    Source {
        program: "kube-apiserver",
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
        module: Module::Kubernetes,
        time: "three minutes",
    },
    Source {
        program: "kube-controller-manager",
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
        module: Module::Kubernetes,
        time: "a minute",
    },
    Source {
        program: "kube-proxy",
        package: "k8s.io/kubernetes/cmd/kube-proxy",
        module: Module::Kubernetes,
        time: "ten seconds",
    },
    Source {
        program: "kubectl",
        package: "k8s.io/kubernetes/cmd/kubectl",
        module: Module::Kubernetes,
        time: "twenty seconds",
    },
    Source {
        program: "helm",
        package: "helm.sh/helm/v3/cmd/helm",
        module: Module::Helm,
        time: "a minute",
    },
];

/// Returns the instruction that a person must follow before the control plane can be built, or nothing if Go is new enough
/// or the control plane is built already.
pub(crate) fn missing() -> Result<Option<String>> {
    let folder = folder()?;
    if SOURCES.iter().all(|source| folder.join(source.program).is_file()) {
        return Ok(None);
    }
    let manifest = Module::Kubernetes.manifest()?;
    let wanted = required(&manifest, "go").context("go.mod names no version of Go")?;
    let wants = format!("the control plane of Kubernetes is built by Go {wanted} or newer");
    // In the module's folder, an old Go reports that it is too old, or switches to a newer toolchain itself.
    let mut command = go(&Module::Kubernetes.folder());
    let Ok(output) = command.args(["env", "GOVERSION"]).stdin(Stdio::null()).output() else {
        return Ok(Some(format!("{wants}, which is not installed: {HOW}")));
    };
    let installed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Ok(Some(format!("{wants}: {why}: {HOW}")));
    }
    if number(&installed) < number(wanted) {
        return Ok(Some(format!("{wants}, but {installed} is installed: {HOW}")));
    }
    Ok(None)
}

/// Builds the programs that are missing; returns the folder with all of them.
pub(crate) fn build() -> Result<PathBuf> {
    let folder = folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for source in &SOURCES {
        source.build(&folder)?;
    }
    Ok(folder)
}

/// Returns the folder of the programs, which is named after their versions.
fn folder() -> Result<PathBuf> {
    let (kubernetes, etcd, helm) = (
        Module::Kubernetes.version()?,
        Module::Etcd.version()?,
        Module::Helm.version()?,
    );
    Ok(root()
        .join("target/kubernetes")
        .join(format!("{kubernetes}-etcd-{etcd}-helm-{helm}")))
}

impl Source {
    fn build(&self, folder: &Path) -> Result<()> {
        let made = folder.join(self.program);
        if made.is_file() {
            return Ok(());
        }
        let version = self.module.version()?;
        println!("building {} {version} ({})", self.program, self.time);
        // It has another name until it is complete.
        let unfinished = folder.join(format!("{}.new", self.program));
        let mut command = go(&self.module.folder());
        command
            .args(["build", "-trimpath", "-buildvcs=false", "-mod=readonly"])
            // The linker removes debug information; not generating it saves a fifth of the compiler's work.
            .args(["-gcflags=all=-dwarf=false", "-ldflags"])
            .arg(self.module.linker_flags(&version))
            .arg("-o")
            .arg(&unfinished)
            .arg(self.package)
            .stdin(Stdio::null());
        let status = command.status().context("cannot run go")?;
        ensure!(status.success(), "go cannot build {} ({status})", self.program);
        fs::rename(&unfinished, &made).with_context(|| format!("cannot rename the new {}", self.program))
    }
}

/// Returns a command of Go in the folder of a module. Go is searched in the search path and in its default folder.
fn go(folder: &Path) -> Command {
    let mut path = search_path();
    path.push(":");
    path.push(OsStr::new(GO_FOLDER));
    let program = which::which_in("go", Some(&path), folder).unwrap_or_else(|_| "go".into());
    let mut command = clean_command(program);
    command.current_dir(folder).env("CGO_ENABLED", "0");
    command
}

/// Returns the version after `name` in a go.mod: that of a direct requirement, or of Go itself.
fn required<'a>(manifest: &'a str, name: &str) -> Option<&'a str> {
    manifest.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        let (found, version) = (words.next()?, words.next()?);
        (found == name && words.next().is_none()).then_some(version)
    })
}

/// Parses versions such as `go1.26.8` and `1.26.0` into numbers that can be compared.
fn number(version: &str) -> Vec<u32> {
    let digits = version.trim_start_matches("go");
    let parts = digits.split('.').map_while(|part| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..end].parse().ok()
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "module x\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes v1.36.3\n\nrequire (\n\t\
                            k8s.io/api v0.36.3 // indirect\n\tgo.etcd.io/etcd/server/v3 v3.6.8\n)\n\nreplace (\n\t\
                            k8s.io/kubernetes/x => k8s.io/y v1.0.0\n)\n";

    #[test]
    fn versions_are_read_from_go_mod() {
        assert_eq!(required(MANIFEST, "go"), Some("1.26.0"));
        assert_eq!(required(MANIFEST, "k8s.io/kubernetes"), Some("v1.36.3"));
        assert_eq!(required(MANIFEST, "go.etcd.io/etcd/server/v3"), Some("v3.6.8"));
        assert_eq!(required(MANIFEST, "k8s.io/client-go"), None);
    }

    #[test]
    fn versions_of_go_compare() {
        assert!(number("go1.19.8") < number("1.26.0"));
        assert!(number("go1.26.8") > number("1.26.0"));
        assert!(number("go1.26.0") >= number("1.26.0"));
        assert!(number("go1.27rc1") > number("1.26.0"));
        assert!(number("go1.9") < number("1.26"));
    }

    #[test]
    fn modules_of_this_repository_have_versions() {
        for module in [Module::Kubernetes, Module::Etcd, Module::Helm] {
            let version = module.version().unwrap();
            assert!(version.starts_with('v'), "{version}");
        }
    }
}
