//! `root`, `mounts`, `linux.rootfsPropagation`, `linux.maskedPaths` and `linux.readonlyPaths`.

use std::path::{Component, Path, PathBuf};

use nix::libc;
use oci_spec::runtime::Mount as OciMount;
use proxmox_shim_init::protocol::{Mount, MountSource};

use super::document::{Document, Item};
use super::plan::{IdMappings, MountAttributes, MountIds, PlannedMount};
use super::{Cgroups, Error, Host, id_mappings};

/// `MOUNT_ATTR_*` of `linux/mount.h`, which the libc crate lacks.
mod attr {
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    /// The field of the access time modes; relatime is zero.
    pub const ATIME: u64 = 0x70;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// What `mount -o` calls a flag, and whether the name clears it.
const FLAGS: [(&str, bool, u64); 32] = [
    ("async", true, libc::MS_SYNCHRONOUS),
    ("atime", true, libc::MS_NOATIME),
    ("bind", false, libc::MS_BIND),
    ("dev", true, libc::MS_NODEV),
    ("diratime", true, libc::MS_NODIRATIME),
    ("dirsync", false, libc::MS_DIRSYNC),
    ("exec", true, libc::MS_NOEXEC),
    ("iversion", false, libc::MS_I_VERSION),
    ("lazytime", false, libc::MS_LAZYTIME),
    ("loud", true, libc::MS_SILENT),
    ("mand", false, libc::MS_MANDLOCK),
    ("noatime", false, libc::MS_NOATIME),
    ("nodev", false, libc::MS_NODEV),
    ("nodiratime", false, libc::MS_NODIRATIME),
    ("noexec", false, libc::MS_NOEXEC),
    ("noiversion", true, libc::MS_I_VERSION),
    ("nolazytime", true, libc::MS_LAZYTIME),
    ("nomand", true, libc::MS_MANDLOCK),
    ("norelatime", true, libc::MS_RELATIME),
    ("nostrictatime", true, libc::MS_STRICTATIME),
    ("nosuid", false, libc::MS_NOSUID),
    ("nosymfollow", false, libc::MS_NOSYMFOLLOW),
    ("rbind", false, libc::MS_BIND | libc::MS_REC),
    ("relatime", false, libc::MS_RELATIME),
    ("remount", false, libc::MS_REMOUNT),
    ("ro", false, libc::MS_RDONLY),
    ("rw", true, libc::MS_RDONLY),
    ("silent", false, libc::MS_SILENT),
    ("strictatime", false, libc::MS_STRICTATIME),
    ("suid", true, libc::MS_NOSUID),
    ("symfollow", true, libc::MS_NOSYMFOLLOW),
    ("sync", false, libc::MS_SYNCHRONOUS),
];

const PROPAGATION: [(&str, u64); 8] = [
    ("private", libc::MS_PRIVATE),
    ("rprivate", libc::MS_PRIVATE | libc::MS_REC),
    ("slave", libc::MS_SLAVE),
    ("rslave", libc::MS_SLAVE | libc::MS_REC),
    ("shared", libc::MS_SHARED),
    ("rshared", libc::MS_SHARED | libc::MS_REC),
    ("unbindable", libc::MS_UNBINDABLE),
    ("runbindable", libc::MS_UNBINDABLE | libc::MS_REC),
];

/// The flags that a bind mount has for itself, in both of the kernel's interfaces.
const OWN_FLAGS: [(u64, u64); 5] = [
    (libc::MS_RDONLY, attr::RDONLY),
    (libc::MS_NOSUID, attr::NOSUID),
    (libc::MS_NODEV, attr::NODEV),
    (libc::MS_NOEXEC, attr::NOEXEC),
    (libc::MS_NOSYMFOLLOW, attr::NOSYMFOLLOW),
];

/// Types whose source and options name nothing on the host. The paths of others (a device, overlay's
/// layers) are the host's in OCI, but init, which is in the container, would find other files by them.
const WITHOUT_SOURCE: [&str; 18] = [
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "proc",
    "pstore",
    "ramfs",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

const ATIME_FLAGS: u64 =
    libc::MS_NOATIME | libc::MS_NODIRATIME | libc::MS_RELATIME | libc::MS_STRICTATIME;

/// Files below `/proc` that lxcfs and the like may replace; all else there stays the kernel's.
const REPLACEABLE_PROC_FILES: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// The options of one mount, sorted by what they act on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    /// `MS_*`.
    set: u64,
    cleared: u64,
    propagation: Vec<u64>,
    /// `MOUNT_ATTR_*`.
    recursive_set: u64,
    recursive_clear: u64,
    /// Names of the recursive options, as `MS_*` for a mount that has nothing below it.
    recursive_as_flags: (u64, u64),
    copy_up: bool,
    /// `idmap` (false) or `ridmap` (true).
    id_map: Option<bool>,
    data: Vec<String>,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self::default();
        for option in options {
            let name = option.as_str();
            if let Some((_, clears, flag)) = FLAGS.iter().find(|(known, ..)| *known == name) {
                switch(&mut parsed.set, &mut parsed.cleared, *clears, *flag);
            } else if let Some((_, flag)) = PROPAGATION.iter().find(|(known, _)| *known == name) {
                parsed.propagation.push(*flag);
            } else if parsed.recursive(name) {
            } else {
                match name {
                    "tmpcopyup" => parsed.copy_up = true,
                    "idmap" => parsed.id_map = Some(false),
                    "ridmap" => parsed.id_map = Some(true),
                    "defaults" | "" => {}
                    _ => parsed.data.push(option.clone()),
                }
            }
        }
        parsed
    }

