//! Storages: where templates and the volumes of CTs are.
//!
//! A storage has a name, what it may hold, and a [`Backend`] that knows how volumes are kept.
//! Only directories are implemented; other kinds of storage would be other backends.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

mod dir;
pub use dir::Dir;

/// Bytes of a storage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// In use.
    pub used: u64,
    /// Left for users.
    pub avail: u64,
}

/// One entry of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name without the storage's: `vztmpl/x.tar.gz`, `100/vm-100-disk-0.raw`.
    pub name: String,
    /// `vztmpl`, `iso`, `snippets`, `backup` or `images`.
    pub content: &'static str,
    /// `tgz`, `tzst`, `tar`, `raw`, `subvol` and so on.
    pub format: &'static str,
    /// Bytes; 0 for a directory without limit.
    pub size: u64,
    /// When it was made, in seconds since the epoch.
    pub ctime: i64,
    /// The guest that owns it.
    pub vmid: Option<u32>,
}

/// The name of a volume: `STORAGE:NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeId {
    /// The storage.
    pub storage: String,
    /// The name in it, which is a relative path without `.` and `..`.
    pub name: String,
}

/// The text is not the name of a volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse volume ID '{0}'")]
pub struct NotAVolume(String);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.storage, self.name)
    }
}

impl FromStr for VolumeId {
    type Err = NotAVolume;

    fn from_str(text: &str) -> Result<Self, NotAVolume> {
        let bad = || NotAVolume(text.to_owned());
        let (storage, name) = text.split_once(':').ok_or_else(bad)?;
        let part = |p: &str| {
            !p.is_empty()
                && !p.starts_with('.')
                && p.chars().all(|c| !c.is_control() && !c.is_whitespace() && !"\\,'\"".contains(c))
        };
        if !is_storage_id(storage) || name.len() > 1024 || !name.split('/').all(part) {
            return Err(bad());
        }
        Ok(Self { storage: storage.to_owned(), name: name.to_owned() })
    }
}

/// Whether the text can be the name of a storage.
pub fn is_storage_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() > 1
        && bytes[0].is_ascii_alphabetic()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
        && bytes[bytes.len() - 1].is_ascii_alphanumeric()
}

/// How volumes are kept: the seam to other kinds of storage.
pub trait Backend: Send + Sync {
    /// The type in the storage's configuration.
    fn kind(&self) -> &'static str;
    /// Its directory, if it is one.
    fn directory(&self) -> Option<&Path>;
    /// How much room there is.
    fn space(&self) -> Space;
    /// Everything that the storage holds.
    fn entries(&self) -> Vec<Entry>;
    /// The file or directory of an entry. It need not exist.
    fn path(&self, name: &str) -> Result<PathBuf, String>;
    /// Makes an empty volume for a guest: a directory without limit if `size` is 0, else a raw
    /// image of so many bytes. Gives its name.
    fn allocate(&self, vmid: u32, size: u64) -> Result<String, String>;
    /// Removes an entry.
    fn free(&self, name: &str) -> Result<(), String>;
    /// Enlarges a volume.
    fn resize(&self, name: &str, size: u64) -> Result<(), String>;
    /// Whether volumes can have snapshots.
    fn has_snapshots(&self) -> bool;
}

/// A storage as a node sees it.
pub struct Storage {
    /// Its name.
    pub name: String,
    /// Whether all nodes see the same.
    pub shared: bool,
    backend: Box<dyn Backend>,
    full: AtomicBool,
}

/// What a storage of type `dir` may hold here.
pub const CONTENT: &str = "backup,images,iso,rootdir,snippets,vztmpl";

impl Storage {
    /// A storage in a directory.
    pub fn dir(name: &str, path: &Path, shared: bool) -> Self {
        let backend = Box::new(Dir::new(path));
        Self { name: name.to_owned(), shared, backend, full: AtomicBool::new(false) }
    }

    /// Fills it up, or makes room again.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    /// Fails if there is no room.
    pub fn check_room(&self) -> Result<(), String> {
        if self.full.load(Ordering::Relaxed) {
            Err("No space left on device".into())
        } else {
            Ok(())
        }
    }

    /// How much room there is.
    pub fn space(&self) -> Space {
        let space = self.backend.space();
        match self.full.load(Ordering::Relaxed) {
            true => Space { used: space.total, avail: 0, ..space },
            false => space,
        }
    }

    /// Makes an empty volume, as [`Backend::allocate`] does.
    pub fn allocate(&self, vmid: u32, size: u64) -> Result<VolumeId, String> {
        self.check_room()?;
        let name = self.backend.allocate(vmid, size)?;
        Ok(VolumeId { storage: self.name.clone(), name })
    }

    /// The backend, for what does not depend on the storage's name and state.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }
}

/// A size in bytes from a number with a unit: `1G`, `512M`, `1.5T`. Without a unit it is bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = match text.bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1u64 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1 << 30),
        b'T' => (&text[..text.len() - 1], 1 << 40),
        _ => (text, 1),
    };
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number: f64 = number.parse().ok().filter(|_| plain)?;
    let bytes = number * unit as f64;
    (bytes < 1e18).then_some(bytes as u64)
}

/// A size as Proxmox VE writes it: in the largest unit that needs no fraction.
pub fn format_size(bytes: u64) -> String {
    if bytes == 0 {
        return "0T".into();
    }
    let units = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];
    match units.iter().find(|(_, shift)| bytes.is_multiple_of(1u64 << shift)) {
        Some((unit, shift)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("1G", 1 << 30), ("512M", 512 << 20), ("1.5K", 1536), ("7", 7)] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "G", "-1G", "1e9", "inf", "1 G", "99999999T"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
        for (bytes, text) in [(0, "0T"), (1 << 30, "1G"), (1536 << 20, "1536M"), (1000, "1000")] {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn a_volume_id_cannot_leave_its_storage() {
        let id: VolumeId = "local:vztmpl/a_1.0.tar.gz".parse().unwrap();
        assert_eq!((id.storage.as_str(), id.name.as_str()), ("local", "vztmpl/a_1.0.tar.gz"));
        assert_eq!(id.to_string(), "local:vztmpl/a_1.0.tar.gz");
        for text in [
            "",
            "local",
            "local:",
            "local:/etc/passwd",
            "local:../x",
            "local:a/../../x",
            "local:a//b",
            ":a",
            "lo/cal:a",
            "local:a/.",
            "local:a b",
            "local:a,mp=/x",
            "local:a\nb",
            "-x:a",
        ] {
            assert!(text.parse::<VolumeId>().is_err(), "{text:?}");
        }
    }
}
