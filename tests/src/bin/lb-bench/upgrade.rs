//! `upgrade`: starts of the agent that replace maps with many entries while clients connect. The maps are those of an agent of an
//! earlier commit, with another layout, or maps of this build that get another size.

mod entries;

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use comfy_table::Table;
use lb_agent::loader::PinPath;
use lb_common::abi::{SizedMap, VERSION};
use lb_tests::fixture::endpoints_of;
use lb_tests::load::Record;
use lb_tests::manifests::{self, Manifests};
use lb_tests::{Agent, Cluster, Connect, Load, Netns, Pod, Process, monotonic_ns, scaled_timeout, testbed};
use serde::Serialize;

use self::entries::Entries;
use crate::numbers::median;
use crate::process;
use crate::report::{self, Machine, Reporting, table};
use crate::sizes::progress;

const NODE: &str = "n1";
const BACKEND_PORT: u16 = 8080;
const NODE_PORT: u16 = 30080;
/// Last part of the address of the Service.
const ADDRESS: u8 = 20;

/// Time limit for a start.
const PATIENCE: Duration = Duration::from_secs(90);
/// Time between two readings of the agent's log, which is the resolution of the time until it serves.
const PAUSE: Duration = Duration::from_millis(1);
/// Time for which clients connect before the start.
const BEFORE: Duration = Duration::from_secs(2);
/// Connections per second of each client.
const RATE: f64 = 200.0;
/// Time limit for a client in seconds, and for one connection. A SYN that is lost is sent again after one second.
const LONGEST_RUN: f64 = 600.0;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Milliseconds after which an agent would remove the records, which have no sockets.
const SWEEP_AGE: &str = "600000";

/// Part of the line of the agent's log when its programs are attached and its maps are filled.
const SERVING: &str = ": serving ";
/// Lines of the agent's log about the two parts of a move, see `loader/moves`.
const PREPARED: &str = "attached programs that use the old and the new maps";
const COPIED: &str = "copied the entries of the old maps";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Program `lb-agent` of an earlier commit with layout 3
    #[arg(long, env = "LB_EARLIER_AGENT", value_name = "FILE")]
    earlier: PathBuf,
    /// Conntrack entries of established flows, two per flow
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    conntrack: u32,
    /// Socket records
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=250_000))]
    sockets: u32,
    /// Repetitions of each measurement
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repetitions: u32,
    #[command(flatten)]
    reporting: Reporting,
}

/// Change of the maps by the measured start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    /// From the layout of the earlier agent.
    Layout,
    /// To twice the size.
    Size,
}

impl Change {
    const ALL: [Self; 2] = [Self::Layout, Self::Size];

    fn label(self) -> String {
        match self {
            Self::Layout => format!("layout 3 to {VERSION}"),
            Self::Size => "twice the size".to_owned(),
        }
    }
}

/// Numbers of entries in the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Numbers {
    conntrack: u32,
    sockets: u32,
}

/// One start. Times are in seconds, memory is in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
struct Measured {
    change: Change,
    #[serde(flatten)]
    numbers: Numbers,
    /// From the start of the process until it serves.
    serving: f64,
    /// Part of that: until programs are attached that use the old and the new maps.
    prepare: f64,
    /// Part of that: copying the entries.
    copy: f64,
    /// Peak resident memory, including BPF maps that the process has mapped.
    peak: u64,
    /// Longest connection before the start.
    longest_before: f64,
    /// Longest connection from the start until the agent serves.
    longest_during: f64,
}

