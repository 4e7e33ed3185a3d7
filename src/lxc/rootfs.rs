//! The rootfs: the mounts of the Create request at `<bundle>/rootfs`, and their end.
//!
//! With the mount API a lower directory is one call, so an image may have as many layers as the kernel
//! allows, whatever the length of their paths: no page-sized option string, and no change of the
//! working directory of a server with many tasks.
//!
//! Each mount is made detached and attached last. What only other mounts need (`template`) is
//! attached where the host does not see it ([`Workshop`]), so all that has to be removed in the end is
//! what lies at the rootfs.

mod id_mapped;
mod image;
mod template;

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
use crate::lxc::workshop::{self, Workshop};
use crate::sys::mount::{self as api, Filesystem};
pub use id_mapped::UserIds;
use image::LoopDevice;
use template::{Active, Transformers};

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
    /// A type that only containerd's mount manager makes, or none.
    #[error(
        "rootfs mount type {fstype:?} is not supported: let containerd's mount manager make it"
    )]
    Type { fstype: String },
    /// An option that nobody understands.
    #[error("rootfs mount option {option:?} of type {fstype} is not supported")]
    UnsupportedOption { fstype: String, option: String },
    /// A template that cannot be filled in.
    #[error("rootfs mount template {text:?} {reason}")]
    Template { text: String, reason: &'static str },
    /// A directory of the option `X-containerd.mkdir.path`.
    #[error("make directory {} for the rootfs: {}", path.display(), text(source))]
    MakeDirectory { path: PathBuf, source: io::Error },
    /// The file cannot be opened, or the node has no loop devices.
    #[error("attach image {} to a loop device: {}", path.display(), text(source))]
    LoopDevice { path: PathBuf, source: io::Error },
    /// No mount namespace for the mounts in between.
    #[error(transparent)]
    Workshop(#[from] workshop::Error),
    /// Not every file system can be id-mapped, and none twice.
    #[error(
        "map the ids of the rootfs's {} to the user namespace: {} (can its file system be \
         id-mapped?)",
        path.display(), text(source)
    )]
    MapIds { path: PathBuf, source: io::Error },
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
    #[error("mount {fstype} {source_path:?} as the rootfs: {reason}")]
    Mount { fstype: String, source_path: String, reason: String },
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
/// there already. With `ids`, the files belong to the users of a user namespace, unless the client has
/// prepared them so. Blocks (for less than a millisecond with an overlay).
///
/// # Errors
/// [`Error`]; nothing stays mounted. A `target` that is a symbolic link is refused.
pub fn mount(
    mounts: &[RootfsMount],
    target: &Path,
    ids: Option<&UserIds>,
) -> Result<Mounted, Error> {
    let steps = mounts.iter().map(Step::of).collect::<Result<Vec<_>, _>>()?;
    // As with containerd's mount manager, what comes before the last template is for templates only.
    let chain = steps.iter().rposition(|step| step.transformers.any()).map_or(0, |last| last + 1);
    let (chain, rest) = steps.split_at(chain);
    if !chain.is_empty() {
        let (mount, tree) = Workshop::run(target, |workshop| assemble(chain, ids, workshop))?;
        attach(&mount, &tree, target)?;
    }
    for (done, step) in rest.iter().enumerate() {
        if let Err(first) = mount_one(&step.mount, target, ids) {
            if done + chain.len() > 0
                && let Err(cleanup) = unmount(target)
            {
                return Err(Error::CleanUp { first: first.into(), cleanup: cleanup.into() });
            }
            return Err(first);
        }
    }
    Ok(Mounted { target: target.to_owned() })
}

/// A mount, and what is done with it before it is made.
#[derive(Debug)]
struct Step {
    transformers: Transformers,
    /// With a type of the kernel.
    mount: RootfsMount,
}

impl Step {
    fn of(mount: &RootfsMount) -> Result<Self, Error> {
        let (transformers, fstype) = Transformers::of(&mount.fstype)?;
        let mount = RootfsMount { fstype: fstype.to_owned(), ..mount.clone() };
        Ok(Self { transformers, mount })
    }

    fn transformed(&self, active: &[Active]) -> Result<RootfsMount, Error> {
        let mut mount = self.mount.clone();
        if self.transformers.format {
            template::format(&mut mount, active)?;
        }
        if self.transformers.mkdir {
            template::make_directories(&mut mount)?;
        }
        Ok(mount)
    }
}

/// Makes all of `steps`, each for the templates of the later ones; returns the last one, detached.
fn assemble(
    steps: &[Step],
    ids: Option<&UserIds>,
    workshop: &mut Workshop,
) -> Result<(RootfsMount, OwnedFd), Error> {
    let Some((last, earlier)) = steps.split_last() else {
        return Err(Error::Type { fstype: String::new() });
    };
    let mut active: Vec<Active> = Vec::new();
    for step in earlier {
        let mount = step.transformed(&active)?;
        let tree = id_mapped::make(&mount, None, workshop)?;
        let RootfsMount { source, target, .. } = mount;
        active.push(Active { source, target, point: workshop.attach(tree)? });
    }
    let mount = last.transformed(&active)?;
    let tree = id_mapped::make(&mount, ids, workshop)?;
    Ok((mount, tree))
}

