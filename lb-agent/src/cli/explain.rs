//! `explain`: how `connect()` or a packet from outside would be handled, and why.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use anyhow::Context as _;
use clap::Args;
use lb_common::abi::{Addr, State, ip_protocol, program_name};
use lb_common::logic::frontend::Destination;
use serde::Serialize;

use super::process::{self, Below};
use super::{Format, ReadArgs, output};
use crate::clock::monotonic_ns;
use crate::loader;
use crate::maps::bpf::PinnedMaps;
use crate::maps::ct::CtMaps;
use lb_core::explain::{ConnectingSocket, Explanation, Snapshot, explain, explain_packet};
use lb_core::places::Places;

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// Client: a process id (also of a process in a pod), or an address (of this node, or of an outside client)
    #[arg(long, value_name = "PID|ADDR")]
    from: From,
    /// Destination: address, port and protocol [default protocol: tcp]
    #[arg(long, value_name = "ADDR:PORT[/tcp|udp]")]
    to: To,
    #[command(flatten)]
    read: ReadArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Process(u32),
    Address(IpAddr),
}

impl FromStr for From {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let process = text.parse().map(Self::Process);
        process
            .or_else(|_| text.parse().map(Self::Address))
            .map_err(|_| "neither a process id nor an address")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct To {
    at: SocketAddr,
    /// IANA number.
    proto: u8,
}

impl FromStr for To {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (at, proto) = text.split_once('/').unwrap_or((text, "tcp"));
        let proto = match proto.to_ascii_lowercase().as_str() {
            "tcp" => ip_protocol::TCP,
            "udp" => ip_protocol::UDP,
            _ => return Err("the protocol is tcp or udp"),
        };
        let at = at.parse().map_err(|_| "not ADDR:PORT (IPv6: [ADDR]:PORT)")?;
        Ok(Self { at, proto })
    }
}

impl To {
    /// Returns the destination as the programs see it; an IPv4 address may be written v4-mapped.
    fn destination(self) -> Destination {
        Destination {
            addr: Addr::from(self.at.ip()).into(),
            port: self.at.port(),
            proto: self.proto,
        }
    }

    /// Returns the hook that handles a connect to the destination.
    fn hook(self) -> &'static str {
        if self.at.is_ipv4() {
            program_name::CONNECT4
        } else {
            program_name::CONNECT6
        }
    }
}

/// The client that connects.
#[derive(Debug, Serialize)]
struct Client {
    /// A description for people.
    name: String,
    pid: Option<u32>,
    /// Cookie of the network namespace; `None` for a client outside.
    netns: Option<u64>,
    /// Whether it is in the node's network namespace.
    on_node: bool,
    /// Whether it is below the served cgroup; `None` if that is not visible.
    below_cgroup: Option<bool>,
}

/// The explanation of a connection by a client, as JSON has it.
#[derive(Debug, Serialize)]
struct ClientExplanation {
    client: Client,
    #[serde(flatten)]
    explanation: Explanation,
}

pub(super) fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let maps = args.read.pin.open()?;
    let state = maps
        .state()
        .context("no agent has run here yet, so the node's network namespace is unknown")?;
    let attached = loader::attached(&args.read.pin.pins())?;
    let hook = args.to.hook();
    let cgroup = attached
        .into_iter()
        .find(|(name, _)| *name == hook)
        .and_then(|(_, at)| at)
        .map_or(0, |at| at.cgroup);
    let explained = explain_for_client(args, &maps, &state, cgroup)?;
    match args.read.output {
        Format::Json => output::json(&explained),
        Format::Table => {
            output::print(&format!("from       {}", explained.client.name))?;
            output::print_lines(&explained.explanation.to_string())
        }
    }
}

