//! Many listening sockets and their connections on one thread.

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

/// Connections that may wait for `accept`: enough for bursts while this process does not run.
const BACKLOG: i32 = 4096;

/// A request with longer headers is not answered.
const LONGEST_REQUEST: usize = 16 * 1024;

/// Flags of `lb-testbed serve`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where to listen; NAME is what clients are told, ADDR:PORT if not said
    #[arg(long, value_name = "ADDR:PORT[=NAME]", required = true)]
    listen: Vec<String>,
    /// Send back what a client sends after the name
    #[arg(long, conflicts_with = "http")]
    echo: bool,
    /// Answer one HTTP request per connection, the name being the body
    #[arg(long)]
    http: bool,
    /// After the name, a blank and the client's address as seen here
    #[arg(long)]
    report_source: bool,
    /// End after so many seconds whatever happens
    #[arg(long, default_value_t = 3600)]
    max_seconds: u64,
}

/// A connection that has not ended.
struct Connection {
    stream: TcpStream,
    /// What is still to be said, in HTTP.
    greeting: String,
    /// What the client has sent, in HTTP.
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
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?,
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
                // Closing takes it out of the epoll.
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
            "a name is one word"
        );
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        // Listening again only sets the backlog: the standard library's is 128.
        listen(&listener, Backlog::new(BACKLOG)?)?;
        let token = self.watch(&listener)?;
        self.listeners.insert(token, (listener, name.to_owned()));
        Ok(())
    }

    /// Adds a socket to the epoll; its token is its descriptor.
    fn watch(&self, socket: &(impl AsFd + AsRawFd)) -> Result<u64> {
        let token = u64::try_from(socket.as_raw_fd()).context("a descriptor is not negative")?;
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
                // The client has gone already.
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
            // A few bytes into an empty buffer: written at once, or the client has gone.
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

    /// Serves what has arrived; false when the connection is over.
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
                    // Whether or not it gets through, this connection is over.
                    let _ = connection.stream.write_all(answer.as_bytes());
                    return false;
                }
                if connection.request.len() > LONGEST_REQUEST {
                    return false;
                }
            }
        }
    }
}
