//! `lb-testbed connect`: clients that open one connection after another.

use std::fs;
use std::io::{self, BufWriter, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use lb_tests::load::{ConnectStep, Failure, Mismatch, Record, Summary};
use lb_tests::monotonic_ns;
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, setsockopt, socket, sockopt,
};

use crate::{hold, print_line};

/// The highest number of failures that a summary lists.
pub(crate) const MAX_LISTED: usize = 100;

/// The longest HTTP response, in bytes; the rest of a longer one is not read.
const MAX_RESPONSE: usize = 64 * 1024;

/// Flags of `lb-testbed connect`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Address to connect to; several are used in turn
    #[arg(long, value_name = "ADDR:PORT", required = true)]
    pub(crate) to: Vec<SocketAddr>,
    /// Stop after this many connections
    #[arg(long, default_value_t = 1_000_000)]
    count: u64,
    /// Stop after this many seconds
    #[arg(long, default_value_t = 300.0)]
    seconds: f64,
    /// Stop as soon as this file exists
    #[arg(long, value_name = "PATH")]
    until_file: Option<PathBuf>,
    /// Number of simultaneous connections
    #[arg(long, default_value_t = 1)]
    threads: u16,
    /// Highest number of connections per second, of all threads together
    #[arg(long)]
    rate: Option<f64>,
    /// Timeout of each step of a connection, in milliseconds
    #[arg(long, default_value_t = 1000)]
    timeout_ms: u64,
    /// Write one line per connection: start, end (nanoseconds of CLOCK_MONOTONIC), target, backend or !errno
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Compare getpeername with the requested address
    #[arg(long)]
    peer_check: bool,
    /// Send a GET request; the backend's name is the first line of the response's body
    #[arg(long)]
    http: bool,
    /// Expect that lb's programs refuse every connection before a packet is sent; others count as failed. This is much
    /// faster than real connections: each thread uses one socket
    #[arg(long, conflicts_with_all = ["log", "http", "peer_check", "rate"])]
    refused: bool,
    /// Open N connections, print `ready`, keep them until standard input ends, then count those that still echo
    #[arg(long, value_name = "N", conflicts_with_all = ["count", "until_file", "log", "http"])]
    pub(crate) hold: Option<u32>,
}

impl Options {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.max(1))
    }
}

/// The first line of a server, and the peer of the connection.
pub(crate) struct Greeting {
    pub(crate) backend: String,
    source: Option<String>,
    peer: Option<SocketAddr>,
}

/// The error of a step of a connection.
pub(crate) struct StepError {
    error: io::Error,
    step: ConnectStep,
}

impl StepError {
    pub(crate) fn into_failure(self, to: SocketAddr, at_ns: u64) -> Failure {
        Failure {
            to,
            errno: self.errno(),
            kind: format!("{:?}", self.error.kind()),
            at_ns,
            step: self.step,
        }
    }

    fn errno(&self) -> i32 {
        // The standard library's timeout of `connect` has no error number.
        let fallback = if self.error.kind() == ErrorKind::TimedOut {
            libc::ETIMEDOUT
        } else {
            0
        };
        self.error.raw_os_error().unwrap_or(fallback)
    }
}