/// Report, as the JSON file contains it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    starts: Vec<Measured>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let machine = Machine::this()?;
    let all = Numbers {
        conntrack: options.conntrack,
        sockets: options.sockets,
    };
    let numbers = [
        Numbers {
            conntrack: 0,
            sockets: 0,
        },
        all,
    ];
    let bed = TestBed::new(&options.earlier, all)?;
    let bar = progress("starts".to_owned())?;
    bar.set_length(u64::from(options.repetitions) * (Change::ALL.len() * numbers.len()) as u64);
    let mut starts = Vec::new();
    for _ in 0..options.repetitions {
        for change in Change::ALL {
            for numbers in numbers {
                bar.set_message(change.label());
                let measured = bed.measure(change, numbers);
                starts.push(measured.with_context(|| format!("{}, {numbers:?}", change.label()))?);
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    report::print([("starts that replace maps", start_table(&starts, &numbers))])?;
    options.reporting.write("upgrade.json", &Report { machine, starts })?;
    Ok(ExitCode::SUCCESS)
}

/// Sizes of maps.
type Sizes = [(SizedMap, u32); 5];

/// Returns sizes that have room for the entries, and that neither agent changes by itself.
fn sizes(all: Numbers) -> Sizes {
    let room = |entries: u32| (2 * entries).next_power_of_two().max(1 << 16);
    let conntrack = room(all.conntrack);
    [
        (SizedMap::Conntrack, conntrack),
        (SizedMap::ConntrackNew, conntrack / 2),
        (SizedMap::Sockets, SizedMap::Sockets.default_capacity()),
        (SizedMap::SocketsMore, room(all.sockets)),
        (SizedMap::UdpFlows, 1 << 16),
    ]
}

/// Returns twice the sizes of the maps with entries.
fn doubled(sizes: Sizes) -> Sizes {
    sizes.map(|(map, size)| (map, if map == SizedMap::UdpFlows { size } else { 2 * size }))
}

/// Returns the flag for the size of a map; before maps sized themselves it was the only one.
fn size_flag(map: SizedMap) -> String {
    format!("--{}", map.flag())
}

/// Returns the hidden flag for the smallest size of a map.
fn floor_flag(map: SizedMap) -> String {
    size_flag(map).replace("max-", "min-")
}

/// Returns the flags of an agent with these sizes.
fn flags(sizes: &Sizes, flag: fn(SizedMap) -> String) -> Vec<String> {
    let sizes = sizes.iter().flat_map(|(map, size)| [flag(*map), size.to_string()]);
    sizes.chain(["--sweep-age", SWEEP_AGE].map(str::to_owned)).collect()
}

/// A node with a Service, its server, and clients in a pod and outside.
struct TestBed {
    earlier: Agent,
    present: Agent,
    sizes: Sizes,
    client: Pod,
    _server: Process,
    /// Last field, so that the cluster is dropped after everything in it.
    cluster: Cluster,
}

impl TestBed {
    fn new(earlier: &Path, all: Numbers) -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).client(true).build()?;
        let (client, server) = (cluster.add_pod(NODE, "client")?, cluster.add_pod(NODE, "server")?);
        let serving = testbed().serve(&server, &[&format!("[::]:{BACKEND_PORT}=server")])?;
        let manifests = Manifests::new(&cluster)?;
        let node = cluster.node(NODE);
        let service = manifests::web("web", ADDRESS, NODE_PORT, &endpoints_of(&server), BACKEND_PORT);
        manifests.write("all.yaml", &(manifests::node(node) + &service))?;
        let agent = |program: &Path| Agent::new(&cluster, node, program, manifests.path());
        Ok(Self {
            earlier: agent(earlier),
            present: agent(&Agent::find()?),
            sizes: sizes(all),
            client,
            _server: serving,
            cluster,
        })
    }

    /// Fills the maps of an agent, and measures the start of the present agent over them.
    fn measure(&self, change: Change, numbers: Numbers) -> Result<Measured> {
        let maps = PinPath::new(self.present.pin_path()).maps();
        let (before, old_flags, old_maps) = match change {
            Change::Layout => {
                let maps = self.earlier.pin_path().join("v3/maps");
                (&self.earlier, flags(&self.sizes, size_flag), maps)
            }
            Change::Size => (&self.present, flags(&self.sizes, floor_flag), maps.clone()),
        };
        let mut process = start(before, &old_flags)?;
        before.wait_ready(&mut process)?;
        process.kill()?;
        let entries = Entries::new(numbers.conntrack, numbers.sockets);
        match change {
            Change::Layout => entries.write_as_layout_3(&old_maps)?,
            Change::Size => entries.write(&old_maps)?,
        }
        let new_sizes = match change {
            Change::Layout => self.sizes,
            Change::Size => doubled(self.sizes),
        };

        let clients_begun = monotonic_ns();
        let clients = [
            self.connect(&self.client, SocketAddr::new(manifests::vips(ADDRESS)[0], 80))?,
            self.connect(
                self.cluster.client(),
                SocketAddr::new(self.cluster.node(NODE).address().into(), NODE_PORT),
            )?,
        ];
        sleep(BEFORE);
        let log_begin = fs::metadata(self.present.log()).context("the agent's log")?.len();
        let begun = monotonic_ns();
        let mut process = start(&self.present, &flags(&new_sizes, floor_flag))?;
        let log = self.wait_until_serving(&mut process, log_begin)?;
        let serving = monotonic_ns();

        self.present.wait_ready(&mut process)?;
        self.present.check_layout(VERSION)?;
        self.present.check_problems()?;
        entries.check(&maps)?;
        self.check_status(numbers)?;
        let records: Vec<_> = clients.into_iter().map(Client::stop).collect::<Result<_>>()?;
        let records = records.concat();
        let peak = process::status_bytes_of(process.id(), "VmHWM")?;
        process.kill()?;
        self.present.output(&["cleanup"])?;
        Ok(Measured {
            change,
            numbers,
            serving: seconds(begun, serving),
            prepare: took(&log, PREPARED)?,
            copy: took(&log, COPIED)?,
            peak,
            longest_before: longest(&records, clients_begun, begun)?,
            longest_during: longest(&records, begun, serving)?,
        })
    }

    /// Starts a client that connects until it is stopped.
    fn connect(&self, from: &Netns, to: SocketAddr) -> Result<Client> {
        let log = self.cluster.scratch().join(format!("{}.connections", from.name()));
        let connect = Connect::to(&[to])
            .rate(RATE)
            .seconds(LONGEST_RUN)
            .timeout(scaled_timeout(CONNECT_TIMEOUT))
            .log(&log);
        let load = testbed().start(from, &connect)?;
        Ok(Client { load, log })
    }

    /// Waits until the present agent serves, and returns its log. The log of earlier processes ends at `from`.
    fn wait_until_serving(&self, process: &mut Process, from: u64) -> Result<String> {
        let deadline = Instant::now() + scaled_timeout(PATIENCE);
        loop {
            let log = read_from(self.present.log(), from)?;
            if log.contains(SERVING) {
                return Ok(log);
            }
            ensure!(
                process.is_running()? && Instant::now() < deadline,
                "lb-agent does not serve:\n{}",
                self.present.log_tail()
            );
            sleep(PAUSE);
        }
    }

    /// Fails if `status` counts fewer entries.
    fn check_status(&self, numbers: Numbers) -> Result<()> {
        let status = self.present.status()?;
        let used = |map: SizedMap| status.used(map.name());
        let conntrack = used(SizedMap::Conntrack)?;
        let sockets = used(SizedMap::Sockets)? + used(SizedMap::SocketsMore)?;
        // A flow has two entries.
        ensure!(
            conntrack >= u64::from(numbers.conntrack / 2 * 2) && sockets >= u64::from(numbers.sockets),
            "{conntrack} conntrack entries and {sockets} socket records of {numbers:?}"
        );
        Ok(())
    }
}

