//! `lb-testbed churn`: creates and connects one socket after another, as fast as possible; see
//! `lb_tests::scripted_socket`.

use std::collections::VecDeque;
use std::io::{Read as _, stdin};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use clap::Args;
use lb_tests::SocketKind;
use nix::sys::socket::{SockaddrStorage, connect};

use crate::{print_line, scripted_socket};

/// Flags of `lb-testbed churn`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Kind of socket
    #[arg(long, value_parser = scripted_socket::parse_kind)]
    kind: SocketKind,
    /// Address to connect to
    #[arg(long)]
    to: SocketAddr,
    /// How many of the last sockets stay open
    #[arg(long, default_value_t = 2000)]
    keep: usize,
}

/// Connects sockets until a byte arrives on standard input, prints their number, and keeps the last ones until standard
/// input ends.
pub(crate) fn run(options: &Options) -> Result<()> {
    static STOP: AtomicBool = AtomicBool::new(false);
    let to = SockaddrStorage::from(options.to);
    let mut kept = VecDeque::new();
    let mut count = 0_u64;
    print_line("ready")?;
    let reader = thread::spawn(|| {
        let result = stdin().read(&mut [0]);
        STOP.store(true, Ordering::Relaxed);
        result
    });
    while !STOP.load(Ordering::Relaxed) {
        let socket = scripted_socket::open(options.kind)?;
        connect(socket.as_raw_fd(), &to).with_context(|| format!("connecting to {}", options.to))?;
        kept.push_back(socket);
        if kept.len() > options.keep {
            kept.pop_front();
        }
        count += 1;
    }
    if let Ok(result) = reader.join() {
        result.context("reading standard input")?;
    }
    print_line(&count.to_string())?;
    stdin().read_to_end(&mut Vec::new()).context("reading standard input")?;
    Ok(())
}
