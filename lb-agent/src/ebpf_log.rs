//! Prints the log lines of the programs (`run --ebpf-log`) through `tracing`.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::mem;
use std::net::{SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use aya::Ebpf;
use aya_log::EbpfLogger;
use lb_common::logic::log as words;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
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

/// Highest number of lines that are printed in a second. Clients cause the lines, so their number has no other limit.
const LINES_PER_SECOND: u32 = 1000;
/// Shortest time between two readings of the map, which limits the work for lines that are not printed.
const PAUSE: Duration = Duration::from_millis(50);

/// Prints the lines of programs until it is dropped.
pub(crate) struct Printer {
    /// Carries no message: dropping it ends the thread.
    _stop: oneshot::Sender<()>,
}

/// Starts to print the lines of programs, on a thread of its own: the agent has other work while clients cause lines. The
/// thread keeps the map of the lines open, which programs of the same object that are loaded later refer to.
///
/// # Errors
/// Returns an error if the map of the lines cannot be used, or if the thread cannot be started.
pub(crate) fn start(programs: &mut Ebpf) -> anyhow::Result<Printer> {
    let budget = Arc::new(Budget::default());
    let to_tracing = ToTracing(Arc::clone(&budget));
    let logger = EbpfLogger::init_with_logger(programs, to_tracing).context("opening the programs' log")?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("creating the runtime of the programs' log")?;
    let (stop, stopped) = oneshot::channel();
    let print = move || {
        let print = async {
            tokio::select! {
                Err(error) = print(logger, &budget) => error!(%error, "reading the programs' log"),
                _ = stopped => {}
            }
        };
        runtime.block_on(print);
    };
    thread::Builder::new()
        .name("ebpf-log".into())
        .spawn(print)
        .context("starting the thread of the programs' log")?;
    Ok(Printer { _stop: stop })
}

/// Prints lines until the map cannot be read.
async fn print(logger: EbpfLogger<ToTracing>, budget: &Budget) -> io::Result<Infallible> {
    let mut logger = watched(logger)?;
    loop {
        // The lines that were not printed are reported a second later at the latest.
        if let Ok(ready) = timeout(Duration::from_secs(1), logger.readable_mut()).await {
            let mut ready = ready?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
        budget.report(Instant::now());
        sleep(PAUSE).await;
    }
}

/// The number of lines that may still be printed in this second.
#[derive(Default)]
struct Budget(Mutex<Second>);

/// The lines of one second.
#[derive(Debug, Default)]
struct Second {
    /// `None` before the first line.
    start: Option<Instant>,
    printed: u32,
    dropped: u64,
}

impl Second {
    /// Counts a line, and returns whether it is printed.
    fn admits(&mut self, now: Instant) -> bool {
        self.start.get_or_insert(now);
        let is_printed = self.printed < LINES_PER_SECOND;
        if is_printed {
            self.printed += 1;
        } else {
            self.dropped += 1;
        }
        is_printed
    }

    /// Begins a new second if this one is over, and returns the number of its lines that were not printed.
    fn end(&mut self, now: Instant) -> u64 {
        if self.start.is_none_or(|start| now - start < Duration::from_secs(1)) {
            return 0;
        }
        mem::take(self).dropped
    }
}

impl Budget {
    fn second(&self) -> MutexGuard<'_, Second> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints the number of lines that were not printed, if a second with such lines is over.
    fn report(&self, now: Instant) {
        let lines = self.second().end(now);
        if lines > 0 {
            warn!(target: target!(), "{lines} lines were not printed: at most {LINES_PER_SECOND} in a second are");
        }
    }

    /// Counts a line, and returns whether it is printed. Lines may arrive without a pause, so a second also ends here.
    fn admits(&self, now: Instant) -> bool {
        self.report(now);
        self.second().admits(now)
    }
}

/// Passes lines from `log`, which aya-log uses, to `tracing`.
struct ToTracing(Arc<Budget>);

impl log::Log for ToTracing {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.0.admits(Instant::now()) {
            return;
        }
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
    fn lines_above_the_limit_of_a_second_are_counted_instead_of_printed() {
        let start = Instant::now();
        let mut second = Second::default();
        assert_eq!(second.end(start), 0);
        let printed = (0..3 * LINES_PER_SECOND).filter(|_| second.admits(start)).count();
        assert_eq!(printed, LINES_PER_SECOND as usize);
        assert_eq!(second.end(start + Duration::from_millis(999)), 0);
        let next = start + Duration::from_secs(1);
        assert_eq!(second.end(next), u64::from(2 * LINES_PER_SECOND));
        assert!(second.admits(next));
        assert_eq!(second.end(next + Duration::from_secs(1)), 0);
    }

    #[test]
    fn lines_without_a_pause_are_printed_in_every_second() {
        let start = Instant::now();
        let budget = Budget::default();
        let printed = (0..4000).filter(|at| budget.admits(start + Duration::from_millis(*at) / 2));
        assert_eq!(printed.count(), 2 * LINES_PER_SECOND as usize);
        let printed = (0..3 * LINES_PER_SECOND).filter(|_| budget.admits(start + Duration::from_secs(9)));
        assert_eq!(printed.count(), LINES_PER_SECOND as usize);
        assert!(budget.admits(start + Duration::from_secs(10)));
    }

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
