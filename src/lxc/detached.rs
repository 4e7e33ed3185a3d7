//! Opens the sources of bind mounts on the host, as detached mounts that init attaches inside the CT.
//!
//! The path is resolved here, once, by the host's rules; what travels to init is the mount itself, with
//! its attributes and propagation already set. So no path of the host is ever resolved in the CT, and
//! the mount is at no moment in the host's peer group while the CT can see it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns};

use crate::oci::plan::{MountAttributes, NamespaceFilesystem};
use crate::sys::mount::{self as api, Change};

/// What can go wrong with the source of a bind mount.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Most often it does not exist.
    #[error("mount {} at {destination:?}: {}", path.display(), text(source))]
    Open { path: PathBuf, destination: String, source: io::Error },
    /// The kernel refused the options.
    #[error("mount {} at {destination:?}: set its options: {}", path.display(), text(source))]
    Change { path: PathBuf, destination: String, source: io::Error },
    /// Not every file system can be id-mapped, and none twice.
    #[error(
        "mount {} at {destination:?}: map its ids: {} (can its file system be id-mapped?)",
        path.display(), text(source)
    )]
    MapIds { path: PathBuf, destination: String, source: io::Error },
    /// What shows a namespace of the container.
    #[error("mount {fstype} for the container's namespace: {}", text(source))]
    OfNamespace { fstype: &'static str, source: io::Error },
    /// The init binary's mount.
    #[error("open {} as a read-only mount: {}", path.display(), text(source))]
    ReadOnly { path: PathBuf, source: io::Error },
}

fn text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// Whose ids the files of a mount get.
#[derive(Debug, Clone, Copy)]
pub struct IdMap<'a> {
    /// Carries the mappings.
    pub user_namespace: BorrowedFd<'a>,
    /// Also of the mounts below it.
    pub recursive: bool,
}

/// A detached mount.
#[derive(Debug)]
pub struct DetachedMount {
    pub fd: OwnedFd,
    /// What init creates when the destination is missing.
    pub directory: bool,
}

/// Opens `source` (links are followed) for the mount at `destination`, which serves for messages only.
///
/// `propagation` are `MS_*` flags, applied in order. A recursive clone gets the first of them recursively,
/// also without `MS_REC`: mounts below that stayed in the host's peer groups would carry the CT's
/// mounts to the host. An empty list means private.
///
/// # Errors
/// [`Error`] naming the path and the destination.
pub fn open(
    source: &Path,
    destination: &str,
    recursive: bool,
    attributes: MountAttributes,
    propagation: &[u64],
    ids: Option<IdMap<'_>>,
) -> Result<DetachedMount, Error> {
    let opened = api::clone_tree(source, recursive).and_then(|fd| {
        // fstat works on a descriptor that is only a place in the tree.
        let file = File::from(fd);
        let directory = file.metadata()?.is_dir();
        Ok(DetachedMount { fd: file.into(), directory })
    });
    let mount = opened.map_err(|source_error| Error::Open {
        path: source.to_owned(),
        destination: destination.to_owned(),
        source: source_error,
    })?;
    if let Some(IdMap { user_namespace, recursive }) = ids {
        api::map_ids(mount.fd.as_fd(), recursive, user_namespace).map_err(|source_error| {
            Error::MapIds {
                path: source.to_owned(),
                destination: destination.to_owned(),
                source: source_error,
            }
        })?;
    }
    apply(&mount.fd, recursive, attributes, propagation).map_err(|source_error| Error::Change {
        path: source.to_owned(),
        destination: destination.to_owned(),
        source: source_error,
    })?;
    Ok(mount)
}

/// Whether there is what [`open`] would mount.
///
/// # Errors
/// [`Error::Open`].
pub fn check_source(source: &Path, destination: &str) -> Result<(), Error> {
    source.metadata().map(|_| ()).map_err(|error| Error::Open {
        path: source.to_owned(),
        destination: destination.to_owned(),
        source: error,
    })
}

fn apply(
    mount: &OwnedFd,
    recursive: bool,
    attributes: MountAttributes,
    propagation: &[u64],
) -> io::Result<()> {
    let kinds = libc::MS_PRIVATE | libc::MS_SLAVE | libc::MS_SHARED | libc::MS_UNBINDABLE;
    let mut steps = propagation.iter().filter(|&flags| flags & kinds != 0);
    // Attributes for the whole tree together with the first propagation: one call, before anything
    // else can happen to the mount. No mount of the tree may stay in the host's peer group.
    let first = Change {
        set: attributes.recursive_set,
        clear: with_atime(attributes.recursive_set, attributes.recursive_clear),
        propagation: steps.next().map_or(libc::MS_PRIVATE, |flags| flags & kinds),
    };
    api::change(mount.as_fd(), recursive, first)?;
    for flags in steps {
        let step = Change { propagation: flags & kinds, ..Change::default() };
        api::change(mount.as_fd(), recursive && flags & libc::MS_REC != 0, step)?;
    }
    let top = Change {
        set: attributes.set,
        clear: with_atime(attributes.set, attributes.clear),
        propagation: 0,
    };
    if top != Change::default() {
        api::change(mount.as_fd(), false, top)?;
    }
    Ok(())
}