/// Explains a connection. `cgroup` is the id of the cgroup that the hook is attached to; zero if it is not attached.
fn explain_for_client(
    args: &ExplainArgs,
    maps: &PinnedMaps,
    state: &State,
    cgroup: u64,
) -> anyhow::Result<ClientExplanation> {
    let to = args.to.destination();
    let mut snapshot = snapshot(maps, state)?;
    let client = client(args.from, &snapshot, state, cgroup)?;
    let mut flows = CtMaps::open(&args.read.pin.pins().maps())?;
    snapshot.flows = flows.unreplied.all()?;
    snapshot.flows.extend(flows.established.all()?);
    if let (From::Address(ip), None) = (args.from, client.netns) {
        let mut explanation = explain_packet(&snapshot, ip, to);
        if explanation.source.as_ref().is_some_and(|source| source.here) {
            let note = "connections of a pod of this node are translated at its sockets, unless it has a proxy or a kernel \
                        of its own: pass the id of one of its processes as --from";
            explanation.notes.push(note.into());
        }
        return Ok(ClientExplanation { client, explanation });
    }
    let explanation = if cgroup == 0 {
        Explanation::untouched(to, format!("the program {} is not attached", args.to.hook()))
    } else if client.below_cgroup == Some(false) {
        Explanation::untouched(to, format!("the process is not below the served cgroup (id {cgroup})"))
    } else {
        let socket = ConnectingSocket {
            netns: client.netns.unwrap_or_default(),
            on_node: client.on_node,
            node_only: state.node_only != 0,
        };
        let mut explanation = explain(&snapshot, socket, to);
        if client.below_cgroup.is_none() {
            explanation.notes.push(format!(
                "whether the process is below the served cgroup (id {cgroup}) is not visible from this cgroup \
                 namespace; if it is not, the destination is not translated"
            ));
        }
        explanation
    };
    let source = match args.from {
        From::Process(pid) => process::source(pid, Addr::from(to.addr.or_loopback()).into()),
        From::Address(ip) => Some(ip.to_canonical()),
    };
    let explanation = explanation.with_packets(&snapshot, source, to);
    Ok(ClientExplanation { client, explanation })
}

fn snapshot(maps: &PinnedMaps, state: &State) -> anyhow::Result<Snapshot> {
    Ok(Snapshot {
        affinity: maps.affinity()?,
        dump: maps.dump()?,
        flows: Vec::new(),
        places: Places::of(&maps.problems()?),
        unlisted_problems: state.more_problems,
        now: monotonic_ns(),
    })
}

fn client(from: From, maps: &Snapshot, state: &State, cgroup: u64) -> anyhow::Result<Client> {
    let namespace = |on_node| if on_node { "the node's" } else { "not the node's" };
    match from {
        From::Process(pid) => {
            let netns = process::netns_cookie(pid)?;
            let on_node = netns == state.netns;
            let below = process::is_below(pid, cgroup)?;
            Ok(Client {
                name: format!(
                    "process {pid} ({}), network namespace {netns} ({})",
                    process::command(pid),
                    namespace(on_node)
                ),
                pid: Some(pid),
                netns: Some(netns),
                on_node,
                below_cgroup: match below {
                    Below::Yes => Some(true),
                    Below::No => Some(false),
                    Below::Unknown => None,
                },
            })
        }
        From::Address(ip) if ip.is_loopback() || maps.dump.node_addrs.contains(&ip.into()) => Ok(Client {
            name: format!(
                "{ip}, this node: a process in network namespace {} below the cgroup",
                state.netns
            ),
            pid: None,
            netns: Some(state.netns),
            on_node: true,
            below_cgroup: Some(true),
        }),
        From::Address(ip) => Ok(Client {
            name: format!("{ip}, not an address of this node"),
            pid: None,
            netns: None,
            on_node: false,
            below_cgroup: None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_and_destination_are_parsed() {
        assert_eq!("17".parse(), Ok(From::Process(17)));
        assert_eq!("10.0.0.1".parse(), Ok(From::Address([10, 0, 0, 1].into())));
        assert!("eth0".parse::<From>().is_err());
        let to = |text: &str| text.parse::<To>().map(|to| (to.at.to_string(), to.proto));
        assert_eq!(to("10.96.0.10:53"), Ok(("10.96.0.10:53".into(), 6)));
        assert_eq!(to("[fd00::1]:53/UDP"), Ok(("[fd00::1]:53".into(), 17)));
        assert!(to("10.96.0.10").is_err());
        assert!(to("10.96.0.10:53/sctp").is_err());
    }
}
