//! Servers of datagrams.

use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::print_line;

/// Flags of `lb-testbed serve-datagrams`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where to listen; the name comes first in every answer
    #[arg(long, value_name = "ADDR:PORT=NAME", required = true)]
    listen: Vec<String>,
    /// Between the name and the datagram, the client's address as seen here
    #[arg(long)]
    report_source: bool,
    /// End after so many seconds whatever happens
    #[arg(long, default_value_t = 3600)]
    max_seconds: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    for entry in &options.listen {
        let (address, name) = entry.split_once('=').context("a listener has a name")?;
        let name = name.to_owned();
        let report_source = options.report_source;
        let socket = UdpSocket::bind(address).with_context(|| format!("listening on {address}"))?;
        thread::spawn(move || {
            let mut buffer = [0; 65_536];
            // An error is that of an earlier answer: its client has gone.
            loop {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let seen = if report_source {
                        format!("{} ", from.ip().to_canonical())
                    } else {
                        String::new()
                    };
                    let answer = [name.as_bytes(), b" ", seen.as_bytes(), &buffer[..length]].concat();
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
    }
    print_line("ready")?;
    thread::sleep(Duration::from_secs(options.max_seconds));
    Ok(())
}
