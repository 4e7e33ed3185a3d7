//! The container's mounts, made inside its root after the pivot.
//!
//! Every mount exists detached first and is attached by descriptor to a target that was resolved
//! once: there is no path between check and use.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::{Attempt, Error, Result, quote};
use crate::protocol::{CgroupHierarchy, Mount, MountSource, Request};
use crate::rootfs::{self, Kind, Root};
use crate::socket::Channel;
use crate::sys::{self, attr};

/// What may be mounted over inside procfs: files that lxcfs and its like provide (runc's list).
const PROC_FILES: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// `mount(2)` flags split into what `mount_setattr(2)` and what the superblock takes.
#[derive(Debug, PartialEq, Eq)]
struct Flags {
    attributes: u64,
    options: Vec<&'static str>,
    read_only: bool,
}

/// Translates `MS_*`. A flag that cannot be honoured is refused rather than forgotten.
fn split_flags(flags: u64) -> Result<Flags> {
    let mut out = Flags { attributes: 0, options: Vec::new(), read_only: false };
    for bit in (0..64).map(|n| 1u64 << n).filter(|bit| flags & bit != 0) {
        match bit as libc::c_ulong {
            libc::MS_RDONLY => {
                out.attributes |= attr::RDONLY;
                out.options.push("ro");
                out.read_only = true;
            }
            libc::MS_NOSUID => out.attributes |= attr::NOSUID,
            libc::MS_NODEV => out.attributes |= attr::NODEV,
            libc::MS_NOEXEC => out.attributes |= attr::NOEXEC,
            libc::MS_NOATIME => out.attributes |= attr::NOATIME,
            libc::MS_STRICTATIME => out.attributes |= attr::STRICTATIME,
            libc::MS_NODIRATIME => out.attributes |= attr::NODIRATIME,
            libc::MS_NOSYMFOLLOW => out.attributes |= attr::NOSYMFOLLOW,
            libc::MS_SYNCHRONOUS => out.options.push("sync"),
            libc::MS_DIRSYNC => out.options.push("dirsync"),
            libc::MS_LAZYTIME => out.options.push("lazytime"),
            libc::MS_MANDLOCK => out.options.push("mand"),
            // The kernel's default, and a wish to keep quiet.
            libc::MS_RELATIME | libc::MS_SILENT => {}
            _ => {
                return Err(Error::Refused {
                    object: format!("mount flag {bit:#x}"),
                    reason: "is not supported for a file system",
                });
            }
        }
    }
    Ok(out)
}

/// A new detached file system. `data` is the option string of `mount(2)`.
fn new_filesystem(
    fstype: &str,
    source: &str,
    flags: &Flags,
    attributes: u64,
    data: &str,
) -> Result<OwnedFd> {
    let fs = sys::c_string(fstype)
        .and_then(|kind| sys::fs_open(&kind))
        .attempt(|| format!("open file system type {}", quote(fstype)))?;
    let configure = || {
        if !source.is_empty() {
            sys::fs_set(fs.as_fd(), c"source", &sys::c_string(source)?)?;
        }
        for option in &flags.options {
            // A tmpfs gets its targets and copies first and becomes read-only afterwards.
            if *option != "ro" || attributes & attr::RDONLY != 0 {
                sys::fs_set_flag(fs.as_fd(), &sys::c_string(option)?)?;
            }
        }
        for option in data.split(',').filter(|o| !o.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => {
                    sys::fs_set(fs.as_fd(), &sys::c_string(key)?, &sys::c_string(value)?)?;
                }
                None => sys::fs_set_flag(fs.as_fd(), &sys::c_string(option)?)?,
            }
        }
        sys::fs_mount(fs.as_fd(), attributes)
    };
    configure().attempt(|| match sys::fs_message(fs.as_fd()) {
        Some(message) => format!("mount {fstype} with options {} ({message})", quote(data)),
        None => format!("mount {fstype} with options {}", quote(data)),
    })
}

