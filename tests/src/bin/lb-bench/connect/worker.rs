//! Processes that connect: one for each way, in its own network namespace and cgroup, told what to do line by line.

use std::env::current_exe;
use std::io::{Write as _, stdin, stdout};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::{ChildStdin, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lb_tests::{Place, Process, Random, monotonic_ns};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::sockopt::{Linger, SendTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, getpeername, setsockopt, socket};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::objects::BACKEND_PORT;

/// The most that a task may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most that one connection may take, in seconds.
const SLOWEST: i64 = 5;

/// Destinations: addresses that follow each other, one port.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Targets {
    pub(crate) first: Ipv4Addr,
    pub(crate) number: u32,
    pub(crate) port: u16,
}

impl Targets {
    /// So many, taken at random.
    fn take(self, count: u32, seed: u64) -> Vec<SockaddrIn> {
        let mut random = Random::new(seed);
        let one = |_| {
            let at = random.below(self.number.into()) as u32;
            SocketAddrV4::new(Ipv4Addr::from_bits(self.first.to_bits() + at), self.port).into()
        };
        (0..count).map(one).collect()
    }
}

/// What to do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Sockets that ask to connect and are told that there is no route, after the programs at the hook have run: all
    /// that these cost, and no packet.
    Ask,
    /// Real connections, one after the other: connected, accepted, closed.
    Connect,
    /// One connection, the name of whose peer is asked for again and again.
    Peer,
}

/// What to do, how often, with which destinations.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) task: Task,
    pub(crate) targets: Targets,
    pub(crate) count: u32,
    pub(crate) seed: u64,
}

impl Order {
    /// How often the order makes each program of its task run.
    pub(crate) fn runs(&self) -> u64 {
        match self.task {
            Task::Ask | Task::Connect => self.count.into(),
            // `accept()` asks for the peer's name as well.
            Task::Peer => u64::from(self.count) + 1,
        }
    }
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Nanoseconds of each `connect()` of [`Task::Connect`].
    pub(crate) times: Vec<u32>,
    /// All of the task.
    pub(crate) seconds: f64,
}

/// A worker as its master sees it.
pub(crate) struct Worker {
    process: Process,
    orders: ChildStdin,
}

impl Worker {
    pub(crate) fn start(place: &Place) -> Result<Self> {
        let program = current_exe().context("finding this program")?;
        let mut process = Process::spawn_reading(place.command(program)?.arg("connect-worker").stdin(Stdio::piped()))?;
        let orders = process.take_stdin().context("a worker has a standard input")?;
        Ok(Self { process, orders })
    }

    /// Has something done, and waits for it.
    pub(crate) fn order(&mut self, order: &Order) -> Result<Done> {
        let line = serde_json::to_string(order).context("writing JSON")?;
        writeln!(self.orders, "{line}").context("writing to a worker")?;
        let answer = self.process.line(PATIENCE)?;
        serde_json::from_str(&answer).with_context(|| format!("a worker said {answer:?}"))
    }
}

/// A worker as itself: until its master has no more to say.
pub(crate) fn run() -> Result<ExitCode> {
    stay_on_one_processor()?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, BACKEND_PORT)).context("listening")?;
    for line in stdin().lines() {
        let order: Order = serde_json::from_str(&line.context("reading orders")?).context("reading an order")?;
        let targets = order.targets.take(order.count, order.seed);
        let start = monotonic_ns();
        let times = match order.task {
            Task::Ask => ask(&targets)?,
            Task::Connect => connections(&targets, &listener)?,
            Task::Peer => peers(&targets, &listener)?,
        };
        let done = Done {
            times,
            seconds: (monotonic_ns() - start) as f64 / 1e9,
        };
        let line = serde_json::to_string(&done).context("writing JSON")?;
        writeln!(stdout(), "{line}").context("writing to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The last one that this process may use: the same for all workers. Elsewhere each would have the records of sockets
/// that its own processor handed out cookies for, in the caches of that processor.
fn stay_on_one_processor() -> Result<()> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).context("sched_getaffinity")?;
    let last = (0..CpuSet::count())
        .rev()
        .find(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .context("no processor")?;
    let mut only = CpuSet::new();
    only.set(last).context("CPU_SET")?;
    sched_setaffinity(this, &only).context("sched_setaffinity")
}

fn tcp() -> Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("opening a socket")
}

fn ask(targets: &[SockaddrIn]) -> Result<Vec<u32>> {
    for target in targets {
        let answer = connect(tcp()?.as_raw_fd(), target);
        ensure!(
            answer == Err(Errno::ENETUNREACH),
            "connecting to {target}, which has no route: {answer:?}"
        );
    }
    Ok(Vec::new())
}

/// A connection. The fields are closed in this order: the client resets the connection, and no port is left waiting for
/// packets that may be late.
struct Connection {
    client: OwnedFd,
    _server: TcpStream,
    /// How long `connect()` took, in nanoseconds.
    time: u32,
}

fn connected(target: &SockaddrIn, listener: &TcpListener) -> Result<Connection> {
    let client = tcp()?;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&client, Linger, &linger).context("SO_LINGER")?;
    setsockopt(&client, SendTimeout, &TimeVal::new(SLOWEST, 0)).context("SO_SNDTIMEO")?;
    let start = monotonic_ns();
    let result = connect(client.as_raw_fd(), target);
    let time = monotonic_ns() - start;
    result.with_context(|| format!("connecting to {target}"))?;
    let (server, _) = listener.accept().context("accepting")?;
    Ok(Connection {
        client,
        _server: server,
        time: time.try_into().unwrap_or(u32::MAX),
    })
}

fn connections(targets: &[SockaddrIn], listener: &TcpListener) -> Result<Vec<u32>> {
    targets
        .iter()
        .map(|target| Ok(connected(target, listener)?.time))
        .collect()
}

fn peers(targets: &[SockaddrIn], listener: &TcpListener) -> Result<Vec<u32>> {
    let target = targets.first().context("no destination")?;
    let connection = connected(target, listener)?;
    for _ in targets {
        let peer: SockaddrIn = getpeername(connection.client.as_raw_fd()).context("getpeername")?;
        ensure!(peer == *target, "connected to {target}, the peer is {peer}");
    }
    Ok(Vec::new())
}
