//! Storage in a directory: templates, ISO images and so on in their own directories, volumes below
//! `images/VMID` as directories or raw images. There are no snapshots.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Backend, Entry, Space};
use crate::sys;

/// Kinds of files, and where they are.
const KINDS: [(&str, &str); 4] = [
    ("vztmpl", "template/cache"),
    ("iso", "template/iso"),
    ("snippets", "snippets"),
    ("backup", "dump"),
];

/// A storage of type `dir`.
#[derive(Debug)]
pub struct Dir {
    path: PathBuf,
}

impl Dir {
    /// The storage in this directory.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn images(&self, vmid: u32) -> PathBuf {
        self.path.join("images").join(vmid.to_string())
    }
}

/// The format of a template, by its name. `None` for what is no template.
pub fn template_format(name: &str) -> Option<&'static str> {
    const FORMATS: [(&str, &str); 5] = [
        (".tar.gz", "tgz"),
        (".tar.xz", "txz"),
        (".tar.zst", "tzst"),
        (".tar.bz2", "tbz2"),
        (".tar", "tar"),
    ];
    FORMATS.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, format)| *format)
}

fn list(dir: &Path) -> impl Iterator<Item = (String, fs::Metadata)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| Some((e.file_name().into_string().ok()?, e.metadata().ok()?)))
}

/// The guest in the name of a volume: `subvol-100-disk-0.subvol`, `vm-100-disk-0.raw`,
/// `base-100-disk-0.raw`.
fn parse_volume(file: &str) -> Option<(u32, &'static str)> {
    let (stem, format) = match file.rsplit_once('.')? {
        (stem, "subvol") => (stem, "subvol"),
        (stem, "raw") => (stem, "raw"),
        _ => return None,
    };
    let mut parts = stem.split('-');
    let known = matches!(parts.next()?, "subvol" | "basevol" | "vm" | "base");
    let vmid = parts.next()?.parse().ok()?;
    (known && parts.next() == Some("disk")).then_some((vmid, format))
}

impl Backend for Dir {
    fn kind(&self) -> &'static str {
        "dir"
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn space(&self) -> Space {
        let (total, used, avail) = sys::disk(&self.path).unwrap_or_default();
        Space { total, used, avail }
    }

