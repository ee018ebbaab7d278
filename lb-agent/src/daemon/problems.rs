//! The board of problems: every fault that exists now, by the part of the agent that reports it.

use std::collections::BTreeMap;

use lb_core::model::Problem;
use tracing::{info, warn};

/// A part of the agent that reports problems. Problems are published in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reporter {
    /// Maps that cannot have the size that they should have. First, since each may be the reason for many others.
    MapSizes,
    /// The source, conflicts between Services, and failed writes of their maps.
    Services,
    /// NODE_ADDRS, the addresses that serve node ports.
    NodeAddresses,
    /// Programs at devices, DEVICES, and the reserved source ports.
    Devices,
    /// Settings of the kernel's nf_conntrack.
    NfConntrack,
    /// The thread that destroys sockets of removed backends.
    SocketDestroyer,
    /// The CT garbage collector.
    CtGc,
    /// The HTTP servers.
    Servers,
}

/// The problems of all reporters, and those that were last logged and last published.
#[derive(Debug, Default)]
pub(super) struct Problems {
    current: BTreeMap<Reporter, Vec<Problem>>,
    logged: Vec<Problem>,
    /// `None` until the first publication: NOTICES may contain problems of an earlier run.
    published: Option<Vec<Problem>>,
}

impl Problems {
    /// Replaces the problems of a reporter.
    pub(super) fn set(&mut self, reporter: Reporter, problems: Vec<Problem>) {
        self.current.insert(reporter, problems);
    }

    /// Logs the problems that are new or gone since the last call.
    pub(super) fn log(&mut self) {
        let all: Vec<_> = self.current.values().flatten().cloned().collect();
        for problem in all.iter().filter(|problem| !self.logged.contains(problem)) {
            warn!(place = problem.place, "{}", problem.message);
        }
        for problem in self.logged.iter().filter(|problem| !all.contains(problem)) {
            info!(place = problem.place, "resolved: {}", problem.message);
        }
        self.logged = all;
    }

    /// Logs changes, and returns all problems if they differ from those that were last published. The caller publishes
    /// them and then calls [`Problems::published`], without which they are returned again.
    pub(super) fn changed(&mut self) -> Option<Vec<Problem>> {
        self.log();
        (self.published.as_ref() != Some(&self.logged)).then(|| self.logged.clone())
    }

    /// Records that these problems were published.
    pub(super) fn published(&mut self, problems: Vec<Problem>) {
        self.published = Some(problems);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(message: &str) -> Problem {
        Problem::new("somewhere", message)
    }

    #[test]
    fn problems_are_returned_until_published_and_again_after_a_change() {
        let mut problems = Problems::default();
        assert_eq!(problems.changed(), Some(Vec::new()), "stale notices are cleared");
        assert_eq!(problems.changed(), Some(Vec::new()), "the publication failed");
        problems.published(Vec::new());
        assert_eq!(problems.changed(), None);
        problems.set(Reporter::Servers, vec![problem("port in use")]);
        let all = problems.changed().unwrap();
        assert_eq!(all, [problem("port in use")]);
        problems.published(all);
        problems.set(Reporter::Servers, vec![problem("port in use")]);
        assert_eq!(problems.changed(), None);
        problems.set(Reporter::Servers, Vec::new());
        assert_eq!(problems.changed(), Some(Vec::new()));
    }

    #[test]
    fn problems_are_ordered_by_reporter() {
        let mut problems = Problems::default();
        problems.set(Reporter::Servers, vec![problem("last")]);
        problems.set(Reporter::Services, vec![problem("first")]);
        assert_eq!(problems.changed(), Some(vec![problem("first"), problem("last")]));
    }
}