/// The access time modes are one field of several bits, which the kernel wants cleared to be set.
fn with_atime(set: u64, clear: u64) -> u64 {
    if set & libc::MOUNT_ATTR__ATIME == 0 { clear } else { clear | libc::MOUNT_ATTR__ATIME }
}

/// A copy of the host's whole mount tree, for hooks that look at the host from inside the CT's mount
/// namespace: the host's mounts arrive in it, and nothing goes back.
///
/// # Errors
/// [`Error`].
pub fn host_tree() -> Result<OwnedFd, Error> {
    let slave = [libc::MS_SLAVE | libc::MS_REC];
    open(Path::new("/"), "/", true, MountAttributes::default(), &slave, None).map(|mount| mount.fd)
}

/// A new mount, with `MOUNT_ATTR_*`, of the file system that shows a namespace of a process. It
/// belongs to whom the namespace belongs.
///
/// # Errors
/// [`Error::OfNamespace`].
pub fn of_namespace(
    filesystem: NamespaceFilesystem,
    process: BorrowedFd<'_>,
    attributes: u64,
) -> Result<OwnedFd, Error> {
    let (fstype, namespace) = match filesystem {
        NamespaceFilesystem::Sysfs => ("sysfs", CloneFlags::CLONE_NEWNET),
        NamespaceFilesystem::Mqueue => ("mqueue", CloneFlags::CLONE_NEWIPC),
    };
    let open = || -> io::Result<OwnedFd> {
        setns(process, namespace)?;
        api::Filesystem::open(fstype)?.mount(attributes)
    };
    // The namespace is that of a thread, which ends with it.
    std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, open) {
        Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(error) => Err(error),
    })
    .map_err(|source| Error::OfNamespace { fstype, source })
}

