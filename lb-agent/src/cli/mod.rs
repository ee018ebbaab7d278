//! The command line.

mod affinity;
mod config;
mod conntrack;
mod devices;
mod explain;
mod list;
mod output;
mod packets;
mod process;
mod run;
mod sockets;
mod status;
mod trace;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use http::Uri;
use ipnet::IpNet;
use lb_common::abi::capacity;

use crate::config::Config;
use crate::loader::{self, PinPath};
use crate::maps::bpf::PinnedMaps;
use crate::source::Source;
use crate::source::connect::Settings;
use lb_core::maps::Capacities;

/// Kubernetes Services in eBPF, beside any CNI.
#[derive(Debug, Parser)]
#[command(name = "lb-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: read Services and endpoints, and keep the kernel's maps as they say
    Run(Box<run::RunArgs>),
    /// What is attached, how full the maps are, what could not be used
    Status(ReadArgs),
    /// Service ports, and whether they are written: pending, done or error
    #[command(subcommand)]
    Service(List),
    /// Backends
    #[command(subcommand)]
    Backend(List),
    /// Sockets that were given a backend of a service, and what the kernel has of them
    #[command(subcommand)]
    Socket(List),
    /// Clients of services with session affinity, and the backends that they keep
    #[command(subcommand)]
    Affinity(List),
    /// Flows of packets that were translated: what was asked for, what serves it
    #[command(subcommand)]
    Conntrack(List),
    /// What connect() would do, or becomes of a packet from outside, and why
    Explain(explain::ExplainArgs),
    /// Connects, sends, flows of packets, refusals and destroyed sockets, as they happen
    Trace(trace::TraceArgs),
    /// Compare the maps with what the source says, afresh; exit 1 and a diff where they differ
    Verify(verify::VerifyArgs),
    /// Detach every program and remove every pin
    Cleanup(PinArgs),
}

#[derive(Debug, Subcommand)]
enum List {
    /// List them
    List(ReadArgs),
}

#[derive(Debug, Args)]
struct PinArgs {
    /// Folder on a BPF file system that everything is pinned below
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/lb")]
    pin_path: PathBuf,
}

impl PinArgs {
    fn pins(&self) -> PinPath {
        PinPath::new(&self.pin_path)
    }

    /// The pinned maps, for reading.
    fn open(&self) -> anyhow::Result<PinnedMaps> {
        let pins = self.pins();
        anyhow::ensure!(
            pins.maps().exists(),
            "nothing is pinned below {} by this version: has `lb-agent run` been started with this --pin-path?",
            pins.root().display()
        );
        Ok(PinnedMaps::open(&pins.maps())?)
    }
}

#[derive(Debug, Args)]
struct ReadArgs {
    #[command(flatten)]
    pin: PinArgs,
    /// A table for people, or JSON for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// Where Services and endpoints come from.
#[derive(Debug, Args)]
struct SourceArgs {
    /// Files or folders of Service, EndpointSlice and Node manifests, YAML or JSON, in place of Kubernetes
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with_all = ["kubeconfig", "kube_apiserver"])]
    manifests: Vec<PathBuf>,
    /// How to reach the API server, and as whom [default: the service account of the pod]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// URLs of the API servers, which are tried in turn: addresses of their own, not that of a Service [default: the one
    /// in the kubeconfig, or in the environment of the pod]
    #[arg(long, value_name = "URL,...", value_delimiter = ',', value_parser = server)]
    kube_apiserver: Vec<Uri>,
    /// Name of this node, as endpoints name it [default: the host name]
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Sources of packets that are inside the cluster, besides this node's addresses: for them, external addresses have
    /// policy Cluster [default: the podCIDRs of this node's Node]
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',')]
    cluster_cidr: Vec<IpNet>,
}

/// The URL of a server, without a path.
fn server(text: &str) -> Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|error| format!("not a URL: {error}"))?;
    match (uri.scheme_str(), uri.host(), uri.path()) {
        (Some("https" | "http"), Some(_), "/" | "") => Ok(uri),
        _ => Err("not of the form https://HOST:PORT".to_owned()),
    }
}

impl SourceArgs {
    /// To be called in a Tokio runtime.
    async fn open(&self) -> anyhow::Result<Source> {
        if !self.manifests.is_empty() {
            return Ok(Source::manifests(&self.manifests));
        }
        let settings = Settings {
            kubeconfig: self.kubeconfig.clone(),
            servers: self.kube_apiserver.clone(),
        };
        Ok(Source::kubernetes(&settings).await?)
    }

    /// Takes from a file what no flag says.
    fn complete(&mut self, config: &Config) {
        self.node_name = self.node_name.take().or_else(|| config.node_name.clone());
        self.kubeconfig = self.kubeconfig.take().or_else(|| config.kubeconfig.clone());
    }

