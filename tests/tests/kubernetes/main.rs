//! Services from a real API server, on two nodes at once.
//!
//! Tests share one cluster, one control plane, and an agent on each node; each test has a namespace of its own in the
//! API. Tests that stop the API server have a fixture of their own.

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

/// Name and function of a test.
type Test = (&'static str, fn(&Fixture) -> Result<()>);
/// Name and function of a test with a fixture of its own, and the function that creates it.
type TestAlone = (&'static str, fn() -> Result<Fixture>, fn(&Fixture) -> Result<()>);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Created by the first test that runs: listing tests, or a filter that matches none, needs no control plane.
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

/// Returns a trial that creates its own fixture.
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

/// Runs `make` on a thread that never ends. Child processes are killed when the thread that started them ends, and the
/// thread of a test ends when no test is left for it, while other tests still run.
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

/// Prints a failure at once, since other tests may run for minutes.
fn failed(name: &str, fixture: &Fixture, error: &anyhow::Error) -> Failed {
    eprintln!("{name}: {error:?}\n{}", fixture.log_tails());
    Failed::without_message()
}
