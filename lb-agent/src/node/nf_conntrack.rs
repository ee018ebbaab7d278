//! The kernel's connection tracking, configured as kube-proxy configures it: otherwise a node falls back to small
//! defaults, and connections that CNIs masquerade break sooner.
//!
//! The limit and the size of the table are the machine's; time-outs are those of a network namespace.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use tracing::info;

use super::sysctl;
use lb_core::model::{Problem, ProblemKind};

const MAX: &str = "nf_conntrack_max";
/// Number of hash buckets of the table.
const BUCKETS: &str = "nf_conntrack_buckets";
/// The highest limit that follows from the number of processors, as kube-proxy has it.
const MOST: u64 = 1 << 20;

/// kube-proxy's `conntrack`, with its defaults. Zero leaves a setting as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NfConntrackSettings {
    /// Connections to be tracked for each processor.
    pub max_per_core: u32,
    /// The minimum; ignored if `max_per_core` is zero.
    pub min: u32,
    /// Time-out of an idle established TCP connection.
    pub tcp_established: Duration,
    /// Time-out of a half-closed TCP connection.
    pub tcp_close_wait: Duration,
    /// Segments out of the window are not INVALID.
    pub tcp_be_liberal: bool,
    /// Time-out of unreplied UDP flows.
    pub udp: Duration,
    /// Time-out of UDP streams.
    pub udp_stream: Duration,
}

impl Default for NfConntrackSettings {
    fn default() -> Self {
        Self {
            max_per_core: 32 * 1024,
            min: 128 * 1024,
            tcp_established: Duration::from_secs(24 * 3600),
            tcp_close_wait: Duration::from_secs(3600),
            tcp_be_liberal: false,
            udp: Duration::ZERO,
            udp_stream: Duration::ZERO,
        }
    }
}

impl NfConntrackSettings {
    /// `nf_conntrack_max` on a machine with so many processors.
    fn max(&self, processors: u64) -> u64 {
        match u64::from(self.max_per_core) * processors {
            0 => 0,
            scaled if scaled > MOST => MOST,
            scaled => scaled.max(self.min.into()),
        }
    }

    /// The settings by name.
    fn wanted(&self, processors: u64) -> Vec<(&'static str, u64)> {
        let all = [
            (MAX, self.max(processors)),
            ("nf_conntrack_tcp_timeout_established", self.tcp_established.as_secs()),
            ("nf_conntrack_tcp_timeout_close_wait", self.tcp_close_wait.as_secs()),
            ("nf_conntrack_tcp_be_liberal", self.tcp_be_liberal.into()),
            ("nf_conntrack_udp_timeout", self.udp.as_secs()),
            ("nf_conntrack_udp_timeout_stream", self.udp_stream.as_secs()),
        ];
        all.into_iter().filter(|(_, value)| *value > 0).collect()
    }
}

/// Settings that are being applied to the kernel.
#[derive(Debug)]
pub struct NfConntrack {
    sysctls: PathBuf,
    /// The settings that could not be applied yet.
    pending: Vec<(&'static str, u64)>,
}

impl NfConntrack {
    /// Creates the list of settings for the network namespace of the calling thread.
    #[must_use]
    pub fn new(settings: &NfConntrackSettings) -> Self {
        let processors = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        let processors = processors.and_then(|n| u64::try_from(n).ok()).unwrap_or(1);
        Self::at(&sysctl::net().join("netfilter"), settings, processors)
    }

    fn at(sysctls: &Path, settings: &NfConntrackSettings, processors: u64) -> Self {
        Self {
            sysctls: sysctls.to_owned(),
            pending: settings.wanted(processors),
        }
    }

    /// Applies the remaining settings. Must be called repeatedly: the kernel has no settings before conntrack is in
    /// use.
    pub fn apply(&mut self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut pending = std::mem::take(&mut self.pending);
        pending.retain(|(name, value)| match self.set(name, *value) {
            Ok(()) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => {
                let message = format!("cannot be set to {value}: {error}");
                problems.push(Problem::new(*name, message).kind(ProblemKind::Node));
                true
            }
        });
        self.pending = pending;
        problems
    }

    fn set(&self, name: &'static str, value: u64) -> io::Result<()> {
        let path = self.sysctls.join(name);
        if name == MAX && fs::metadata(&path)?.permissions().mode() & 0o222 == 0 {
            // The kernel accepts a limit only in the initial network namespace.
            info!(
                name,
                "left unchanged: it can be set in the initial network namespace only"
            );
            return Ok(());
        }
        let current = read(&path)?;
        // A limit is raised, never lowered, as by kube-proxy (kubernetes#142035). Time-outs are set exactly, as there.
        let is_applied = if name == MAX {
            current >= value
        } else {
            current == value
        };
        if !is_applied {
            fs::write(&path, value.to_string())?;
            info!(name, value, "set");
        }
        if name == MAX {
            self.grow(value / 4)?;
        }
        Ok(())
    }