    /// Networks that are inside the cluster, besides this node's addresses and its pods.
    fn inside<'a>(&'a self, config: Option<&'a Config>) -> &'a [IpNet] {
        match config {
            Some(config) if self.cluster_cidr.is_empty() => config.detect_local.inside(),
            _ => &self.cluster_cidr,
        }
    }

    fn node(&self) -> anyhow::Result<String> {
        if let Some(name) = &self.node_name {
            return Ok(name.clone());
        }
        let name = nix::unistd::gethostname()?;
        // As kubelet does: node names are in lower case.
        Ok(name.to_string_lossy().trim().to_lowercase())
    }
}

/// Sizes of maps. A map that is pinned keeps its size.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Capacities")]
struct CapacityArgs {
    /// Service ports (per family)
    #[arg(long, value_name = "N", default_value_t = capacity::SERVICES, value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    max_services: u32,
    /// Addresses and ports that lead to services, and one per service address
    #[arg(long, value_name = "N", default_value_t = capacity::FRONTENDS, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
    max_frontends: u32,
    /// Backends, over all service ports
    #[arg(long, value_name = "N", default_value_t = capacity::BACKENDS, value_parser = clap::value_parser!(u32).range(2..=1 << 26))]
    max_backends: u32,
    /// Slots of backend sets: per set, the number of its endpoints
    #[arg(long, value_name = "N", default_value_t = capacity::BACKEND_SLOTS, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
    max_backend_slots: u32,
    /// Socket records in the direct-mapped array; rounded up to a power of two
    #[arg(long, value_name = "N", default_value_t = capacity::SOCKETS, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_sockets: u32,
    /// Socket records beyond those
    #[arg(long, value_name = "N", default_value_t = capacity::SOCKETS_MORE, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_sockets_more: u32,
    /// Unconnected UDP sockets that talk to services
    #[arg(long, value_name = "N", default_value_t = capacity::UDP_FLOWS, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_udp_flows: u32,
    /// Clients of services with session affinity; beyond that the least recently seen are forgotten
    #[arg(long, value_name = "N", default_value_t = capacity::AFFINITY, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_affinity: u32,
    /// Directions of flows of packets that were answered: two for each flow. Beyond that new flows are refused
    #[arg(long, value_name = "N", default_value_t = capacity::CT, value_parser = clap::value_parser!(u32).range(2..=1 << 26))]
    max_conntrack: u32,
    /// The same of flows without an answer; beyond that the least recently used are forgotten
    #[arg(long, value_name = "N", default_value_t = capacity::CT_NEW, value_parser = clap::value_parser!(u32).range(2..=1 << 26))]
    max_conntrack_new: u32,
}

impl From<CapacityArgs> for Capacities {
    fn from(args: CapacityArgs) -> Self {
        let CapacityArgs {
            max_services,
            max_frontends,
            max_backends,
            max_backend_slots,
            max_sockets,
            max_sockets_more,
            max_udp_flows,
            max_affinity,
            max_conntrack,
            max_conntrack_new,
        } = args;
        Self {
            services: max_services,
            frontends: max_frontends,
            backends: max_backends,
            backend_slots: max_backend_slots,
            sockets: max_sockets.next_power_of_two(),
            sockets_more: max_sockets_more,
            udp_flows: max_udp_flows,
            affinity: max_affinity,
            conntrack: max_conntrack,
            conntrack_new: max_conntrack_new,
        }
    }
}

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(*args).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => status::status(&args).map(|()| ExitCode::SUCCESS),
        Command::Service(List::List(args)) => list::services(&args).map(|()| ExitCode::SUCCESS),
        Command::Backend(List::List(args)) => list::backends(&args).map(|()| ExitCode::SUCCESS),
        Command::Socket(List::List(args)) => sockets::list(&args).map(|()| ExitCode::SUCCESS),
        Command::Affinity(List::List(args)) => affinity::list(&args).map(|()| ExitCode::SUCCESS),
        Command::Conntrack(List::List(args)) => conntrack::list(&args).map(|()| ExitCode::SUCCESS),
        Command::Explain(args) => explain::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Trace(args) => trace::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::verify(args),
        Command::Cleanup(args) => cleanup(&args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        if output::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        output::complain(&format!("error: {}", output::chain(&error)));
        ExitCode::FAILURE
    })
}

fn cleanup(args: &PinArgs) -> anyhow::Result<()> {
    let pins = args.pins();
    let what = match loader::cleanup(&pins) {
        Ok(true) => "detached all programs and removed all pins below",
        Ok(false) => "nothing is pinned below",
        Err(loader::LoadError::Locked(path)) => {
            anyhow::bail!(
                "an agent is running on {}: stop it first, or it would go on without its maps",
                path.display()
            )
        }
        Err(error) => return Err(error.into()),
    };
    output::say(&format!("{what} {}", pins.root().display()))
}
