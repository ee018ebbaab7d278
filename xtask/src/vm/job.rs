//! The job of a virtual machine: programs to run, and the files that they need.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use crate::artifacts::{Built, TestProgram};
use crate::testbed::Programs;
use crate::workspace::{current_program, root};

/// Test programs that run first, in this order, because their results matter most; all others follow.
const FIRST: [&str; 9] = [
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

/// Test programs that virtual machines skip without a filter: the test bed itself, the output of `explain` about decisions
/// that other tests make, the agent's HTTP servers and Events, its behavior when its own calls fail, the output of its
/// commands, and tests that need no kernel at all. None of them depends on the kernel's version, and emulation takes more
/// than ten minutes for them.
const SKIPPED: [&str; 6] = ["explain", "faults", "fuzz_corpus", "pinned_maps", "server", "testbed"];

/// Test programs that run on one of several machines each, in turn, to save time. With a filter they run on all machines.
const SHARED: [&str; 5] = ["demo", "dns_clients", "session_affinity", "stress", "trace"];

/// Time limit of one program in seconds, so that a program that hangs does not keep the others from running.
pub(super) const PROGRAM_LIMIT: u32 = 15 * 60;

/// Prefix of the line that the virtual machine prints when a program has ended.
pub(super) const ENDED: &str = "lb-vm: ended ";

/// Programs to run, and the files that they need in addition to those of every machine.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Steps, which run one after the other.
    pub(super) steps: Vec<Step>,
    /// Files: path in the virtual machine and path on this machine.
    pub(super) files: Vec<(PathBuf, PathBuf)>,
    /// Environment variables of all programs.
    pub(super) env: Vec<(&'static str, OsString)>,
}

/// A program to run, with its arguments and environment.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    /// Unique name, one word.
    pub(super) name: String,
    /// Path of the program, which is among the job's files.
    pub(super) program: PathBuf,
    /// Its arguments.
    pub(super) arguments: Vec<OsString>,
    /// Environment variables of this program.
    pub(super) env: Vec<(&'static str, OsString)>,
    /// Working folder.
    pub(super) dir: PathBuf,
    /// True for a test program, which prints a summary with its own counts.
    pub(super) prints_summary: bool,
    /// True if only one of several machines runs it.
    pub(super) shared: bool,
}

impl Job {
    /// Returns the job of the tests that need a kernel, or those of them with `filter` in their name. The tests are those in
    /// `built`. The programs that they start are those in `release`, if it has them, because emulation is slow.
    pub(crate) fn tests(built: &Built, release: &Built, filter: Option<&str>) -> Result<Self> {
        // Under emulation, the Kubernetes control plane would not start in time.
        let skipped = |test: &TestProgram| filter.is_none() && SKIPPED.contains(&test.target.as_str());
        let wanted = |test: &&TestProgram| test.needs_root() && !test.needs_kubernetes() && !skipped(test);
        if filter.is_none() {
            println!(
                "skipping {}, which do not depend on the kernel's version; running {} on one machine each",
                SKIPPED.join(", "),
                SHARED.join(", ")
            );
        }
        let mut tests: Vec<_> = built.tests.iter().filter(wanted).collect();
        tests.sort_by_key(|test| {
            FIRST
                .iter()
                .position(|known| *known == test.target)
                .unwrap_or(FIRST.len())
        });
        let mut files: Vec<_> = built
            .all_programs()
            // xtask itself is of no use in the virtual machine, and large.
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

    /// Returns the part of the job for one of several machines.
    pub(super) fn share(&self, machine: usize, machines: usize) -> Self {
        let mut turn = (0..machines).cycle();
        let mut share = self.clone();
        share.steps.retain(|step| !step.shared || turn.next() == Some(machine));
        share
    }

    /// Returns the job that checks the demo.
    pub(crate) fn demo(programs: &Programs) -> Result<Self> {
        let xtask = current_program()?;
        let files = [&xtask, &programs.agent, &programs.testbed].map(|path| (path.clone(), path.clone()));
        let (agent, testbed) = (&programs.agent, &programs.testbed);
        let arguments = ["run", "--check", "--agent"].map(OsString::from).into_iter();
        let arguments = arguments.chain([agent.into(), "--testbed".into(), testbed.into()]);
        Ok(Self {
            steps: vec![Step {
                name: "demo".to_owned(),
                program: xtask,
                arguments: arguments.collect(),
                env: Vec::new(),
                dir: root(),
                prints_summary: false,
                shared: false,
            }],
            files: files.into(),
            env: Vec::new(),
        })
    }
}

impl Step {
    fn tests(test: &TestProgram, filter: Option<&str>) -> Self {
        // One test at a time with its output unbuffered, so that a person who waits can follow the progress.
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
            prints_summary: true,
            shared: filter.is_none() && SHARED.contains(&test.target.as_str()),
        }
    }
}
