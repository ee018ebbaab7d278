//! Processes that connect and send: one for each way, in its own network namespace and cgroup, told what to do line by
//! line.

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

/// The most that a task may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most that one connection may take, in seconds.
const SLOWEST: i64 = 5;
/// How long a datagram may take, in seconds, and how often one is sent.
const LOST: i64 = 1;
const TRIES: u32 = 5;

/// Destinations: addresses that follow each other, one port.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Targets {
    pub(crate) first: IpAddr,
    pub(crate) number: u32,
    pub(crate) port: u16,
}

impl Targets {
    /// So many, taken at random.
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

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Sockets that ask to connect and are told that there is no route, after the programs at the hook have run: all
    /// that these cost, and no packet.
    Ask,
    /// Real connections, one after the other: connected, accepted, closed.
    Connect,
    /// One connection, the name of whose peer is asked for again and again.
    Peer,
    /// Unconnected sockets that send a datagram each, and are told that there is no route. They stay open.
    FirstSend,
    /// The same sockets send one more, each to the same destination.
    NextSend,
    /// They are closed.
    Close,
    /// Datagrams that are sent, answered, and received.
    Exchange(Manner),
}

/// How datagrams are exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Manner {
    /// By sockets that are connected.
    pub(crate) connected: bool,
    /// By a new socket each, that is closed after it; else all by one, with the first destination.
    pub(crate) fresh: bool,
}

/// What to do, how often, with which destinations.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) task: Task,
    /// What kind of sockets [`Task::Ask`] opens.
    pub(crate) udp: bool,
    pub(crate) targets: Targets,
    pub(crate) count: u32,
    pub(crate) seed: u64,
}

impl Order {
    /// How many backends it makes the programs choose, where destinations are those of Services.
    pub(crate) fn choices(&self) -> u32 {
        match self.task {
            Task::Ask | Task::Connect | Task::FirstSend | Task::Exchange(Manner { fresh: true, .. }) => self.count,
            Task::Peer | Task::Exchange(_) => 1,
            Task::NextSend | Task::Close => 0,
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
    pub(crate) fn start(netns: &Netns) -> Result<Self> {
        let program = current_exe().context("finding this program")?;
        let cgroup = netns.process_cgroup().context("the place has no cgroup")?;
        let mut command = netns.command(program)?;
        command.arg("worker").arg("--cgroup").arg(cgroup).stdin(Stdio::piped());
        let mut process = Process::spawn_reading(&mut command)?;
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

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The cgroup that it was started in
    #[arg(long)]
    cgroup: PathBuf,
}

/// A worker as itself: until its master has no more to say.
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

/// The last one that this process may use: the same for all workers. Elsewhere each would have the records of sockets
/// that its own processor handed out cookies for, in the caches of that processor.
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

/// Opens sockets that the programs at this cgroup do not see: a socket belongs to the cgroup of the process that opened
/// it, at that time.
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
    /// Those of [`Task::FirstSend`].
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
        // Without the peer's name: a program would be asked for it.
        let server = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).context("accepting")?;
        Ok(Connection {
            client,
            // SAFETY: it was just opened, and nobody else knows of it.
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

    /// A datagram from each of the sockets that stay open.
    fn send(&self, targets: &[SockaddrStorage]) -> Result<()> {
        ensure!(self.kept.len() == targets.len(), "{} sockets are open", self.kept.len());
        for (socket, target) in self.kept.iter().zip(targets) {
            let answer = sendto(socket.as_raw_fd(), QUESTION, target, MsgFlags::empty());
            ensure!(
                answer == Err(Errno::ENETUNREACH),
                "sending to {target}, which has no route: {answer:?}"
            );
        }
        Ok(())
    }

    fn exchange(&self, targets: &[SockaddrStorage], manner: Manner) -> Result<()> {
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
            let from = tries.with_context(|| format!("no answer from {to}"))??;
            ensure!(from == to, "asked {to}, the answer is from {from}");
        }
        Ok(())
    }

    /// Asks, answers, and tells who it was that answered; `None` where a datagram was lost on the way. That happens on
    /// loopback too: once in millions of times the kernel does not find the socket, since sockets of whatever namespace
    /// come and go in the same hash table meanwhile.
    fn question(&self, client: &OwnedFd, to: &SockaddrStorage, connected: bool) -> Result<Option<SockaddrStorage>> {
        let client = client.as_raw_fd();
        let sent = if connected {
            send(client, QUESTION, MsgFlags::empty())
        } else {
            sendto(client, QUESTION, to, MsgFlags::empty())
        };
        let mut buffer = [0; 2 * QUESTION.len()];
        let answer = sent
            .and_then(|_| self.echo.answer())
            .and_then(|()| recvfrom::<SockaddrStorage>(client, &mut buffer));
        match answer {
            Ok((length, from)) => {
                ensure!(length == QUESTION.len(), "{to} answered {length} bytes");
                Ok(from)
            }
            Err(Errno::EAGAIN | Errno::ECONNREFUSED) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("asking {to}")),
        }
    }
}

/// As long as a small question to a name server.
const QUESTION: &[u8] = &[b'q'; 32];

/// The server behind every address of a backend, of both families.
struct Echo(UdpSocket);

impl Echo {
    fn open() -> Result<Self> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)).context("listening for datagrams")?;
        setsockopt(&socket.as_fd(), Ipv6RecvPacketInfo, &true).context("IPV6_RECVPKTINFO")?;
        setsockopt(&socket.as_fd(), ReceiveTimeout, &TimeVal::new(LOST, 0)).context("SO_RCVTIMEO")?;
        Ok(Self(socket))
    }

    /// Answers the next datagram, from the address that it was sent to.
    fn answer(&self) -> nix::Result<()> {
        let fd = self.0.as_raw_fd();
        let mut buffer = [0; 2 * QUESTION.len()];
        let mut control = nix::cmsg_space!(libc::in6_pktinfo);
        let mut data = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<SockaddrIn6>(fd, &mut data, Some(&mut control), MsgFlags::empty())?;
        let info = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
            _ => None,
        });
        let (from, length) = (received.address, received.bytes);
        // By whichever interface leads there.
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

/// A socket of the family of `target`.
fn open(target: &SockaddrStorage, kind: SockType) -> Result<OwnedFd> {
    let family = target.family().unwrap_or(AddressFamily::Inet);
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).context("opening a socket")
}

/// A socket that asks for datagrams of `target`.
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

/// A connection. The fields are closed in this order: the client resets the connection, and no port is left waiting for
/// packets that may be late.
struct Connection {
    client: OwnedFd,
    _server: OwnedFd,
    /// How long `connect()` took, in nanoseconds.
    time: u32,
}
