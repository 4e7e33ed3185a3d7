//! `rootfs` and `mpN`: what they name, and how the pre-start hook learns of it.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::conf::Section;
use crate::node::Node;
use crate::params::{parse_bool, split_props};
use crate::storage::{Storage, VolumeId, is_storage_id, parse_size};

/// Where the content of a mount point comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory of the host.
    Bind(PathBuf),
    /// A block device of the host.
    Device(PathBuf),
    /// A volume of a storage.
    Volume(VolumeId),
    /// A volume that is still to be made: `STORAGE:GIGABYTES`.
    New {
        /// The storage.
        storage: String,
        /// Its size in bytes; 0 for a directory.
        size: u64,
    },
}

/// A `rootfs` or `mpN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where its content comes from.
    pub source: Source,
    /// All other properties.
    pub props: Vec<(String, String)>,
}

impl Mount {
    /// Reads the value of the key.
    pub fn parse(value: &str) -> Result<Self, String> {
        let mut props = split_props("volume", value);
        let at = props.iter().position(|(k, _)| k == "volume");
        let volume = at.map(|i| props.remove(i).1).unwrap_or_default();
        let source = if volume.starts_with("/dev/") {
            Source::Device(volume.into())
        } else if volume.starts_with('/') {
            Source::Bind(volume.into())
        } else if let Some((storage, size)) = new_volume(&volume) {
            Source::New { storage: storage.to_owned(), size }
        } else {
            Source::Volume(volume.parse().map_err(|e| format!("{e}"))?)
        };
        let mut mount = Self { source, props };
        mount.sort();
        Ok(mount)
    }

    /// The value of a property.
    pub fn prop(&self, name: &str) -> Option<&str> {
        self.props.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// Sets a property.
    pub fn set_prop(&mut self, name: &str, value: String) {
        self.props.retain(|(k, _)| k != name);
        self.props.push((name.to_owned(), value));
        self.sort();
    }

    /// The required property first, then by name, as Proxmox VE writes them.
    fn sort(&mut self) {
        self.props.sort_by(|(a, _), (b, _)| (a != "mp", a).cmp(&(b != "mp", b)));
    }

    /// `bind` or `device`, which only root@pam may use; `None` for a volume.
    pub fn restricted(&self) -> Option<&'static str> {
        match self.source {
            Source::Bind(_) => Some("bind"),
            Source::Device(_) => Some("device"),
            Source::Volume(_) | Source::New { .. } => None,
        }
    }

    /// The volume, if it is one that exists.
    pub fn volume(&self) -> Option<&VolumeId> {
        match &self.source {
            Source::Volume(volume) => Some(volume),
            _ => None,
        }
    }

    /// The name of the storage that it is in or will be.
    pub fn storage(&self) -> Option<&str> {
        match &self.source {
            Source::Volume(volume) => Some(&volume.storage),
            Source::New { storage, .. } => Some(storage),
            Source::Bind(_) | Source::Device(_) => None,
        }
    }
}

impl fmt::Display for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Bind(path) | Source::Device(path) => write!(f, "{}", path.display())?,
            Source::Volume(volume) => write!(f, "{volume}")?,
            Source::New { storage, size } => write!(f, "{storage}:{}", size >> 30)?,
        }
        self.props.iter().try_for_each(|(k, v)| write!(f, ",{k}={v}"))
    }
}

/// `STORAGE:GIGABYTES`
fn new_volume(text: &str) -> Option<(&str, u64)> {
    let (storage, size) = text.split_once(':')?;
    if !is_storage_id(storage) || size.ends_with(char::is_alphabetic) {
        return None;
    }
    Some((storage, parse_size(&format!("{size}G"))?))
}

/// The keys that hold mount points, the rootfs first.
pub fn keys(conf: &Section) -> Vec<String> {
    let mut list: Vec<(u32, String)> = conf
        .values
        .keys()
        .filter_map(|k| Some((k.strip_prefix("mp")?.parse().ok()?, k.clone())))
        .collect();
    list.sort();
    let rootfs = conf.has("rootfs").then(|| "rootfs".to_owned());
    rootfs.into_iter().chain(list.into_iter().map(|(_, k)| k)).collect()
}

