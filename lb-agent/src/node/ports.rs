//! The source ports of packets to other nodes: reserved, so that the node's own sockets do not get them.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::sysctl;

const RESERVED: &str = "ipv4/ip_local_reserved_ports";
const LOCAL: &str = "ipv4/ip_local_port_range";

/// The default range of node ports of the API server.
const NODE_PORTS: PortRange = PortRange {
    first: 30000,
    last: 32767,
};

/// Ports from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The first port, not zero.
    pub first: u16,
    /// The last port, inclusive.
    pub last: u16,
}

/// Reasons why a text is not a usable range.
#[derive(Debug, thiserror::Error)]
pub enum PortRangeError {
    /// The text is not of the form FIRST-LAST.
    #[error("not of the form FIRST-LAST, such as {0}")]
    Form(PortRange),
    /// The range overlaps the node ports.
    #[error("overlaps the node ports {NODE_PORTS}")]
    NodePorts,
}

/// Above the kernel's default range of ephemeral ports.
impl Default for PortRange {
    fn default() -> Self {
        Self {
            first: 61000,
            last: u16::MAX,
        }
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let range = Self::parse(text, '-').filter(|range| range.first != 0);
        let range = range.ok_or(PortRangeError::Form(Self::default()))?;
        if range.overlaps(NODE_PORTS) {
            return Err(PortRangeError::NodePorts);
        }
        Ok(range)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl PortRange {
    fn parse(text: &str, between: char) -> Option<Self> {
        let (first, last) = text.split_once(between)?;
        let range = Self {
            first: first.trim().parse().ok()?,
            last: last.trim().parse().ok()?,
        };
        (range.first <= range.last).then_some(range)
    }

    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// A set of ports, as the kernel writes it: `80,443,61000-65535`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ports(Vec<bool>);

impl Ports {
    fn parse(text: &str) -> Option<Self> {
        let mut ports = Self(vec![false; 1 << 16]);
        for word in text.trim().split(',').filter(|word| !word.is_empty()) {
            let range = match word.parse() {
                Ok(port) => PortRange {
                    first: port,
                    last: port,
                },
                Err(_) => PortRange::parse(word, '-')?,
            };
            ports.set(range, true);
        }
        Some(ports)
    }

    fn set(&mut self, range: PortRange, to: bool) {
        self.0[range.first.into()..=range.last.into()].fill(to);
    }

    fn has_all(&self, range: PortRange) -> bool {
        !self.0[range.first.into()..=range.last.into()].contains(&false)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut at = 0;
        let mut comma = "";
        for run in self.0.chunk_by(PartialEq::eq) {
            let last = at + run.len() - 1;
            if run[0] {
                write!(f, "{comma}{at}")?;
                if last > at {
                    write!(f, "-{last}")?;
                }
                comma = ",";
            }
            at = last + 1;
        }
        Ok(())
    }
}

/// The result of reserving a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Whether packets may use the ports.
    pub usable: bool,
    /// The range that lb added to the reserved ports.
    pub own: Option<PortRange>,
    /// The reason why the range could not be reserved, and its consequence.
    pub problem: Option<String>,
}

/// The ports of a network namespace that the kernel does not give to a socket that requests any port, in bind() to port
/// 0 or connect().
#[derive(Debug)]
pub struct ReservedPorts {
    sysctls: PathBuf,
}

impl ReservedPorts {
    /// Uses the network namespace of the calling thread at each call.
    #[must_use]
    pub fn new() -> Self {
        Self::at(&sysctl::net())
    }

    fn at(sysctls: &Path) -> Self {
        Self {
            sysctls: sysctls.to_owned(),
        }
    }

    /// Reserves a range instead of the earlier range `own`. If that fails, the range is usable only if it has no
    /// ephemeral port, since the kernel then gives none of its ports to a socket that requests any port.
    #[must_use]
    pub fn replace(&self, range: PortRange, own: Option<PortRange>) -> Reservation {
        match self.reserve(range, own) {
            Ok(is_new) => Reservation {
                usable: true,
                own: is_new.then_some(range),
                problem: None,
            },
            Err(error) => {
                let usable = self.is_beyond_local(range).unwrap_or(false);
                let what = if usable {
                    "a socket of this node that asks for one by number may get it"
                } else {
                    "sockets of this node may have them, so packets to other nodes get none"
                };
                Reservation {
                    usable,
                    own,
                    problem: Some(format!("ports {range} cannot be reserved ({error}): {what}")),
                }
            }
        }
    }

    /// Adds a range to the reserved ports, and removes `old`. False if all of it was reserved already.
    fn reserve(&self, range: PortRange, old: Option<PortRange>) -> io::Result<bool> {
        let there = self.read()?;
        let mut ports = there.clone();
        if let Some(old) = old {
            ports.set(old, false);
        }
        let is_new = !ports.has_all(range);
        ports.set(range, true);
        self.write(&there, &ports)?;
        Ok(is_new)
    }

    /// Removes a range from the reserved ports.
    ///
    /// # Errors
    /// Returns the error of the system call, or an error if the kernel's list cannot be parsed.
    pub fn release(&self, range: PortRange) -> io::Result<()> {
        let there = self.read()?;
        let mut ports = there.clone();
        ports.set(range, false);
        self.write(&there, &ports)
    }

    /// Whether no port of a range is an ephemeral port, reserved or not.
    fn is_beyond_local(&self, range: PortRange) -> io::Result<bool> {
        let text = fs::read_to_string(self.sysctls.join(LOCAL))?;
        let local = PortRange::parse(text.trim(), '\t').ok_or_else(|| unknown(&text))?;
        Ok(!local.overlaps(range))
    }

    fn read(&self) -> io::Result<Ports> {
        let text = fs::read_to_string(self.sysctls.join(RESERVED))?;
        Ports::parse(&text).ok_or_else(|| unknown(&text))
    }

    fn write(&self, there: &Ports, ports: &Ports) -> io::Result<()> {
        if ports == there {
            return Ok(());
        }
        // An empty line empties the list.
        fs::write(self.sysctls.join(RESERVED), format!("{ports}\n"))
    }
}

impl Default for ReservedPorts {
    fn default() -> Self {
        Self::new()
    }
}

fn unknown(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("no ports: {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn a_range_is_two_ports_that_are_no_node_ports() {
        let parse = |text: &str| text.parse::<PortRange>().ok();
        assert_eq!(parse("61000-65535"), Some(range(61000, 65535)));
        assert_eq!(parse("1-29999"), Some(range(1, 29999)));
        assert_eq!(parse("32768-32768"), Some(range(32768, 32768)));
        for text in [
            "",
            "-",
            "61000",
            "61000-",
            "0-10",
            "10-9",
            "1-65536",
            "a-b",
            "29000-30000",
            "32767-40000",
            "1-65535",
            "30001-30002",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&PortRange::default().to_string()), Some(PortRange::default()));
    }

    #[test]
    fn sets_of_ports_as_the_kernel_writes_them() {
        for text in [
            "",
            "80",
            "80,443",
            "0-65535",
            "1-2,4,6-7",
            "61000-65535",
            "80,61000-65535",
        ] {
            assert_eq!(Ports::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Ports::parse("443,80,81\n").unwrap().to_string(), "80-81,443");
        for text in ["x", "80-", "65536", "9-8"] {
            assert_eq!(Ports::parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_others_have_reserved_stays() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("ipv4")).unwrap();
        let file = folder.path().join(RESERVED);
        let reserved = ReservedPorts::at(folder.path());
        let says = || fs::read_to_string(&file).unwrap().trim().to_owned();
        assert!(reserved.reserve(range(1, 2), None).is_err(), "no such setting");
        fs::write(&file, "8080,9148\n").unwrap();
        assert!(reserved.reserve(range(61000, 65535), None).unwrap());
        assert_eq!(says(), "8080,9148,61000-65535");
        assert!(!reserved.reserve(range(61000, 65535), None).unwrap(), "there already");
        // Another range instead of lb's.
        assert!(
            reserved
                .reserve(range(60000, 62000), Some(range(61000, 65535)))
                .unwrap()
        );
        assert_eq!(says(), "8080,9148,60000-62000");
        reserved.release(range(60000, 62000)).unwrap();
        assert_eq!(says(), "8080,9148");
        fs::write(&file, "80\n").unwrap();
        reserved.release(range(80, 80)).unwrap();
        assert_eq!(says(), "");
    }

    #[test]
    fn what_cannot_be_reserved_is_used_only_where_sockets_get_none_of_it() {
        let folder = tempfile::tempdir().unwrap();
        // A folder cannot be written to, not even by root.
        fs::create_dir_all(folder.path().join(RESERVED)).unwrap();
        let reserved = ReservedPorts::at(folder.path());
        let usable = |first, last| {
            let settled = reserved.replace(range(first, last), None);
            assert!(
                settled
                    .problem
                    .is_some_and(|problem| problem.contains("cannot be reserved"))
            );
            assert_eq!(settled.own, None);
            settled.usable
        };
        // The range of ephemeral ports is unknown.
        assert!(!usable(61000, 65535));
        fs::write(folder.path().join(LOCAL), "32768\t60999\n").unwrap();
        assert!(usable(61000, 65535));
        assert!(usable(1, 32767));
        assert!(!usable(60999, 65535));
        assert!(!usable(1, 65535));
        // The range that an earlier run reserved is still released.
        let own = Some(range(50000, 50999));
        assert_eq!(reserved.replace(range(61000, 65535), own).own, own);
        fs::remove_dir(folder.path().join(RESERVED)).unwrap();
        fs::write(folder.path().join(RESERVED), "50000-50999\n").unwrap();
        let settled = reserved.replace(range(33000, 33999), own);
        assert_eq!(
            settled,
            Reservation {
                usable: true,
                own: Some(range(33000, 33999)),
                problem: None
            }
        );
        assert_eq!(
            fs::read_to_string(folder.path().join(RESERVED)).unwrap(),
            "33000-33999\n"
        );
    }
}
