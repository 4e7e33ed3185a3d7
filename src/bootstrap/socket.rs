//! The shim's socket: where it is, who binds it, and who removes it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::{Mode, umask};
use sha2::{Digest, Sha256};

/// Where containerd's shims have their sockets unless it names another directory.
pub(super) const DEFAULT_DIR: &str = "/run/containerd/s";

/// `sun_path` of `unix(7)` without the final zero.
const MAX_PATH: usize = 107;

/// What is wrong with the shim's socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system allows only 107 bytes.
    #[error(
        "the socket path {0} is longer than 107 bytes; containerd's socket directory must be shorter"
    )]
    TooLong(PathBuf),
    /// A system call failed.
    #[error("cannot {verb} {path}: {source}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { verb, path, source }
}

/// The path of the socket of the shim that serves `grouping` for the containerd at `address`.
///
/// Source: `SocketAddress` in containerd's `pkg/shim`.
pub(super) fn path(dir: &Path, address: &str, namespace: &str, grouping: &str) -> PathBuf {
    use std::fmt::Write as _;
    // Not Path::join, for which a group that begins with a slash would be a path of its own: one shim
    // for all namespaces.
    let digest = Sha256::digest(format!("{address}/{namespace}/{grouping}"));
    let mut hex = String::with_capacity(64);
    for byte in digest {
        // Writing to a String does not fail.
        let _ = write!(hex, "{byte:02x}");
    }
    dir.join(hex)
}

/// The form containerd dials.
pub(super) fn to_address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// The outcome of [`bind`].
pub(super) enum Bound {
    /// The socket is ours to serve.
    Fresh(UnixListener),
    /// A living shim has it.
    Served,
}

/// Binds `path`, readable and writable for its owner only. A socket that nobody serves any more is
/// replaced.
///
/// Changes the process's umask for a moment: only for a process with one thread.
pub(super) fn bind(path: &Path) -> Result<Bound, Error> {
    if path.as_os_str().len() > MAX_PATH {
        return Err(Error::TooLong(path.to_path_buf()));
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)
        .map_err(failed("create the directory", dir))?;
    // Two starts for one pod that find the same dead socket must not both replace it: the second
    // would remove the living socket of the first.
    let _one_at_a_time = lock(dir)?;
    match listen(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
        other => return other.map(Bound::Fresh).map_err(failed("listen on", path)),
    }
    match UnixStream::connect(path) {
        Ok(_) => Ok(Bound::Served),
        // So is a connection to a file that is no socket at all.
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
            fs::remove_file(path).map_err(failed("remove the dead socket", path))?;
            listen(path).map(Bound::Fresh).map_err(failed("listen on", path))
        }
        Err(e) => Err(failed("connect to", path)(e)),
    }
}

fn lock(dir: &Path) -> Result<Flock<File>, Error> {
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).bits())
        .open(dir)
        .map_err(failed("open the directory", dir))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed("lock the directory", dir)(errno.into()))
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    // A mode set after the bind would come too late for a connection made in between.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Removes the socket if nobody serves it: that of a shim that died.
pub(super) fn remove_dead(path: &Path) {
    let Some(dir) = path.parent() else { return };
    if !is_socket(path) {
        return;
    }
    // Under the lock of `bind`, so that it cannot be one that was bound a moment ago.
    let Ok(_one_at_a_time) = lock(dir) else { return };
    let refused =
        UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    if refused {
        let _ = fs::remove_file(path);
    }
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
}

/// A socket file that its server removes at its end, unless it was replaced meanwhile.
#[derive(Debug)]
pub(super) struct Owned {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Owned {
    pub(super) fn new(path: PathBuf) -> Owned {
        let identity = identity(&path);
        Owned { path, identity }
    }

    pub(super) fn remove(&self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_containerds_hash() {
        // printf /run/containerd/containerd.sock/default/c1 | sha256sum
        assert_eq!(
            path(Path::new(DEFAULT_DIR), "/run/containerd/containerd.sock", "default", "c1"),
            Path::new(
                "/run/containerd/s/d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"
            )
        );
        let of = |namespace, group| path(Path::new("/x"), "/run/c.sock", namespace, group);
        assert_ne!(of("one", "/pod"), of("two", "/pod"), "a group is one of its namespace");
        assert_ne!(of("one", "../two/pod"), of("two", "pod"));
        let elsewhere = path(Path::new("/x/"), "/run/containerd/containerd.sock", "default", "c1");
        assert!(elsewhere.starts_with("/x"));
        assert!(to_address(&elsewhere).starts_with("unix:///x/"));
    }

    fn fresh(bound: Bound) -> UnixListener {
        match bound {
            Bound::Fresh(listener) => listener,
            Bound::Served => panic!("already served"),
        }
    }

    #[test]
    fn a_socket_is_private_in_a_traversable_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/s/sock");
        let _listener = fresh(bind(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o711);
    }

    #[test]
    fn a_served_socket_is_left_alone_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = fresh(bind(&path).unwrap());
        assert!(matches!(bind(&path).unwrap(), Bound::Served));
        remove_dead(&path);
        assert!(path.exists(), "a served socket is not dead");
        drop(listener);
        let again = fresh(bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_ok());
        drop(again);
        remove_dead(&path);
        assert!(!path.exists());
    }

    #[test]
    fn only_sockets_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "precious").unwrap();
        remove_dead(&path);
        assert!(bind(&path).is_err());
        assert!(path.exists());
    }

    #[test]
    fn a_server_does_not_remove_its_successors_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let first = fresh(bind(&path).unwrap());
        let owned = Owned::new(path.clone());
        // A second file first, so that the inode number is not used again at once.
        fs::rename(&path, dir.path().join("old")).unwrap();
        let _second = fresh(bind(&path).unwrap());
        owned.remove();
        assert!(path.exists());
        Owned::new(path.clone()).remove();
        assert!(!path.exists());
        drop(first);
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let long = Path::new("/tmp").join("d".repeat(60)).join("s".repeat(64));
        assert!(matches!(bind(&long), Err(Error::TooLong(_))));
    }
}
