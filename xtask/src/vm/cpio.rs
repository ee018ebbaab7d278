//! Archives that the kernel unpacks as its initial file system: cpio, format "newc".

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// File types, as in `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writer of an archive. A second entry for a path is ignored.
#[derive(Debug)]
pub(crate) struct Archive<W: Write> {
    out: W,
    written: u64,
    inode: u32,
    known: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    /// Creates an empty archive.
    pub(crate) fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
            known: BTreeSet::new(),
        }
    }

    /// Returns true if the archive has an entry for this path.
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.known.contains(path)
    }

    /// Adds a folder and the folders above it.
    pub(crate) fn directory(&mut self, path: &Path) -> Result<()> {
        let mut above = PathBuf::from("/");
        for part in path.components().filter(|part| matches!(part, Component::Normal(_))) {
            above.push(part);
            if self.claim(&above) {
                self.header(&above, DIRECTORY | 0o755, 0, (0, 0))?;
            }
        }
        Ok(())
    }

    /// Adds a file of this machine at the path `at`, with its permissions.
    pub(crate) fn file(&mut self, at: &Path, from: &Path) -> Result<()> {
        let mut file = File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
        let metadata = file.metadata()?;
        let mode = metadata.permissions().mode() & 0o777;
        if !self.entry(at, REGULAR | mode, metadata.len(), (0, 0))? {
            return Ok(());
        }
        let copied = io::copy(&mut file, &mut self.out).with_context(|| format!("cannot copy {}", from.display()))?;
        ensure!(
            copied == metadata.len(),
            "{} changed while it was copied",
            from.display()
        );
        self.written += copied;
        self.pad()
    }

    /// Adds a file with this content.
    pub(crate) fn content(&mut self, at: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if self.entry(at, REGULAR | mode, content.len() as u64, (0, 0))? {
            self.put(content)?;
            self.pad()?;
        }
        Ok(())
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, at: &Path, target: &Path) -> Result<()> {
        let target = target.as_os_str().as_bytes();
        if self.entry(at, SYMLINK | 0o777, target.len() as u64, (0, 0))? {
            self.put(target)?;
            self.pad()?;
        }
        Ok(())
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, at: &Path, number: (u32, u32)) -> Result<()> {
        self.entry(at, CHARACTER_DEVICE | 0o600, 0, number).map(drop)
    }

    /// Adds all files of a folder at their own paths.
    pub(crate) fn tree(&mut self, dir: &Path) -> Result<()> {
        self.directory(dir)?;
        for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                self.tree(&path)?;
            } else if metadata.is_symlink() {
                self.symlink(&path, &fs::read_link(&path)?)?;
            } else if metadata.is_file() {
                self.file(&path, &path)?;
            }
        }
        Ok(())
    }

    /// Writes the trailer and returns the writer.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.header(Path::new("/TRAILER!!!"), 0, 0, (0, 0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Reserves a path; returns false if the archive has it already.
    fn claim(&mut self, path: &Path) -> bool {
        self.known.insert(path.to_owned())
    }

    /// Writes the header of an entry that is not a folder; returns false if the archive has the path already.
    fn entry(&mut self, at: &Path, mode: u32, length: u64, device: (u32, u32)) -> Result<bool> {
        if let Some(above) = at.parent() {
            self.directory(above)?;
        }
        let new = self.claim(at);
        if new {
            self.header(at, mode, length, device)?;
        }
        Ok(new)
    }

    fn header(&mut self, path: &Path, mode: u32, length: u64, (major, minor): (u32, u32)) -> Result<()> {
        let name = path
            .strip_prefix("/")
            .context("not an absolute path")?
            .as_os_str()
            .as_bytes();
        let length = u32::try_from(length).with_context(|| format!("{} is too large", path.display()))?;
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            major,
            minor,
            u32::try_from(name.len() + 1)?,
            0,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(name)?;
        self.put(b"\0")?;
        self.pad()
    }

    /// Pads the archive to the next multiple of four bytes.
    fn pad(&mut self) -> Result<()> {
        let missing = usize::try_from((4 - self.written % 4) % 4)?;
        self.put(&[0; 3][..missing])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).context("cannot write the archive")?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_folders_come_first() {
        let mut archive = Archive::new(Vec::new());
        archive.content(Path::new("/a/b"), 0o644, b"12345").unwrap();
        archive.symlink(Path::new("/a/c"), Path::new("b")).unwrap();
        archive.content(Path::new("/a/b"), 0o644, b"again").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, six)| *six == b"070701")
            .collect();
        assert!(starts.iter().all(|(at, _)| at % 4 == 0));
        let name = |at: usize| {
            let rest = &bytes[at + 110..];
            let end = rest.iter().position(|&byte| byte == 0).unwrap();
            String::from_utf8_lossy(&rest[..end]).into_owned()
        };
        let names: Vec<_> = starts.iter().map(|&(at, _)| name(at)).collect();
        assert_eq!(names, ["a", "a/b", "a/c", "TRAILER!!!"]);
        assert_eq!(&bytes[starts[1].0 + 54..starts[1].0 + 62], b"00000005");
    }
}
