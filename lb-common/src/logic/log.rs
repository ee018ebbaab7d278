//! Words of the programs' log lines (`lb-agent run --ebpf-log`).
//!
//! A program cannot choose between strings: they would need pointers in its data. So it writes a number after the name of
//! its table, as in `reason#16`, and addresses in IPv6 notation. The agent replaces both by text for operators.

use crate::abi::DropReason;

/// The hook that a line is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Hook {
    /// `cgroup/connect4`.
    Connect4,
    /// `cgroup/connect6`.
    Connect6,
    /// `cgroup/sendmsg4`.
    Sendmsg4,
    /// `cgroup/sendmsg6`.
    Sendmsg6,
    /// `cgroup/recvmsg4`.
    Recvmsg4,
    /// `cgroup/recvmsg6`.
    Recvmsg6,
    /// `cgroup/getpeername4`.
    Getpeername4,
    /// `cgroup/getpeername6`.
    Getpeername6,
    /// `cgroup/post_bind4`.
    PostBind4,
    /// `cgroup/post_bind6`.
    PostBind6,
    /// tc ingress.
    Ingress,
    /// tc egress.
    Egress,
}

impl Hook {
    /// All hooks, in the order of their numbers.
    pub const ALL: &[Self] = &[
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::PostBind4,
        Self::PostBind6,
        Self::Ingress,
        Self::Egress,
    ];

    /// Returns the name of the hook.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
            Self::Sendmsg4 => "sendmsg4",
            Self::Sendmsg6 => "sendmsg6",
            Self::Recvmsg4 => "recvmsg4",
            Self::Recvmsg6 => "recvmsg6",
            Self::Getpeername4 => "getpeername4",
            Self::Getpeername6 => "getpeername6",
            Self::PostBind4 => "post_bind4",
            Self::PostBind6 => "post_bind6",
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// The decision about a packet that is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Decision {
    /// The packet started a flow.
    NewFlow,
    /// The packet belongs to a flow, in the original direction.
    Request,
    /// The packet belongs to a flow, in the reply direction.
    Reply,
}

impl Decision {
    /// All decisions, in the order of their numbers.
    pub const ALL: &[Self] = &[Self::NewFlow, Self::Request, Self::Reply];

    /// Returns the words of the decision.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::NewFlow => "new flow",
            Self::Request => "request",
            Self::Reply => "reply",
        }
    }
}

/// Returns the text for a number in a table, if there is one.
#[must_use]
pub fn text(table: &str, number: u32) -> Option<&'static str> {
    match table {
        "hook" => Hook::ALL.get(number as usize).map(|hook| hook.label()),
        "decision" => Decision::ALL.get(number as usize).map(|decision| decision.label()),
        "reason" => DropReason::from_u32(number).map(DropReason::label),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_text() {
        for hook in Hook::ALL {
            assert_eq!(text("hook", *hook as u32), Some(hook.label()));
        }
        for decision in Decision::ALL {
            assert_eq!(text("decision", *decision as u32), Some(decision.label()));
        }
        for reason in DropReason::ALL {
            assert_eq!(text("reason", *reason as u32), Some(reason.label()));
        }
        assert_eq!(text("hook", 99), None);
        assert_eq!(text("unknown", 0), None);
    }
}
