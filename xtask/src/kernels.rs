//! Kernels for virtual machines, from Debian's packages.

use std::collections::{BTreeMap, BTreeSet};
use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::privilege::as_root;
use crate::workspace::root;

/// Files of a kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Name of the package.
    pub(crate) package: String,
    /// Image to boot.
    pub(crate) image: PathBuf,
    /// Paths of modules by name.
    modules: BTreeMap<String, PathBuf>,
    /// Names of modules that are part of the image.
    builtin: BTreeSet<String>,
}

/// Fetches the kernels of these versions that are not in the cache.
pub(crate) fn fetch_missing(versions: &[String]) -> Result<()> {
    versions.iter().try_for_each(|version| Kernel::get(version).map(drop))
}

/// Returns the folder of the fetched kernels.
pub(crate) fn cache() -> PathBuf {
    root().join("target/vm")
}

impl Kernel {
    /// Returns the newest kernel of `version` (two numbers), and fetches it if it is not in the cache.
    pub(crate) fn get(version: &str) -> Result<Self> {
        ensure!(
            ARCH == "x86_64",
            "there are virtual machines for x86_64 only, not for {ARCH}"
        );
        let package = newest(version)?;
        let dir = cache().join(&package);
        if !dir.is_dir() {
            fetch(&package, &dir).with_context(|| format!("cannot get {package}"))?;
        }
        Self::open(package, &dir)
    }

    fn open(package: String, dir: &Path) -> Result<Self> {
        let image = entries(&dir.join("boot"))?
            .into_iter()
            .find(|path| name(path).starts_with("vmlinuz-"))
            .with_context(|| format!("no kernel in {}", dir.display()))?;
        let library = entries(&dir.join("lib/modules"))?
            .pop()
            .with_context(|| format!("no modules in {}", dir.display()))?;
        let mut modules = BTreeMap::new();
        collect(&library.join("kernel"), &mut modules)?;
        let builtin = fs::read_to_string(library.join("modules.builtin")).context("cannot read modules.builtin")?;
        Ok(Self {
            package,
            image,
            modules,
            builtin: builtin.lines().map(|line| module_name(Path::new(line))).collect(),
        })
    }

    /// Returns name and content of these modules and their dependencies, in the order of loading.
    pub(crate) fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut loaded = Vec::new();
        for name in wanted {
            self.add(name, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if self.builtin.contains(name) || loaded.iter().any(|(known, _)| known == name) {
            return Ok(());
        }
        let path = self
            .modules
            .get(name)
            .with_context(|| format!("{} has no module {name}", self.package))?;
        let content = uncompressed(path)?;
        for needed in depends(&content) {
            self.add(&needed, loaded)?;
        }
        loaded.push((name.to_owned(), content));
        Ok(())
    }
}

/// Returns the name of the newest package that apt lists, or else of the newest one in the cache.
fn newest(version: &str) -> Result<String> {
    let numbers: Vec<_> = version.split('.').collect();
    ensure!(
        numbers.len() == 2 && numbers.iter().all(|number| number.parse::<u32>().is_ok()),
        "{version:?} is not a kernel version: give two numbers, for example 6.12"
    );
    if let Some(name) = newest_name(version, known()?) {
        return Ok(name);
    }
    let present = entries(&cache()).unwrap_or_default();
    let present = present.iter().filter(|path| path.is_dir()).map(|path| name(path));
    if let Some(name) = newest_name(version, present.collect()) {
        return Ok(name);
    }
    update_lists()?;
    newest_name(version, known()?)
        .with_context(|| format!("apt lists no package linux-image-{version}.*-cloud-amd64-unsigned; Debian 12 has it"))
}

/// Returns the names of the kernel packages that apt lists.
fn known() -> Result<Vec<String>> {
    let output = Command::new("apt-cache")
        .args(["search", "--names-only", "^linux-image-.*-cloud-amd64-unsigned$"])
        .output()
        .context("cannot run apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let names = text.lines().filter_map(|line| line.split_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

/// Lets apt fetch its package lists.
fn update_lists() -> Result<()> {
    println!("fetching the package lists");
    run(as_root(Path::new("apt-get"), &[], "fetching the package lists")?.args(["update", "--quiet"]))
}

fn newest_name(version: &str, names: Vec<String>) -> Option<String> {
    let prefix = format!("linux-image-{version}.");
    names
        .into_iter()
        .filter(|name| name.starts_with(&prefix) && name.ends_with("-cloud-amd64-unsigned"))
        .max_by_key(|name| numbers(name))
}

/// Returns all numbers in a text, as the sort key of versions.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// Fetches a package and unpacks it.
fn fetch(package: &str, dir: &Path) -> Result<()> {
    println!("fetching {package}");
    let scratch = cache().join(format!("{package}.new"));
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    fs::create_dir_all(&scratch)?;
    let done = download(package, &scratch).or_else(|_| {
        // The package lists may be outdated.
        update_lists()?;
        download(package, &scratch)
    });
    done?;
    let archive = entries(&scratch)?
        .into_iter()
        .find(|path| name(path).ends_with(".deb"))
        .context("apt-get fetched nothing")?;
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&scratch))?;
    fs::remove_file(archive)?;
    fs::rename(&scratch, dir).context("cannot put it in place")
}

fn download(package: &str, dir: &Path) -> Result<()> {
    run(Command::new("apt-get")
        .args(["download", "--quiet", package])
        .current_dir(dir))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_os_string();
    let output = command
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "{}: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
}

/// Reads a module and decompresses it, as the kernel's loader expects it.
fn uncompressed(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .context("cannot run xz")?;
    ensure!(output.status.success(), "xz cannot read {}", path.display());
    Ok(output.stdout)
}

/// Returns the names of a module's dependencies, from the field `depends` in the module itself.
fn depends(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(FIELD.len()).position(|bytes| bytes == FIELD) else {
        return Vec::new();
    };
    let rest = &module[at + FIELD.len()..];
    let end = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// Collects all modules below a folder.
fn collect(dir: &Path, modules: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for path in entries(dir)? {
        if path.is_dir() {
            collect(&path, modules)?;
        } else {
            modules.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// Returns the name of a module from its path: `nf_tables` for `net/netfilter/nf-tables.ko.xz`.
fn module_name(path: &Path) -> String {
    let name = name(path);
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Returns the paths of a folder's entries, sorted.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = list
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_package_has_the_highest_numbers() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64-unsigned",
            "linux-image-6.1.0-56-cloud-amd64-unsigned",
            "linux-image-6.1.0-99-amd64-unsigned",
            "linux-image-6.12.111+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.12+deb12-cloud-amd64-unsigned",
        ];
        let newest = |version| newest_name(version, names.map(str::to_owned).to_vec());
        assert_eq!(newest("6.1").as_deref(), Some(names[1]));
        assert_eq!(newest("6.12").as_deref(), Some(names[3]));
        assert_eq!(newest("6.13"), None);
    }

    #[test]
    fn dependencies_are_read_from_the_module() {
        assert_eq!(depends(b"x\0depends=stp,llc-x\0name=bridge\0"), ["stp", "llc_x"]);
        assert!(depends(b"x\0depends=\0name=veth\0").is_empty());
        assert!(depends(b"nothing").is_empty());
        assert_eq!(
            module_name(Path::new("kernel/net/ip6-udp_tunnel.ko.xz")),
            "ip6_udp_tunnel"
        );
    }
}
