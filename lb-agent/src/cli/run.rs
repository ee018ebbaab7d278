//! `run`: the arguments of the daemon.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::capacity::CapacityArgs;
use super::config::ConfigArgs;
use super::{PinArgs, SourceArgs};
use crate::config::Config;
use crate::daemon::{self, DaemonSettings};
use crate::ebpf_log;
use crate::loader::{EbpfLog, SocketLb};
use crate::node::addrs::{NodePortAddresses, Selection};
use crate::node::destroy::DestroySettings;
use crate::node::devices::Patterns;
use crate::node::ports::PortRange;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    pin: PinArgs,
    /// Cgroup (v2) whose processes get socket-level load balancing [default: the root of the cgroup2 mount]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Which processes get socket-level load balancing: all, or only those in the node's network namespace (for pods with
    /// a proxy or a kernel of their own between socket and node: Istio, Kata, gVisor, KubeVirt)
    #[arg(long, value_enum, default_value_t = SocketLbArg::All)]
    socket_lb: SocketLbArg,
    #[command(flatten)]
    node_ports: NodePortArgs,
    #[command(flatten)]
    packets: PacketArgs,
    /// Destroy TCP sockets of removed backends too, not only connected UDP sockets. A terminating backend keeps its
    /// sockets until its endpoint is removed. Needs CAP_NET_ADMIN and a kernel with CONFIG_INET_DIAG_DESTROY; for sockets
    /// of pods also CAP_SYS_PTRACE, CAP_SYS_ADMIN and the host's process namespace (hostPID). `status` shows which of
    /// these are missing; sockets out of reach are left alone
    #[arg(long)]
    destroy_tcp: bool,
    /// Milliseconds after which a socket record may be swept, and between two sweeps; for tests
    #[arg(long, value_name = "MS", default_value_t = 60_000, hide = true)]
    sweep_age: u64,
    /// Log format on standard error; RUST_LOG sets the level
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Log lines of the eBPF programs, with the target lb_ebpf: `warn` for refused or dropped calls and packets, `debug` for
    /// every decision about a Service. With `off` the programs contain no code for it
    #[arg(long, value_enum, value_name = "LEVEL", default_value_t = EbpfLogArg::Off)]
    ebpf_log: EbpfLogArg,
    /// Load this eBPF object instead of the embedded one; for developers
    #[arg(long, value_name = "FILE", hide = true)]
    ebpf_object: Option<PathBuf>,
    // Last, because its heading applies to all arguments after it.
    #[command(flatten)]
    capacities: CapacityArgs,
}

/// The devices and addresses that serve node ports.
#[derive(Debug, Args)]
struct NodePortArgs {
    /// Devices that serve packets, and whose addresses serve node ports; `*` and `?` match any characters, and devices
    /// that are added later are included [default: packets on all but loopback, dummies, and ports of bridges and bonds;
    /// node ports at the addresses of all devices]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    devices: Vec<String>,
    /// Node addresses that serve node ports: those in these networks (families with no CIDR listed use all addresses), or
    /// `primary`: the first address of each family in this node's Node object, or without a Node object the addresses of
    /// the devices with a default route. The node's own sockets can always use loopback [default: all]
    #[arg(long, value_name = "CIDR,...|primary")]
    nodeport_addresses: Option<NodePortAddresses>,
}

impl NodePortArgs {
    fn selection(self) -> Selection {
        let Self {
            devices,
            nodeport_addresses,
        } = self;
        Selection {
            devices: Patterns::new(&devices),
            wanted: nodeport_addresses.unwrap_or_default(),
        }
    }
}

/// How packets are served at devices.
#[derive(Debug, Args)]
struct PacketArgs {
    /// Source ports for packets sent to other nodes; reserved on this node by net.ipv4.ip_local_reserved_ports
    #[arg(long, value_name = "FIRST-LAST", default_value_t = PortRange::default())]
    snat_ports: PortRange,
    /// Attach to devices by clsact, as before Linux 6.6; for tests
    #[arg(long, hide = true)]
    no_tcx: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SocketLbArg {
    All,
    Node,
}

impl From<SocketLbArg> for SocketLb {
    fn from(arg: SocketLbArg) -> Self {
        match arg {
            SocketLbArg::All => Self::All,
            SocketLbArg::Node => Self::Node,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EbpfLogArg {
    Off,
    Warn,
    Debug,
}

impl From<EbpfLogArg> for EbpfLog {
    fn from(arg: EbpfLogArg) -> Self {
        match arg {
            EbpfLogArg::Off => Self::Off,
            EbpfLogArg::Warn => Self::Warn,
            EbpfLogArg::Debug => Self::Debug,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

pub(super) fn run(mut args: RunArgs) -> anyhow::Result<()> {
    start_log(args.log_format, args.ebpf_log)?;
    let config = args.config.read()?;
    if let Some(config) = &config {
        args.complete(config);
    }
    let source = args.source.clone();
    let settings = args.into_settings(config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(daemon::serve(settings, source.open()))
}

fn start_log(format: LogFormat, programs: EbpfLogArg) -> anyhow::Result<()> {
    let mut filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    if programs != EbpfLogArg::Off {
        filter = filter.add_directive(
            ebpf_log::DIRECTIVE
                .parse()
                .context("parsing the filter of the programs' log")?,
        );
    }
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

impl RunArgs {
    /// Takes values from the configuration file for flags that are not set.
    fn complete(&mut self, config: &Config) {
        self.source.complete(config);
        let addresses = &mut self.node_ports.nodeport_addresses;
        *addresses = addresses.take().or_else(|| config.node_port_addresses.clone());
    }

    fn into_settings(self, config: Option<Config>) -> anyhow::Result<DaemonSettings> {
        Ok(DaemonSettings {
            node: self.source.node()?,
            pins: self.pin.pins(),
            cgroup: self.cgroup,
            socket_lb: self.socket_lb.into(),
            ebpf_log: self.ebpf_log.into(),
            object: self.ebpf_object,
            maps: self.capacities.0,
            inside: self.source.inside(config.as_ref()).to_vec(),
            servers: self.config.servers(config.as_ref().unwrap_or(&Config::default())),
            selection: self.node_ports.selection(),
            packets: daemon::PacketSettings {
                snat_ports: self.packets.snat_ports,
                tcx: !self.packets.no_tcx,
            },
            sockets: DestroySettings {
                tcp: self.destroy_tcp,
                sweep: Duration::from_millis(self.sweep_age),
            },
            config,
        })
    }
}
