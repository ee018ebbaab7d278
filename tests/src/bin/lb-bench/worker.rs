//! Worker processes that connect and send: one for each way, in its own network namespace and cgroup. A worker receives an
//! order per line and replies with its result.

use std::env::current_exe;
use std::fs;
use std::io::{IoSlice, IoSliceMut, Write as _, stdin, stdout};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lb_tests::{Netns, Process, Random, monotonic_ns};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::sockopt::{Ipv6RecvPacketInfo, Linger, ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn6, SockaddrLike as _,
    SockaddrStorage, accept4, connect, getpeername, recvfrom, recvmsg, send, sendmsg, sendto, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::objects::BACKEND_PORT;

/// Time limit of a task.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time limit of one connection in seconds.
const SLOWEST: i64 = 5;
/// Time limit of a datagram in seconds, and the number of times that one is sent.
const LOST: i64 = 1;
const TRIES: u32 = 5;

/// Destinations: consecutive addresses with one port.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Targets {
    pub(crate) first: IpAddr,
    pub(crate) number: u32,
    pub(crate) port: u16,
}

impl Targets {
    /// Returns `count` random destinations.
    fn take(self, count: u32, seed: u64) -> Vec<SockaddrStorage> {
        let mut random = Random::new(seed);
        let one = |_| {
            let at = random.below(self.number.into()) as u32;
            let addr = match self.first {
                IpAddr::V4(first) => IpAddr::V4((first.to_bits() + at).into()),
                IpAddr::V6(first) => IpAddr::V6((first.to_bits() + u128::from(at)).into()),
            };
            SocketAddr::new(addr, self.port).into()
        };
        (0..count).map(one).collect()
    }
}

/// Task of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Sockets that call `connect()` and receive the error that there is no route, after the programs at the hook have run.
    /// This costs the programs' time and sends no packet.
    Ask,
    /// Real connections, one after the other, which are accepted and closed.
    Connect,
    /// One connection with repeated calls of `getpeername`.
    Peer,
    /// Unconnected sockets that send a datagram each, and receive the error that there is no route. They stay open.
    FirstSend,
    /// One more datagram of the sockets of [`Task::FirstSend`], each to its first destination.
    NextSend,
    /// Closing of the sockets of [`Task::FirstSend`].
    Close,
    /// Requests and replies by datagrams.
    Exchange(SocketUse),
}

/// Sockets that exchange datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct SocketUse {
    /// True for connected sockets.
    pub(crate) connected: bool,
    /// True for a new socket per exchange, which is closed after it; otherwise one socket exchanges all datagrams with the
    /// first destination.
    pub(crate) fresh: bool,
}

/// An order: a task, its destinations and its repetitions.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) task: Task,
    /// True if [`Task::Ask`] opens UDP sockets, false for TCP.
    pub(crate) udp: bool,
    pub(crate) targets: Targets,
    pub(crate) count: u32,
    pub(crate) seed: u64,
}

impl Order {
    /// Returns the number of backends that the programs select for it, if the destinations are those of Services.
    pub(crate) fn choices(&self) -> u32 {
        match self.task {
            Task::Ask | Task::Connect | Task::FirstSend | Task::Exchange(SocketUse { fresh: true, .. }) => self.count,
            Task::Peer | Task::Exchange(_) => 1,
            Task::NextSend | Task::Close => 0,
        }
    }
}

/// Result of an order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Nanoseconds of each `connect()` of [`Task::Connect`].
    pub(crate) times: Vec<u32>,
    /// Seconds of the whole task.
    pub(crate) seconds: f64,
}

/// Handle of a worker process.
pub(crate) struct Worker {
    process: Process,
    orders: ChildStdin,
}

impl Worker {
    pub(crate) fn start(netns: &Netns) -> Result<Self> {
        let program = current_exe().context("finding this program")?;
        let cgroup = netns.process_cgroup().context("the place has no cgroup")?;
        let mut command = netns.command(program)?;
        command.arg("worker").arg("--cgroup").arg(cgroup).stdin(Stdio::piped());
        let mut process = Process::spawn_reading(&mut command)?;
        let orders = process.take_stdin().context("a worker has a standard input")?;
        Ok(Self { process, orders })
    }

