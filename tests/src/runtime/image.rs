//! File systems of containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Folders of this machine that its programs need.
const MACHINE: [&str; 6] = [
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/iptables",
    "/etc/alternatives",
];

/// What a container is made of.
#[derive(Debug, Clone)]
pub struct Image {
    kind: Kind,
    pub(super) entrypoint: Vec<String>,
    /// What is bound read-only into it: from where, and the place.
    pub(super) binds: Vec<(PathBuf, PathBuf)>,
}

#[derive(Debug, Clone)]
enum Kind {
    /// Compressed layers.
    Layers(Vec<PathBuf>),
    Machine,
}

impl Image {
    /// An OCI image layout in an archive, as `cargo xtask image` writes it; `folder` is where it is unpacked.
    ///
    /// # Errors
    /// If it is not one.
    pub fn from_archive(archive: &Path, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        unpack(archive, folder)?;
        let read = |path: PathBuf| -> Result<Value> {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text).with_context(|| format!("not JSON: {}", path.display()))
        };
        let blob = |descriptor: &Value| -> Result<PathBuf> {
            let digest = descriptor["digest"].as_str().context("a descriptor has a digest")?;
            Ok(folder.join("blobs").join(digest.replace(':', "/")))
        };
        let index = read(folder.join("index.json"))?;
        let manifest = read(blob(&index["manifests"][0])?)?;
        let config = read(blob(&manifest["config"])?)?;
        let layers = manifest["layers"].as_array().context("an image has layers")?;
        Ok(Self {
            kind: Kind::Layers(layers.iter().map(blob).collect::<Result<_>>()?),
            entrypoint: serde_json::from_value(config["config"]["Entrypoint"].clone()).context("no entry point")?,
            binds: Vec::new(),
        })
    }

    /// The programs of this machine, which has all that kube-proxy calls, and one more in `/usr/local/bin`.
    ///
    /// # Errors
    /// If the program has no name.
    pub fn from_host(program: &Path) -> Result<Self> {
        let name = program.file_name().context("a program has a name")?;
        let own = |path: &&&str| Path::new(path).exists();
        let mut binds: Vec<_> = MACHINE
            .iter()
            .filter(own)
            .map(|path| (PathBuf::from(path), PathBuf::from(path)))
            .collect();
        binds.push((program.to_owned(), Path::new("/usr/local/bin").join(name)));
        Ok(Self {
            kind: Kind::Machine,
            entrypoint: Vec::new(),
            binds,
        })
    }

    /// A file system of its own for a container in `bundle`; returns its root.
    pub(super) fn instance(&self, bundle: &Path) -> Result<PathBuf> {
        let root = bundle.join("rootfs");
        fs::create_dir(&root).with_context(|| format!("making {}", root.display()))?;
        match &self.kind {
            Kind::Layers(layers) => layers.iter().try_for_each(|layer| unpack(layer, &root))?,
            Kind::Machine => {
                for name in ["bin", "sbin", "lib", "lib64"] {
                    symlink(Path::new("usr").join(name), root.join(name)).context("making a link")?;
                }
            }
        }
        Ok(root)
    }
}

fn unpack(archive: &Path, folder: &Path) -> Result<()> {
    let output = Command::new("tar")
        .arg("--extract")
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(folder)
        .output()
        .context("running tar")?;
    ensure!(
        output.status.success(),
        "tar cannot read {}: {}",
        archive.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