/// Starts an agent.
fn start(agent: &Agent, flags: &[String]) -> Result<Process> {
    agent.start(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A client that connects until it is stopped, and the log of its connections.
struct Client {
    load: Load,
    log: PathBuf,
}

impl Client {
    /// Stops the client, and returns its connections, which must all have succeeded.
    fn stop(self) -> Result<Vec<Record>> {
        self.load.stop()?.all_well()?;
        Record::read_log(&self.log)
    }
}

/// Returns the content of a file from a position on.
fn read_from(path: &Path, from: u64) -> Result<String> {
    let read = || {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().with_context(|| format!("reading {}", path.display()))
}

/// Returns the seconds in the field `took` of the only line of a log with a message.
fn took(log: &str, message: &str) -> Result<f64> {
    let lines: Vec<_> = log.lines().filter(|line| line.contains(message)).collect();
    let [line] = lines[..] else {
        anyhow::bail!("{} lines {message:?} in the log:\n{log}", lines.len());
    };
    let value = line.split_whitespace().find_map(|word| word.strip_prefix("took="));
    value
        .and_then(duration_seconds)
        .with_context(|| format!("no duration: {line}"))
}

/// Parses the debug output of a `Duration`.
fn duration_seconds(text: &str) -> Option<f64> {
    // The unit of seconds is the end of the others.
    let units = [("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let (number, unit) = units
        .into_iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    Some(number.parse::<f64>().ok()? * unit)
}

/// Returns the seconds of the longest connection that was not over at `from`, and begun at `to`.
fn longest(records: &[Record], from: u64, to: u64) -> Result<f64> {
    let during = records
        .iter()
        .filter(|record| record.end_ns >= from && record.start_ns <= to);
    let longest = during.map(|record| seconds(record.start_ns, record.end_ns));
    longest.max_by(f64::total_cmp).context("no connection")
}

/// Returns the seconds between two times of the monotonic clock.
fn seconds(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e9
}

/// Returns the medians of the repetitions, and the longest connection of all of them.
fn start_table(starts: &[Measured], numbers: &[Numbers]) -> Table {
    let mut table = table(&[
        "change",
        "conntrack entries",
        "socket records",
        "serving (s)",
        "prepare (s)",
        "copy (s)",
        "peak (MB)",
        "longest connection before (ms)",
        "during (ms)",
    ]);
    for change in Change::ALL {
        for numbers in numbers {
            let is_same = |start: &&Measured| start.change == change && start.numbers == *numbers;
            let same: Vec<_> = starts.iter().filter(is_same).collect();
            let middle = |value: fn(&Measured) -> f64| median(same.iter().copied().map(value));
            let largest = |value: fn(&Measured) -> f64| same.iter().copied().map(value).fold(0.0, f64::max);
            table.add_row([
                change.label(),
                numbers.conntrack.to_string(),
                numbers.sockets.to_string(),
                format!("{:.2}", middle(|start| start.serving)),
                format!("{:.2}", middle(|start| start.prepare)),
                format!("{:.3}", middle(|start| start.copy)),
                format!("{:.1}", middle(|start| start.peak as f64 / 1e6)),
                format!("{:.1}", largest(|start| start.longest_before * 1e3)),
                format!("{:.1}", largest(|start| start.longest_during * 1e3)),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_in_the_log_are_parsed() {
        for duration in [
            Duration::from_nanos(12),
            Duration::from_micros(1500),
            Duration::from_nanos(34_500),
            Duration::from_millis(2345),
        ] {
            let parsed = duration_seconds(&format!("{duration:?}")).unwrap();
            assert!((parsed - duration.as_secs_f64()).abs() < 1e-12, "{duration:?} {parsed}");
        }
        assert_eq!(duration_seconds("soon"), None);
        let line = format!("2026-01-01T00:00:00Z  INFO lb_agent::loader::moves: {COPIED} took=1.5s lost=0\n");
        assert!((took(&line, COPIED).unwrap() - 1.5).abs() < 1e-12);
        assert!(took(&line, PREPARED).is_err());
        assert!(took(&(line.clone() + &line), COPIED).is_err());
    }

    #[test]
    fn sizes_have_room_for_the_entries_and_for_a_move() {
        let all = Numbers {
            conntrack: 100_000,
            sockets: 50_000,
        };
        let sizes = sizes(all);
        let [(_, conntrack), (_, new), (_, slots), (_, more), _] = sizes;
        assert_eq!([conntrack, new, slots, more], [1 << 18, 1 << 17, 1 << 14, 1 << 17]);
        let words = flags(&doubled(sizes), floor_flag).join(" ");
        assert!(
            words.starts_with("--min-conntrack 524288 --min-conntrack-new 262144"),
            "{words}"
        );
        assert!(words.contains("--min-udp-flows 65536"), "{words}");
    }

    #[test]
    fn longest_connection_overlaps_the_time() {
        let record = |start_ns: u64, end_ns| Record {
            start_ns,
            end_ns,
            to: "10.96.0.20:80".parse().unwrap(),
            outcome: Ok("server".to_owned()),
        };
        let records = [record(0, 10_000), record(20_000, 24_000), record(30_000, 50_000)];
        let nanoseconds = |from, to| longest(&records, from, to).map(|seconds| (seconds * 1e9).round());
        assert!(nanoseconds(11_000, 25_000).is_ok_and(|ns| (ns - 4_000.0).abs() < 0.5));
        assert!(nanoseconds(5_000, 25_000).is_ok_and(|ns| (ns - 10_000.0).abs() < 0.5));
        assert!(nanoseconds(60_000, 70_000).is_err());
    }
}