/// New instances of procfs for those of `mounts` that want one, in their order.
///
/// A user namespace gets a new one only as long as another one can be seen completely, which LXC has
/// made for this purpose and init removes.
pub fn new_procfs(mounts: &[Mount]) -> Result<VecDeque<OwnedFd>> {
    let mut instances = VecDeque::new();
    for mount in mounts {
        if let MountSource::Filesystem { source, fstype, flags, data } = &mount.source
            && fstype == "proc"
        {
            let made = split_flags(*flags)
                .and_then(|flags| new_filesystem(fstype, source, &flags, flags.attributes, data));
            instances.push_back(made.map_err(|reason| failed(mount, reason))?);
        }
    }
    Ok(instances)
}

/// The words are runc's.
fn failed(mount: &Mount, reason: Error) -> Error {
    let source = match &mount.source {
        MountSource::Detached { .. } => "bind",
        MountSource::Filesystem { source, .. } => source,
        MountSource::Cgroup { .. } => "cgroup",
    };
    Error::Mount {
        source_name: source.to_owned(),
        destination: mount.destination.clone(),
        reason: Box::new(reason),
    }
}

/// Makes the mounts of one container.
pub struct Mounter<'a> {
    root: &'a Root,
    channel: &'a Channel,
    /// See [`new_procfs`].
    procfs: VecDeque<OwnedFd>,
    /// Detached mounts that have arrived but are not attached yet.
    arrived: VecDeque<OwnedFd>,
    /// What [`Mounter::finish`] makes read-only.
    read_only_later: Vec<OwnedFd>,
}

impl<'a> Mounter<'a> {
    /// Detached mounts are received over `channel` when they are needed; `procfs` are the
    /// [`new_procfs`].
    pub fn new(root: &'a Root, channel: &'a Channel, procfs: VecDeque<OwnedFd>) -> Self {
        Self { root, channel, procfs, arrived: VecDeque::new(), read_only_later: Vec::new() }
    }

    /// Makes one mount.
    pub fn mount(&mut self, mount: &Mount) -> Result<()> {
        self.mount_one(mount).map_err(|e| match e {
            Error::Disconnected => Error::Disconnected,
            e => failed(mount, e),
        })
    }

    fn mount_one(&mut self, mount: &Mount) -> Result<()> {
        let destination = rootfs::clean(&mount.destination);
        let attached = match &mount.source {
            MountSource::Detached { directory } => {
                let fd = self.next_detached()?;
                let kind = if *directory { Kind::Directory } else { Kind::File };
                let target = self.target(&destination, kind)?;
                let is_proc = sys::file_system(fd.as_fd()).attempt(|| "inspect")?;
                check_proc(&destination, target.fd.as_fd(), is_proc == sys::PROC_MAGIC)?;
                attach(fd, target.fd.as_fd())?
            }
            MountSource::Filesystem { source, fstype, flags, data } => {
                self.filesystem(mount, &destination, source, fstype, *flags, data)?
            }
            MountSource::Cgroup { flags, hierarchies } => {
                self.cgroup(&destination, *flags, hierarchies)?
            }
        };
        for flags in &mount.propagation {
            let recursive = flags & libc::MS_REC != 0;
            sys::change_mount(attached.as_fd(), 0, flags & !libc::MS_REC, recursive)
                .attempt(|| "set propagation")?;
        }
        Ok(())
    }

    /// Makes read-only what had to be writable until now.
    pub fn finish(self) -> Result<()> {
        if !self.arrived.is_empty() {
            return Err(Error::Protocol("more detached mounts than mounts"));
        }
        for mount in &self.read_only_later {
            sys::change_mount(mount.as_fd(), attr::RDONLY, 0, false)
                .attempt(|| "make a tmpfs read-only")?;
        }
        Ok(())
    }

    fn next_detached(&mut self) -> Result<OwnedFd> {
        if self.arrived.is_empty() {
            match self.channel.receive()? {
                (Request::Descriptors, fds) => self.arrived = fds.into(),
                _ => return Err(Error::Protocol("expected detached mounts")),
            }
        }
        self.arrived.pop_front().ok_or(Error::Protocol("a detached mount is missing"))
    }

