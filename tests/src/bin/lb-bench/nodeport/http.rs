//! A client that asks over some connections at once, and a server: one process each, told what to do line by line.

use std::collections::HashMap;
use std::env::current_exe;
use std::io::{ErrorKind, Read as _, Write as _, stdin, stdout};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::process::{ChildStdin, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lb_tests::{Place, Process, monotonic_ns};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use serde::{Deserialize, Serialize};

use crate::objects::BACKEND_PORT;
use crate::worker::stay_on_one_processor;

/// Connections at once.
pub(crate) const CONNECTIONS: u32 = 16;

/// The most that a turn may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most that nothing may happen, in milliseconds.
const SILENCE: u16 = 10_000;
/// How long a server may take to start.
const START: Duration = Duration::from_secs(20);

const ASK: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
const ASK_ONCE: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\nhello\n";

/// What to ask, and how often.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) to: SocketAddr,
    pub(crate) requests: u32,
    /// A new connection for each; else they are opened before.
    pub(crate) fresh: bool,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Nanoseconds of each request, with its connection where that is new.
    pub(crate) times: Vec<u32>,
    pub(crate) seconds: f64,
}

/// The client as its master sees it.
pub(crate) struct Client {
    process: Process,
    orders: ChildStdin,
}

impl Client {
    pub(crate) fn start(place: &Place) -> Result<Self> {
        let mut command = place.command(current_exe().context("finding this program")?)?;
        let mut process = Process::spawn_reading(command.arg("http-client").stdin(Stdio::piped()))?;
        let orders = process.take_stdin().context("a client has a standard input")?;
        Ok(Self { process, orders })
    }

    /// Has it ask, and waits.
    pub(crate) fn order(&mut self, order: &Order) -> Result<Done> {
        let line = serde_json::to_string(order).context("writing JSON")?;
        writeln!(self.orders, "{line}").context("writing to a client")?;
        let answer = self.process.line(PATIENCE)?;
        serde_json::from_str(&answer).with_context(|| format!("a client said {answer:?}"))
    }
}

/// Starts a server on all addresses of a place.
pub(crate) fn serve(place: &Place) -> Result<Process> {
    let mut command = place.command(current_exe().context("finding this program")?)?;
    Process::spawn_ready(command.arg("http-server"), START)
}

/// The server itself: until it is killed.
pub(crate) fn run_server() -> Result<ExitCode> {
    stay_on_one_processor()?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, BACKEND_PORT)).context("listening")?;
    listener.set_nonblocking(true).context("O_NONBLOCK")?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    epoll.add(&listener, interest(&listener.as_raw_fd(), EpollFlags::EPOLLIN))?;
    writeln!(stdout(), "ready").context("writing to standard output")?;
    let mut open: HashMap<RawFd, TcpStream> = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = match epoll.wait(&mut events, u16::MAX) {
            Err(Errno::EINTR) => 0,
            result => result.context("epoll_wait")?,
        };
        for event in &events[..count] {
            let fd = event.data() as RawFd;
            if fd == listener.as_raw_fd() {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).context("O_NONBLOCK")?;
                    stream.set_nodelay(true).context("TCP_NODELAY")?;
                    epoll.add(&stream, interest(&stream.as_raw_fd(), EpollFlags::EPOLLIN))?;
                    open.insert(stream.as_raw_fd(), stream);
                }
            } else if !open.get(&fd).is_some_and(answer) {
                open.remove(&fd);
            }
        }
    }
}

