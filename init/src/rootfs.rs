//! Paths inside the container's root.
//!
//! The image is hostile: every component of a path may be a symbolic link, and a volume shared with
//! a running container may change while we look. So a path is turned into a descriptor once, the
//! descriptor is used, and nothing is looked up twice.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys;

/// Symbolic links in one path, as in the kernel.
const MAX_LINKS: usize = 40;
/// Components in one path after all links; also bounds a race that removes what we create.
const MAX_STEPS: usize = 4096;

/// What a missing mount target becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory of mode 0755.
    Directory,
    /// An empty file of mode 0755, as runc makes it.
    File,
}

/// A mount target.
pub struct Target {
    /// `O_PATH`.
    pub fd: OwnedFd,
    /// It did not exist before.
    pub created: bool,
}

/// The root directory.
pub struct Root(OwnedFd);

impl Root {
    /// The root of this process.
    pub fn open() -> io::Result<Self> {
        sys::openat(sys::cwd(), c"/", libc::O_PATH | libc::O_DIRECTORY, 0).map(Self)
    }

    /// Another directory as the root (tests).
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens what exists, following symbolic links inside the root.
    pub fn open_at(&self, path: &str, flags: i32) -> io::Result<OwnedFd> {
        sys::open_in_root(self.0.as_fd(), &sys::c_string(path)?, flags)
    }

    /// Opens a mount target; a missing one is created with its parents.
    pub fn target(&self, path: &str, kind: Kind) -> io::Result<Target> {
        match self.open_at(path, libc::O_PATH) {
            Ok(fd) => Ok(Target { fd, created: false }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.create(path, kind).map(|fd| Target { fd, created: true })
            }
            Err(e) => Err(e),
        }
    }

    /// Whether the descriptor is the root directory.
    pub fn is_same(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        let (root, other) = (sys::fstat(self.0.as_fd())?, sys::fstat(fd)?);
        Ok((root.st_dev, root.st_ino) == (other.st_dev, other.st_ino))
    }

    /// The directory that holds `path`, created if missing, and the last component, which is not
    /// looked up.
    pub fn parent(&self, path: &str) -> io::Result<(OwnedFd, CString)> {
        let (directory, name) = split(path)?;
        let fd = self.target(directory, Kind::Directory)?.fd;
        Ok((fd, sys::c_string(name)?))
    }