    /// Enlarges the table to at least this number of hash buckets.
    fn grow(&self, buckets: u64) -> io::Result<()> {
        let path = self.sysctls.join(BUCKETS);
        if read(&path)? < buckets {
            fs::write(&path, buckets.to_string())?;
            info!(buckets, "enlarged the conntrack table");
        }
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn the_limit_follows_the_processors() {
        let settings = NfConntrackSettings::default();
        for (processors, expected) in [(1, 131_072), (4, 131_072), (5, 163_840), (32, 1 << 20), (256, 1 << 20)] {
            assert_eq!(settings.max(processors), expected, "{processors}");
        }
        let off = NfConntrackSettings {
            max_per_core: 0,
            ..settings
        };
        assert_eq!(off.max(4), 0);
    }

    #[test]
    fn zero_leaves_a_setting_as_it_is() {
        let names =
            |settings: &NfConntrackSettings| settings.wanted(1).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(
            names(&NfConntrackSettings::default()),
            [
                MAX,
                "nf_conntrack_tcp_timeout_established",
                "nf_conntrack_tcp_timeout_close_wait"
            ]
        );
        let settings = NfConntrackSettings {
            max_per_core: 0,
            tcp_established: Duration::ZERO,
            tcp_close_wait: Duration::from_millis(999),
            tcp_be_liberal: true,
            udp: Duration::from_secs(10),
            udp_stream: Duration::from_secs(20),
            ..NfConntrackSettings::default()
        };
        assert_eq!(
            names(&settings),
            [
                "nf_conntrack_tcp_be_liberal",
                "nf_conntrack_udp_timeout",
                "nf_conntrack_udp_timeout_stream"
            ]
        );
    }

    #[test]
    fn settings_are_written_once_they_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let sysctls = folder.path().join("netfilter");
        let settings = NfConntrackSettings {
            tcp_close_wait: Duration::ZERO,
            ..NfConntrackSettings::default()
        };
        let mut conntrack = NfConntrack::at(&sysctls, &settings, 8);
        // Without the kernel's module there is nothing to set, and nothing wrong.
        assert_eq!(conntrack.apply(), []);
        fs::create_dir(&sysctls).unwrap();
        let file = |name: &str| sysctls.join(name);
        fs::write(file(MAX), "65536\n").unwrap();
        fs::write(file(BUCKETS), "16384\n").unwrap();
        fs::write(file("nf_conntrack_tcp_timeout_established"), "432000\n").unwrap();
        assert_eq!(conntrack.apply(), []);
        assert_eq!(read(&file(MAX)).unwrap(), 262_144);
        assert_eq!(read(&file(BUCKETS)).unwrap(), 65_536);
        assert_eq!(read(&file("nf_conntrack_tcp_timeout_established")).unwrap(), 86_400);
        // Later changes by others are kept.
        fs::write(file(MAX), "1000\n").unwrap();
        assert_eq!(conntrack.apply(), []);
        assert_eq!(read(&file(MAX)).unwrap(), 1000);
    }

    #[test]
    fn a_large_table_is_left_alone_and_so_is_a_limit_that_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let (limit, buckets) = (folder.path().join(MAX), folder.path().join(BUCKETS));
        let settings = NfConntrackSettings {
            tcp_established: Duration::ZERO,
            tcp_close_wait: Duration::ZERO,
            ..NfConntrackSettings::default()
        };
        fs::write(&buckets, "1000000\n").unwrap();
        fs::write(&limit, "5\n").unwrap();
        fs::set_permissions(&limit, Permissions::from_mode(0o444)).unwrap();
        assert_eq!(NfConntrack::at(folder.path(), &settings, 1).apply(), []);
        assert_eq!(read(&limit).unwrap(), 5);
        fs::set_permissions(&limit, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(NfConntrack::at(folder.path(), &settings, 1).apply(), []);
        assert_eq!(read(&limit).unwrap(), 131_072);
        assert_eq!(read(&buckets).unwrap(), 1_000_000);
    }

    #[test]
    fn higher_limit_is_kept_and_longer_timeouts_are_set() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let established = "nf_conntrack_tcp_timeout_established";
        let settings = NfConntrackSettings {
            tcp_close_wait: Duration::ZERO,
            ..NfConntrackSettings::default()
        };
        fs::write(file(MAX), "2000000\n").unwrap();
        fs::write(file(BUCKETS), "1000\n").unwrap();
        fs::write(file(established), "432000\n").unwrap();
        assert_eq!(NfConntrack::at(folder.path(), &settings, 1).apply(), []);
        assert_eq!(read(&file(MAX)).unwrap(), 2_000_000);
        assert_eq!(read(&file(BUCKETS)).unwrap(), 131_072 / 4);
        assert_eq!(read(&file(established)).unwrap(), 86_400);
    }

    #[test]
    fn what_cannot_be_written_is_told_and_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let name = "nf_conntrack_tcp_be_liberal";
        let settings = NfConntrackSettings {
            max_per_core: 0,
            tcp_established: Duration::ZERO,
            tcp_close_wait: Duration::ZERO,
            tcp_be_liberal: true,
            ..NfConntrackSettings::default()
        };
        let mut conntrack = NfConntrack::at(folder.path(), &settings, 1);
        // A folder cannot be written to, not even by root.
        fs::create_dir(folder.path().join(name)).unwrap();
        let problems = conntrack.apply();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().starts_with(name), "{problems:?}");
        fs::remove_dir(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name), "0\n").unwrap();
        assert_eq!(conntrack.apply(), []);
        assert_eq!(read(&folder.path().join(name)).unwrap(), 1);
    }
}