    fn target(&self, destination: &str, kind: Kind) -> Result<rootfs::Target> {
        let target = self.root.target(destination, kind).attempt(|| "open the mount's target")?;
        // Also behind a link: processes that enter later would get what lies on top as their root.
        if self.root.is_same(target.fd.as_fd()).attempt(|| "inspect the mount's target")? {
            return Err(refused(destination, "is the container's root"));
        }
        Ok(target)
    }

    fn filesystem(
        &mut self,
        mount: &Mount,
        destination: &str,
        source: &str,
        fstype: &str,
        flags: u64,
        data: &str,
    ) -> Result<OwnedFd> {
        // With a link there, everything that trusts /proc or /sys would trust what it points to.
        if matches!(fstype, "proc" | "sysfs") || matches!(destination, "/proc" | "/sys") {
            let is_link =
                self.root.is_link(destination).attempt(|| "inspect the mount's target")?;
            if is_link {
                return Err(refused(destination, "must be mounted on ordinary directory"));
            }
        }
        let flags = split_flags(flags)?;
        let target = self.target(destination, Kind::Directory)?;
        check_proc(destination, target.fd.as_fd(), fstype == "proc")?;
        if fstype == "proc" {
            let fd = self.procfs.pop_front().ok_or(Error::Protocol("a procfs is missing"))?;
            return attach(fd, target.fd.as_fd());
        }
        if fstype != "tmpfs" {
            let fd = new_filesystem(fstype, source, &flags, flags.attributes, data)?;
            return attach(fd, target.fd.as_fd());
        }
        // A tmpfs over an existing directory has that directory's mode unless the options say
        // otherwise: /tmp stays 1777.
        let data = if target.created {
            data.to_owned()
        } else {
            let status = sys::fstat(target.fd.as_fd()).attempt(|| "inspect the target")?;
            format!("mode={:o},{data}", status.st_mode & 0o7777)
        };
        let attributes = flags.attributes & !attr::RDONLY;
        let fd = new_filesystem(fstype, source, &flags, attributes, &data)?;
        if mount.copy_up {
            copy_up(target.fd.as_fd(), fd.as_fd())?;
        }
        if flags.read_only {
            let later = sys::duplicate(&fd).attempt(|| "duplicate")?;
            self.read_only_later.push(later);
        }
        attach(fd, target.fd.as_fd())
    }

    /// The container's view of its own cgroups. The cgroup namespace makes `/` of each hierarchy
    /// the CT's cgroup.
    fn cgroup(
        &mut self,
        destination: &str,
        flags: u64,
        hierarchies: &[CgroupHierarchy],
    ) -> Result<OwnedFd> {
        let flags = split_flags(flags)?;
        let target = self.target(destination, Kind::Directory)?;
        check_proc(destination, target.fd.as_fd(), false)?;
        // Read-only applies to the mount, never to a superblock that the host may share.
        let plain = Flags { attributes: flags.attributes, options: Vec::new(), read_only: false };
        if hierarchies.is_empty() {
            let fd = new_filesystem("cgroup2", "cgroup", &plain, flags.attributes, "")?;
            return attach(fd, target.fd.as_fd());
        }
        let attributes = flags.attributes & !attr::RDONLY;
        let tmpfs = new_filesystem("tmpfs", "tmpfs", &plain, attributes, "mode=755")?;
        let tmpfs = attach(tmpfs, target.fd.as_fd())?;
        for hierarchy in hierarchies {
            self.hierarchy(&tmpfs, hierarchy, &plain).map_err(|e| Error::Hierarchy {
                name: hierarchy.name.clone(),
                reason: Box::new(e),
            })?;
        }
        if flags.read_only {
            sys::change_mount(tmpfs.as_fd(), attr::RDONLY, 0, false)
                .attempt(|| "make read-only")?;
        }
        Ok(tmpfs)
    }