fn mount_one(mount: &RootfsMount, rootfs: &Path, ids: Option<&UserIds>) -> Result<(), Error> {
    let in_workshop = || Workshop::run(rootfs, |workshop| id_mapped::make(mount, ids, workshop));
    let tree = match ids.is_some() || id_mapped::is_of_client(mount) {
        true => in_workshop()?,
        false => match make(mount) {
            Err(error) if error.is_old_kernel() => in_workshop()?,
            result => result?,
        },
    };
    attach(mount, &tree, rootfs)
}

fn attach(mount: &RootfsMount, tree: &OwnedFd, rootfs: &Path) -> Result<(), Error> {
    let directory = open_directory(&below(rootfs, &mount.target)?)?;
    api::attach(tree.as_fd(), directory.as_fd()).map_err(|e| failed(mount, text(&e)))
}

/// Makes one mount, detached. Its type has no transformers any more.
fn make(mount: &RootfsMount) -> Result<OwnedFd, Error> {
    let options = Options::parse(&mount.options);
    if options.bind.is_some() || mount.fstype == "bind" {
        return clone_bind(mount, &options);
    }
    if let Some(option) = options.data.iter().find(|o| o.starts_with("X-")) {
        return Err(Error::UnsupportedOption {
            fstype: mount.fstype.clone(),
            option: option.clone(),
        });
    }
    detached(mount, &options)
}

impl Error {
    /// `lowerdir+` exists since Linux 6.5.
    fn is_old_kernel(&self) -> bool {
        matches!(self, Self::Option { fstype, option, source, .. }
            if fstype == "overlay"
                && option.starts_with("lowerdir+")
                && source.raw_os_error() == Some(libc::EINVAL))
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

fn failed(mount: &RootfsMount, reason: String) -> Error {
    Error::Mount { fstype: mount.fstype.clone(), source_path: mount.source.clone(), reason }
}

/// Mount options, sorted by who understands them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    /// `bind` (false) or `rbind` (true).
    bind: Option<bool>,
    /// The source is an image, also if it is no regular file.
    loop_device: bool,
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
                "loop" => parsed.loop_device = true,
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

fn clone_bind(mount: &RootfsMount, options: &Options) -> Result<OwnedFd, Error> {
    if let Some(option) = options.data.first() {
        return Err(Error::UnsupportedOption { fstype: "bind".to_owned(), option: option.clone() });
    }
    let error = |e: io::Error| failed(mount, text(&e));
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
fn detached(mount: &RootfsMount, options: &Options) -> Result<OwnedFd, Error> {
    let images = Images::attach(mount, options)?;
    let fs = match Filesystem::open(&mount.fstype) {
        Ok(fs) => fs,
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {
            return Err(failed(mount, "the kernel does not know this type".to_owned()));
        }
        Err(e) => return Err(failed(mount, text(&e))),
    };
    let mut parameters = vec![("source".to_owned(), Some(images.of(&mount.source)))];
    for option in &options.data {
        match option.split_once('=') {
            Some(("device", blob)) if mount.fstype == "erofs" => {
                parameters.push(("device".to_owned(), Some(images.of(blob))));
            }
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
                let directory = open_layer(value).map_err(|e| failed(mount, e))?;
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
    let tree = fs.mount(options.attributes).map_err(|e| failed(mount, text(&e) + &details(&fs)))?;
    let propagation_only =
        Options { propagation: options.propagation.clone(), ..Options::default() };
    change(&tree, &propagation_only).map_err(|e| failed(mount, text(&e)))?;
    Ok(tree)
}

/// The loop devices of a mount whose source, or whose blobs (erofs's option `device`), are files.
struct Images(Vec<(String, LoopDevice)>);

impl Images {
    fn attach(mount: &RootfsMount, options: &Options) -> Result<Self, Error> {
        // As losetup has it, and as containerd does with erofs: what cannot be written is not opened
        // for writing.
        let read_only =
            options.attributes & libc::MOUNT_ATTR_RDONLY != 0 || mount.fstype == "erofs";
        let is_file = |path: &str| path.starts_with('/') && Path::new(path).is_file();
        let blobs = options.data.iter().filter_map(|o| o.strip_prefix("device="));
        let source = Some(mount.source.as_str()).filter(|s| options.loop_device || is_file(s));
        let files =
            source.into_iter().chain(blobs.filter(|b| mount.fstype == "erofs" && is_file(b)));
        let attach = |path: &str| {
            LoopDevice::attach(Path::new(path), read_only)
                .map(|device| (path.to_owned(), device))
                .map_err(|source| Error::LoopDevice { path: path.into(), source })
        };
        files.map(attach).collect::<Result<_, _>>().map(Self)
    }

    /// The device of a file, or what it is itself.
    fn of(&self, path: &str) -> String {
        match self.0.iter().find(|(file, _)| file == path) {
            Some((_, device)) => device.path().display().to_string(),
            None => path.to_owned(),
        }
    }
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
fn classic_overlay(mount: &RootfsMount, workshop: &mut Workshop) -> Result<OwnedFd, Error> {
    let options = Options::parse(&mount.options);
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
                let fd = open_layer(&unescaped(&layer)).map_err(|e| failed(mount, e))?;
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
    let point = workshop.directory()?;
    nix::mount::mount(
        Some(mount.source.as_str()),
        &point,
        Some(mount.fstype.as_str()),
        flags,
        Some(data.as_str()),
    )
    .map_err(|errno| failed(mount, errno.desc().to_lowercase()))?;
    api::clone_tree(&point, false).map_err(|e| failed(mount, text(&e)))
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
mod tests;
