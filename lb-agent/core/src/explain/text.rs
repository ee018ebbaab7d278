//! The text form of an explanation.

use std::fmt;

use super::{AffinityState, Explanation, Outcome, Source};

/// One line per step, with its name in the first column.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            to,
            protocol,
            frontend,
            source,
            set,
            affinity,
            candidates,
            outcome,
            packets,
            notes,
        } = self;
        writeln!(f, "to         {to}/{protocol}")?;
        if let Some(found) = frontend {
            writeln!(
                f,
                "frontend   {} of {} (service {})",
                found.kind, found.service, found.index
            )?;
        }
        if let Some(source) = source {
            writeln!(f, "source     {source}")?;
        }
        if let Some(set) = set {
            writeln!(f, "policy     {} set, members: {} ({})", set.name, set.members, set.why)?;
        }
        if let Some(affinity) = affinity {
            writeln!(f, "affinity   {affinity}")?;
        }
        for candidate in candidates {
            let sign = if candidate.eligible { "yes" } else { "no " };
            let node = if candidate.local { "this node" } else { "other node" };
            writeln!(
                f,
                "candidate  {sign} {} (backend {}, {node}): {}",
                candidate.address, candidate.id, candidate.why
            )?;
        }
        for note in notes {
            writeln!(f, "note       {note}")?;
        }
        let what = if source.is_some() { "packet   " } else { "connect()" };
        write!(f, "{what}  {outcome}")?;
        match packets {
            Some(packets) => {
                let outcome = Clause {
                    outcome: &packets.outcome,
                    is_plural: true,
                };
                write!(f, "\npackets    from {}: {outcome}", packets.from)
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match (self.inside, self.here) {
            (true, true) => "inside the cluster, a pod of this node",
            (true, false) => "inside the cluster",
            (false, _) => "outside of the cluster",
        };
        write!(f, "{place}")?;
        if let Some(network) = &self.network {
            write!(f, " ({network})")?;
        }
        match self.admitted {
            Some(true) => write!(f, "; loadBalancerSourceRanges have it"),
            Some(false) => write!(f, "; loadBalancerSourceRanges do not have it"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for AffinityState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeout {} s: ", self.timeout)?;
        match (self.backend, self.age) {
            (Some(backend), Some(age)) => write!(f, "{backend}, last used {age} s ago; ")?,
            (None, Some(age)) => write!(f, "a backend that is gone, last used {age} s ago; ")?,
            (_, None) => {}
        }
        f.write_str(self.why)?;
        match self.remaining {
            Some(left) => write!(f, "; {left} s remain"),
            None => f.write_str("; a new backend is chosen"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clause = Clause {
            outcome: self,
            is_plural: false,
        };
        clause.fmt(f)
    }
}

/// An outcome as the rest of a sentence about a call, a packet or several packets.
struct Clause<'a> {
    outcome: &'a Outcome,
    is_plural: bool,
}

impl fmt::Display for Clause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (go, are, fail) = if self.is_plural {
            ("go", "are", "fail")
        } else {
            ("goes", "is", "fails")
        };
        match self.outcome {
            Outcome::Untouched { why } => write!(f, "{go} to the destination as it is: {why}"),
            Outcome::Connects { backends } if backends.len() == 1 => write!(f, "{go} to {}", backends[0]),
            Outcome::Connects { backends } => {
                let backends: Vec<_> = backends.iter().map(ToString::to_string).collect();
                write!(f, "{go} to one of these, at random: {}", backends.join(", "))
            }
            Outcome::Rejected { answer, reason, why } => {
                write!(f, "{are} answered with {answer}: {why} (counted as {reason})")
            }
            Outcome::Dropped { reason, why } => write!(f, "{are} dropped: {why} (counted as {reason})"),
            Outcome::Refused { errno, reason, why, .. } => {
                write!(f, "{fail} with {errno}: {why} (counted as {reason})")
            }
        }
    }
}
