//! The initial file system of a virtual machine: test programs, the tools that they call, and a script that runs them.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::BufWriter;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::cpio::Archive;
use super::job::{ENDED, Job, PROGRAM_LIMIT};
use crate::kernels::{self, Kernel};
use crate::privilege::search_path;
use crate::workspace::root;

/// Tools that the test bed and the tests call, at their own paths; all other tools are busybox.
const TOOLS: [&str; 19] = [
    "bpftool", "bridge", "cat", "curl", "dig", "dnsmasq", "getent", "ip", "mount", "nft", "nginx", "setpriv", "sh",
    "sleep", "ss", "stat", "tc", "umount", "unshare",
];

/// Tools that print and load iptables rules; those that are not installed are left out.
const RULES: [&str; 6] = [
    "iptables-legacy-save",
    "ip6tables-legacy-save",
    "iptables-nft-save",
    "ip6tables-nft-save",
    "iptables-nft-restore",
    "ip6tables-nft-restore",
];
/// Folder of the extensions that they load.
const EXTENSIONS: &str = "/usr/lib/x86_64-linux-gnu/xtables";

/// Kernel modules that the test bed needs.
const MODULES: [&str; 18] = [
    "veth",
    "bridge",
    "vxlan",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "iptable_filter",
    "ip6table_filter",
    // A CNI's rules.
    "br_netfilter",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_MASQUERADE",
    // Listing and destroying sockets.
    "tcp_diag",
    "udp_diag",
    // Programs at devices, and a device without a link layer.
    "sch_ingress",
    "cls_bpf",
    "tun",
];

