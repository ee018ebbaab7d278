//! The actions that make the toolchain and the programs for tests present, derived from a description of the machine.

use lb_ebpf_build::toolchain::{EbpfToolchain, LINKED};

use crate::command::CommandLine;

/// Version of bpf-linker that is installed.
const LINKER_VERSION: &str = "0.13.0";
/// Debian's folder of the LLVM of the compiler in [`COMPILER`]. A bpf-linker with an older LLVM cannot read its output.
const LLVM: &str = "/usr/lib/llvm-22";
/// Debian's packages of a Rust compiler that ships `core` for eBPF.
const COMPILER: [&str; 5] = [
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "libstd-rust-web-dev-bpf",
    "rust-web-llvm",
];
/// Debian's packages that bpf-linker is built with.
const LINKER: [&str; 4] = ["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev"];

/// Debian's package of nginx.
const NGINX: &str = "nginx-light";
/// Command that installs a toolchain on systems without a compiler that ships `core` for eBPF. Setup never runs it itself,
/// because the choice of a nightly is the user's.
pub(crate) const NIGHTLY: &str = "rustup toolchain install nightly --component rust-src";

/// A program that tests and the demo start, and Debian's package of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tool {
    /// Name of the program.
    pub(crate) program: &'static str,
    /// Name of the package.
    pub(crate) package: &'static str,
}

/// Programs that tests and the demo start.
pub(crate) const TOOLS: [Tool; 13] = [
    Tool {
        program: "ip",
        package: "iproute2",
    },
    Tool {
        program: "bridge",
        package: "iproute2",
    },
    Tool {
        program: "nginx",
        package: NGINX,
    },
    Tool {
        program: "curl",
        package: "curl",
    },
    Tool {
        program: "bpftool",
        package: "bpftool",
    },
    Tool {
        program: "nft",
        package: "nftables",
    },
    Tool {
        program: "iptables",
        package: "iptables",
    },
    Tool {
        program: "dnsmasq",
        package: "dnsmasq-base",
    },
    Tool {
        program: "dig",
        package: "bind9-dnsutils",
    },
    Tool {
        program: "python3",
        package: "python3",
    },
    Tool {
        program: "musl-gcc",
        package: "musl-tools",
    },
    Tool {
        program: "openssl",
        package: "openssl",
    },
    Tool {
        program: "runc",
        package: "runc",
    },
];

/// Programs that tests in virtual machines need in addition.
pub(crate) const MACHINE_TOOLS: [Tool; 4] = [
    Tool {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
    },
    Tool {
        program: "busybox",
        package: "busybox-static",
    },
    Tool {
        program: "xz",
        package: "xz-utils",
    },
    Tool {
        program: "strip",
        package: "binutils",
    },
];

/// Compiler of the C programs that benchmarks compare with. Only they need it, so setup names it and does not install it.
pub(crate) const COMPILER_OF_C: Tool = Tool {
    program: "clang",
    package: "clang",
};

/// Description of a machine.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// The toolchain that a build of the eBPF object would use now.
    pub(crate) toolchain: Option<EbpfToolchain>,
    /// rustup is installed.
    pub(crate) rustup: bool,
    /// Debian's compiler that ships `core` for eBPF is installed in /usr.
    pub(crate) compiler: bool,
    /// A bpf-linker that can read the compiler's output is installed.
    pub(crate) linker: bool,
    /// Necessary tools that are missing.
    pub(crate) missing: Vec<Tool>,
    /// apt-get is installed.
    pub(crate) apt: bool,
    /// systemd runs the services.
    pub(crate) systemd: bool,
}

/// An action of setup.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Keeps the nginx service, which Debian's package starts, from starting: tests start nginx themselves.
    MaskNginx,
    /// Installs Debian packages.
    Packages(Vec<&'static str>),
    /// Registers Debian's compiler with rustup.
    Link,
    /// Builds bpf-linker, with Debian's LLVM if true.
    Linker(bool),
}

impl Action {
    /// Returns a short description of the action.
    pub(crate) fn headline(&self) -> String {
        match self {
            Self::MaskNginx => "keeping the nginx service from starting".to_owned(),
            Self::Packages(names) => format!("installing {}", names.join(" ")),
            Self::Link => format!("linking /usr as rustup's toolchain {LINKED}"),
            Self::Linker(_) => format!("building bpf-linker {LINKER_VERSION} (a minute)"),
        }
    }

    /// Returns a hint for the error if the action fails.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Linker(_) => "setup: built binaries are at https://github.com/aya-rs/bpf-linker/releases",
            Self::MaskNginx | Self::Packages(_) | Self::Link => "setup",
        }
    }

    /// Returns the command of the action.
    pub(crate) fn command(&self) -> CommandLine {
        match self {
            Self::MaskNginx => CommandLine::new(["systemctl", "mask", "nginx.service"]).root(),
            Self::Packages(names) => {
                let install = ["apt-get", "install", "--yes", "--no-install-recommends"];
                // Without systemd, invoke-rc.d starts nothing in the single-user run level.
                CommandLine::new(install.into_iter().chain(names.iter().copied()))
                    .env("DEBIAN_FRONTEND", "noninteractive")
                    .env("RUNLEVEL", "1")
                    .root()
            }
            Self::Link => CommandLine::new(["rustup", "toolchain", "link", LINKED, "/usr"]),
            Self::Linker(false) => CommandLine::new(["cargo", "install", "bpf-linker", "--locked", "--force"]),
            Self::Linker(true) => CommandLine::new([
                "cargo",
                "install",
                "bpf-linker",
                "--version",
                LINKER_VERSION,
                "--no-default-features",
                "--features",
                "llvm-22",
                "--locked",
                "--force",
            ])
            .env("LLVM_PREFIX", LLVM)
            .env("PATH", &format!("{LLVM}/bin:$PATH")),
        }
    }
}

