//! The rootfs: the mounts of the Create request at `<bundle>/rootfs`, and their end.
//!
//! With the mount API a lower directory is one call, so an image may have as many layers as the kernel
//! allows, whatever the length of their paths: no page-sized option string, and no change of the
//! working directory of a server with many tasks.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use log::warn;
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, umount2};

use crate::lxc::cgroup::unescape;
use crate::sys::mount::{self as api, Filesystem};

/// `fsconfig(2)` takes strings of up to 255 bytes.
const LONGEST_VALUE: usize = 255;
/// `mount(2)` takes up to a page of options, with the final NUL.
const LONGEST_OPTIONS: usize = 4095;
/// How long a mount may be busy before it is detached: 50 times 10 ms.
const BUSY_ATTEMPTS: u32 = 50;

/// One mount as containerd asks for it (`containerd.types.Mount`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// `type` in containerd's message.
    pub fstype: String,
    /// A directory, a device, or a mere name, as the type has it.
    pub source: String,
    /// Below the rootfs; empty for the rootfs itself.
    pub target: String,
    /// As of `mount(8)`.
    pub options: Vec<String>,
}

/// What can go wrong with the rootfs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Asked for something that is not implemented.
    #[error("rootfs mount type {fstype} is not supported yet")]
    Type { fstype: String },
    /// An image file, which would need a loop device.
    #[error("rootfs mount of image file {source_path} (type {fstype}) is not supported yet")]
    ImageFile { fstype: String, source_path: String },
    /// Asked for something that is not implemented.
    #[error("rootfs mount option {option:?} of type {fstype} is not supported yet")]
    UnsupportedOption { fstype: String, option: String },
    /// The kernel refused an option.
    #[error(
        "rootfs mount option {option:?} of type {fstype} is refused by the kernel: {}{details}",
        text(source)
    )]
    Option { fstype: String, option: String, details: String, source: io::Error },
    /// The target is no directory, or a symbolic link.
    #[error("open rootfs {}: {}", path.display(), text(source))]
    Target { path: PathBuf, source: io::Error },
    /// The target of one mount leaves the rootfs.
    #[error("rootfs mount target {target:?} leaves the rootfs")]
    Outside { target: String },
    /// The mount failed.
    #[error("mount {fstype} {source_path:?} at {}: {reason}", target.display())]
    Mount { fstype: String, source_path: String, target: PathBuf, reason: String },
    /// A mount could not be removed.
    #[error("unmount {}: {}", path.display(), text(source))]
    Unmount { path: PathBuf, source: io::Error },
    /// A mount failed, and those before it could not be removed either.
    #[error("{first}; then also: {cleanup}")]
    CleanUp { first: Box<Error>, cleanup: Box<Error> },
}

fn text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// The mounts at a rootfs. It does not unmount by itself: they must outlive a shim that crashes.
#[derive(Debug)]
pub struct Mounted {
    target: PathBuf,
}

impl Mounted {
    /// The rootfs.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// See [`unmount`].
    ///
    /// # Errors
    /// [`Error::Unmount`].
    pub fn unmount(self) -> Result<(), Error> {
        unmount(&self.target)
    }
}

/// Mounts `mounts` in order at `target`, an existing directory. An empty list means that the rootfs is
/// there already. Blocks (for less than a millisecond with an overlay).
///
/// # Errors
/// [`Error`]; nothing stays mounted. A `target` that is a symbolic link is refused.
pub fn mount(mounts: &[RootfsMount], target: &Path) -> Result<Mounted, Error> {
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(first) = mount_one(mount, target) {
            if done > 0
                && let Err(cleanup) = unmount(target)
            {
                return Err(Error::CleanUp { first: first.into(), cleanup: cleanup.into() });
            }
            return Err(first);
        }
    }
    Ok(Mounted { target: target.to_owned() })
}

