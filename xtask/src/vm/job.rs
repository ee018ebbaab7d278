//! What is run in a virtual machine.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use crate::artifacts::{Built, TestProgram};
use crate::testbed::Programs;
use crate::workspace::{current_program, root};

/// Test programs in the order of what is best known first; all others follow.
const KNOWN: [&str; 9] = [
    "verifier",
    "tc_programs",
    "packet_path",
    "devices",
    "socket_lb",
    "udp",
    "dns_clients",
    "updates_under_load",
    "restart",
];

/// What machines leave out unless a filter asks for it: the test bed itself, what `explain` says of the very decisions that
/// the other tests make, the agent's HTTP servers and Events, what it does when its own calls fail, what its commands
/// print, and what needs no kernel at all. None of it depends on the kernel's version, and emulation takes more than ten
/// minutes for it.
const LEFT_OUT: [&str; 6] = ["explain", "faults", "fuzz_corpus", "pinned_maps", "server", "testbed"];

/// What one of several machines does for all, in turn, unless a filter asks for it, to save time.
const SHARED: [&str; 5] = ["demo", "dns_clients", "session_affinity", "stress", "trace"];

/// How long one program may run, in seconds. One that hangs keeps the others from running no longer.
pub(super) const PROGRAM_LIMIT: u32 = 15 * 60;

/// Prefix of the line that the virtual machine prints when a program has ended.
pub(super) const ENDED: &str = "lb-vm: ended ";

/// Programs to run, and files that they need besides those of every machine.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// One after the other.
    pub(super) steps: Vec<Step>,
    /// Files: where the programs look for them, and where they are on this machine.
    pub(super) files: Vec<(PathBuf, PathBuf)>,
    /// For all programs.
    pub(super) env: Vec<(&'static str, OsString)>,
}

/// A program to run.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    /// A word that is no other step's.
    pub(super) name: String,
    /// The program, which is among the files.
    pub(super) program: PathBuf,
    /// Its arguments.
    pub(super) arguments: Vec<OsString>,
    /// Variables for it alone.
    pub(super) env: Vec<(&'static str, OsString)>,
    /// Where it runs.
    pub(super) dir: PathBuf,
    /// It is a program of tests, which tells its own results.
    pub(super) tells: bool,
    /// One of several machines runs it.
    pub(super) shared: bool,
}

impl Job {
    /// The tests that need a kernel, or those of them whose name contains `filter`. They are as `built`; the programs that
    /// they start are those in `release` where that has them: emulation is slow enough.
    pub(crate) fn tests(built: &Built, release: &Built, filter: Option<&str>) -> Result<Self> {
        // Emulated, the control plane of Kubernetes would not come up in time.
        let left_out = |test: &TestProgram| filter.is_none() && LEFT_OUT.contains(&test.target.as_str());
        let wanted = |test: &&TestProgram| test.needs_root() && !test.needs_kubernetes() && !left_out(test);
        if filter.is_none() {
            println!(
                "without {}, which do not depend on the kernel's version; {} on one machine each",
                LEFT_OUT.join(", "),
                SHARED.join(", ")
            );
        }
        let mut tests: Vec<_> = built.tests.iter().filter(wanted).collect();
        tests.sort_by_key(|test| {
            KNOWN
                .iter()
                .position(|known| *known == test.target)
                .unwrap_or(KNOWN.len())
        });
        let mut files: Vec<_> = built
            .all_programs()
            // Of no use there, and large.
            .filter(|(name, _)| *name != env!("CARGO_PKG_NAME"))
            .map(|(name, path)| (path.clone(), release.program(name).unwrap_or_else(|_| path.clone())))
            .collect();
        files.extend(tests.iter().map(|test| (test.path.clone(), test.path.clone())));
        let programs = built.programs()?;
        Ok(Self {
            steps: tests.into_iter().map(|test| Step::tests(test, filter)).collect(),
            files,
            env: vec![
                ("LB_AGENT", programs.agent.into()),
                ("LB_TESTBED", programs.testbed.into()),
            ],
        })
    }

    /// What one of so many machines does of it.
    pub(super) fn share(&self, machine: usize, machines: usize) -> Self {
        let mut turn = (0..machines).cycle();
        let mut share = self.clone();
        share.steps.retain(|step| !step.shared || turn.next() == Some(machine));
        share
    }

    /// The check of the demo.
    pub(crate) fn demo(programs: &Programs) -> Result<Self> {
        let myself = current_program()?;
        let files = [&myself, &programs.agent, &programs.testbed].map(|path| (path.clone(), path.clone()));
        let (agent, testbed) = (&programs.agent, &programs.testbed);
        let arguments = ["run", "--check", "--agent"].map(OsString::from).into_iter();
        let arguments = arguments.chain([agent.into(), "--testbed".into(), testbed.into()]);
        Ok(Self {
            steps: vec![Step {
                name: "demo".to_owned(),
                program: myself,
                arguments: arguments.collect(),
                env: Vec::new(),
                dir: root(),
                tells: false,
                shared: false,
            }],
            files: files.into(),
            env: Vec::new(),
        })
    }
}

impl Step {
    fn tests(test: &TestProgram, filter: Option<&str>) -> Self {
        // One at a time, and each says at once what it has to say: whoever waits sees where it is.
        let arguments = ["--test-threads=1", "--nocapture"].into_iter().chain(filter);
        Self {
            name: format!("{}/{}", test.package, test.target),
            program: test.path.clone(),
            arguments: arguments.map(OsString::from).collect(),
            env: vec![
                ("CARGO_MANIFEST_DIR", test.dir.clone().into()),
                ("CARGO_PKG_NAME", test.package.clone().into()),
            ],
            dir: test.dir.clone(),
            tells: true,
            shared: filter.is_none() && SHARED.contains(&test.target.as_str()),
        }
    }
}