/// Returns the actions in order. If setup cannot do all of them itself, the error has the instructions for a person, a line
/// each.
pub(crate) fn plan(host: &Host) -> Result<Vec<Action>, Vec<String>> {
    let mut by_hand = Vec::new();
    if host.toolchain.is_none() && !host.rustup {
        by_hand.push("rustup is missing: see https://rustup.rs".to_owned());
    }
    if host.toolchain.is_none() && !host.apt {
        by_hand.push(NIGHTLY.to_owned());
    }
    if !host.apt && !host.missing.is_empty() {
        let programs: Vec<_> = host.missing.iter().map(|tool| tool.program).collect();
        by_hand.push(format!("install these programs: {}", programs.join(" ")));
    }
    let actions = actions(host);
    if by_hand.is_empty() {
        return Ok(actions);
    }
    by_hand.extend(actions.iter().map(|action| action.command().to_string()));
    Err(by_hand)
}

/// Returns the actions that xtask can do itself, in order.
fn actions(host: &Host) -> Vec<Action> {
    let debian_compiler = host.apt && host.toolchain.is_none();
    let debian_linker = host.apt && !matches!(host.toolchain, Some(EbpfToolchain::Nightly(_)));
    let mut packages = Vec::new();
    if debian_compiler && !host.compiler {
        packages.extend(COMPILER);
    }
    if debian_linker && !host.linker {
        packages.extend(LINKER);
    }
    if host.apt {
        packages.extend(host.missing.iter().map(|tool| tool.package));
    }
    // Two programs of one package are next to each other in TOOLS.
    packages.dedup();

    let mut actions = Vec::new();
    if host.systemd && packages.contains(&NGINX) {
        actions.push(Action::MaskNginx);
    }
    if !packages.is_empty() {
        actions.push(Action::Packages(packages));
    }
    if debian_compiler {
        actions.push(Action::Link);
    }
    if !host.linker {
        actions.push(Action::Linker(debian_linker));
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debian() -> Host {
        Host {
            toolchain: Some(EbpfToolchain::Linked("/usr".into())),
            rustup: true,
            compiler: true,
            linker: true,
            missing: Vec::new(),
            apt: true,
            systemd: false,
        }
    }

    #[test]
    fn complete_machine_needs_no_action() {
        assert_eq!(plan(&debian()), Ok(Vec::new()));
        let nightly = Some(EbpfToolchain::Nightly("/n".into()));
        assert_eq!(
            plan(&Host {
                toolchain: nightly,
                apt: false,
                ..debian()
            }),
            Ok(Vec::new())
        );
    }

    #[test]
    fn bare_debian_needs_all_actions_in_order() {
        let host = Host {
            toolchain: None,
            compiler: false,
            linker: false,
            missing: TOOLS.to_vec(),
            systemd: true,
            ..debian()
        };
        let actions = plan(&host).unwrap();
        let [
            Action::MaskNginx,
            Action::Packages(packages),
            Action::Link,
            Action::Linker(true),
        ] = actions.as_slice()
        else {
            panic!("{actions:?}");
        };
        assert!(packages.starts_with(&COMPILER));
        assert_eq!(packages.iter().filter(|name| **name == "iproute2").count(), 1);
        assert_eq!(actions[2].command().to_string(), "rustup toolchain link ebpf /usr");
    }

    #[test]
    fn compiler_that_rustup_lacks_is_only_linked() {
        assert_eq!(
            plan(&Host {
                toolchain: None,
                ..debian()
            }),
            Ok(vec![Action::Link])
        );
    }

    #[test]
    fn linker_for_nightly_is_built_with_its_own_llvm() {
        let host = Host {
            toolchain: Some(EbpfToolchain::Nightly("/n".into())),
            linker: false,
            ..debian()
        };
        assert_eq!(plan(&host), Ok(vec![Action::Linker(false)]));
    }

    #[test]
    fn machine_without_apt_gets_instructions() {
        let host = Host {
            toolchain: None,
            compiler: false,
            linker: false,
            missing: vec![TOOLS[4]],
            apt: false,
            ..debian()
        };
        let instructions = plan(&host).unwrap_err();
        assert_eq!(
            instructions,
            [
                "rustup toolchain install nightly --component rust-src",
                "install these programs: bpftool",
                "cargo install bpf-linker --locked --force",
            ]
        );
        let instructions = plan(&Host {
            toolchain: None,
            rustup: false,
            ..debian()
        })
        .unwrap_err();
        assert_eq!(
            instructions,
            [
                "rustup is missing: see https://rustup.rs",
                "rustup toolchain link ebpf /usr"
            ]
        );
    }
}