fn mount_one(mount: &RootfsMount, rootfs: &Path) -> Result<(), Error> {
    let target = below(rootfs, &mount.target)?;
    let directory = open_directory(&target)?;
    let options = Options::parse(&mount.options);
    let bind = options.bind.is_some() || mount.fstype == "bind";
    let attach = |tree: &OwnedFd| {
        api::attach(tree.as_fd(), directory.as_fd()).map_err(|e| failed(mount, &target, text(&e)))
    };
    if bind {
        return attach(&clone_bind(mount, &options, &target)?);
    }
    // Types with a scheme such as `format/mkdir/overlay` are templates of containerd's mount
    // manager.
    if mount.fstype.is_empty() || mount.fstype.contains('/') {
        return Err(Error::Type { fstype: mount.fstype.clone() });
    }
    if let Some(option) = options.data.iter().find(|o| *o == "loop" || o.starts_with("X-")) {
        return Err(Error::UnsupportedOption {
            fstype: mount.fstype.clone(),
            option: option.clone(),
        });
    }
    if Path::new(&mount.source).is_file() {
        return Err(Error::ImageFile {
            fstype: mount.fstype.clone(),
            source_path: mount.source.clone(),
        });
    }
    match detached(mount, &options, &target) {
        // `lowerdir+` exists since Linux 6.5.
        Err(Error::Option { option, source, .. })
            if mount.fstype == "overlay"
                && option.starts_with("lowerdir+")
                && source.raw_os_error() == Some(libc::EINVAL) =>
        {
            classic_overlay(mount, &options, &directory, &target)
        }
        other => attach(&other?),
    }
}

/// The path of a mount below the rootfs, without a way out of it.
fn below(rootfs: &Path, target: &str) -> Result<PathBuf, Error> {
    let mut path = rootfs.to_owned();
    for component in Path::new(target).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => {
                path.push(name);
                // The image may hold a link in place of any of them.
                open_directory(&path)?;
            }
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::Outside { target: target.to_owned() });
            }
        }
    }
    Ok(path)
}

/// `O_DIRECTORY` beside `O_NOFOLLOW` refuses a link, and the descriptor cannot be swapped for one.
fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|source| Error::Target { path: path.to_owned(), source })
}

fn failed(mount: &RootfsMount, target: &Path, reason: String) -> Error {
    Error::Mount {
        fstype: mount.fstype.clone(),
        source_path: mount.source.clone(),
        target: target.to_owned(),
        reason,
    }
}

/// Mount options, sorted by who understands them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    /// `bind` (false) or `rbind` (true).
    bind: Option<bool>,
    /// `MOUNT_ATTR_*`.
    attributes: u64,
    /// `MS_*` propagation, of the mount or recursive.
    propagation: Vec<(u64, bool)>,
    /// For the filesystem.
    data: Vec<String>,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self::default();
        for option in options.iter().flat_map(|o| split_unescaped(o, ',')) {
            let attributes = &mut parsed.attributes;
            match option.as_str() {
                "" | "rw" | "suid" | "dev" | "exec" | "defaults" | "relatime" | "async"
                | "diratime" => {}
                "bind" => parsed.bind = parsed.bind.or(Some(false)),
                "rbind" => parsed.bind = Some(true),
                "ro" => *attributes |= libc::MOUNT_ATTR_RDONLY,
                "nosuid" => *attributes |= libc::MOUNT_ATTR_NOSUID,
                "nodev" => *attributes |= libc::MOUNT_ATTR_NODEV,
                "noexec" => *attributes |= libc::MOUNT_ATTR_NOEXEC,
                "noatime" => *attributes |= libc::MOUNT_ATTR_NOATIME,
                "strictatime" => *attributes |= libc::MOUNT_ATTR_STRICTATIME,
                "nodiratime" => *attributes |= libc::MOUNT_ATTR_NODIRATIME,
                "nosymfollow" => *attributes |= libc::MOUNT_ATTR_NOSYMFOLLOW,
                "private" => parsed.propagation.push((libc::MS_PRIVATE, false)),
                "rprivate" => parsed.propagation.push((libc::MS_PRIVATE, true)),
                "slave" => parsed.propagation.push((libc::MS_SLAVE, false)),
                "rslave" => parsed.propagation.push((libc::MS_SLAVE, true)),
                "shared" => parsed.propagation.push((libc::MS_SHARED, false)),
                "rshared" => parsed.propagation.push((libc::MS_SHARED, true)),
                _ => parsed.data.push(option),
            }
        }
        parsed
    }
}

