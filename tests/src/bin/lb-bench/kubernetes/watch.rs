//! A client that tells when a Service's answer changes.

use std::io::{self, BufRead as _, BufReader, Write as _, stdout};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lb_tests::monotonic_ns;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Linger;

/// Between two connections: how finely a change is seen.
const PAUSE: Duration = Duration::from_millis(1);
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where to connect
    #[arg(long)]
    to: SocketAddr,
}

/// Connects until it is killed; writes a line `START NAME` when another backend than before, or none, has answered.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut last = String::new();
    loop {
        let start = monotonic_ns();
        let name = ask(options.to).unwrap_or_default();
        if name != last {
            writeln!(stdout(), "{start} {name}").context("writing to standard output")?;
            last = name;
        }
        sleep(PAUSE);
    }
}

/// The name of the backend that answers.
fn ask(to: SocketAddr) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Reset in place of closed: no port waits for a minute.
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &at_once)?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    Ok(name.trim_end().to_owned())
}
