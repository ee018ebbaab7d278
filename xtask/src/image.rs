//! `image`: the container image of the agent, built without a container engine.
//!
//! An OCI image layout in a tar archive (image-spec v1.1, image-layout.md), which `ctr images import`, `podman load` and
//! `skopeo copy oci-archive:` read. Its only layer has one file, the static agent. It contains no time and no path of the
//! machine that built it, so equal agents give equal bytes.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use flate2::{Compression, GzBuilder};
use oci_spec::image::{
    ANNOTATION_DESCRIPTION, ANNOTATION_LICENSES, ANNOTATION_REF_NAME, ANNOTATION_TITLE, ANNOTATION_VERSION,
    ConfigBuilder, Descriptor, HistoryBuilder, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder,
    MediaType, OciLayoutBuilder, Platform, RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::artifacts::{build_agent_for_image, package};
use crate::setup::{self, Scope};
use crate::workspace::root;

/// Default name of the image, without its tag. It names no registry, because every node imports the archive.
const NAME: &str = "localhost/lb-agent";

/// Name of the agent within the image.
const PROGRAM: &str = "lb-agent";

/// Largest size of the image in bytes: a node that has just joined waits for the image.
const LIMIT: usize = 20_000_000;

/// containerd's annotation for the name of an image in an archive.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Arguments of `image`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Path of the archive [default: target/image/lb-agent.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Name of the image without a tag; the tag is the version
    #[arg(long, default_value = NAME)]
    name: String,
}

/// Builds the agent and writes the image.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let ready = setup::run(Scope::Build)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    let output = args.output.clone().unwrap_or_else(default_output);
    let made = write(&build_agent_for_image()?, &args.name, &output)?;
    println!("{made}");
    println!("{}", output.display());
    Ok(ExitCode::SUCCESS)
}

/// Returns the default path of the archive.
fn default_output() -> PathBuf {
    root().join("target/image/lb-agent.tar")
}

/// Writes the image with the default name to the default path, for tests; returns the path.
pub(crate) fn write_default(agent: &Path) -> anyhow::Result<PathBuf> {
    let output = default_output();
    println!("{}", write(agent, NAME, &output)?);
    Ok(output)
}

/// Writes the image of an agent; returns a line with its name, version and size.
fn write(agent: &Path, name: &str, output: &Path) -> anyhow::Result<String> {
    let program = fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let about = About::of_agent(name)?;
    let image = archive(&about, &program)?;
    ensure!(
        image.len() <= LIMIT,
        "the image has {} bytes, more than the limit of {LIMIT}: check which libraries the agent was linked with",
        image.len()
    );
    if let Some(dir) = output.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    fs::write(output, &image).with_context(|| format!("cannot write {}", output.display()))?;
    let megabytes = image.len() as f64 / 1e6;
    Ok(format!("{}:{} {megabytes:.1} MB", about.name, about.version))
}

/// Metadata of the image.
#[derive(Debug)]
struct About {
    name: String,
    version: String,
    description: String,
    licenses: String,
}

impl About {
    /// Reads the metadata from the package of the agent.
    fn of_agent(name: &str) -> anyhow::Result<Self> {
        let package = package(PROGRAM)?;
        Ok(Self {
            name: name.to_owned(),
            version: package.version.to_string(),
            description: package.description.unwrap_or_default(),
            licenses: package.license.unwrap_or_default(),
        })
    }

    fn labels(&self) -> HashMap<String, String> {
        let labels = [
            (ANNOTATION_TITLE, PROGRAM),
            (ANNOTATION_VERSION, &self.version),
            (ANNOTATION_DESCRIPTION, &self.description),
            (ANNOTATION_LICENSES, &self.licenses),
        ];
        labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    /// Returns the names of the image in the index: the tag for the specification, the whole name for containerd.
    fn names(&self) -> HashMap<String, String> {
        let whole = format!("{}:{}", self.name, self.version);
        [
            (ANNOTATION_REF_NAME.to_owned(), self.version.clone()),
            (CONTAINERD_NAME.to_owned(), whole),
        ]
        .into()
    }
}

/// Returns the bytes of the archive.
fn archive(about: &About, program: &[u8]) -> anyhow::Result<Vec<u8>> {
    let layer = tar([(PROGRAM, 0o755, program)])?;
    let compressed = gzip(&layer)?;
    let labels = about.labels();
    let config = ImageConfigurationBuilder::default()
        .config(
            ConfigBuilder::default()
                .entrypoint([format!("/{PROGRAM}")])
                .labels(labels.clone())
                .build()?,
        )
        .rootfs(
            RootFsBuilder::default()
                .typ("layers")
                .diff_ids([format!("sha256:{}", sha256(&layer))])
                .build()?,
        )
        .history([HistoryBuilder::default().created_by("cargo xtask image").build()?])
        .build()?;
    let platform = {
        let mut platform = Platform::default();
        platform.set_architecture(config.architecture().clone());
        platform.set_os(config.os().clone());
        platform
    };
    let config = json(&config)?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(descriptor(MediaType::ImageConfig, &config)?)
        .layers([descriptor(MediaType::ImageLayerGzip, &compressed)?])
        .annotations(labels)
        .build()?;
    let manifest = json(&manifest)?;
    let mut image = descriptor(MediaType::ImageManifest, &manifest)?;
    image.set_annotations(Some(about.names()));
    image.set_platform(Some(platform));
    let index = ImageIndexBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageIndex)
        .manifests([image])
        .build()?;
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
    let blob = |content| format!("blobs/sha256/{}", sha256(content));
    tar([
        ("oci-layout", 0o644, json(&layout)?.as_slice()),
        ("index.json", 0o644, json(&index)?.as_slice()),
        (&blob(&manifest), 0o644, manifest.as_slice()),
        (&blob(&config), 0o644, config.as_slice()),
        (&blob(&compressed), 0o644, compressed.as_slice()),
    ])
}