/// Splits where `separator` is not escaped by a backslash; escapes stay.
fn split_unescaped(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == separator && !escaped {
            parts.push(String::new());
            continue;
        }
        escaped = c == '\\' && !escaped;
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

/// Removes overlay's escapes, `\:` and `\\`, which `lowerdir+` does not know.
fn unescaped(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    out
}

fn clone_bind(mount: &RootfsMount, options: &Options, target: &Path) -> Result<OwnedFd, Error> {
    if let Some(option) = options.data.first() {
        return Err(Error::UnsupportedOption { fstype: "bind".to_owned(), option: option.clone() });
    }
    let error = |e: io::Error| failed(mount, target, text(&e));
    let recursive = options.bind.unwrap_or(false);
    let tree = api::clone_tree(Path::new(&mount.source), recursive).map_err(error)?;
    change(&tree, options).map_err(error)?;
    Ok(tree)
}

fn change(tree: &OwnedFd, options: &Options) -> io::Result<()> {
    const ATIME: u64 = libc::MOUNT_ATTR_NOATIME | libc::MOUNT_ATTR_STRICTATIME;
    if options.attributes != 0 {
        let clear = if options.attributes & ATIME == 0 { 0 } else { libc::MOUNT_ATTR__ATIME };
        let change = api::Change { set: options.attributes, clear, propagation: 0 };
        api::change(tree.as_fd(), false, change)?;
    }
    for &(propagation, recursive) in &options.propagation {
        let change = api::Change { propagation, ..api::Change::default() };
        api::change(tree.as_fd(), recursive, change)?;
    }
    Ok(())
}

/// A new filesystem as a detached mount.
fn detached(mount: &RootfsMount, options: &Options, target: &Path) -> Result<OwnedFd, Error> {
    let fs = match Filesystem::open(&mount.fstype) {
        Ok(fs) => fs,
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {
            return Err(failed(mount, target, "the kernel does not know this type".to_owned()));
        }
        Err(e) => return Err(failed(mount, target, text(&e))),
    };
    let mut parameters = vec![("source".to_owned(), Some(mount.source.clone()))];
    for option in &options.data {
        match option.split_once('=') {
            Some(("lowerdir", layers)) if mount.fstype == "overlay" => {
                parameters.extend(lower_layers(layers));
            }
            Some((key, value)) if mount.fstype == "overlay" => {
                parameters.push((key.to_owned(), Some(unescaped(value))));
            }
            Some((key, value)) => parameters.push((key.to_owned(), Some(value.to_owned()))),
            None => parameters.push((option.clone(), None)),
        }
    }
    if options.attributes & libc::MOUNT_ATTR_RDONLY != 0 {
        // The filesystem, not only the mount, as `mount -o ro` has it.
        parameters.push(("ro".to_owned(), None));
    }
    // Directories with paths beyond the limit are named by a descriptor, open until the mount.
    let mut open = Vec::new();
    for (key, value) in &parameters {
        let result = match value {
            None => fs.set_flag(key),
            Some(value) if value.len() > LONGEST_VALUE && value.starts_with('/') => {
                let directory = open_layer(value).map_err(|e| failed(mount, target, e))?;
                let short = format!("/proc/self/fd/{}", directory.as_raw_fd());
                open.push(directory);
                fs.set(key, short.as_bytes())
            }
            Some(value) => fs.set(key, value.as_bytes()),
        };
        result.map_err(|source| Error::Option {
            fstype: mount.fstype.clone(),
            option: match value {
                Some(value) => format!("{key}={value}"),
                None => key.clone(),
            },
            details: details(&fs),
            source,
        })?;
    }
    let tree = fs
        .mount(options.attributes)
        .map_err(|e| failed(mount, target, text(&e) + &details(&fs)))?;
    let propagation_only =
        Options { propagation: options.propagation.clone(), ..Options::default() };
    change(&tree, &propagation_only).map_err(|e| failed(mount, target, text(&e)))?;
    Ok(tree)
}

/// What the kernel says beyond the error number.
fn details(fs: &Filesystem) -> String {
    let told = fs.messages();
    if told.is_empty() { told } else { format!(": {told}") }
}

/// `a:b::c` as one parameter per layer; after `::` come layers of data only.
fn lower_layers(layers: &str) -> Vec<(String, Option<String>)> {
    let mut key = "lowerdir+";
    let mut out = Vec::new();
    for layer in split_unescaped(layers, ':') {
        if layer.is_empty() {
            key = "datadir+";
        } else {
            out.push((key.to_owned(), Some(unescaped(&layer))));
        }
    }
    out
}

fn open_layer(path: &str) -> Result<OwnedFd, String> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|e| format!("{path}: {}", text(&e)))
}