    fn hierarchy(&self, tmpfs: &OwnedFd, hierarchy: &CgroupHierarchy, flags: &Flags) -> Result<()> {
        let name = &hierarchy.name;
        if name.is_empty() || name == "." || name == ".." || name.contains('/') {
            return Err(refused(name, "is no name of a cgroup hierarchy"));
        }
        let c_name = sys::c_string(name).attempt(|| "name")?;
        sys::mkdirat(tmpfs.as_fd(), &c_name, 0o755).attempt(|| "create the directory")?;
        let target = sys::openat(
            tmpfs.as_fd(),
            &c_name,
            libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY,
            0,
        )
        .attempt(|| "open the directory")?;
        let (fstype, options) = if hierarchy.unified {
            ("cgroup2", "")
        } else {
            ("cgroup", hierarchy.options.as_str())
        };
        let fd = new_filesystem(fstype, "cgroup", flags, flags.attributes, options)?;
        attach(fd, target.as_fd())?;
        if name.contains(',') {
            for controller in name.split(',').filter(|c| !c.is_empty()) {
                let link = sys::c_string(controller).attempt(|| "name")?;
                sys::symlinkat(&c_name, tmpfs.as_fd(), &link)
                    .attempt(|| format!("link {}", quote(controller)))?;
            }
        }
        Ok(())
    }
}

fn refused(object: &str, reason: &'static str) -> Error {
    Error::Refused { object: quote(object), reason }
}

fn attach(mount: OwnedFd, target: BorrowedFd<'_>) -> Result<OwnedFd> {
    sys::attach_mount(mount.as_fd(), target).attempt(|| "attach the mount")?;
    Ok(mount)
}

/// Only procfs itself may cover `/proc`, and only harmless files inside it may be covered:
/// otherwise the image decides what init and the runtime read and write there.
fn check_proc(destination: &str, target: BorrowedFd<'_>, is_proc: bool) -> Result<()> {
    let on_proc = destination == "/proc"
        || destination.starts_with("/proc/")
        || sys::file_system(target).attempt(|| "inspect the target")? == sys::PROC_MAGIC;
    if !on_proc || (is_proc && destination == "/proc") || PROC_FILES.contains(&destination) {
        return Ok(());
    }
    Err(refused(destination, "cannot be mounted because it is inside /proc"))
}

/// Copies what a directory holds into the root of a new, still detached tmpfs: names, contents,
/// types, owners and modes. Extended attributes and times are not copied.
fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let from = rootfs::open_directory(from, c".").attempt(|| "open for copying up")?;
    let to = rootfs::open_directory(to, c".").attempt(|| "open the new tmpfs")?;
    copy_directory(from.as_fd(), to.as_fd(), 0).attempt(|| "copy the directory up into the tmpfs")
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: u32) -> std::io::Result<()> {
    // One descriptor pair per level: a bound well below RLIMIT_NOFILE.
    if depth > 128 {
        return Err(std::io::Error::from_raw_os_error(libc::ELOOP));
    }
    for name in sys::read_dir(from)? {
        let status = sys::lstatat(from, &name)?;
        let mode = status.st_mode & 0o7777;
        match status.st_mode & libc::S_IFMT {
            libc::S_IFDIR => {
                sys::mkdirat(to, &name, 0o700)?;
                let below = rootfs::open_directory(from, &name)?;
                let copy = rootfs::open_directory(to, &name)?;
                copy_directory(below.as_fd(), copy.as_fd(), depth + 1)?;
                sys::lchownat(to, &name, status.st_uid, status.st_gid)?;
                sys::fchmod(copy.as_fd(), mode)?;
            }
            libc::S_IFREG => {
                let source = sys::openat(from, &name, libc::O_RDONLY | libc::O_NOFOLLOW, 0)?;
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
                let copy = sys::openat(to, &name, flags, 0o600)?;
                let mut copy = std::fs::File::from(copy);
                std::io::copy(&mut std::fs::File::from(source), &mut copy)?;
                sys::lchownat(to, &name, status.st_uid, status.st_gid)?;
                sys::fchmod(copy.as_fd(), mode)?;
            }
            libc::S_IFLNK => {
                let text = sys::c_string(sys::readlinkat(from, &name)?)?;
                sys::symlinkat(&text, to, &name)?;
                sys::lchownat(to, &name, status.st_uid, status.st_gid)?;
            }
            // Made with a zero umask: the mode is exact.
            _ => {
                sys::mknodat(to, &name, status.st_mode, status.st_rdev)?;
                sys::lchownat(to, &name, status.st_uid, status.st_gid)?;
            }
        }
    }
    Ok(())
}

