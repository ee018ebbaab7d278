//! Services that come from a real API server, on two nodes at once.
//!
//! Tests share one cluster, one control plane, and an agent on each node; each has a namespace of its own in the API.
//! Those that take the API server away have all of that for themselves.

mod control_plane;
mod endpoints;
mod fixture;
mod outages;
mod server;
mod services;

use std::process::ExitCode;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use self::fixture::Fixture;

/// A test, and its name.
type Test = (&'static str, fn(&Fixture) -> Result<()>);
/// The same of a test that has a bed of its own, and how that is made.
type TestAlone = (&'static str, fn() -> Result<Fixture>, fn(&Fixture) -> Result<()>);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Made by the first test that is run: a list of tests, or a filter that leaves none, needs no control plane.
    let fixture = Arc::new(OnceLock::new());
    let tests = [control_plane::TESTS, services::TESTS, endpoints::TESTS, server::TESTS].concat();
    let tests = tests.into_iter().map(|test| trial(test, &fixture));
    let trials = outages::TESTS
        .iter()
        .map(|&test| trial_alone(test))
        .chain(tests)
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // `Conclusion::exit` would leave the cluster behind.
    drop(fixture);
    conclusion.exit_code()
}

/// A test that makes a bed of its own.
fn trial_alone((name, make, test): TestAlone) -> Trial {
    Trial::test(name, move || {
        let fixture = make().map_err(|error| format!("{error:?}"))?;
        test(&fixture).map_err(|error| failed(name, &fixture, &error))
    })
}

fn trial((name, test): Test, fixture: &Arc<OnceLock<Result<Fixture, String>>>) -> Trial {
    let fixture = Arc::clone(fixture);
    Trial::test(name, move || {
        let fixture =
            fixture.get_or_init(|| on_a_thread_that_stays(|| Fixture::new().map_err(|error| format!("{error:?}"))));
        let fixture = fixture.as_ref().map_err(|error| Failed::from(error.as_str()))?;
        test(fixture).map_err(|error| failed(name, fixture, &error))
    })
}

/// Programs die with the thread that has started them; that of a test ends when no test is left for it, while others still
/// go on.
fn on_a_thread_that_stays<T: Send + 'static>(make: fn() -> Result<T, String>) -> Result<T, String> {
    let (made, result) = mpsc::channel();
    thread::spawn(move || {
        made.send(make()).ok();
        loop {
            thread::park();
        }
    });
    result.recv().map_err(|error| format!("making the bed: {error}"))?
}

/// Tells of a failure at once: others may go on for minutes.
fn failed(name: &str, fixture: &Fixture, error: &anyhow::Error) -> Failed {
    eprintln!("{name}: {error:?}\n{}", fixture.log_tails());
    Failed::without_message()
}