/// `mount(2)` for kernels before 6.5, with layers named by descriptors if the options would not fit:
/// some 180 layers then do.
fn classic_overlay(
    mount: &RootfsMount,
    options: &Options,
    directory: &OwnedFd,
    target: &Path,
) -> Result<(), Error> {
    let mut data = options.data.join(",");
    let mut open = Vec::new();
    if data.len() > LONGEST_OPTIONS {
        let mut short = Vec::new();
        for option in &options.data {
            let Some(layers) = option.strip_prefix("lowerdir=") else {
                short.push(option.clone());
                continue;
            };
            let mut names = Vec::new();
            for layer in split_unescaped(layers, ':') {
                if layer.is_empty() {
                    names.push(layer);
                    continue;
                }
                let fd = open_layer(&unescaped(&layer)).map_err(|e| failed(mount, target, e))?;
                names.push(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                open.push(fd);
            }
            short.push(format!("lowerdir={}", names.join(":")));
        }
        data = short.join(",");
    }
    let mut flags = MsFlags::empty();
    for (attribute, flag) in [
        (libc::MOUNT_ATTR_RDONLY, MsFlags::MS_RDONLY),
        (libc::MOUNT_ATTR_NOSUID, MsFlags::MS_NOSUID),
        (libc::MOUNT_ATTR_NODEV, MsFlags::MS_NODEV),
        (libc::MOUNT_ATTR_NOEXEC, MsFlags::MS_NOEXEC),
        (libc::MOUNT_ATTR_NOATIME, MsFlags::MS_NOATIME),
        (libc::MOUNT_ATTR_STRICTATIME, MsFlags::MS_STRICTATIME),
        (libc::MOUNT_ATTR_NODIRATIME, MsFlags::MS_NODIRATIME),
    ] {
        if options.attributes & attribute != 0 {
            flags |= flag;
        }
    }
    // The descriptor's path, so that the directory that was checked is the one that is used.
    let at = format!("/proc/self/fd/{}", directory.as_raw_fd());
    nix::mount::mount(
        Some(mount.source.as_str()),
        at.as_str(),
        Some(mount.fstype.as_str()),
        flags,
        Some(data.as_str()),
    )
    .map_err(|errno| failed(mount, target, errno.desc().to_lowercase()))
}

/// Removes all mounts at `target` and below it, however many lie upon each other, and whoever made
/// them: also those of a shim that crashed. Nothing mounted, or no such directory, is fine.
///
/// Blocks: for up to half a second while a mount is busy, and for as long as the kernel takes to write
/// out the upper directory's file system, which it does with every overlay that is not `volatile`
/// (milliseconds, or hundreds of them on a disk that others write to).
///
/// # Errors
/// [`Error::Unmount`].
pub fn unmount(target: &Path) -> Result<(), Error> {
    loop {
        // Nearly always there is one mount, or none: no need to read the host's whole table.
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or not there.
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => break,
            // There are mounts below it, or it is in use.
            Err(Errno::EBUSY) => {
                unmount_below(target)?;
                unmount_busy(target)?;
            }
            Err(errno) => return Err(unmount_error(target, errno)),
        }
    }
    unmount_below(target)
}

