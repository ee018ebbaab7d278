//! `lb-testbed serve`: TCP servers with many listening sockets and their connections on one thread.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{Backlog, listen};

use crate::print_line;

/// How many connections may wait for `accept`: enough for bursts while this process is not scheduled.
const BACKLOG: i32 = 4096;

/// The longest HTTP request, in bytes. The server closes the connection of a longer one without a response.
const MAX_REQUEST: usize = 16 * 1024;

/// Flags of `lb-testbed serve`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Address to listen on, and the name that clients receive [default name: ADDR:PORT]
    #[arg(long, value_name = "ADDR:PORT[=NAME]", required = true)]
    listen: Vec<String>,
    /// Echo everything that a client sends, after the name
    #[arg(long, conflicts_with = "http")]
    echo: bool,
    /// Answer one HTTP request per connection with the name as the body
    #[arg(long)]
    http: bool,
    /// Append a blank and the client's address, as the server sees it, to the name
    #[arg(long)]
    report_source: bool,
    /// End after this many seconds
    #[arg(long, default_value_t = 3600)]
    max_seconds: u64,
}

/// An open connection.
struct Connection {
    stream: TcpStream,
    /// The line with the server's name: the body of the response in HTTP.
    greeting: String,
    /// The bytes of an HTTP request that have arrived so far.
    request: Vec<u8>,
}

struct Server<'a> {
    options: &'a Options,
    epoll: Epoll,
    listeners: HashMap<u64, (TcpListener, String)>,
    connections: HashMap<u64, Connection>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut server = Server {
        options,
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("creating an epoll instance")?,
        listeners: HashMap::new(),
        connections: HashMap::new(),
    };
    for entry in &options.listen {
        server.listen(entry).with_context(|| format!("listening on {entry}"))?;
    }
    print_line("ready")?;
    let deadline = Instant::now() + Duration::from_secs(options.max_seconds);
    let mut events = [EpollEvent::empty(); 256];
    while Instant::now() < deadline {
        let count = match server.epoll.wait(&mut events, EpollTimeout::from(500_u16)) {
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno).context("waiting for connections"),
        };
        for event in &events[..count] {
            let token = event.data();
            if server.listeners.contains_key(&token) {
                server.accept(token)?;
            } else if !server.serve(token) {
                // Closing the socket removes it from the epoll instance.
                server.connections.remove(&token);
            }
        }
    }
    Ok(())
}

impl Server<'_> {
    fn listen(&mut self, entry: &str) -> Result<()> {
        let (address, name) = entry.split_once('=').unwrap_or((entry, entry));
        let name = name.trim();
        ensure!(
            !name.is_empty() && !name.contains(char::is_whitespace),
            "the name of a server must be one word"
        );
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        // Listening again only changes the backlog, which the standard library sets to 128.
        listen(&listener, Backlog::new(BACKLOG)?)?;
        let token = self.watch(&listener)?;
        self.listeners.insert(token, (listener, name.to_owned()));
        Ok(())
    }

    /// Adds a socket to the epoll instance and returns its token, which is its descriptor.
    fn watch(&self, socket: &(impl AsFd + AsRawFd)) -> Result<u64> {
        let token = u64::try_from(socket.as_raw_fd()).context("a descriptor is negative")?;
        self.epoll
            .add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token))
            .context("watching a socket")?;
        Ok(token)
    }

    fn accept(&mut self, token: u64) -> Result<()> {
        loop {
            let (listener, name) = &self.listeners[&token];
            let (stream, source) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The client has already closed the connection.
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Err(error).context("accepting"),
            };
            let greeting = self.greeting(name, source);
            let mut connection = Connection {
                stream,
                greeting,
                request: Vec::new(),
            };
            connection
                .stream
                .set_nonblocking(true)
                .context("unblocking a connection")?;
            // A few bytes fit into the empty buffer, so a failed write means that the client has closed the connection.
            if !self.options.http && connection.stream.write_all(connection.greeting.as_bytes()).is_err() {
                continue;
            }
            let token = self.watch(&connection.stream)?;
            self.connections.insert(token, connection);
        }
    }

    fn greeting(&self, name: &str, source: SocketAddr) -> String {
        if self.options.report_source {
            format!("{name} {}\n", source.ip().to_canonical())
        } else {
            format!("{name}\n")
        }
    }

    /// Processes the bytes that have arrived; returns false if the connection is over.
    fn serve(&mut self, token: u64) -> bool {
        let Some(connection) = self.connections.get_mut(&token) else {
            return false;
        };
        let mut buffer = [0; 4096];
        loop {
            let read = match connection.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return false,
            };
            if self.options.echo && connection.stream.write_all(&buffer[..read]).is_err() {
                return false;
            }
            if self.options.http {
                connection.request.extend_from_slice(&buffer[..read]);
                if connection.request.windows(4).any(|window| window == b"\r\n\r\n") {
                    let body = &connection.greeting;
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                        body.len()
                    );
                    // The connection is over, whether or not the client receives the response.
                    let _ = connection.stream.write_all(answer.as_bytes());
                    return false;
                }
                if connection.request.len() > MAX_REQUEST {
                    return false;
                }
            }
        }
    }
}