    /// Whether `path` is a symbolic link itself.
    pub fn is_link(&self, path: &str) -> io::Result<bool> {
        let (directory, name) = split(path)?;
        let status = self
            .open_at(directory, libc::O_PATH)
            .and_then(|fd| sys::lstatat(fd.as_fd(), &sys::c_string(name)?));
        match status {
            Ok(status) => Ok(is_link(&status)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Walks component by component and makes what is missing, also behind a dangling link.
    ///
    /// Each step is relative to the descriptor of the step before and follows no link by itself,
    /// and `..` goes back to a descriptor we came from: there is no way out of the root, whatever
    /// is renamed meanwhile.
    fn create(&self, path: &str, kind: Kind) -> io::Result<OwnedFd> {
        let mut trail = vec![sys::duplicate(&self.0)?];
        let mut todo = components(path.as_bytes());
        let mut links = 0;
        for _ in 0..MAX_STEPS {
            let Some(name) = todo.pop() else {
                return trail.pop().ok_or_else(|| errno(libc::ELOOP));
            };
            if name.as_bytes() == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let here = match trail.last() {
                Some(fd) => fd.as_fd(),
                None => self.0.as_fd(),
            };
            match sys::openat(here, &name, libc::O_PATH | libc::O_NOFOLLOW, 0) {
                Ok(fd) => {
                    let status = sys::fstat(fd.as_fd())?;
                    if !is_link(&status) {
                        trail.push(fd);
                        continue;
                    }
                    links += 1;
                    // A link of procfs does not mean what its text says.
                    if links > MAX_LINKS || sys::file_system(here)? == sys::PROC_MAGIC {
                        return Err(errno(libc::ELOOP));
                    }
                    let text = sys::readlinkat(fd.as_fd(), c"")?;
                    if text.first() == Some(&b'/') {
                        trail.truncate(1);
                    }
                    todo.extend(components(&text));
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let made = if kind == Kind::File && todo.is_empty() {
                        let flags =
                            libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY;
                        sys::openat(here, &name, flags, 0o755).map(drop)
                    } else {
                        sys::mkdirat(here, &name, 0o755)
                    };
                    match made {
                        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                        _ => todo.push(name),
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Err(errno(libc::ELOOP))
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn is_link(status: &libc::stat) -> bool {
    status.st_mode & libc::S_IFMT == libc::S_IFLNK
}

/// The components in reverse order: the next one is at the end.
fn components(path: &[u8]) -> Vec<CString> {
    path.split(|b| *b == b'/')
        .rev()
        .filter(|c| !c.is_empty() && *c != b".")
        .filter_map(|c| CString::new(c).ok())
        .collect()
}

/// The directory and the last component; a path without a name of its own is `EINVAL`.
fn split(path: &str) -> io::Result<(&str, &str)> {
    let trimmed = path.trim_end_matches('/');
    let (directory, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
    if matches!(name, "" | "." | "..") {
        return Err(errno(libc::EINVAL));
    }
    Ok((if directory.is_empty() { "/" } else { directory }, name))
}

/// The path without `.`, `..`, doubled and trailing slashes, by its text alone.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Whether the descriptor is the character device `major:minor`.
pub fn is_character_device(fd: BorrowedFd<'_>, major: u32, minor: u32) -> io::Result<bool> {
    let status = sys::fstat(fd)?;
    Ok(status.st_mode & libc::S_IFMT == libc::S_IFCHR
        && status.st_rdev == sys::device(major, minor))
}

/// An entry of a directory opened for reading, whatever mode it has.
pub fn open_directory(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    sys::openat(fd, name, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, 0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("init-rootfs-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path.join("root")).unwrap();
            Self(path)
        }

        fn root(&self) -> PathBuf {
            self.0.join("root")
        }

        fn open(&self) -> Root {
            Root::new(fs::File::open(self.root()).unwrap().into())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn exists(path: impl AsRef<Path>) -> bool {
        path.as_ref().symlink_metadata().is_ok()
    }

    #[test]
    fn missing_targets_are_created_with_their_parents() {
        let scratch = Scratch::new("create");
        let root = scratch.open();
        assert!(root.target("/a/b/c", Kind::Directory).unwrap().created);
        assert!(root.target("/a/b/f", Kind::File).unwrap().created);
        assert!(!root.target("/a/b/f", Kind::Directory).unwrap().created);
        assert!(scratch.root().join("a/b/c").is_dir());
        assert!(scratch.root().join("a/b/f").is_file());
    }

    #[test]
    fn links_never_leave_the_root() {
        let scratch = Scratch::new("links");
        let root = scratch.open();
        symlink("/", scratch.root().join("abs")).unwrap();
        symlink("../../../../..", scratch.root().join("up")).unwrap();
        symlink("/run", scratch.root().join("dangling")).unwrap();
        symlink("../../outside", scratch.root().join("file")).unwrap();
        for path in ["/abs/one", "/up/two", "/dangling/three", "/../../four"] {
            root.target(path, Kind::Directory).unwrap();
        }
        root.target("/file", Kind::File).unwrap();
        for made in ["one", "two", "run/three", "four", "outside"] {
            assert!(exists(scratch.root().join(made)), "{made}");
        }
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1);
    }

    #[test]
    fn loops_end() {
        let scratch = Scratch::new("loop");
        symlink("b", scratch.root().join("a")).unwrap();
        symlink("a", scratch.root().join("b")).unwrap();
        let error = scratch.open().target("/a/x", Kind::File).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_is_no_parent() {
        let scratch = Scratch::new("file");
        fs::write(scratch.root().join("f"), "").unwrap();
        let error = scratch.open().target("/f/x", Kind::File).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn a_racing_swap_of_a_directory_and_a_link_stays_inside() {
        let scratch = Scratch::new("race");
        let root = scratch.open();
        let (inside, stop) = (scratch.root(), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::create_dir(inside.join("d"));
                    let _ = fs::remove_dir_all(inside.join("d"));
                    let _ = symlink("../..", inside.join("d"));
                    let _ = fs::remove_file(inside.join("d"));
                }
            });
            for n in 0..2000 {
                // May fail while the other thread is between two states; it must not escape.
                let _ = root.target(&format!("/d/x{}", n % 7), Kind::Directory);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let outside: Vec<_> =
            fs::read_dir(&scratch.0).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(outside, ["root"]);
    }

    #[test]
    fn only_the_last_component_is_checked_for_being_a_link() {
        let scratch = Scratch::new("islink");
        fs::create_dir(scratch.root().join("real")).unwrap();
        symlink("real", scratch.root().join("proc")).unwrap();
        let root = scratch.open();
        assert!(root.is_link("/proc/").unwrap());
        assert!(!root.is_link("/real").unwrap());
        assert!(!root.is_link("/missing").unwrap());
    }

    #[test]
    fn paths_are_split_and_cleaned_by_text() {
        assert_eq!(split("/dev/null").unwrap(), ("/dev", "null"));
        assert_eq!(split("/x/").unwrap(), ("/", "x"));
        for bad in ["/", "", "/a/..", "/."] {
            assert!(split(bad).is_err(), "{bad}");
        }
        assert_eq!(clean("//proc/./x/..//"), "/proc");
        assert_eq!(clean("/../.."), "/");
    }
}