/// The mounts strictly below `target`, the latest first.
fn unmount_below(target: &Path) -> Result<(), Error> {
    // The table has real paths; the last component must not be followed.
    let Some((parent, name)) = target.parent().zip(target.file_name()) else { return Ok(()) };
    let Ok(parent) = parent.canonicalize() else { return Ok(()) };
    let real = parent.join(name);
    let path = Path::new("/proc/self/mountinfo");
    let table = std::fs::read_to_string(path)
        .map_err(|source| Error::Unmount { path: path.to_owned(), source })?;
    let points: Vec<_> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|point| point.starts_with(&real) && *point != real)
        .collect();
    for point in points.iter().rev() {
        match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(Errno::EBUSY) => unmount_busy(point)?,
            Err(errno) => return Err(unmount_error(point, errno)),
        }
    }
    Ok(())
}

/// Waits for the last user of a mount: a process that has just been killed may still have it as its
/// root, or liblxc's monitor may be about to leave.
fn unmount_busy(point: &Path) -> Result<(), Error> {
    for _ in 0..BUSY_ATTEMPTS {
        sleep(Duration::from_millis(10));
        match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) => {}
            Err(errno) => return Err(unmount_error(point, errno)),
        }
    }
    // The snapshot can't be removed, nor the container's id used again, while the mount is seen at
    // its place. Whoever still uses it keeps it alive in secret; it goes with its last user.
    warn!(path = point.display().to_string().as_str(); "a mount of the rootfs stays busy and is detached");
    match umount2(point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(unmount_error(point, errno)),
    }
}