/// Answers what was asked; whether the connection stays.
fn answer(mut stream: &TcpStream) -> bool {
    let mut request = [0; 256];
    match stream.read(&mut request) {
        // A request is shorter than a segment, and comes as one.
        Ok(length) if length > 0 => stream.write_all(ANSWER).is_ok() && request[..length] == *ASK,
        Ok(_) => false,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

fn interest(fd: &RawFd, flags: EpollFlags) -> EpollEvent {
    EpollEvent::new(flags, *fd as u64)
}

/// The client itself: until its master has no more to say.
pub(crate) fn run_client() -> Result<ExitCode> {
    stay_on_one_processor()?;
    for line in stdin().lines() {
        let order: Order = serde_json::from_str(&line.context("reading orders")?).context("reading an order")?;
        let done = if order.fresh {
            ask_fresh(&order)
        } else {
            ask_again(&order)
        };
        let done = done.with_context(|| format!("asking {}", order.to))?;
        let line = serde_json::to_string(&done).context("writing JSON")?;
        writeln!(stdout(), "{line}").context("writing to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A connection of the client.
struct Asking {
    stream: TcpStream,
    begun: u64,
    /// Bytes of the answer so far.
    got: usize,
    /// The request is on its way.
    sent: bool,
}

impl Asking {
    /// Begins to connect, and asks to be told.
    fn open(to: SocketAddr, epoll: &Epoll) -> Result<Self> {
        let begun = monotonic_ns();
        let family = if to.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(family, SockType::Stream, flags, None).context("opening a socket")?;
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error).context("connecting"),
        }
        let stream = TcpStream::from(fd);
        epoll.add(&stream, interest(&stream.as_raw_fd(), EpollFlags::EPOLLOUT))?;
        Ok(Self {
            stream,
            begun,
            got: 0,
            sent: false,
        })
    }

    /// It is connected: asks.
    fn send(&mut self, request: &[u8], epoll: &Epoll) -> Result<()> {
        if let Some(error) = self.stream.take_error().context("SO_ERROR")? {
            return Err(error).context("connecting");
        }
        self.stream.set_nodelay(true).context("TCP_NODELAY")?;
        self.stream.write_all(request).context("writing")?;
        self.sent = true;
        let mut event = interest(&self.stream.as_raw_fd(), EpollFlags::EPOLLIN);
        epoll.modify(self.stream.as_fd(), &mut event).context("EPOLL_CTL_MOD")
    }

    /// Reads what there is. True: all of the answer; with `end`, and the end of the connection.
    fn receive(&mut self, end: bool) -> Result<bool> {
        let mut buffer = [0; 256];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) if end && self.got == ANSWER.len() => return Ok(true),
                Ok(0) => bail!("the connection ended after {} bytes", self.got),
                Ok(length) => {
                    let expected = ANSWER.get(self.got..self.got + length);
                    ensure!(expected == Some(&buffer[..length]), "the answer is another one");
                    self.got += length;
                    if !end && self.got == ANSWER.len() {
                        return Ok(true);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).context("reading"),
            }
        }
    }

    fn time(&self) -> u32 {
        (monotonic_ns() - self.begun).try_into().unwrap_or(u32::MAX)
    }
}

/// The next of the connections on which something has happened.
fn ready(epoll: &Epoll, events: &mut [EpollEvent; 64]) -> Result<usize> {
    loop {
        match epoll.wait(events, SILENCE) {
            Ok(0) => bail!("nothing happened for {SILENCE} ms"),
            Err(Errno::EINTR) => {}
            result => return result.context("epoll_wait"),
        }
    }
}

/// A connection for each request.
fn ask_fresh(order: &Order) -> Result<Done> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    let mut events = [EpollEvent::empty(); 64];
    let mut open: HashMap<RawFd, Asking> = HashMap::new();
    let mut times = Vec::with_capacity(order.requests as usize);
    let mut left = order.requests;
    let start = monotonic_ns();
    while times.len() < order.requests as usize {
        while left > 0 && open.len() < CONNECTIONS as usize {
            let asking = Asking::open(order.to, &epoll)?;
            open.insert(asking.stream.as_raw_fd(), asking);
            left -= 1;
        }
        let count = ready(&epoll, &mut events)?;
        for event in &events[..count] {
            let fd = event.data() as RawFd;
            let asking = open.get_mut(&fd).context("an event of nobody")?;
            if !asking.sent {
                asking.send(ASK_ONCE, &epoll)?;
            } else if asking.receive(true)? {
                times.push(asking.time());
                open.remove(&fd);
            }
        }
    }
    Ok(Done {
        times,
        seconds: (monotonic_ns() - start) as f64 / 1e9,
    })
}

/// Connections that stay open, and have been used before time is taken.
fn ask_again(order: &Order) -> Result<Done> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    let mut events = [EpollEvent::empty(); 64];
    let mut open: HashMap<RawFd, Asking> = HashMap::new();
    for _ in 0..CONNECTIONS {
        let asking = Asking::open(order.to, &epoll)?;
        open.insert(asking.stream.as_raw_fd(), asking);
    }
    let mut waiting = CONNECTIONS;
    while waiting > 0 {
        let count = ready(&epoll, &mut events)?;
        for event in &events[..count] {
            let asking = open.get_mut(&(event.data() as RawFd)).context("an event of nobody")?;
            if !asking.sent {
                asking.send(ASK, &epoll)?;
            } else if asking.receive(false)? {
                waiting -= 1;
            }
        }
    }
    let mut times = Vec::with_capacity(order.requests as usize);
    let mut left = order.requests;
    let mut again = |asking: &mut Asking| -> Result<()> {
        if left > 0 {
            left -= 1;
            asking.got = 0;
            asking.begun = monotonic_ns();
            asking.stream.write_all(ASK).context("writing")?;
        }
        Ok(())
    };
    let start = monotonic_ns();
    for asking in open.values_mut() {
        again(asking)?;
    }
    while times.len() < order.requests as usize {
        let count = ready(&epoll, &mut events)?;
        for event in &events[..count] {
            let asking = open.get_mut(&(event.data() as RawFd)).context("an event of nobody")?;
            if asking.receive(false)? {
                times.push(asking.time());
                again(asking)?;
            }
        }
    }
    Ok(Done {
        times,
        seconds: (monotonic_ns() - start) as f64 / 1e9,
    })
}
