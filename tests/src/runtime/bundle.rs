//! Converts the specification of a pod to the configuration of runc (runtime-spec 1.0, config.json).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{CGROUP2, ContainerExtras, Image};

/// The PATH that containerd sets for a container without one.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Paths of /proc and /sys that are hidden in a container that is not privileged, as runtimes do by default.
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// Paths that are read-only in a container that is not privileged.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Capabilities in the order of their numbers (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The configuration of a container.
pub(super) struct Bundle<'a> {
    pub(super) node: &'a str,
    pub(super) image: &'a Image,
    pub(super) rootfs: PathBuf,
    /// The container's cgroup, from the root of the hierarchy.
    pub(super) cgroup: PathBuf,
    /// Directory for the container's empty volumes.
    pub(super) folder: &'a Path,
}

impl Bundle<'_> {
    pub(super) fn config(&self, pod: &Value, container: &Value, extras: &ContainerExtras<'_>) -> Result<Value> {
        ensure!(pod["hostNetwork"] == true, "pods without hostNetwork are not supported");
        let security = &container["securityContext"];
        let privileged = security["privileged"] == true;
        let capabilities = capabilities(security)?;
        let mut mounts = default_mounts(privileged);
        let mut propagation = "rslave";
        for mount in array(&container["volumeMounts"]) {
            let mode = match mount["mountPropagation"].as_str() {
                None | Some("None") => "rprivate",
                Some("HostToContainer") => "rslave",
                Some("Bidirectional") if privileged => "rshared",
                Some(other) => bail!("mount propagation {other} needs a privileged container"),
            };
            if mode == "rshared" {
                propagation = mode;
            }
            let access = if mount["readOnly"] == true { "ro" } else { "rw" };
            mounts.push(json!({
                "destination": mount["mountPath"],
                "type": "bind",
                "source": self.volume(pod, text(&mount["name"])?, extras)?,
                "options": ["rbind", mode, access],
            }));
        }
        let folders = extras.mounts.iter().map(|(from, at)| (from.as_path(), Path::new(at)));
        let binds = self.image.binds.iter().map(|(from, at)| (from.as_path(), at.as_path()));
        for (from, at) in folders.chain(binds) {
            mounts.push(json!({
                "destination": at, "type": "bind", "source": from, "options": ["rbind", "rprivate", "ro"],
            }));
        }
        let mut namespaces = vec![
            json!({"type": "mount"}),
            json!({"type": "ipc"}),
            json!({"type": "cgroup"}),
        ];
        if pod["hostPID"] != true {
            namespaces.push(json!({"type": "pid"}));
        }
        let (masked, read_only) = if privileged {
            (json!([]), json!([]))
        } else {
            (json!(MASKED), json!(READ_ONLY))
        };
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": security["runAsUser"].as_u64().unwrap_or(0), "gid": 0},
                "args": self.command_line(container, extras)?,
                "env": self.env(container, extras)?,
                "cwd": "/",
                "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
            },
            "root": {"path": self.rootfs, "readonly": security["readOnlyRootFilesystem"] == true},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": self.cgroup,
                "namespaces": namespaces,
                "resources": {"devices": [{"allow": privileged, "access": "rwm"}]},
                "rootfsPropagation": propagation,
                "maskedPaths": masked,
                "readonlyPaths": read_only,
            },
        }))
    }

    /// Returns the command line: `command` replaces the image's entry point, and `args` follow.
    fn command_line(&self, container: &Value, extras: &ContainerExtras<'_>) -> Result<Vec<String>> {
        let words = |value: &Value| {
            array(value)
                .map(|word| text(word).map(str::to_owned))
                .collect::<Result<Vec<_>>>()
        };
        let mut line = words(&container["command"])?;
        if line.is_empty() {
            line.clone_from(&self.image.entrypoint);
        }
        line.extend(words(&container["args"])?);
        line.extend(extras.arguments.iter().cloned());
        // Replaces references to variables, for example $(NODE_NAME) in an argument.
        for (name, value) in self.variables(container)? {
            for word in &mut line {
                *word = word.replace(&format!("$({name})"), &value);
            }
        }
        Ok(line)
    }

    fn env(&self, container: &Value, extras: &ContainerExtras<'_>) -> Result<Vec<String>> {
        let own = self.variables(container)?;
        let own = own.into_iter().map(|(name, value)| format!("{name}={value}"));
        let more = extras.env.iter().map(|(name, value)| format!("{name}={value}"));
        Ok([PATH.to_owned()].into_iter().chain(own).chain(more).collect())
    }

    fn variables(&self, container: &Value) -> Result<Vec<(String, String)>> {
        array(&container["env"])
            .map(|variable| {
                let name = text(&variable["name"])?.to_owned();
                if variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName" {
                    return Ok((name, self.node.to_owned()));
                }
                Ok((name, text(&variable["value"])?.to_owned()))
            })
            .collect()
    }

    /// Returns the directory of a volume of the pod.
    fn volume(&self, pod: &Value, name: &str, extras: &ContainerExtras<'_>) -> Result<PathBuf> {
        if let Some(folder) = extras.volumes.get(name) {
            return Ok(folder.clone());
        }
        let volume = array(&pod["volumes"]).find(|volume| volume["name"] == name);
        let volume = volume.with_context(|| format!("the pod has no volume {name}"))?;
        let path = volume["hostPath"]["path"].as_str();
        let path = PathBuf::from(path.with_context(|| format!("volume {name} is not a host path"))?);
        if path.exists() {
            return Ok(path);
        }
        match volume["hostPath"]["type"].as_str() {
            Some("FileOrCreate") => fs::write(&path, "").with_context(|| format!("creating {}", path.display()))?,
            // A runtime would create the directory on the host. Here it is created in the container's own directory.
            None | Some("") => {
                let empty = self.folder.join(name);
                fs::create_dir_all(&empty).with_context(|| format!("creating {}", empty.display()))?;
                return Ok(empty);
            }
            Some(kind) => bail!("{} ({kind}) does not exist", path.display()),
        }
        Ok(path)
    }
}