fn unmount_error(path: &Path, errno: Errno) -> Error {
    Error::Unmount { path: path.to_owned(), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Instant;

    /// Below a tmpfs that is not shared with any other mount namespace.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            fs::create_dir(place.path("rootfs")).unwrap();
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn dir(&self, name: &str) -> String {
            fs::create_dir_all(self.path(name)).unwrap();
            self.path(name).to_str().unwrap().to_owned()
        }

        fn overlay(&self, layers: &[String], more: &[&str]) -> RootfsMount {
            let mut options = vec![
                format!("lowerdir={}", layers.join(":")),
                format!("upperdir={}", self.dir("upper")),
                format!("workdir={}", self.dir("work")),
            ];
            options.extend(more.iter().map(|o| (*o).to_owned()));
            RootfsMount {
                fstype: "overlay".into(),
                source: "overlay".into(),
                target: String::new(),
                options,
            }
        }

        fn mounts(&self) -> usize {
            let real = self.0.path().canonicalize().unwrap();
            fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .lines()
                .filter(|l| l.split(' ').nth(4).unwrap().starts_with(real.to_str().unwrap()))
                .count()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = unmount(&self.path("rootfs"));
        }
    }

    fn bind(source: &str, options: &[&str]) -> RootfsMount {
        RootfsMount {
            fstype: "bind".into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    fn root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn an_overlay_with_options_beyond_a_page_is_mounted_and_unmounted() {
        if !root() {
            return;
        }
        let place = Place::new();
        let layers: Vec<_> =
            (0..120).map(|n| place.dir(&format!("{}-{n}", "x".repeat(60)))).collect();
        fs::write(Path::new(&layers[119]).join("file"), "deep").unwrap();
        assert!(layers.join(":").len() > 5000);
        let start = Instant::now();
        let mounted =
            mount(&[place.overlay(&layers, &["index=off"])], &place.path("rootfs")).unwrap();
        eprintln!("120 layers: {:?}", start.elapsed());
        assert_eq!(fs::read_to_string(place.path("rootfs/file")).unwrap(), "deep");
        fs::write(place.path("rootfs/new"), "").unwrap();
        assert!(place.path("upper/new").exists());
        mounted.unmount().unwrap();
        assert_eq!(place.mounts(), 0);
        unmount(&place.path("rootfs")).unwrap();
    }

    #[test]
    fn an_overlay_mounts_in_less_than_a_millisecond() {
        if !root() {
            return;
        }
        let place = Place::new();
        let layers: Vec<_> = (0..5).map(|n| place.dir(&format!("lower{n}"))).collect();
        let overlay = [place.overlay(&layers, &["index=off"])];
        let mut times: Vec<_> = (0..20)
            .map(|_| {
                let start = Instant::now();
                let mounted = mount(&overlay, &place.path("rootfs")).unwrap();
                let time = start.elapsed();
                mounted.unmount().unwrap();
                time
            })
            .collect();
        times.sort();
        eprintln!("5 layers: median {:?}, worst {:?}", times[10], times[19]);
        // Ample, for a busy machine; the median is some 100 µs.
        assert!(times[10] < Duration::from_millis(5));
    }

    #[test]
    fn a_layer_with_a_very_long_path_or_special_characters_is_found() {
        if !root() {
            return;
        }
        let place = Place::new();
        let long = place.dir(&format!("{}/{}", "a".repeat(200), "b".repeat(200)));
        let odd = place.dir("with:colon,comma");
        fs::write(Path::new(&long).join("long"), "").unwrap();
        fs::write(Path::new(&odd).join("odd"), "").unwrap();
        let layers = [long, odd.replace(':', "\\:").replace(',', "\\,")];
        mount(&[place.overlay(&layers, &[])], &place.path("rootfs")).unwrap();
        assert!(place.path("rootfs/long").exists() && place.path("rootfs/odd").exists());
    }

    #[test]
    fn older_kernels_get_the_same_by_mount_2() {
        if !root() {
            return;
        }
        let place = Place::new();
        let target = place.path("rootfs");
        let layers: Vec<_> =
            (0..100).map(|n| place.dir(&format!("{}-{n}", "x".repeat(60)))).collect();
        fs::write(Path::new(&layers[99]).join("file"), "deep").unwrap();
        let overlay = place.overlay(&layers, &["index=off"]);
        let options = Options::parse(&overlay.options);
        classic_overlay(&overlay, &options, &open_directory(&target).unwrap(), &target).unwrap();
        assert_eq!(fs::read_to_string(place.path("rootfs/file")).unwrap(), "deep");
    }

    #[test]
    fn a_read_only_view_cannot_be_written() {
        if !root() {
            return;
        }
        let place = Place::new();
        let view = RootfsMount {
            options: vec![format!("lowerdir={}:{}", place.dir("l1"), place.dir("l2")), "ro".into()],
            ..place.overlay(&[], &[])
        };
        mount(&[view], &place.path("rootfs")).unwrap();
        let error = fs::write(place.path("rootfs/x"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }

    #[test]
    fn bind_mounts_take_their_attributes() {
        if !root() {
            return;
        }
        let place = Place::new();
        let source = place.dir("source");
        fs::write(place.path("source/file"), "").unwrap();
        mount(&[bind(&source, &["rbind", "ro"])], &place.path("rootfs")).unwrap();
        assert!(place.path("rootfs/file").exists());
        let error = fs::write(place.path("rootfs/x"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        fs::write(place.path("source/x"), "").unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_rootfs_is_refused() {
        if !root() {
            return;
        }
        let place = Place::new();
        let source = place.dir("source");
        symlink(place.dir("elsewhere"), place.path("link")).unwrap();
        let error = mount(&[bind(&source, &["bind"])], &place.path("link")).unwrap_err();
        assert!(matches!(error, Error::Target { .. }), "{error}");
        assert_eq!(place.mounts(), 0);
    }

    #[test]
    fn mounts_upon_and_below_each_other_are_all_removed() {
        if !root() {
            return;
        }
        let place = Place::new();
        let (a, b) = (place.dir("a"), place.dir("b"));
        fs::create_dir_all(place.path("b/sub")).unwrap();
        let rootfs = place.path("rootfs");
        mount(&[bind(&a, &["bind"]), bind(&b, &["bind"])], &rootfs).unwrap();
        let below = RootfsMount { target: "/sub".into(), ..bind(&a, &["bind"]) };
        mount(&[below], &rootfs).unwrap();
        assert_eq!(place.mounts(), 3);
        unmount(&rootfs).unwrap();
        assert_eq!(place.mounts(), 0);
    }

    #[test]
    fn a_busy_mount_is_waited_for_and_then_detached() {
        if !root() {
            return;
        }
        let place = Place::new();
        let source = place.dir("source");
        fs::write(place.path("source/file"), "").unwrap();
        mount(&[bind(&source, &["bind"])], &place.path("rootfs")).unwrap();
        let user = fs::File::open(place.path("rootfs/file")).unwrap();
        let release = std::thread::spawn(move || {
            sleep(Duration::from_millis(60));
            drop(user);
        });
        unmount(&place.path("rootfs")).unwrap();
        assert_eq!(place.mounts(), 0);
        release.join().unwrap();
        mount(&[bind(&source, &["bind"])], &place.path("rootfs")).unwrap();
        let _user = fs::File::open(place.path("rootfs/file")).unwrap();
        unmount(&place.path("rootfs")).unwrap();
        assert_eq!(place.mounts(), 0);
    }

    #[test]
    fn a_failure_leaves_nothing_mounted_and_says_what_failed() {
        if !root() {
            return;
        }
        let place = Place::new();
        let good = place.dir("good");
        let mounts = [bind(&good, &["bind"]), bind("/does/not/exist", &["bind"])];
        let text = mount(&mounts, &place.path("rootfs")).unwrap_err().to_string();
        assert!(text.contains("/does/not/exist") && text.contains("no such file"), "{text}");
        assert_eq!(place.mounts(), 0);
        let missing = place.overlay(&["/does/not/exist".into()], &[]);
        let text = mount(&[missing], &place.path("rootfs")).unwrap_err().to_string();
        assert!(text.contains("/does/not/exist"), "{text}");
        let unknown = place.overlay(std::slice::from_ref(&good), &["nonsense=1"]);
        let text = mount(&[unknown], &place.path("rootfs")).unwrap_err().to_string();
        assert!(text.contains("nonsense"), "{text}");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let place = Place::new();
        let rootfs = place.path("rootfs");
        fs::write(place.path("image"), "").unwrap();
        let image = place.path("image").to_str().unwrap().to_owned();
        for (fstype, source, option, expected) in [
            ("format/mkdir/overlay", "overlay", "", "format/mkdir/overlay is not supported yet"),
            ("erofs", image.as_str(), "", "erofs"),
            ("ext4", "/dev/null", "loop", "\"loop\" of type ext4"),
            ("", "x", "", "not supported yet"),
        ] {
            let mount_ = RootfsMount {
                fstype: fstype.into(),
                source: source.into(),
                target: String::new(),
                options: vec![option.into()],
            };
            let text = mount(&[mount_], &rootfs).unwrap_err().to_string();
            assert!(text.contains(expected), "{fstype}: {text}");
        }
        let outside = RootfsMount { target: "a/../..".into(), ..bind("/tmp", &[]) };
        fs::create_dir(place.path("rootfs/a")).unwrap();
        assert!(matches!(mount(&[outside], &rootfs), Err(Error::Outside { .. })));
    }

    #[test]
    fn layers_are_split_where_overlay_splits_them() {
        let some = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
        assert_eq!(
            lower_layers("/a:/b\\:c::/d"),
            [some("lowerdir+", "/a"), some("lowerdir+", "/b:c"), some("datadir+", "/d")]
        );
    }
}
