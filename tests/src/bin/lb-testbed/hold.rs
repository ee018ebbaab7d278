//! `lb-testbed connect --hold`: connections that are kept open, and checked at the end by an echo.

use std::io::{ErrorKind, Read as _, Write as _, stdin};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lb_tests::load::{ConnectStep, HeldSummary};
use lb_tests::monotonic_ns;

use crate::connect::{MAX_LISTED, Options, StepError, at, first_line, open, parse};
use crate::print_line;

/// Time after which a client ends that is not stopped.
const MAX_TIME: Duration = Duration::from_secs(600);

pub(crate) fn run(options: &Options, connections: u32) -> Result<()> {
    let mut held = HeldSummary {
        held: 0,
        live: 0,
        per_backend: Default::default(),
        live_per_backend: Default::default(),
        failures: Vec::new(),
    };
    let mut streams = Vec::new();
    for (_, &to) in (0..connections).zip(options.to.iter().cycle()) {
        let start_ns = monotonic_ns();
        let opened = open(options, to).and_then(|mut stream| {
            let greeting = parse(&first_line(&mut stream)?)?;
            Ok((stream, greeting.backend))
        });
        match opened {
            Ok((stream, backend)) => {
                held.held += 1;
                *held.per_backend.entry(backend.clone()).or_default() += 1;
                streams.push((to, backend, stream));
            }
            Err(error) => note(&mut held, error, to, start_ns),
        }
    }
    print_line("ready")?;
    wait_for_end_of_input();
    for (number, (to, backend, stream)) in streams.iter_mut().enumerate() {
        let start_ns = monotonic_ns();
        match echo(stream, &format!("are you there, {number}?\n")) {
            Ok(()) => {
                held.live += 1;
                *held.live_per_backend.entry(backend.clone()).or_default() += 1;
            }
            Err(error) => note(&mut held, error, *to, start_ns),
        }
    }
    print_line(&serde_json::to_string(&held).context("writing JSON")?)
}

fn note(held: &mut HeldSummary, error: StepError, to: SocketAddr, at_ns: u64) {
    if held.failures.len() < MAX_LISTED {
        held.failures.push(error.into_failure(to, at_ns));
    }
}

fn wait_for_end_of_input() {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // An error ends the wait as well.
        let _ = stdin().read_to_end(&mut Vec::new());
        let _ = sender.send(());
    });
    let _ = receiver.recv_timeout(MAX_TIME);
}

/// Sends a line and checks that the server returns it.
fn echo(stream: &mut TcpStream, line: &str) -> Result<(), StepError> {
    stream.write_all(line.as_bytes()).map_err(at(ConnectStep::Write))?;
    let mut answer = vec![0; line.len()];
    stream.read_exact(&mut answer).map_err(at(ConnectStep::Read))?;
    if answer != line.as_bytes() {
        return Err(at(ConnectStep::Read)(ErrorKind::InvalidData.into()));
    }
    Ok(())
}