    /// `rro`, `rnosuid`, …: the plain option after an `r`, for the whole tree (mount_setattr(2)
    /// with `AT_RECURSIVE`).
    fn recursive(&mut self, name: &str) -> bool {
        let (clears, attribute, flag) = match name {
            "rro" => (false, attr::RDONLY, libc::MS_RDONLY),
            "rrw" => (true, attr::RDONLY, libc::MS_RDONLY),
            "rnosuid" => (false, attr::NOSUID, libc::MS_NOSUID),
            "rsuid" => (true, attr::NOSUID, libc::MS_NOSUID),
            "rnodev" => (false, attr::NODEV, libc::MS_NODEV),
            "rdev" => (true, attr::NODEV, libc::MS_NODEV),
            "rnoexec" => (false, attr::NOEXEC, libc::MS_NOEXEC),
            "rexec" => (true, attr::NOEXEC, libc::MS_NOEXEC),
            "rnodiratime" => (false, attr::NODIRATIME, libc::MS_NODIRATIME),
            "rdiratime" => (true, attr::NODIRATIME, libc::MS_NODIRATIME),
            "rrelatime" => (false, 0, libc::MS_RELATIME),
            "rnorelatime" => (true, 0, libc::MS_RELATIME),
            "rnoatime" => (false, attr::NOATIME, libc::MS_NOATIME),
            "ratime" => (true, attr::NOATIME, libc::MS_NOATIME),
            "rstrictatime" => (false, attr::STRICTATIME, libc::MS_STRICTATIME),
            "rnostrictatime" => (true, attr::STRICTATIME, libc::MS_STRICTATIME),
            "rnosymfollow" => (false, attr::NOSYMFOLLOW, libc::MS_NOSYMFOLLOW),
            "rsymfollow" => (true, attr::NOSYMFOLLOW, libc::MS_NOSYMFOLLOW),
            _ => return false,
        };
        switch(&mut self.recursive_set, &mut self.recursive_clear, clears, attribute);
        // The access time modes are one field, which the kernel wants cleared as a whole.
        if attribute & !attr::ATIME == 0 {
            self.recursive_clear |= attr::ATIME;
        }
        let (set, cleared) = &mut self.recursive_as_flags;
        switch(set, cleared, clears, flag);
        true
    }

    /// What runc's remount of a bind mount does: nothing if no flag is named; otherwise the named
    /// flags replace those of the source, except for the access time mode, which stays unless it
    /// is named.
    fn attributes(&self) -> MountAttributes {
        let mut attributes = MountAttributes {
            recursive_set: self.recursive_set,
            recursive_clear: self.recursive_clear,
            ..MountAttributes::default()
        };
        let not_flags = libc::MS_BIND | libc::MS_REC | libc::MS_REMOUNT;
        if self.set & !not_flags == 0 && self.cleared == 0 {
            return attributes;
        }
        attributes.set = attributes_of(self.set);
        let mut named = OWN_FLAGS.iter().fold(0, |all, (_, attribute)| all | attribute);
        if self.set & ATIME_FLAGS != 0 {
            named |= attr::NODIRATIME;
            attributes.clear |= attr::ATIME;
        }
        attributes.clear |= named & !attributes.set;
        attributes
    }
}

