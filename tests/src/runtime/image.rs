//! Images: the file systems of containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Directories of this machine that its programs need.
const HOST_DIRECTORIES: [&str; 6] = [
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/iptables",
    "/etc/alternatives",
];

/// The file system of a container, and its entry point.
#[derive(Debug, Clone)]
pub struct Image {
    rootfs: Rootfs,
    pub(super) entrypoint: Vec<String>,
    /// Read-only bind mounts: source and destination.
    pub(super) binds: Vec<(PathBuf, PathBuf)>,
}

#[derive(Debug, Clone)]
enum Rootfs {
    /// Archives of compressed layers.
    Layers(Vec<PathBuf>),
    /// Only links into `/usr`, which is bind-mounted from this machine.
    Host,
}

impl Image {
    /// Unpacks an archive with an OCI image layout, as `cargo xtask image` writes it, in the directory `folder`.
    ///
    /// # Errors
    /// If the archive does not contain an OCI image layout.
    pub fn from_archive(archive: &Path, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        unpack(archive, folder)?;
        let read = |path: PathBuf| -> Result<Value> {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text).with_context(|| format!("not JSON: {}", path.display()))
        };
        let blob = |descriptor: &Value| -> Result<PathBuf> {
            let digest = descriptor["digest"].as_str().context("a descriptor has no digest")?;
            Ok(folder.join("blobs").join(digest.replace(':', "/")))
        };
        let index = read(folder.join("index.json"))?;
        let manifest = read(blob(&index["manifests"][0])?)?;
        let config = read(blob(&manifest["config"])?)?;
        let layers = manifest["layers"].as_array().context("the image has no layers")?;
        Ok(Self {
            rootfs: Rootfs::Layers(layers.iter().map(blob).collect::<Result<_>>()?),
            entrypoint: serde_json::from_value(config["config"]["Entrypoint"].clone()).context("no entry point")?,
            binds: Vec::new(),
        })
    }

    /// Creates an image of this machine's programs, which include those that kube-proxy calls, and of `program` in
    /// `/usr/local/bin`.
    ///
    /// # Errors
    /// If the path of the program has no file name.
    pub fn from_host(program: &Path) -> Result<Self> {
        let name = program
            .file_name()
            .context("the path of the program has no file name")?;
        let exists = |path: &&&str| Path::new(path).exists();
        let mut binds: Vec<_> = HOST_DIRECTORIES
            .iter()
            .filter(exists)
            .map(|path| (PathBuf::from(path), PathBuf::from(path)))
            .collect();
        binds.push((program.to_owned(), Path::new("/usr/local/bin").join(name)));
        Ok(Self {
            rootfs: Rootfs::Host,
            entrypoint: Vec::new(),
            binds,
        })
    }

    /// Creates a file system for one container in the directory `bundle` and returns its root.
    pub(super) fn create_rootfs(&self, bundle: &Path) -> Result<PathBuf> {
        let root = bundle.join("rootfs");
        fs::create_dir(&root).with_context(|| format!("creating {}", root.display()))?;
        match &self.rootfs {
            Rootfs::Layers(layers) => layers.iter().try_for_each(|layer| unpack(layer, &root))?,
            Rootfs::Host => {
                for name in ["bin", "sbin", "lib", "lib64"] {
                    symlink(Path::new("usr").join(name), root.join(name)).context("creating a symbolic link")?;
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