/// Configuration of this machine that tools read.
const CONFIGURATION: [&str; 4] = ["/etc/iproute2", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"];

/// Path of Python in the virtual machine.
const PYTHON: &str = "/usr/bin/python3";

/// Writes the archive that `kernel` boots with, for a machine that is `slow` times slower than others. The file has no name,
/// so it disappears with the process, even if that is killed.
pub(super) fn write(kernel: &Kernel, job: &Job, slow: u32) -> Result<File> {
    let file = tempfile::tempfile_in(kernels::cache()).context("cannot create a file")?;
    let mut image = Archive::new(BufWriter::new(file));
    for dir in ["bin", "sbin", "lib", "lib32", "lib64"] {
        let dir = Path::new("/").join(dir);
        if let Ok(target) = fs::read_link(&dir) {
            image.symlink(&dir, &target)?;
        }
    }
    for dir in [
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/tmp",
        "/var/log/nginx",
        "/var/lib/nginx",
    ] {
        image.directory(Path::new(dir))?;
    }
    image.symlink(Path::new("/var/run"), Path::new("/run"))?;
    image.device(Path::new("/dev/console"), (5, 1))?;
    for tool in TOOLS {
        let path = find(tool).with_context(|| format!("{tool} is not installed"))?;
        add_program(&mut image, &path)?;
    }
    for program in RULES.iter().filter_map(|program| find(program)) {
        add_program(&mut image, &program)?;
    }
    if Path::new(EXTENSIONS).is_dir() {
        image.tree(Path::new(EXTENSIONS))?;
    }
    let busybox = find("busybox").context("busybox is not installed")?;
    image.file(Path::new("/busybox/busybox"), &busybox)?;
    image.symlink(Path::new("/busybox/sh"), Path::new("busybox"))?;
    for file in CONFIGURATION.map(Path::new) {
        if file.is_dir() {
            image.tree(file)?;
        } else if file.is_file() {
            image.file(file, file)?;
        }
    }
    // Tests mount files of their own over it.
    image.content(Path::new("/etc/resolv.conf"), 0o644, b"")?;
    add_python(&mut image)?;
    for dir in ["deploy", "examples", "tests/clients"] {
        image.tree(&root().join(dir))?;
    }
    for (at, from) in &job.files {
        // Half of a program is debug information, and the archive must fit into memory.
        let small = tempfile::NamedTempFile::new_in(kernels::cache()).context("cannot create a file")?;
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(small.path()).arg(from);
        let done = strip.status().context("cannot run strip")?;
        ensure!(done.success(), "strip cannot read {}", from.display());
        image.file(at, small.path())?;
        add_libraries(&mut image, from)?;
    }
    for step in &job.steps {
        image.directory(&step.dir)?;
    }
    let mut modules = Vec::new();
    for (name, content) in kernel.modules(&MODULES)? {
        image.content(&Path::new("/modules").join(&name), 0o644, &content)?;
        modules.push(name);
    }
    image.content(Path::new("/init"), 0o755, init(&modules, job, slow)?.as_bytes())?;
    let written = image.finish()?.into_inner();
    written.context("cannot write the archive")
}

/// Returns the script that the kernel starts as init.
fn init(modules: &[String], job: &Job, slow: u32) -> Result<String> {
    let mut script = String::from(
        "#!/busybox/sh\n\
         /busybox/busybox --install -s /busybox\n\
         export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/busybox HOME=/\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs devtmpfs /dev\n\
         mount -t tmpfs tmpfs /run\n\
         mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mkdir -p /dev/shm /run/netns\n\
         ip link set lo up\n\
         uname -rv\n",
    );
    for module in modules {
        writeln!(script, "insmod /modules/{module}")?;
    }
    let slow = ("LB_SLOW", OsString::from(slow.to_string()));
    let backtrace = ("RUST_BACKTRACE", OsString::from("0"));
    for (name, value) in job.env.iter().chain([&slow, &backtrace]) {
        writeln!(script, "export {name}={}", quoted(value)?)?;
    }
    for step in &job.steps {
        writeln!(script, "echo '== {}'", step.name)?;
        write!(script, "cd {}; ", quoted(step.dir.as_os_str())?)?;
        for (name, value) in &step.env {
            write!(script, "{name}={} ", quoted(value)?)?;
        }
        write!(script, "timeout -s KILL {PROGRAM_LIMIT}")?;
        for word in iter::once(step.program.as_os_str()).chain(step.arguments.iter().map(OsString::as_os_str)) {
            write!(script, " {}", quoted(word)?)?;
        }
        // The mark is on a line of its own, even after a program that stopped within a line.
        writeln!(script, "; code=$?; echo; echo \"{ENDED}{} $code\"", step.name)?;
    }
    script.push_str("cd /; sync; poweroff -f\n");
    Ok(script)
}

/// Quotes a word for the shell.
fn quoted(word: &OsStr) -> Result<String> {
    let word = word.to_str().context("a path is not UTF-8")?;
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

/// Returns the path of a program of this machine.
fn find(program: &str) -> Option<PathBuf> {
    let path: OsString = search_path();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

type Image = Archive<BufWriter<File>>;

/// Adds a program of this machine with its libraries, and the links that lead to it.
fn add_program(image: &mut Image, path: &Path) -> Result<()> {
    add_links(image, path)?;
    add_libraries(image, path)
}

/// Adds Python, with the modules that the tests' client imports.
fn add_python(image: &mut Image) -> Result<()> {
    let python = find("python3").context("python3 is not installed")?;
    // The first one in the search path may be a script that selects an interpreter.
    let program = output(&python, &["-I", "-c", "import sys; print(sys.executable)"])?;
    let program = Path::new(program.trim_end());
    add_program(image, program)?;
    if program != Path::new(PYTHON) {
        image.symlink(Path::new(PYTHON), program)?;
    }
    let client = root().join("tests/clients/client.py");
    let client = client.to_str().context("a path is not UTF-8")?;
    let files = output(program, &["-I", client, "--files"])?;
    for file in files.lines().map(Path::new).filter(|file| *file != Path::new(client)) {
        if file.extension() == Some(OsStr::new("so")) {
            add_program(image, file)?;
        } else {
            add_links(image, file)?;
        }
    }
    Ok(())
}

/// Returns the standard output of a program.
fn output(program: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(output.status.success(), "{} failed", program.display());
    String::from_utf8(output.stdout).context("not UTF-8")
}

/// Adds the shared libraries of a program.
fn add_libraries(image: &mut Image, program: &Path) -> Result<()> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    // ldd fails for a static program, which needs no libraries.
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        !text.contains("not found"),
        "{} lacks libraries: {text}",
        program.display()
    );
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        add_links(image, Path::new(library))?;
    }
    Ok(())
}

/// Adds a file of this machine, and the symbolic links that lead to it.
fn add_links(image: &mut Image, path: &Path) -> Result<()> {
    let parent = path.parent().context("no folder")?;
    let parent = fs::canonicalize(parent).with_context(|| format!("no folder {}", parent.display()))?;
    let path = parent.join(path.file_name().context("no name")?);
    if image.has(&path) {
        return Ok(());
    }
    match fs::read_link(&path) {
        Ok(target) => {
            image.symlink(&path, &target)?;
            add_links(image, &parent.join(target))
        }
        Err(_) => image.file(&path, &path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted() {
        assert_eq!(quoted(OsStr::new("a b's")).unwrap(), r"'a b'\''s'");
    }
}
