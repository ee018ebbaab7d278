//! The command line.

mod affinity;
mod capacity;
mod config;
mod conntrack;
mod devices;
mod explain;
mod list;
mod output;
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

use crate::config::Config;
use crate::loader::{self, PinPath};
use crate::maps::bpf::PinnedMaps;
use crate::source::Source;
use crate::source::connect::ApiServerSettings;

/// Kubernetes Services in eBPF, with any CNI.
#[derive(Debug, Parser)]
#[command(name = "lb-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: watch Services and endpoints, and keep the eBPF maps up to date
    Run(Box<run::RunArgs>),
    /// Show attached programs, map usage, drops and problems
    Status(ReadArgs),
    /// Show service ports, and whether they are written: pending, done or error; also those that found no room in a map
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Show backends
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Show sockets translated to a backend, and their state in the kernel
    #[command(subcommand)]
    Socket(SocketCommand),
    /// Show clients of services with session affinity, and their backends
    #[command(subcommand)]
    Affinity(AffinityCommand),
    /// Show translated flows of packets: frontend, backend and state
    #[command(subcommand)]
    Conntrack(ConntrackCommand),
    /// Explain how a connection or packet would be handled, and why
    Explain(explain::ExplainArgs),
    /// Print connects, sends, new flows, refusals and destroyed sockets as they happen
    Trace(trace::TraceArgs),
    /// Compare the maps with the source; print the differences and exit 1 if there are any
    Verify(verify::VerifyArgs),
    /// Detach every program and remove every pin
    Cleanup(PinArgs),
}

/// Defines the subcommand `list` of each kind of rows, with a help text of its own.
macro_rules! list_commands {
    ($($name:ident: $help:tt,)*) => {$(
        #[derive(Debug, Subcommand)]
        enum $name {
            #[doc = $help]
            List(ReadArgs),
        }
    )*};
}

list_commands! {
    ServiceCommand: "List service ports",
    BackendCommand: "List backends",
    SocketCommand: "List sockets translated to a backend",
    AffinityCommand: "List clients of services with session affinity",
    ConntrackCommand: "List translated flows of packets",
}

#[derive(Debug, Args)]
struct PinArgs {
    /// Directory on a BPF file system for all pins
    #[arg(long, value_name = "PATH", default_value = "/sys/fs/bpf/lb")]
    pin_path: PathBuf,
}

impl PinArgs {
    fn pins(&self) -> PinPath {
        PinPath::new(&self.pin_path)
    }

    /// Opens the pinned maps for reading.
    fn open(&self) -> anyhow::Result<PinnedMaps> {
        let pins = self.pins();
        anyhow::ensure!(
            pins.maps().exists(),
            "no maps of this version are pinned below {}: was `lb-agent run` started with this --pin-path?",
            pins.root().display()
        );
        Ok(PinnedMaps::open(&pins.maps())?)
    }
}

#[derive(Debug, Args)]
struct ReadArgs {
    #[command(flatten)]
    pin: PinArgs,
    /// Output format: a table, or JSON
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// The source of Services and endpoints.
#[derive(Debug, Clone, Args)]
struct SourceArgs {
    /// Files or directories of Service, EndpointSlice and Node manifests (YAML or JSON), instead of an API server
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with_all = ["kubeconfig", "kube_apiserver"])]
    manifests: Vec<PathBuf>,
    /// Address of the API server, and credentials [default: the service account of the pod]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// URLs of the API servers, tried in turn; must be direct addresses, not a Service IP [default: the URL in the
    /// kubeconfig, or in the environment of the pod]
    #[arg(long, value_name = "URL,...", value_delimiter = ',', value_parser = server)]
    kube_apiserver: Vec<Uri>,
    /// Name of this node, as used in EndpointSlices [default: the host name; for `verify` the name that the last agent had]
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Source networks inside the cluster, in addition to this node's addresses: for clients there, external addresses
    /// have traffic policy Cluster [default: the podCIDRs of this node's Node object]
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',')]
    cluster_cidr: Vec<IpNet>,
}

/// Parses the URL of a server, without a path.
fn server(text: &str) -> Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|error| format!("not a URL: {error}"))?;
    match (uri.scheme_str(), uri.host(), uri.path()) {
        (Some("https" | "http"), Some(_), "/" | "") => Ok(uri),
        _ => Err("not of the form https://HOST:PORT".to_owned()),
    }
}

impl SourceArgs {
    /// Opens the source. Must be called in a Tokio runtime.
    async fn open(&self) -> anyhow::Result<Source> {
        if !self.manifests.is_empty() {
            return Ok(Source::manifests(&self.manifests));
        }
        let settings = ApiServerSettings {
            kubeconfig: self.kubeconfig.clone(),
            servers: self.kube_apiserver.clone(),
        };
        Ok(Source::kubernetes(&settings).await?)
    }

    /// Takes values from the configuration file for flags that are not set.
    fn complete(&mut self, config: &Config) {
        self.node_name = self.node_name.take().or_else(|| config.node_name.clone());
        self.kubeconfig = self.kubeconfig.take().or_else(|| config.kubeconfig.clone());
    }

    /// Returns the networks inside the cluster, in addition to this node's addresses and its pods.
    fn inside<'a>(&'a self, config: Option<&'a Config>) -> &'a [IpNet] {
        match config {
            Some(config) if self.cluster_cidr.is_empty() => config.detect_local.inside(),
            _ => &self.cluster_cidr,
        }
    }

    /// Returns the name of this node.
    fn node(&self) -> anyhow::Result<String> {
        if let Some(name) = &self.node_name {
            return Ok(name.clone());
        }
        let name = nix::unistd::gethostname()?;
        // As in kubelet: node names are in lower case.
        Ok(name.to_string_lossy().trim().to_lowercase())
    }
}

/// Runs the program, and returns its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(*args).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => status::status(&args).map(|()| ExitCode::SUCCESS),
        Command::Service(ServiceCommand::List(args)) => list::services(&args).map(|()| ExitCode::SUCCESS),
        Command::Backend(BackendCommand::List(args)) => list::backends(&args).map(|()| ExitCode::SUCCESS),
        Command::Socket(SocketCommand::List(args)) => sockets::list(&args).map(|()| ExitCode::SUCCESS),
        Command::Affinity(AffinityCommand::List(args)) => affinity::list(&args).map(|()| ExitCode::SUCCESS),
        Command::Conntrack(ConntrackCommand::List(args)) => conntrack::list(&args).map(|()| ExitCode::SUCCESS),
        Command::Explain(args) => explain::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Trace(args) => trace::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::verify(args),
        Command::Cleanup(args) => cleanup(&args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        if output::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        output::warn(&format!("error: {}", output::chain(&error)));
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
                "an agent is running on {}: stop it first, since it cannot work without its maps",
                path.display()
            )
        }
        Err(error) => return Err(error.into()),
    };
    output::print(&format!("{what} {}", pins.root().display()))
}
