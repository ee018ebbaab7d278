//! Sockets that are opened, used and closed one command at a time; see `lb_tests::Sockets`.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _, stdin};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lb_tests::patience;

use crate::say;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(1);

enum Socket {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Listener(TcpListener),
}

#[derive(Default)]
struct Sockets {
    named: HashMap<String, Socket>,
    churned: Vec<UdpSocket>,
}

/// Obeys the lines of standard input; each has one line for an answer: `ok` and what there is to tell, or `error` and
/// the errno.
pub(crate) fn run() -> Result<()> {
    let mut sockets = Sockets::default();
    say("ready")?;
    for line in stdin().lines() {
        let line = line.context("reading a command")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match sockets.obey(&words)? {
            Ok(told) => say(&format!("ok {told}"))?,
            Err(error) => say(&format!("error {}", error.raw_os_error().unwrap_or(0)))?,
        }
    }
    Ok(())
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse().with_context(|| format!("no address: {text}"))
}

impl Sockets {
    fn obey(&mut self, words: &[&str]) -> Result<io::Result<String>> {
        let nothing = |_| String::new();
        Ok(match *words {
            ["udp", name, local] => {
                let socket = UdpSocket::bind(address(local)?);
                self.keep(name, socket.map(Socket::Udp)).map(nothing)
            }
            ["tcp", name, to] => {
                let socket = TcpStream::connect(address(to)?);
                self.keep(name, socket.map(Socket::Tcp)).map(nothing)
            }
            ["listen", name, local] => {
                let socket = TcpListener::bind(address(local)?);
                self.keep(name, socket.map(Socket::Listener)).map(nothing)
            }
            ["serve", name, local] => serve(name, address(local)?).map(nothing),
            ["connect", name, to] => self.udp(name)?.connect(address(to)?).map(nothing),
            ["ask", name, text] => self.ask(name, text)?,
            ["ask", name, text, to] => ask_at(self.udp(name)?, text, address(to)?),
            ["churn", to, milliseconds] => self.churn(address(to)?, milliseconds.parse()?),
            ["close", name] => Ok(if self.named.remove(name).is_some() {
                "closed"
            } else {
                ""
            }
            .into()),
            _ => bail!("no command: {words:?}"),
        })
    }

    fn keep(&mut self, name: &str, socket: io::Result<Socket>) -> io::Result<()> {
        self.named.insert(name.to_owned(), socket?);
        Ok(())
    }

    fn udp(&self, name: &str) -> Result<&UdpSocket> {
        match self.named.get(name) {
            Some(Socket::Udp(socket)) => Ok(socket),
            _ => bail!("no UDP socket {name}"),
        }
    }

    /// Says something on a connected socket and returns the answer.
    fn ask(&mut self, name: &str, text: &str) -> Result<io::Result<String>> {
        match self.named.get_mut(name) {
            Some(Socket::Udp(socket)) => Ok(ask_udp(socket, text)),
            Some(Socket::Tcp(stream)) => Ok(ask_tcp(stream, text)),
            _ => bail!("no socket {name} to ask"),
        }
    }

    /// Connects UDP sockets as fast as it can for some time, and keeps the last of them open.
    fn churn(&mut self, to: SocketAddr, milliseconds: u64) -> io::Result<String> {
        const KEPT: usize = 500;
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let end = Instant::now() + Duration::from_millis(milliseconds);
        let mut count = 0_usize;
        while Instant::now() < end {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            if self.churned.len() < KEPT {
                self.churned.push(socket);
            } else {
                self.churned[count % KEPT] = socket;
            }
            count += 1;
        }
        Ok(count.to_string())
    }
}

fn ask_udp(socket: &UdpSocket, text: &str) -> io::Result<String> {
    socket.set_read_timeout(Some(patience(ANSWER)))?;
    socket.send(text.as_bytes())?;
    received(socket)
}

fn ask_at(socket: &UdpSocket, text: &str, to: SocketAddr) -> io::Result<String> {
    socket.set_read_timeout(Some(patience(ANSWER)))?;
    socket.send_to(text.as_bytes(), to)?;
    received(socket)
}

fn received(socket: &UdpSocket) -> io::Result<String> {
    let mut buffer = [0; 512];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok(format!("{from} {}", String::from_utf8_lossy(&buffer[..length])))
}

fn ask_tcp(stream: &mut TcpStream, text: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(patience(ANSWER)))?;
    stream.write_all(format!("{text}\n").as_bytes())?;
    let mut buffer = [0; 512];
    let length = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).replace('\n', " "))
}

/// Answers each datagram with the server's name and what the datagram says.
fn serve(name: &str, local: SocketAddr) -> io::Result<()> {
    let socket = UdpSocket::bind(local)?;
    let name = name.to_owned();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        // A client that has gone is told by an error of the next call.
        loop {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let answer = format!("{name} {}", String::from_utf8_lossy(&buffer[..length]));
                let _ = socket.send_to(answer.as_bytes(), from);
            }
        }
    });
    Ok(())
}