/// The `MOUNT_ATTR_*` of a mount with the flags `MS_*`.
pub(super) fn attributes_of(flags: u64) -> u64 {
    let mut attributes = 0;
    for (flag, attribute) in OWN_FLAGS {
        if flags & flag != 0 {
            attributes |= attribute;
        }
    }
    if flags & libc::MS_NODIRATIME != 0 {
        attributes |= attr::NODIRATIME;
    }
    // The kernel's own order of precedence (`path_mount`).
    if flags & libc::MS_STRICTATIME != 0 {
        attributes | attr::STRICTATIME
    } else if flags & libc::MS_NOATIME != 0 {
        attributes | attr::NOATIME
    } else {
        attributes
    }
}

fn switch(set: &mut u64, cleared: &mut u64, clears: bool, flag: u64) {
    let (gains, loses) = if clears { (cleared, set) } else { (set, cleared) };
    *gains |= flag;
    *loses &= !flag;
}

/// All mounts, in order.
pub(super) fn read(
    spec: &Document,
    bundle: &Path,
    host: &Host,
    root_propagation: Option<u64>,
    mappings: Option<&IdMappings>,
    warnings: &mut Vec<String>,
) -> Result<Vec<PlannedMount>, Error> {
    spec.list::<OciMount>("mounts")?
        .into_iter()
        .map(|Item { field, value }| {
            convert(&field, &value, bundle, host, root_propagation, mappings, warnings)
        })
        .collect()
}

fn convert(
    field: &str,
    mount: &OciMount,
    bundle: &Path,
    host: &Host,
    root_propagation: Option<u64>,
    mappings: Option<&IdMappings>,
    warnings: &mut Vec<String>,
) -> Result<PlannedMount, Error> {
    let mut options = Options::parse(mount.options().as_deref().unwrap_or_default());
    let ids = mount_ids(field, mount, &options, mappings)?;
    let mut destination = text(mount.destination());
    if !mount.destination().is_absolute() {
        warnings.push(format!("{field}.destination is not absolute: taken relative to /"));
        destination.insert(0, '/');
    }
    let clean = clean(&destination);
    if clean == Path::new("/") {
        return Err(Error::invalid(format!("{field}.destination"), "is the container's root"));
    }
    let fstype = mount.typ().clone().unwrap_or_default();
    let source = mount.source().clone().unwrap_or_default();

    // A socket of the host: runtimes with a kernel of their own forward it, here a bind mount does.
    if options.set & libc::MS_BIND != 0 || fstype == "uds" {
        if !options.data.is_empty() {
            return Err(Error::invalid(
                format!("{field}.options"),
                format!("{:?} mean nothing to a bind mount", options.data),
            ));
        }
        if source.as_os_str().is_empty() {
            return Err(Error::invalid(format!("{field}.source"), "is missing"));
        }
        let source = bundle.join(source);
        let is_proc = self::clean(&text(&source)) == Path::new("/proc");
        protect_proc(field, &clean, is_proc)?;
        // As in runc, where the mount is made in a copy of the host's mount tree that has the
        // propagation of the container's root: the mount starts with that one (slave unless
        // rootfsPropagation is set), and its own options come on top.
        let mut propagation = vec![match root_propagation.map(|flags| flags & !libc::MS_REC) {
            Some(libc::MS_SHARED) => libc::MS_SHARED | libc::MS_REC,
            Some(libc::MS_PRIVATE | libc::MS_UNBINDABLE) => libc::MS_PRIVATE | libc::MS_REC,
            _ => libc::MS_SLAVE | libc::MS_REC,
        }];
        propagation.append(&mut options.propagation);
        propagation.dedup();
        return Ok(PlannedMount::Bind {
            source,
            destination,
            recursive: options.set & libc::MS_REC != 0,
            attributes: options.attributes(),
            propagation,
            ids,
        });
    }
    if ids.is_some() {
        return Err(Error::invalid(field, "has id mappings, which only bind mounts can have"));
    }

    if matches!(fstype.as_str(), "" | "none" | "bind" | "rbind") {
        return Err(Error::invalid(
            format!("{field}.type"),
            format!("{fstype:?} needs the option \"bind\" or \"rbind\""),
        ));
    }
    if !WITHOUT_SOURCE.contains(&fstype.as_str()) {
        return Err(Error::unsupported(
            format!("{field}.type {fstype:?}"),
            "mount it on the host and give the container a bind mount of it",
        ));
    }
    protect_proc(field, &clean, fstype == "proc")?;
    // Nothing is mounted below a new filesystem yet, so there a recursive option is a plain one.
    let (recursive_set, recursive_cleared) = options.recursive_as_flags;
    let flags = (options.set & !recursive_cleared) | recursive_set;
    let source = match (fstype.as_str(), &host.cgroups) {
        ("cgroup", Cgroups::V2) => MountSource::Cgroup { flags, hierarchies: Vec::new() },
        ("cgroup", Cgroups::V1 { hierarchies }) => {
            MountSource::Cgroup { flags, hierarchies: hierarchies.clone() }
        }
        _ => MountSource::Filesystem {
            source: text(&source),
            fstype,
            flags,
            data: options.data.join(","),
        },
    };
    Ok(PlannedMount::Init(Mount {
        destination,
        source,
        copy_up: options.copy_up,
        propagation: options.propagation,
    }))
}

