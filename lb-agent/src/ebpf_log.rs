//! Prints the log lines of the programs (`run --ebpf-log`) through `tracing`.

use std::fmt::Write as _;
use std::io;
use std::net::{SocketAddr, SocketAddrV6};

use anyhow::Context as _;
use aya::Ebpf;
use aya_log::EbpfLogger;
use lb_common::logic::log as words;
use tokio::io::unix::AsyncFd;
use tracing::{debug, error, info, trace, warn};

use crate::maps::sys::watched;

/// Target of the lines, for filters such as `RUST_LOG=lb_ebpf=debug`.
macro_rules! target {
    () => {
        "lb_ebpf"
    };
}

/// Directive of a filter that shows every line.
pub(crate) const DIRECTIVE: &str = concat!(target!(), "=debug");

/// Starts to print the lines of programs in the background, on the current runtime. The task keeps the map of the lines
/// open, which programs that are loaded later refer to.
///
/// # Errors
/// Returns an error if the map of the lines cannot be used.
pub(crate) fn start(programs: &mut Ebpf) -> anyhow::Result<()> {
    let logger = EbpfLogger::init_with_logger(programs, ToTracing).context("opening the programs' log")?;
    let mut logger = watched(logger).context("polling the programs' log")?;
    tokio::spawn(async move {
        loop {
            if let Err(error) = print(&mut logger).await {
                error!(%error, "reading the programs' log");
                return;
            }
        }
    });
    Ok(())
}

/// Waits for lines, and prints them.
async fn print(logger: &mut AsyncFd<EbpfLogger<ToTracing>>) -> io::Result<()> {
    let mut ready = logger.readable_mut().await?;
    ready.get_inner_mut().flush();
    ready.clear_ready();
    Ok(())
}

/// Passes lines from `log`, which aya-log uses, to `tracing`.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = readable(&record.args().to_string());
        match record.level() {
            log::Level::Error => error!(target: target!(), "{line}"),
            log::Level::Warn => warn!(target: target!(), "{line}"),
            log::Level::Info => info!(target: target!(), "{line}"),
            log::Level::Debug => debug!(target: target!(), "{line}"),
            log::Level::Trace => trace!(target: target!(), "{line}"),
        }
    }

    fn flush(&self) {}
}

/// Replaces the numbers of a line by their texts, and v4-mapped addresses by IPv4 addresses; see
/// [`lb_common::logic::log`].
fn readable(line: &str) -> String {
    let mut readable = String::with_capacity(line.len());
    for word in line.split(' ') {
        if !readable.is_empty() {
            readable.push(' ');
        }
        let replaced = address(word).or_else(|| text(word));
        readable.push_str(replaced.as_deref().unwrap_or(word));
    }
    readable
}

fn address(word: &str) -> Option<String> {
    let addr: SocketAddrV6 = word.parse().ok()?;
    let mut text = String::new();
    match addr.ip().to_ipv4_mapped() {
        Some(ip) => write!(text, "{}", SocketAddr::new(ip.into(), addr.port())).ok()?,
        None => write!(text, "{addr}").ok()?,
    }
    Some(text)
}

fn text(word: &str) -> Option<String> {
    let (table, number) = word.split_once('#')?;
    let number: u32 = number.parse().ok()?;
    match table {
        "proto" => Some(lb_core::model::Protocol::name_of(number.try_into().ok()?).into()),
        table => words::text(table, number).map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_names_and_addresses_of_their_family() {
        for (line, expected) in [
            (
                "hook#0 proto#6 pid 7 [::ffff:10.96.0.1]:80 => [::ffff:10.10.1.2]:8080",
                "connect4 TCP pid 7 10.96.0.1:80 => 10.10.1.2:8080",
            ),
            (
                "hook#6 proto#17 [fd00::1]:4000 > [fd00:96::1]:53 service 3 rejected reason#0",
                "ingress UDP [fd00::1]:4000 > [fd00:96::1]:53 service 3 rejected no_endpoint",
            ),
            ("decision#0 decision#99 reason#x #", "new flow decision#99 reason#x #"),
        ] {
            assert_eq!(readable(line), expected);
        }
    }
}
