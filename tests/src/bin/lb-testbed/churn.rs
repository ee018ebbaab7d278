//! Sockets that are made and connected one after the other, as fast as can be; see `lb_tests::scripted_socket`.

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
    /// Where to
    #[arg(long)]
    to: SocketAddr,
    /// How many sockets stay open, the last ones
    #[arg(long, default_value_t = 2000)]
    keep: usize,
}

/// Goes on until a byte comes on standard input, tells how many there were, and holds the last until it ends.
pub(crate) fn run(options: &Options) -> Result<()> {
    static ENOUGH: AtomicBool = AtomicBool::new(false);
    let to = SockaddrStorage::from(options.to);
    let mut kept = VecDeque::new();
    let mut count = 0_u64;
    print_line("ready")?;
    let reader = thread::spawn(|| {
        let told = stdin().read(&mut [0]);
        ENOUGH.store(true, Ordering::Relaxed);
        told
    });
    while !ENOUGH.load(Ordering::Relaxed) {
        let socket = scripted_socket::open(options.kind)?;
        connect(socket.as_raw_fd(), &to).with_context(|| format!("connecting to {}", options.to))?;
        kept.push_back(socket);
        if kept.len() > options.keep {
            kept.pop_front();
        }
        count += 1;
    }
    if let Ok(told) = reader.join() {
        told.context("reading standard input")?;
    }
    print_line(&count.to_string())?;
    stdin().read_to_end(&mut Vec::new()).context("reading standard input")?;
    Ok(())
}
