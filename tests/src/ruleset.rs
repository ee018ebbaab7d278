//! The packet-filter rules of a namespace, to show that lb-agent writes none.

use std::fmt;

use anyhow::{Result, ensure};

use crate::Netns;

/// The programs that print rules, with their arguments. `--stateless` omits counters.
const PRINTERS: [(&str, &[&str]); 5] = [
    ("iptables-legacy-save", &[]),
    ("ip6tables-legacy-save", &[]),
    ("iptables-nft-save", &[]),
    ("ip6tables-nft-save", &[]),
    ("nft", &["--stateless", "list", "ruleset"]),
];

/// All iptables (legacy and nft) and nftables rules of a namespace, as text without counters and times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    parts: Vec<(&'static str, String)>,
}

impl Ruleset {
    /// Reads the rules of a network namespace.
    ///
    /// # Errors
    /// If none of the programs that print rules is installed, or one of them fails.
    pub fn read(netns: &Netns) -> Result<Self> {
        let mut parts = Vec::new();
        for (program, arguments) in PRINTERS {
            if which::which(program).is_err() {
                continue;
            }
            parts.push((program, without_noise(&netns.run(program, arguments)?)));
        }
        ensure!(
            !parts.is_empty(),
            "no program that prints rules: install iptables and nftables"
        );
        Ok(Self { parts })
    }

    /// Returns whether any rule contains `needle`.
    #[must_use]
    pub fn mentions(&self, needle: &str) -> bool {
        self.parts.iter().any(|(_, text)| text.contains(needle))
    }
}

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (program, text) in &self.parts {
            write!(f, "# {program}\n{text}")?;
        }
        Ok(())
    }
}

/// Removes the parts that change without a change of rules: `iptables-save` writes the time in comments, and packet counts
/// after each chain.
fn without_noise(text: &str) -> String {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| match line.split_once(" [") {
            Some((chain, _)) if line.starts_with(':') => format!("{chain}\n"),
            _ => format!("{line}\n"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_times_are_ignored() {
        let first = "# Generated on Monday\n*nat\n:INPUT ACCEPT [1:60]\n-A INPUT -s 10.0.0.1\nCOMMIT\n";
        let second = "# Generated on Tuesday\n*nat\n:INPUT ACCEPT [2:90]\n-A INPUT -s 10.0.0.1\nCOMMIT\n";
        assert_eq!(without_noise(first), without_noise(second));
        assert!(without_noise(first).contains("-A INPUT -s 10.0.0.1"));
    }
}