    fn entries(&self) -> Vec<Entry> {
        let mut found = Vec::new();
        for (content, dir) in KINDS {
            for (file, meta) in list(&self.path.join(dir)).filter(|(_, m)| m.is_file()) {
                let format = match content {
                    "vztmpl" => match template_format(&file) {
                        Some(format) => format,
                        None => continue,
                    },
                    "iso" => "iso",
                    "snippets" => "snippet",
                    _ => "tar",
                };
                let name = format!("{content}/{file}");
                let (size, ctime) = (meta.len(), meta.ctime());
                found.push(Entry { name, content, format, size, ctime, vmid: None });
            }
        }
        for (owner, _) in list(&self.path.join("images")) {
            for (file, meta) in list(&self.path.join("images").join(&owner)) {
                let Some((vmid, format)) = parse_volume(&file) else { continue };
                if owner != vmid.to_string() || meta.is_dir() != (format == "subvol") {
                    continue;
                }
                let name = format!("{owner}/{file}");
                let size = if format == "subvol" { 0 } else { meta.len() };
                let ctime = meta.ctime();
                found.push(Entry {
                    name,
                    content: "images",
                    format,
                    size,
                    ctime,
                    vmid: Some(vmid),
                });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    fn path(&self, name: &str) -> Result<PathBuf, String> {
        let bad = || format!("unable to parse directory volume name '{name}'");
        let (kind, file) = name.split_once('/').ok_or_else(bad)?;
        // `VolumeId` has no other parts either, but this is what keeps everything inside.
        if file.is_empty() || file.starts_with('.') || file.contains(['/', '\0']) {
            return Err(bad());
        }
        if kind == "vztmpl" && template_format(file).is_none() {
            return Err(bad());
        }
        if let Some((_, dir)) = KINDS.iter().find(|(content, _)| *content == kind) {
            return Ok(self.path.join(dir).join(file));
        }
        let (vmid, _) = parse_volume(file).ok_or_else(bad)?;
        if kind != vmid.to_string() {
            return Err(bad());
        }
        Ok(self.images(vmid).join(file))
    }

    fn allocate(&self, vmid: u32, size: u64) -> Result<String, String> {
        let dir = self.images(vmid);
        let failed = |e: io::Error| format!("unable to create volume in '{}' - {e}", dir.display());
        fs::create_dir_all(&dir).map_err(failed)?;
        for n in 0..1000 {
            let files =
                [format!("subvol-{vmid}-disk-{n}.subvol"), format!("vm-{vmid}-disk-{n}.raw")];
            let base =
                [format!("basevol-{vmid}-disk-{n}.subvol"), format!("base-{vmid}-disk-{n}.raw")];
            if files.iter().chain(&base).any(|f| dir.join(f).exists()) {
                continue;
            }
            let [subvol, raw] = files;
            let made = if size == 0 {
                fs::create_dir(dir.join(&subvol)).map(|()| subvol)
            } else {
                let file = fs::OpenOptions::new().write(true).create_new(true).open(dir.join(&raw));
                file.and_then(|f| f.set_len(size)).map(|()| raw)
            };
            match made {
                Ok(file) => return Ok(format!("{vmid}/{file}")),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Err(format!("unable to allocate an image name for VM {vmid} in storage"))
    }

    fn free(&self, name: &str) -> Result<(), String> {
        let path = self.path(name)?;
        let failed = |e: io::Error| format!("unlink '{}' failed - {e}", path.display());
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        if meta.is_dir() {
            fs::remove_dir_all(&path).map_err(failed)?;
        } else {
            fs::remove_file(&path).map_err(failed)?;
        }
        if let Some(parent) = path.parent().filter(|p| p.starts_with(self.path.join("images"))) {
            // It stays as long as the guest has other volumes.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    fn resize(&self, name: &str, size: u64) -> Result<(), String> {
        if !name.ends_with(".raw") {
            return Err("can't resize this image format".into());
        }
        let path = self.path(name)?;
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|f| f.set_len(size))
            .map_err(|e| format!("unable to resize '{}' - {e}", path.display()))
    }

    fn has_snapshots(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_come_and_go_with_their_guest() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Dir::new(dir.path());
        assert_eq!(storage.allocate(100, 0).unwrap(), "100/subvol-100-disk-0.subvol");
        assert_eq!(storage.allocate(100, 1 << 20).unwrap(), "100/vm-100-disk-1.raw");
        assert_eq!(storage.allocate(101, 0).unwrap(), "101/subvol-101-disk-0.subvol");
        let entries = storage.entries();
        let names: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.size, e.vmid)).collect();
        assert_eq!(
            names,
            [
                ("100/subvol-100-disk-0.subvol", 0, Some(100)),
                ("100/vm-100-disk-1.raw", 1 << 20, Some(100)),
                ("101/subvol-101-disk-0.subvol", 0, Some(101)),
            ]
        );
        storage.resize("100/vm-100-disk-1.raw", 2 << 20).unwrap();
        assert_eq!(storage.entries()[1].size, 2 << 20);
        assert_eq!(
            storage.resize("100/subvol-100-disk-0.subvol", 1).unwrap_err(),
            "can't resize this image format"
        );
        for entry in entries {
            storage.free(&entry.name).unwrap();
        }
        assert!(storage.entries().is_empty());
        assert_eq!(fs::read_dir(dir.path().join("images")).unwrap().count(), 0);
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Dir::new(dir.path());
        for name in [
            "",
            "/",
            "vztmpl",
            "vztmpl/",
            "vztmpl/..",
            "vztmpl/../../x",
            "vztmpl/x",
            "../x",
            "100/../x",
            "100/vm-101-disk-0.raw",
            "100/x.raw",
            "100/vm-100-disk-0.qcow2",
            "etc/passwd",
        ] {
            assert!(storage.path(name).is_err(), "{name}");
        }
        assert!(storage.path("vztmpl/a.tar").unwrap().starts_with(dir.path()));
    }
}