/// Makes existing paths read-only: each is bound onto itself. Missing ones are skipped.
pub fn make_read_only(root: &Root, paths: &[String]) -> Result<()> {
    for path in paths {
        let Some(target) = open_existing(root, path)? else {
            continue;
        };
        let bind = || {
            let copy = sys::clone_mount(target.as_fd(), true)?;
            sys::change_mount(copy.as_fd(), attr::RDONLY, 0, false)?;
            sys::attach_mount(copy.as_fd(), target.as_fd())
        };
        bind().attempt(|| format!("make {} read-only", quote(path)))?;
    }
    Ok(())
}

/// Hides existing paths: files behind `/dev/null`, directories behind an empty, read-only tmpfs.
pub fn mask(root: &Root, paths: &[String]) -> Result<()> {
    let mut null = None;
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let Some(target) = open_existing(root, path)? else {
            continue;
        };
        let status = sys::fstat(target.as_fd()).attempt(|| format!("inspect {}", quote(path)))?;
        let cover = if status.st_mode & libc::S_IFMT == libc::S_IFDIR {
            match &empty {
                // All directories share one superblock. Only an attached mount can be cloned
                // before Linux 6.15, so the first use attaches the original.
                Some(attached) => sys::clone_mount(attached.as_fd(), false),
                None => {
                    let first = empty_tmpfs()?;
                    let copy = sys::duplicate(&first);
                    empty = Some(first);
                    copy
                }
            }
        } else {
            let null = match &mut null {
                Some(fd) => fd,
                none => none.insert(open_null(root)?),
            };
            sys::clone_mount(null.as_fd(), false)
        };
        cover
            .and_then(|cover| sys::attach_mount(cover.as_fd(), target.as_fd()))
            .attempt(|| format!("mask {}", quote(path)))?;
    }
    Ok(())
}

fn empty_tmpfs() -> Result<OwnedFd> {
    let flags = split_flags(libc::MS_RDONLY)?;
    new_filesystem("tmpfs", "tmpfs", &flags, flags.attributes, "nr_blocks=1,nr_inodes=1")
}

/// `/dev/null`, proved by its device number: an image could put a file there and have the masked
/// paths show it.
fn open_null(root: &Root) -> Result<OwnedFd> {
    let null =
        root.open_at("/dev/null", libc::O_PATH).attempt(|| "open \"/dev/null\" to mask files")?;
    if !rootfs::is_character_device(null.as_fd(), 1, 3).attempt(|| "inspect \"/dev/null\"")? {
        return Err(refused("/dev/null", "is not the null device"));
    }
    Ok(null)
}

fn open_existing(root: &Root, path: &str) -> Result<Option<OwnedFd>> {
    match root.open_at(path, libc::O_PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(e) => Err(e).attempt(|| format!("open {}", quote(path))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mount_flag_is_translated_or_refused() {
        let flags = libc::MS_RDONLY
            | libc::MS_NOSUID
            | libc::MS_NODEV
            | libc::MS_NOEXEC
            | libc::MS_RELATIME
            | libc::MS_SYNCHRONOUS;
        let split = split_flags(flags).unwrap();
        assert_eq!(split.attributes, attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC);
        assert_eq!(split.options, ["ro", "sync"]);
        assert!(split.read_only);
        for refused in
            [libc::MS_BIND, libc::MS_REC, libc::MS_REMOUNT, libc::MS_SHARED, libc::MS_MOVE]
        {
            assert!(split_flags(refused).is_err(), "{refused:#x}");
        }
    }

    #[test]
    fn nothing_but_procfs_covers_proc() {
        let root = std::fs::File::open("/").unwrap();
        let check = |destination, is_proc| check_proc(destination, root.as_fd(), is_proc).is_ok();
        assert!(check("/proc", true));
        assert!(!check("/proc", false));
        assert!(!check("/proc/self", true));
        assert!(!check("/proc/sys/kernel", false));
        assert!(check("/proc/meminfo", false));
        assert!(check("/process", false));
        let proc = std::fs::File::open("/proc").unwrap();
        assert!(check_proc("/elsewhere", proc.as_fd(), false).is_err());
    }
}