/// Serializes to JSON with sorted keys: the types of the specification keep annotations in hash maps.
fn json(value: &impl Serialize) -> anyhow::Result<Vec<u8>> {
    let mut value = serde_json::to_value(value)?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

/// Returns the descriptor by which other parts of an image refer to `content`.
fn descriptor(media_type: MediaType, content: &[u8]) -> anyhow::Result<Descriptor> {
    let digest: Sha256Digest = sha256(content).parse()?;
    Ok(Descriptor::new(media_type, content.len() as u64, digest))
}

/// Returns the SHA-256 digest in lower-case hexadecimal digits.
fn sha256(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a tar archive of files that belong to root and have no times.
fn tar<'a>(files: impl IntoIterator<Item = (&'a str, u32, &'a [u8])>) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, mode, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        archive
            .append_data(&mut header, path, content)
            .with_context(|| format!("cannot archive {path}"))?;
    }
    Ok(archive.into_inner()?)
}

/// Compresses `content`, without name and time in the header.
fn gzip(content: &[u8]) -> io::Result<Vec<u8>> {
    let mut writer = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    writer.write_all(content)?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use flate2::read::GzDecoder;
    use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

    use super::*;

    fn about() -> About {
        About {
            name: "localhost/lb-agent".to_owned(),
            version: "1.2.3".to_owned(),
            description: "what it is".to_owned(),
            licenses: "MIT".to_owned(),
        }
    }

    /// Returns mode and content of each file by its path.
    fn read(archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(Result::unwrap);
        entries
            .map(|mut entry| {
                let header = entry.header();
                assert_eq!((header.uid().unwrap(), header.mtime().unwrap()), (0, 0));
                let mode = header.mode().unwrap();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                (entry.path().unwrap().to_str().unwrap().to_owned(), (mode, content))
            })
            .collect()
    }

    /// Returns the content of a descriptor after a check of its size and digest.
    fn blob<'a>(files: &'a BTreeMap<String, (u32, Vec<u8>)>, descriptor: &Descriptor) -> &'a [u8] {
        let digest = descriptor.as_digest_sha256().unwrap();
        let (_, content) = &files[&format!("blobs/sha256/{digest}")];
        assert_eq!(sha256(content), digest);
        assert_eq!(content.len() as u64, descriptor.size());
        content
    }

    #[test]
    fn image_has_one_layer_with_only_the_program() {
        let files = read(&archive(&about(), b"a program").unwrap());
        assert_eq!(files["oci-layout"].1, br#"{"imageLayoutVersion":"1.0.0"}"#);
        let index: ImageIndex = serde_json::from_slice(&files["index.json"].1).unwrap();
        let [image] = index.manifests().as_slice() else {
            panic!("{index:?}");
        };
        let names = image.annotations().as_ref().unwrap();
        assert_eq!(names[CONTAINERD_NAME], "localhost/lb-agent:1.2.3");
        let manifest: ImageManifest = serde_json::from_slice(blob(&files, image)).unwrap();
        let config: ImageConfiguration = serde_json::from_slice(blob(&files, manifest.config())).unwrap();
        assert_eq!(config.labels_of_config().unwrap()[ANNOTATION_VERSION], "1.2.3");
        assert_eq!(
            config.config().as_ref().unwrap().entrypoint().as_deref().unwrap(),
            ["/lb-agent"]
        );
        let [layer] = manifest.layers().as_slice() else {
            panic!("{manifest:?}");
        };
        let mut unpacked = Vec::new();
        GzDecoder::new(blob(&files, layer)).read_to_end(&mut unpacked).unwrap();
        assert_eq!(config.rootfs().diff_ids(), &[format!("sha256:{}", sha256(&unpacked))]);
        assert_eq!(
            read(&unpacked),
            BTreeMap::from([("lb-agent".to_owned(), (0o755, b"a program".to_vec()))])
        );
    }

    #[test]
    fn equal_programs_give_equal_bytes() {
        let first = archive(&about(), b"a program").unwrap();
        for _ in 0..10 {
            assert_eq!(archive(&about(), b"a program").unwrap(), first);
        }
        assert_ne!(archive(&about(), b"another").unwrap(), first);
    }

    #[test]
    fn sha256_agrees_with_the_standard() {
        // FIPS 180-4, example of one block.
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
