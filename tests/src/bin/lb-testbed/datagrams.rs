//! `lb-testbed serve-datagrams`: UDP servers.

use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::print_line;

/// Flags of `lb-testbed serve-datagrams`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Address to listen on, and the name that begins every reply
    #[arg(long, value_name = "ADDR:PORT=NAME", required = true)]
    listen: Vec<String>,
    /// Insert the client's address, as the server sees it, between the name and the payload
    #[arg(long)]
    report_source: bool,
    /// End after this many seconds
    #[arg(long, default_value_t = 3600)]
    max_seconds: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    for entry in &options.listen {
        let (address, name) = entry
            .split_once('=')
            .context("a listener needs a name: ADDR:PORT=NAME")?;
        let name = name.to_owned();
        let report_source = options.report_source;
        let socket = UdpSocket::bind(address).with_context(|| format!("listening on {address}"))?;
        thread::spawn(move || {
            let mut buffer = [0; 65_536];
            // An error concerns an earlier reply: the client has closed its socket.
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