/// One file, such as the init binary, opened (`O_PATH`) on a private, read-only mount that belongs to no
/// namespace: whoever runs it from there cannot be used to write to it.
///
/// A container finds the mount behind `/proc/<pid>/exe` of an exec. While a descriptor of `open_tree(2)`
/// keeps the mount in its anonymous namespace, CAP_SYS_ADMIN is enough to make it writable
/// (`mount_setattr(2)`), and with it the file on the host. So that descriptor is closed here: the file's
/// own descriptor keeps the mount alive, but nothing can change it any more.
///
/// # Errors
/// [`Error::ReadOnly`].
pub fn read_only_file(path: &Path) -> Result<OwnedFd, Error> {
    let change = Change {
        set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        clear: 0,
        propagation: libc::MS_PRIVATE,
    };
    let open = || {
        let tree = api::clone_tree(path, false)?;
        api::change(tree.as_fd(), false, change)?;
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(format!("/proc/self/fd/{}", tree.as_raw_fd()))
            .map(OwnedFd::from)
    };
    open().map_err(|source| Error::ReadOnly { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{OFlag, openat};
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sys::stat::Mode;
    use std::fs;

    const PRIVATE: &[u64] = &[libc::MS_PRIVATE];

    fn root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    fn create(dir: &OwnedFd, name: &str) -> nix::Result<OwnedFd> {
        openat(dir, name, OFlag::O_CREAT | OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::S_IRWXU)
    }

    #[test]
    fn a_missing_source_is_named_with_its_destination() {
        let error =
            open(Path::new("/no/such"), "/data", false, MountAttributes::default(), PRIVATE, None);
        let text = error.unwrap_err().to_string();
        for part in ["/no/such", "/data", "no such file or directory"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn files_and_directories_are_told_apart() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        for (name, directory) in [("", true), ("file", false), ("link", false)] {
            let path = dir.path().join(name);
            let mount =
                open(&path, "/x", false, MountAttributes::default(), PRIVATE, None).unwrap();
            assert_eq!(mount.directory, directory, "{name}");
        }
    }

    #[test]
    fn read_only_is_of_the_top_and_recursive_read_only_of_all() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        mount(Some("t"), &sub, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let ro = libc::MOUNT_ATTR_RDONLY;
        let top = MountAttributes { set: ro, ..MountAttributes::default() };
        let all = MountAttributes { recursive_set: ro, ..MountAttributes::default() };
        let plain =
            open(dir.path(), "/x", true, top, &[libc::MS_PRIVATE | libc::MS_REC], None).unwrap();
        let recursive = open(dir.path(), "/x", true, all, PRIVATE, None).unwrap();
        let shallow =
            open(dir.path(), "/x", false, MountAttributes::default(), PRIVATE, None).unwrap();
        let results = (
            create(&plain.fd, "a").err(),
            create(&plain.fd, "sub/a").err(),
            create(&recursive.fd, "a").err(),
            create(&recursive.fd, "sub/b").err(),
            create(&shallow.fd, "sub/c").err(),
        );
        let seen_below = sub.join("c").exists();
        umount2(&sub, MntFlags::MNT_DETACH).unwrap();
        let refused = Some(Errno::EROFS);
        assert_eq!(results, (refused, None, refused, refused, None));
        assert!(!seen_below, "a plain bind does not take the mounts below along");
    }

    /// `/proc/self/fdinfo` and the mount id lead to no mountinfo for a detached mount, so the
    /// propagation is seen by its effect: a mount on the host must not appear in a private clone, and
    /// must appear in a slave.
    #[test]
    fn private_clones_leave_the_hosts_peer_group_and_slaves_follow_it() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path();
        mount(Some("t"), base, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, base, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        fs::create_dir(base.join("sub")).unwrap();
        fs::create_dir(base.join("at")).unwrap();
        let none = MountAttributes::default();
        let private = open(base, "/x", false, none, &[], None).unwrap();
        let changed = api::change(
            private.fd.as_fd(),
            false,
            Change { propagation: libc::MS_SLAVE, ..Change::default() },
        );
        // Attach it in this namespace to see its line in mountinfo.
        let at = tempfile::tempdir().unwrap();
        let shown = |kind: u64| {
            let clone = open(base, "/x", false, none, &[kind], None).unwrap();
            let target = File::open(at.path()).unwrap();
            mount(Some("p"), at.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            mount(None::<&str>, at.path(), None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)
                .unwrap();
            drop(target);
            let inner = at.path().join("m");
            fs::create_dir(&inner).unwrap();
            let target = File::open(&inner).unwrap();
            api::attach(clone.fd.as_fd(), target.as_fd()).unwrap();
            let real = inner.canonicalize().unwrap();
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let line =
                table.lines().find(|l| l.split(' ').nth(4) == real.to_str()).unwrap().to_owned();
            umount2(at.path(), MntFlags::MNT_DETACH).unwrap();
            line
        };
        let lines = [libc::MS_PRIVATE, libc::MS_SLAVE, libc::MS_SHARED].map(shown);
        umount2(base, MntFlags::MNT_DETACH).unwrap();
        changed.unwrap();
        assert!(!lines[0].contains("shared:") && !lines[0].contains("master:"), "{}", lines[0]);
        assert!(lines[1].contains("master:") && !lines[1].contains("shared:"), "{}", lines[1]);
        assert!(lines[2].contains("shared:"), "{}", lines[2]);
    }

    #[test]
    fn an_id_mapped_mount_shows_mapped_owners_and_stores_unmapped_ones() {
        use std::os::unix::fs::MetadataExt;
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let map = "0 100000 65536\n";
        let user_namespace = crate::sys::user_namespace::with_mappings(map, map).unwrap();
        let ids = Some(IdMap { user_namespace: user_namespace.as_fd(), recursive: false });
        let none = MountAttributes::default();
        let mount = open(dir.path(), "/x", false, none, PRIVATE, ids).unwrap();
        let seen = openat(&mount.fd, "file", OFlag::O_RDONLY, Mode::empty()).unwrap();
        let seen = File::from(seen).metadata().unwrap();
        assert_eq!((seen.uid(), seen.gid()), (100_000, 100_000));
        assert_eq!(dir.path().join("file").metadata().unwrap().uid(), 0);
        // Host root has no id there.
        assert_eq!(create(&mount.fd, "new").err(), Some(Errno::EOVERFLOW));
        let error = open(Path::new("/proc"), "/x", false, none, PRIVATE, ids).unwrap_err();
        assert!(error.to_string().contains("can its file system be id-mapped?"), "{error}");
    }

    #[test]
    fn the_read_only_file_runs_and_cannot_be_written() {
        if !root() {
            return;
        }
        let fd = read_only_file(Path::new("/bin/true")).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        assert!(std::process::Command::new(&path).status().unwrap().success());
        let write = || fs::OpenOptions::new().write(true).open(&path).unwrap_err().raw_os_error();
        assert_eq!(write(), Some(libc::EROFS));
    }

    /// As root, so with more than CAP_SYS_ADMIN, and with what /proc/<pid>/exe leads to.
    #[test]
    fn nobody_can_make_the_read_only_file_writable() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::copy("/bin/sleep", &program).unwrap();
        let fd = read_only_file(&program).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut running = std::process::Command::new(&path).arg("60").spawn().unwrap();
        let exe = PathBuf::from(format!("/proc/{}/exe", running.id()));
        let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&exe).unwrap();
        running.kill().unwrap();
        running.wait().unwrap();
        let clear = Change { clear: libc::MOUNT_ATTR_RDONLY, ..Change::default() };
        let path = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
        let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
        let remounted = mount(None::<&str>, &path, None::<&str>, remount, None::<&str>);
        let errors = (
            api::change(found.as_fd(), false, clear).map_err(|e| e.raw_os_error()),
            api::clone_tree(&path, false).map(drop).map_err(|e| e.raw_os_error()),
            remounted,
            OpenOptions::new().write(true).open(&path).map(drop).map_err(|e| e.raw_os_error()),
        );
        let invalid = Err(Some(libc::EINVAL));
        assert_eq!(errors, (invalid, invalid, Err(Errno::EINVAL), Err(Some(libc::EROFS))));
    }
}