    /// Sends an order to the worker and waits for the result.
    pub(crate) fn order(&mut self, order: &Order) -> Result<Done> {
        let line = serde_json::to_string(order).context("writing JSON")?;
        writeln!(self.orders, "{line}").context("writing to a worker")?;
        let answer = self.process.line(PATIENCE)?;
        serde_json::from_str(&answer).with_context(|| format!("the worker sent an unexpected line: {answer:?}"))
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Cgroup that the worker was started in
    #[arg(long)]
    cgroup: PathBuf,
}

/// Runs the worker process until its standard input ends.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    stay_on_one_processor()?;
    let mut sockets = Sockets {
        listener: TcpListener::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)).context("listening")?,
        echo: elsewhere(&options.cgroup, Echo::open)?,
        kept: Vec::new(),
    };
    for line in stdin().lines() {
        let order: Order = serde_json::from_str(&line.context("reading orders")?).context("reading an order")?;
        let targets = order.targets.take(order.count, order.seed);
        let start = monotonic_ns();
        let times = sockets.perform(&order, &targets)?;
        let done = Done {
            times,
            seconds: (monotonic_ns() - start) as f64 / 1e9,
        };
        let line = serde_json::to_string(&done).context("writing JSON")?;
        writeln!(stdout(), "{line}").context("writing to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Pins this process to the last processor that it may use, which is one for all workers. On different processors, each worker
/// would have the socket records with cookies from its own processor in the caches of that processor.
pub(crate) fn stay_on_one_processor() -> Result<()> {
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

/// Opens sockets outside this worker's cgroup, so that its programs do not run for them: a socket belongs to the cgroup that
/// its process was in when it opened the socket.
fn elsewhere<T>(cgroup: &Path, open: impl FnOnce() -> Result<T>) -> Result<T> {
    let enter = |cgroup: &Path| {
        let path = cgroup.join("cgroup.procs");
        fs::write(&path, "0").with_context(|| format!("writing to {}", path.display()))
    };
    enter(cgroup.parent().context("a pod's cgroup has a parent")?)?;
    let opened = open()?;
    enter(cgroup)?;
    Ok(opened)
}

/// A worker's sockets.
struct Sockets {
    listener: TcpListener,
    echo: Echo,
    /// Sockets of [`Task::FirstSend`].
    kept: Vec<OwnedFd>,
}

impl Sockets {
    fn perform(&mut self, order: &Order, targets: &[SockaddrStorage]) -> Result<Vec<u32>> {
        match order.task {
            Task::Connect => {
                let times = targets.iter().map(|target| Ok(self.connected(target)?.time));
                return times.collect();
            }
            Task::Ask => ask(targets, order.udp)?,
            Task::Peer => self.peers(targets)?,
            Task::FirstSend => {
                self.kept = targets.iter().map(udp).collect::<Result<_>>()?;
                self.send(targets)?;
            }
            Task::NextSend => self.send(targets)?,
            Task::Close => self.kept.clear(),
            Task::Exchange(manner) => self.exchange(targets, manner)?,
        }
        Ok(Vec::new())
    }

    fn connected(&self, target: &SockaddrStorage) -> Result<Connection> {
        let client = tcp(target)?;
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
        // accept4 must not return the peer's name, because that would run a program.
        let server = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).context("accepting")?;
        Ok(Connection {
            client,
            // SAFETY: the descriptor was just returned by accept4 and has no other owner.
            _server: unsafe { OwnedFd::from_raw_fd(server) },
            time: time.try_into().unwrap_or(u32::MAX),
        })
    }

    fn peers(&self, targets: &[SockaddrStorage]) -> Result<()> {
        let target = targets.first().context("no destination")?;
        let connection = self.connected(target)?;
        for _ in targets {
            let peer: SockaddrStorage = getpeername(connection.client.as_raw_fd()).context("getpeername")?;
            ensure!(peer == *target, "connected to {target}, the peer is {peer}");
        }
        Ok(())
    }

    /// Sends a datagram from each of the open sockets.
    fn send(&self, targets: &[SockaddrStorage]) -> Result<()> {
        ensure!(self.kept.len() == targets.len(), "{} sockets are open", self.kept.len());
        for (socket, target) in self.kept.iter().zip(targets) {
            let answer = sendto(socket.as_raw_fd(), REQUEST, target, MsgFlags::empty());
            ensure!(
                answer == Err(Errno::ENETUNREACH),
                "sending to {target}, which has no route: {answer:?}"
            );
        }
        Ok(())
    }

    fn exchange(&self, targets: &[SockaddrStorage], manner: SocketUse) -> Result<()> {
        let mut open = None;
        let mut to = *targets.first().context("no destination")?;
        for target in targets {
            if manner.fresh {
                to = *target;
                open = None;
            }
            let client = match &open {
                Some(client) => client,
                None => open.insert(client(&to, manner.connected)?),
            };
            let tries = (0..TRIES).find_map(|_| self.question(client, &to, manner.connected).transpose());
            let from = tries.with_context(|| format!("no reply from {to}"))??;
            ensure!(from == to, "sent a request to {to}, and the reply is from {from}");
        }
        Ok(())
    }

    /// Sends a request, replies to it, and returns the address that the reply came from; `None` if a datagram was lost. That
    /// happens on loopback too: once in millions of times the kernel does not find the socket, because sockets of all
    /// namespaces are inserted into and removed from one hash table concurrently.
    fn question(&self, client: &OwnedFd, to: &SockaddrStorage, connected: bool) -> Result<Option<SockaddrStorage>> {
        let client = client.as_raw_fd();
        let sent = if connected {
            send(client, REQUEST, MsgFlags::empty())
        } else {
            sendto(client, REQUEST, to, MsgFlags::empty())
        };
        let mut buffer = [0; 2 * REQUEST.len()];
        let answer = sent
            .and_then(|_| self.echo.answer())
            .and_then(|()| recvfrom::<SockaddrStorage>(client, &mut buffer));
        match answer {
            Ok((length, from)) => {
                ensure!(length == REQUEST.len(), "{to} replied with {length} bytes");
                Ok(from)
            }
            Err(Errno::EAGAIN | Errno::ECONNREFUSED) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("exchanging a datagram with {to}")),
        }
    }
}

/// Payload of a request, as long as a short DNS query.
const REQUEST: &[u8] = &[b'q'; 32];

/// The server behind every address of a backend, of both families.
struct Echo(UdpSocket);

impl Echo {
    fn open() -> Result<Self> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)).context("listening for datagrams")?;
        setsockopt(&socket.as_fd(), Ipv6RecvPacketInfo, &true).context("IPV6_RECVPKTINFO")?;
        setsockopt(&socket.as_fd(), ReceiveTimeout, &TimeVal::new(LOST, 0)).context("SO_RCVTIMEO")?;
        Ok(Self(socket))
    }

    /// Replies to the next datagram, from the address that it was sent to.
    fn answer(&self) -> nix::Result<()> {
        let fd = self.0.as_raw_fd();
        let mut buffer = [0; 2 * REQUEST.len()];
        let mut control = nix::cmsg_space!(libc::in6_pktinfo);
        let mut data = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<SockaddrIn6>(fd, &mut data, Some(&mut control), MsgFlags::empty())?;
        let info = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
            _ => None,
        });
        let (from, length) = (received.address, received.bytes);
        // Index zero: the kernel selects the interface.
        let info = libc::in6_pktinfo {
            ipi6_ifindex: 0,
            ..info.ok_or(Errno::ENOMSG)?
        };
        let data = [IoSlice::new(&buffer[..length])];
        let control = [ControlMessage::Ipv6PacketInfo(&info)];
        sendmsg(fd, &data, &control, MsgFlags::empty(), from.as_ref()).map(drop)
    }
}