/// Returns a function that adds the failed step to an I/O error.
pub(crate) fn at(step: ConnectStep) -> impl Fn(io::Error) -> StepError {
    move |error| StepError { error, step }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(connections) = options.hold {
        return hold::run(options, connections);
    }
    let next = AtomicU64::new(0);
    let begin = Instant::now();
    let tallies: Vec<Tally> = thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads.max(1))
            .map(|_| {
                scope.spawn(|| {
                    if options.refused {
                        refused(options, begin)
                    } else {
                        connect_all(options, &next, begin)
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("no worker panics"))
            .collect()
    });
    let mut total = Tally::default();
    for tally in tallies {
        total.add(tally);
    }
    total.summary.elapsed_ns = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    if let Some(path) = &options.log {
        total.records.sort_by_key(|record| record.start_ns);
        let file = fs::File::create(path).with_context(|| format!("creating {}", path.display()))?;
        let mut file = BufWriter::new(file);
        total
            .records
            .iter()
            .try_for_each(|record| writeln!(file, "{}", record.line()))
            .and_then(|()| file.flush())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    print_line(&serde_json::to_string(&total.summary).context("writing JSON")?)
}

/// The results of one thread.
#[derive(Default)]
struct Tally {
    summary: Summary,
    records: Vec<Record>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        let (into, from) = (&mut self.summary, other.summary);
        into.connections += from.connections;
        into.failure_count += from.failure_count;
        into.failures.extend(from.failures);
        into.failures.sort_by_key(|failure| failure.at_ns);
        into.failures.truncate(MAX_LISTED);
        into.peer_mismatches += from.peer_mismatches;
        into.mismatches.extend(from.mismatches);
        into.mismatches.sort_by_key(|mismatch| mismatch.at_ns);
        into.mismatches.truncate(MAX_LISTED);
        for (name, count) in from.per_backend {
            *into.per_backend.entry(name).or_default() += count;
        }
        for (name, count) in from.per_source {
            *into.per_source.entry(name).or_default() += count;
        }
        for (target, backends) in from.per_target {
            let into = into.per_target.entry(target).or_default();
            for (name, count) in backends {
                *into.entry(name).or_default() += count;
            }
        }
        self.records.extend(other.records);
    }

    fn record(&mut self, options: &Options, to: SocketAddr, start_ns: u64, result: Result<Greeting, StepError>) {
        let summary = &mut self.summary;
        summary.connections += 1;
        if options.log.is_some() {
            self.records.push(Record {
                start_ns,
                end_ns: monotonic_ns(),
                to,
                outcome: result
                    .as_ref()
                    .map(|greeting| greeting.backend.clone())
                    .map_err(StepError::errno),
            });
        }
        match result {
            Ok(greeting) => {
                if let Some(peer) = greeting.peer.filter(|&peer| peer != to) {
                    summary.peer_mismatches += 1;
                    if summary.mismatches.len() < MAX_LISTED {
                        summary.mismatches.push(Mismatch {
                            to,
                            peer,
                            at_ns: start_ns,
                        });
                    }
                }
                if let Some(source) = greeting.source {
                    *summary.per_source.entry(source).or_default() += 1;
                }
                let backends = summary.per_target.entry(to.to_string()).or_default();
                *backends.entry(greeting.backend.clone()).or_default() += 1;
                *summary.per_backend.entry(greeting.backend).or_default() += 1;
            }
            Err(error) => {
                summary.failure_count += 1;
                if summary.failures.len() < MAX_LISTED {
                    summary.failures.push(error.into_failure(to, start_ns));
                }
            }
        }
    }
}

/// Connects until a limit of the options is reached.
fn connect_all(options: &Options, next: &AtomicU64, begin: Instant) -> Tally {
    let mut tally = Tally::default();
    let end = begin + Duration::from_secs_f64(options.seconds.clamp(0.0, 86_400.0));
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= options.count {
            break;
        }
        if let Some(rate) = options.rate {
            let due = begin + Duration::from_secs_f64(number as f64 / rate.max(0.001));
            // Short sleeps, so that the end is noticed in time.
            while Instant::now() < due.min(end) && !stopped(options) {
                thread::sleep(
                    due.saturating_duration_since(Instant::now())
                        .min(Duration::from_millis(20)),
                );
            }
        }
        if Instant::now() >= end || stopped(options) {
            break;
        }
        let index = usize::try_from(number).unwrap_or_default() % options.to.len();
        let to = options.to[index];
        let start_ns = monotonic_ns();
        let result = connect_once(options, to);
        tally.record(options, to, start_ns, result);
    }
    tally
}