/// Returns the mounts that runtimes add before the volumes. A cgroup namespace shows the container's own cgroup.
fn default_mounts(privileged: bool) -> Vec<Value> {
    let access = if privileged { "rw" } else { "ro" };
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount(CGROUP2, "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ]
}

/// Returns the capabilities of a container. A container that is not privileged must drop all capabilities first.
fn capabilities(security: &Value) -> Result<Vec<String>> {
    if security["privileged"] == true {
        return bounding_capabilities();
    }
    ensure!(
        security["capabilities"]["drop"] == json!(["ALL"]),
        "a container that is not privileged must drop all capabilities: {security}"
    );
    array(&security["capabilities"]["add"])
        .map(|name| {
            let name = text(name)?;
            ensure!(CAPABILITIES.contains(&name), "unknown capability {name}");
            Ok(format!("CAP_{name}"))
        })
        .collect()
}

/// Returns all capabilities in the bounding set of this process.
fn bounding_capabilities() -> Result<Vec<String>> {
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let bits = u64::from_str_radix(bits.context("no CapBnd")?.trim(), 16).context("CapBnd")?;
    let has = |number: usize| bits & (1 << number) != 0;
    let names = CAPABILITIES.iter().enumerate().filter(|&(number, _)| has(number));
    Ok(names.map(|(_, name)| format!("CAP_{name}")).collect())
}

/// Returns the elements of a JSON array; none if the value is not an array.
pub(super) fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("not a string: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_exactly_those_of_the_pod() {
        let security = json!({"capabilities": {"drop": ["ALL"], "add": ["BPF", "NET_ADMIN"]}});
        assert_eq!(capabilities(&security).unwrap(), ["CAP_BPF", "CAP_NET_ADMIN"]);
        for wrong in [
            json!({"capabilities": {"add": ["BPF"]}}),
            json!({"capabilities": {"drop": ["ALL"], "add": ["CAP_BPF"]}}),
            json!(null),
        ] {
            assert!(capabilities(&wrong).is_err(), "{wrong}");
        }
    }
}