/// The mappings of a mount: as with runc the option without mappings means those of the container,
/// and mappings without the option mean `idmap`.
fn mount_ids(
    field: &str,
    mount: &OciMount,
    options: &Options,
    of_container: Option<&IdMappings>,
) -> Result<Option<MountIds>, Error> {
    let own = id_mappings::convert(
        field,
        mount.uid_mappings().as_deref().unwrap_or_default(),
        mount.gid_mappings().as_deref().unwrap_or_default(),
    )?;
    let recursive = options.id_map.unwrap_or(false);
    let mappings = own.or_else(|| options.id_map.and(of_container).cloned());
    match (mappings, options.id_map) {
        (Some(mappings), _) => Ok(Some(MountIds { mappings, recursive })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Error::invalid(
            format!("{field}.uidMappings"),
            "is missing: without a user namespace there is nothing to map the ids by",
        )),
    }
}

/// Only procfs may cover `/proc`, and only a few files below it may be replaced: otherwise a
/// container's author decides what AppArmor and other readers of `/proc` see. Init checks again
/// after it has resolved symbolic links.
fn protect_proc(field: &str, clean: &Path, is_proc: bool) -> Result<(), Error> {
    let replaceable = REPLACEABLE_PROC_FILES.iter().any(|file| clean == Path::new(file));
    if !clean.starts_with("/proc") || replaceable || (is_proc && clean == Path::new("/proc")) {
        return Ok(());
    }
    Err(Error::invalid(format!("{field}.destination"), "must not cover the kernel's /proc"))
}

/// Whether `/dev` is somebody else's: then neither devices nor links are created in it.
pub(super) fn dev_is_bind(mounts: &[PlannedMount]) -> bool {
    mounts.iter().any(|mount| {
        matches!(mount, PlannedMount::Bind { destination, .. }
            if clean(destination) == Path::new("/dev"))
    })
}

/// The host's path of the root filesystem.
pub(super) fn root_path(spec: &Document, bundle: &Path) -> Result<PathBuf, Error> {
    match spec.string("root.path")? {
        Some(path) => Ok(bundle.join(path)),
        None => Err(Error::invalid("root.path", "is missing")),
    }
}

/// `linux.rootfsPropagation` as `MS_*`.
pub(super) fn root_propagation(spec: &Document) -> Result<Option<u64>, Error> {
    const FIELD: &str = "linux.rootfsPropagation";
    let Some(name) = spec.string(FIELD)? else { return Ok(None) };
    match PROPAGATION.iter().find(|(known, _)| *known == name) {
        Some((_, flags)) => Ok(Some(*flags)),
        None => Err(Error::invalid(FIELD, format!("has the unknown value {name:?}"))),
    }
}

/// A list of absolute paths.
pub(super) fn paths(spec: &Document, field: &str) -> Result<Vec<String>, Error> {
    spec.list::<String>(field)?
        .into_iter()
        .map(|item| match Path::new(&item.value).is_absolute() {
            true => Ok(item.value),
            false => Err(Error::invalid(item.field, "must be absolute")),
        })
        .collect()
}

