//! Words of the programs' log lines (`lb-agent run --ebpf-log`).
//!
//! A program cannot choose between strings: they would need pointers in its data. So it writes a number after the name of
//! its table, as in `reason#16`, and addresses in IPv6 notation. The agent replaces both by text for operators.

use crate::abi::DropReason;
use crate::abi::enums::abi_enum;

abi_enum! {
    /// The hook that a line is from. Hooks of getpeername, bind and release do not log: a check of the level would cost the
    /// verifier more than 2 % of their instructions.
    pub enum Hook: u32, from_u32 {
        /// `cgroup/connect4`.
        Connect4 = 0, "connect4";
        /// `cgroup/connect6`.
        Connect6 = 1, "connect6";
        /// `cgroup/sendmsg4`.
        Sendmsg4 = 2, "sendmsg4";
        /// `cgroup/sendmsg6`.
        Sendmsg6 = 3, "sendmsg6";
        /// `cgroup/recvmsg4`.
        Recvmsg4 = 4, "recvmsg4";
        /// `cgroup/recvmsg6`.
        Recvmsg6 = 5, "recvmsg6";
        /// tc ingress.
        Ingress = 6, "ingress";
        /// tc egress.
        Egress = 7, "egress";
    }
}

abi_enum! {
    /// The decision about a packet that is translated.
    pub enum Decision: u32, from_u32 {
        /// The packet started a flow.
        NewFlow = 0, "new flow";
        /// The packet belongs to a flow, in the original direction.
        Request = 1, "request";
        /// The packet belongs to a flow, in the reply direction.
        Reply = 2, "reply";
    }
}

/// Returns the text for a number in a table, if there is one.
#[must_use]
pub fn text(table: &str, number: u32) -> Option<&'static str> {
    match table {
        "hook" => Hook::from_u32(number).map(Hook::label),
        "decision" => Decision::from_u32(number).map(Decision::label),
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