/// All volumes of a CT, the unused and those of snapshots among them.
pub fn volumes(config: &crate::conf::Config) -> Vec<VolumeId> {
    let mut list = Vec::new();
    for section in [&config.current, &config.pending].into_iter().chain(config.snapshots.values()) {
        let unused = section.values.keys().filter(|k| k.starts_with("unused")).cloned();
        for key in keys(section).into_iter().chain(unused) {
            let mount = Mount::parse(&section.text(&key).unwrap_or_default());
            if let Some(volume) = mount.ok().and_then(|m| m.volume().cloned())
                && !list.contains(&volume)
            {
                list.push(volume);
            }
        }
    }
    list
}

impl Node {
    /// A storage of this node.
    pub fn storage(&self, name: &str) -> Result<&Storage, String> {
        let found = self.storages.iter().find(|s| s.name == name);
        found.map(|s| &**s).ok_or_else(|| format!("storage '{name}' does not exist"))
    }

    /// The file or directory of a volume. It need not exist.
    pub fn volume_path(&self, volume: &VolumeId) -> Result<PathBuf, String> {
        self.storage(&volume.storage)?.backend().path(&volume.name)
    }

    /// What the pre-start hook is to mount: lines of kind, source, target and mode, separated by
    /// tabs. What is broken is left to the hook, which fails on it as the real one does.
    pub fn mount_list(&self, conf: &Section) -> String {
        let mut list = String::new();
        for key in keys(conf) {
            let Ok(mount) = Mount::parse(&conf.text(&key).unwrap_or_default()) else { continue };
            let (kind, path) = match &mount.source {
                Source::Bind(path) => ("bind", path.clone()),
                Source::Device(path) => ("device", path.clone()),
                Source::Volume(volume) => match self.volume_path(volume) {
                    Ok(path) if volume.name.ends_with(".raw") => ("loop", path),
                    Ok(path) => ("bind", path),
                    Err(_) => ("missing", Path::new("-").to_owned()),
                },
                Source::New { .. } => continue,
            };
            let target = if key == "rootfs" { "/" } else { mount.prop("mp").unwrap_or("-") };
            let mode =
                if mount.prop("ro").and_then(parse_bool) == Some(true) { "ro" } else { "rw" };
            let line = [kind, &path.display().to_string(), target, mode];
            if line.iter().all(|field| !field.contains(['\t', '\n'])) {
                list.push_str(&line.join("\t"));
                list.push('\n');
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let source = |text: &str| Mount::parse(text).unwrap().source;
        assert_eq!(source("/srv/x,mp=/y"), Source::Bind("/srv/x".into()));
        assert_eq!(source("mp=/y,volume=/dev/sda"), Source::Device("/dev/sda".into()));
        assert_eq!(source("local:0"), Source::New { storage: "local".into(), size: 0 });
        assert_eq!(source("local:1.5"), Source::New { storage: "local".into(), size: 3 << 29 });
        let volume: VolumeId = "local:100/vm-100-disk-0.raw".parse().unwrap();
        assert_eq!(source("local:100/vm-100-disk-0.raw,size=1G"), Source::Volume(volume));
        for text in ["", "x", "local:../x", "mp=/y"] {
            assert!(Mount::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_mount_is_written_with_its_source_first() {
        for text in ["local:100/x.raw,mp=/y,size=1G", "/srv/x,mp=/y,ro=1", "local:4,mp=/y"] {
            assert_eq!(Mount::parse(text).unwrap().to_string(), text);
        }
        let mount = Mount::parse("backup=1,size=1G,mp=/y,volume=/a").unwrap();
        assert_eq!(mount.to_string(), "/a,mp=/y,backup=1,size=1G");
    }

    #[test]
    fn only_volumes_are_removed_with_a_ct() {
        let text = "rootfs: local:100/subvol-100-disk-0.subvol,size=0T\nmp0: /srv,mp=/a\n\
            mp1: local:100/vm-100-disk-1.raw,mp=/b\nunused0: local:100/vm-100-disk-2.raw\n";
        let (config, _) = crate::conf::parse(text, 100);
        let names: Vec<_> = volumes(&config).iter().map(|v| v.name.clone()).collect();
        assert_eq!(
            names,
            ["100/subvol-100-disk-0.subvol", "100/vm-100-disk-1.raw", "100/vm-100-disk-2.raw"]
        );
    }
}