fn tcp(target: &SockaddrStorage) -> Result<OwnedFd> {
    open(target, SockType::Stream)
}

fn udp(target: &SockaddrStorage) -> Result<OwnedFd> {
    open(target, SockType::Datagram)
}

/// Returns a socket of the family of `target`.
fn open(target: &SockaddrStorage, kind: SockType) -> Result<OwnedFd> {
    let family = target.family().unwrap_or(AddressFamily::Inet);
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).context("opening a socket")
}

/// Returns a socket for requests to `target`.
fn client(target: &SockaddrStorage, connected: bool) -> Result<OwnedFd> {
    let client = udp(target)?;
    setsockopt(&client, ReceiveTimeout, &TimeVal::new(LOST, 0)).context("SO_RCVTIMEO")?;
    if connected {
        connect(client.as_raw_fd(), target).with_context(|| format!("connecting to {target}"))?;
    }
    Ok(client)
}

fn ask(targets: &[SockaddrStorage], udp: bool) -> Result<()> {
    let kind = if udp { SockType::Datagram } else { SockType::Stream };
    for target in targets {
        let answer = connect(open(target, kind)?.as_raw_fd(), target);
        ensure!(
            answer == Err(Errno::ENETUNREACH),
            "connecting to {target}, which has no route: {answer:?}"
        );
    }
    Ok(())
}

/// A connection. Its fields are closed in their order: the client resets the connection, so that no port stays in TIME_WAIT.
struct Connection {
    client: OwnedFd,
    _server: OwnedFd,
    /// Nanoseconds of `connect()`.
    time: u32,
}
