//! Services that come from a real API server, on two nodes at once.
//!
//! All tests share one cluster, one control plane, and an agent on each node; each has a namespace of its own in the API.

mod bed;
mod control_plane;

use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

use self::bed::Bed;

/// A test, and its name.
type Test = (&'static str, fn(&Bed) -> Result<()>);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Made by the first test that is run: a list of tests, or a filter that leaves none, needs no control plane.
    let bed = Arc::new(OnceLock::new());
    let tests = [control_plane::TESTS].concat();
    let trials = tests.into_iter().map(|test| trial(test, &bed)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // `Conclusion::exit` would leave the cluster behind.
    drop(bed);
    conclusion.exit_code()
}

fn trial((name, test): Test, bed: &Arc<OnceLock<Result<Bed, String>>>) -> Trial {
    let bed = Arc::clone(bed);
    Trial::test(name, move || {
        let bed = bed.get_or_init(|| Bed::new().map_err(|error| format!("{error:#}")));
        let bed = bed.as_ref().map_err(|error| Failed::from(error.as_str()))?;
        test(bed).map_err(|error| Failed::from(format!("{error:?}\n{}", bed.log_tails())))
    })
}