/// Attempts connections that are refused, until a limit of the options is reached.
fn refused(options: &Options, begin: Instant) -> Tally {
    /// Connections between two checks of the limits.
    const BATCH: usize = 1000;
    let mut tally = Tally::default();
    let end = begin + Duration::from_secs_f64(options.seconds.clamp(0.0, 86_400.0));
    let addresses: Vec<(SocketAddr, Box<dyn SockaddrLike>)> = options
        .to
        .iter()
        .map(|&to| match to {
            SocketAddr::V4(v4) => (to, Box::new(SockaddrIn::from(v4)) as _),
            SocketAddr::V6(v6) => (to, Box::new(SockaddrIn6::from(v6)) as _),
        })
        .collect();
    let new = || {
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).expect("a socket can be opened")
    };
    let mut client = new();
    while Instant::now() < end && !stopped(options) && tally.summary.connections < options.count {
        for (to, address) in addresses.iter().cycle().take(BATCH) {
            tally.summary.connections += 1;
            let errno = match socket::connect(client.as_raw_fd(), &**address) {
                Err(Errno::ECONNREFUSED) => continue,
                Err(errno) => errno as i32,
                Ok(()) => 0,
            };
            // The state of the socket is unknown after another result, so a new one is used.
            client = new();
            tally.summary.connections -= 1;
            let error = io::Error::from_raw_os_error(errno);
            tally.record(options, *to, monotonic_ns(), Err(at(ConnectStep::Connect)(error)));
        }
    }
    tally
}

fn stopped(options: &Options) -> bool {
    options.until_file.as_ref().is_some_and(|path| path.exists())
}

/// Opens a connection, reads the server's line, and closes the connection.
fn connect_once(options: &Options, to: SocketAddr) -> Result<Greeting, StepError> {
    let mut stream = open(options, to)?;
    let peer = if options.peer_check {
        Some(stream.peer_addr().map_err(at(ConnectStep::Peer))?)
    } else {
        None
    };
    let line = if options.http {
        http_line(&mut stream, to)?
    } else {
        first_line(&mut stream)?
    };
    let mut greeting = parse(&line)?;
    greeting.peer = peer;
    Ok(greeting)
}

/// Connects a socket that closes with an RST, so that no connection remains in TIME_WAIT on either side.
pub(crate) fn open(options: &Options, to: SocketAddr) -> Result<TcpStream, StepError> {
    let stream = TcpStream::connect_timeout(&to, options.timeout()).map_err(at(ConnectStep::Connect))?;
    let set_up = || -> io::Result<()> {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&stream, sockopt::Linger, &linger)?;
        stream.set_read_timeout(Some(options.timeout()))?;
        stream.set_write_timeout(Some(options.timeout()))
    };
    set_up().map_err(at(ConnectStep::Peer))?;
    Ok(stream)
}

/// Reads the line that a server of the test bed writes on each connection.
pub(crate) fn first_line(stream: &mut TcpStream) -> Result<String, StepError> {
    let mut text = Vec::new();
    let mut buffer = [0; 256];
    loop {
        let read = stream.read(&mut buffer).map_err(at(ConnectStep::Read))?;
        if read == 0 || text.len() > MAX_RESPONSE {
            return Err(at(ConnectStep::Read)(ErrorKind::UnexpectedEof.into()));
        }
        text.extend_from_slice(&buffer[..read]);
        if let Some(end) = text.iter().position(|&byte| byte == b'\n') {
            return Ok(String::from_utf8_lossy(&text[..end]).into_owned());
        }
    }
}

/// Sends a GET request for `/` and returns the first line of the body.
fn http_line(stream: &mut TcpStream, to: SocketAddr) -> Result<String, StepError> {
    let request = format!("GET / HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(at(ConnectStep::Write))?;
    let mut response = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).map_err(at(ConnectStep::Read))?;
        if read == 0 || response.len() > MAX_RESPONSE {
            break;
        }
        response.extend_from_slice(&buffer[..read]);
    }
    let text = String::from_utf8_lossy(&response);
    let invalid = |why: &str| at(ConnectStep::Read)(io::Error::new(ErrorKind::InvalidData, why.to_owned()));
    if text.is_empty() {
        return Err(at(ConnectStep::Read)(ErrorKind::UnexpectedEof.into()));
    }
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| invalid("not an HTTP response"))?;
    if head.split(' ').nth(1) != Some("200") {
        return Err(invalid("the status is not 200"));
    }
    Ok(body.lines().next().unwrap_or_default().to_owned())
}

/// Parses a server's line: `NAME` or `NAME SOURCE`.
pub(crate) fn parse(line: &str) -> Result<Greeting, StepError> {
    let mut words = line.split_whitespace();
    let Some(backend) = words.next() else {
        return Err(at(ConnectStep::Read)(ErrorKind::InvalidData.into()));
    };
    Ok(Greeting {
        backend: backend.to_owned(),
        source: words.next().map(str::to_owned),
        peer: None,
    })
}
