//! A client that reports when another backend of a Service answers.

use std::io::{self, BufRead as _, BufReader, Write as _, stdout};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lb_tests::monotonic_ns;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Linger;

/// Time between two connections, which is the resolution of the time of a change.
const PAUSE: Duration = Duration::from_millis(1);
/// Time limit of a connection.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Address to connect to
    #[arg(long)]
    to: SocketAddr,
}

/// Connects until it is killed. Writes a line `START NAME` when another backend than before has answered, or none.
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

/// Returns the name of the backend that answers.
fn ask(to: SocketAddr) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // The connection is reset, not closed, so that its port is not in TIME_WAIT for a minute.
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, Linger, &at_once)?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    Ok(name.trim_end().to_owned())
}