/// Without `.`, `..` and doubled slashes; only for comparisons, because a symbolic link can make
/// it another file.
fn clean(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

/// Paths come from JSON, so they are UTF-8.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::plan::IdMapping;
    use super::super::tests::host;
    use super::*;

    const PRIVATE: u64 = libc::MS_PRIVATE | libc::MS_REC;
    const SLAVE: u64 = libc::MS_SLAVE | libc::MS_REC;
    const SHARED: u64 = libc::MS_SHARED | libc::MS_REC;

    fn read_json(mount: &str, root: Option<u64>) -> Result<PlannedMount, String> {
        let json = format!(r#"{{"mounts":[{mount}]}}"#);
        let spec = Document::parse(json.as_bytes()).unwrap();
        read(&spec, Path::new("/bundle"), &host(), root, None, &mut Vec::new())
            .map(|mut mounts| mounts.remove(0))
            .map_err(|error| error.to_string())
    }

    fn bind(options: &str, root: Option<u64>) -> (bool, MountAttributes, Vec<u64>) {
        let mount = format!(r#"{{"destination":"/d","source":"/s","options":[{options}]}}"#);
        match read_json(&mount, root).unwrap() {
            PlannedMount::Bind { recursive, attributes, propagation, .. } => {
                (recursive, attributes, propagation)
            }
            other => panic!("{other:?}"),
        }
    }

    fn filesystem(fstype: &str, options: &str) -> (u64, String) {
        let mount = format!(
            r#"{{"destination":"/d","type":"{fstype}","source":"s","options":[{options}]}}"#
        );
        match read_json(&mount, None).unwrap() {
            PlannedMount::Init(Mount {
                source: MountSource::Filesystem { flags, data, .. },
                ..
            }) => (flags, data),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bind_propagation_starts_with_the_root_s() {
        for (options, root, expected) in [
            (r#""bind""#, None, vec![SLAVE]),
            (r#""rbind","rslave""#, None, vec![SLAVE]),
            (r#""rbind","rprivate""#, None, vec![SLAVE, PRIVATE]),
            (r#""rbind","rshared""#, None, vec![SLAVE, SHARED]),
            (r#""rbind","rshared""#, Some(SHARED), vec![SHARED]),
            (r#""rbind""#, Some(libc::MS_SHARED), vec![SHARED]),
            (r#""rbind","slave""#, Some(PRIVATE), vec![PRIVATE, libc::MS_SLAVE]),
            (r#""rbind""#, Some(libc::MS_UNBINDABLE), vec![PRIVATE]),
        ] {
            assert_eq!(bind(options, root).2, expected, "{options} {root:?}");
        }
    }

    #[test]
    fn bind_attributes() {
        let all = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC | attr::NOSYMFOLLOW;
        let attributes = |set, clear, recursive_set, recursive_clear| MountAttributes {
            set,
            clear,
            recursive_set,
            recursive_clear,
        };
        for (options, recursive, expected) in [
            (r#""bind""#, false, attributes(0, 0, 0, 0)),
            (r#""rbind","rprivate""#, true, attributes(0, 0, 0, 0)),
            (r#""rbind","ro""#, true, attributes(attr::RDONLY, all & !attr::RDONLY, 0, 0)),
            (r#""rbind","rw""#, true, attributes(0, all, 0, 0)),
            (
                r#""bind","nosuid","noexec","nodev","suid""#,
                false,
                attributes(attr::NOEXEC | attr::NODEV, all & !(attr::NOEXEC | attr::NODEV), 0, 0),
            ),
            (
                r#""bind","noatime""#,
                false,
                attributes(attr::NOATIME, all | attr::ATIME | attr::NODIRATIME, 0, 0),
            ),
            (
                r#""bind","strictatime","nodiratime""#,
                false,
                attributes(attr::STRICTATIME | attr::NODIRATIME, all | attr::ATIME, 0, 0),
            ),
            (
                r#""bind","relatime""#,
                false,
                attributes(0, all | attr::ATIME | attr::NODIRATIME, 0, 0),
            ),
            (r#""rbind","rro""#, true, attributes(0, 0, attr::RDONLY, 0)),
            (r#""rbind","rro","rrw""#, true, attributes(0, 0, 0, attr::RDONLY)),
            (r#""rbind","rnoatime""#, true, attributes(0, 0, attr::NOATIME, attr::ATIME)),
            (r#""rbind","rrelatime""#, true, attributes(0, 0, 0, attr::ATIME)),
            (
                r#""rbind","rnosuid","rnodev","rnoexec","rnosymfollow","rnodiratime""#,
                true,
                attributes(0, 0, (all & !attr::RDONLY) | attr::NODIRATIME, 0),
            ),
        ] {
            let (was_recursive, attributes, _) = bind(options, None);
            assert_eq!((was_recursive, attributes), (recursive, expected), "{options}");
        }
    }

    #[test]
    fn filesystem_options() {
        for (options, flags, data) in [
            ("", 0, ""),
            (
                r#""nosuid","noexec","nodev","ro""#,
                libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV | libc::MS_RDONLY,
                "",
            ),
            (
                r#""nosuid","strictatime","mode=755","size=65536k""#,
                libc::MS_NOSUID | libc::MS_STRICTATIME,
                "mode=755,size=65536k",
            ),
            (r#""ro","rw","sync","async","defaults""#, 0, ""),
            (r#""newinstance","ptmxmode=0666","gid=5""#, 0, "newinstance,ptmxmode=0666,gid=5"),
            (
                r#""rro","lazytime","dirsync","nosymfollow""#,
                libc::MS_RDONLY | libc::MS_LAZYTIME | libc::MS_DIRSYNC | libc::MS_NOSYMFOLLOW,
                "",
            ),
            (r#""ro","rrw""#, 0, ""),
        ] {
            assert_eq!(filesystem("tmpfs", options), (flags, data.to_owned()), "{options}");
        }
    }

    #[test]
    fn tmpfs_with_copy_up_and_propagation() {
        let mount = read_json(
            r#"{"destination":"d","type":"tmpfs","source":"tmpfs",
                "options":["tmpcopyup","rshared","private"]}"#,
            None,
        );
        assert_eq!(
            mount.unwrap(),
            PlannedMount::Init(Mount {
                destination: "/d".to_owned(),
                source: MountSource::Filesystem {
                    source: "tmpfs".to_owned(),
                    fstype: "tmpfs".to_owned(),
                    flags: 0,
                    data: String::new(),
                },
                copy_up: true,
                propagation: vec![SHARED, libc::MS_PRIVATE],
            })
        );
    }

    #[test]
    fn cgroup_takes_the_host_s_hierarchies() {
        let mount = read_json(
            r#"{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro"]}"#,
            None,
        );
        let Cgroups::V1 { hierarchies } = host().cgroups else { panic!("test host is v1") };
        assert_eq!(
            mount.unwrap(),
            PlannedMount::Init(Mount {
                destination: "/sys/fs/cgroup".to_owned(),
                source: MountSource::Cgroup { flags: libc::MS_RDONLY, hierarchies },
                copy_up: false,
                propagation: vec![],
            })
        );
    }

    #[test]
    fn mappings_of_a_bind_mount() {
        const MAPPINGS: &str = r#""uidMappings":[{"containerID":0,"hostID":100000,"size":10}],
            "gidMappings":[{"containerID":5,"hostID":200000,"size":1}]"#;
        let mapping = |container, host, size| IdMapping { container, host, size };
        let mappings =
            IdMappings { uids: vec![mapping(0, 100_000, 10)], gids: vec![mapping(5, 200_000, 1)] };
        for (options, recursive) in
            [(r#""bind""#, false), (r#""rbind","idmap""#, false), (r#""rbind","ridmap""#, true)]
        {
            let mount =
                format!(r#"{{"destination":"/d","source":"/s","options":[{options}],{MAPPINGS}}}"#);
            let ids = match read_json(&mount, None).unwrap() {
                PlannedMount::Bind { ids, .. } => ids,
                other => panic!("{other:?}"),
            };
            assert_eq!(ids, Some(MountIds { mappings: mappings.clone(), recursive }), "{options}");
        }
    }

    #[test]
    fn a_forwarded_socket_is_a_bind_mount() {
        let mount = read_json(r#"{"destination":"/run/s","type":"uds","source":"/h/s"}"#, None);
        assert!(
            matches!(mount, Ok(PlannedMount::Bind { source, destination, recursive: false, .. })
            if source == Path::new("/h/s") && destination == "/run/s")
        );
    }

    #[test]
    fn relative_sources_are_the_bundle_s() {
        let mount = read_json(r#"{"destination":"/d","source":"vol","options":["bind"]}"#, None);
        assert!(matches!(mount.unwrap(), PlannedMount::Bind { source, .. }
            if source == Path::new("/bundle/vol")));
    }

    #[test]
    fn wrong_mounts_are_refused() {
        for (mount, expected) in [
            (
                r#"{"destination":"/","type":"tmpfs"}"#,
                "mounts[0].destination is the container's root",
            ),
            (
                r#"{"destination":"/a/..","type":"tmpfs"}"#,
                "mounts[0].destination is the container's root",
            ),
            (
                r#"{"destination":"/d","type":"bind","source":"/s"}"#,
                "mounts[0].type \"bind\" needs",
            ),
            (r#"{"destination":"/d"}"#, "mounts[0].type \"\" needs"),
            (r#"{"destination":"/d","type":"uds"}"#, "mounts[0].source is missing"),
            (r#"{"destination":"/d","options":["bind"]}"#, "mounts[0].source is missing"),
            (
                r#"{"destination":"/d","source":"/s","options":["bind","size=1"]}"#,
                "mounts[0].options [\"size=1\"] mean nothing",
            ),
            (
                r#"{"destination":"/d","source":"/s","options":["bind","ridmap"]}"#,
                "mounts[0].uidMappings is missing",
            ),
            (
                r#"{"destination":"/d","source":"/s","options":["bind"],
                    "uidMappings":[{"containerID":0,"hostID":5,"size":1}]}"#,
                "mounts[0].gidMappings is missing",
            ),
            (
                r#"{"destination":"/d","type":"tmpfs",
                    "uidMappings":[{"containerID":0,"hostID":5,"size":1}],
                    "gidMappings":[{"containerID":0,"hostID":5,"size":1}]}"#,
                "mounts[0] has id mappings, which only bind mounts can have",
            ),
            (r#"{"destination":"/proc","type":"tmpfs"}"#, "mounts[0].destination must not cover"),
            (
                r#"{"destination":"/d","type":"overlay","options":["lowerdir=/a:/b"]}"#,
                "mounts[0].type \"overlay\" is not supported",
            ),
            (
                r#"{"destination":"/d","type":"ext4","source":"/dev/sda1"}"#,
                "mounts[0].type \"ext4\" is not supported",
            ),
            (
                r#"{"destination":"/proc/./self/attr","type":"tmpfs"}"#,
                "mounts[0].destination must not cover",
            ),
            (
                r#"{"destination":"/proc/sys/kernel","source":"/s","options":["bind"]}"#,
                "mounts[0].destination must not cover",
            ),
            (
                r#"{"destination":"/proc","source":"/s","options":["rbind"]}"#,
                "mounts[0].destination must not cover",
            ),
            (r#"{"source":"/s"}"#, "mounts[0]: missing field `destination`"),
        ] {
            let error = read_json(mount, None).unwrap_err();
            assert!(error.starts_with(expected), "{mount}: {error}");
        }
        for fine in [
            r#"{"destination":"/proc","type":"proc","source":"proc"}"#,
            r#"{"destination":"/proc","source":"/proc","options":["rbind"]}"#,
            r#"{"destination":"/proc/meminfo","source":"/s","options":["bind"]}"#,
            r#"{"destination":"/process","type":"tmpfs"}"#,
        ] {
            assert!(read_json(fine, None).is_ok(), "{fine}");
        }
    }

    #[test]
    fn root_fields() {
        let spec = Document::parse(
            br#"{"root":{"path":"rootfs"},"linux":{"rootfsPropagation":"rslave",
                "maskedPaths":["/a"],"readonlyPaths":["b"]}}"#,
        )
        .unwrap();
        assert_eq!(root_path(&spec, Path::new("/b")).unwrap(), Path::new("/b/rootfs"));
        assert_eq!(root_propagation(&spec).unwrap(), Some(SLAVE));
        assert_eq!(paths(&spec, "linux.maskedPaths").unwrap(), ["/a"]);
        assert_eq!(
            paths(&spec, "linux.readonlyPaths").unwrap_err().to_string(),
            "linux.readonlyPaths[0] must be absolute"
        );
        let wrong = Document::parse(br#"{"linux":{"rootfsPropagation":"x"}}"#).unwrap();
        assert!(root_propagation(&wrong).is_err() && root_path(&wrong, Path::new("/b")).is_err());
    }
}
