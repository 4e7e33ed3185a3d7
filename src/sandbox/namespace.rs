//! Namespaces that are joined by their path.
//!
//! A pod's containers name those of the sandbox as `/proc/<pid>/ns/…`, CNI's as a file that is
//! mounted somewhere. Either may be gone, or mean something else, by the time it is used; LXC would
//! only say that the container did not start.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use crate::oci::plan::{Namespace, Namespaces, UserNamespace};
use crate::sys;

/// What is wrong with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing at the path any more.
    #[error(
        "{kind} namespace {path:?}: is gone: the pod sandbox has ended or its network was removed"
    )]
    Gone { kind: Kind, path: PathBuf },
    /// It can't be opened.
    #[error("{kind} namespace {path:?}: cannot be opened")]
    Open { kind: Kind, path: PathBuf, source: io::Error },
    /// It is a file of another sort.
    #[error("{kind} namespace {path:?}: is not a {kind} namespace")]
    Other { kind: Kind, path: PathBuf },
    /// The container's process is in another one.
    #[error(
        "{kind} namespace {path:?}: changed while the container was started; the pod sandbox has \
         ended"
    )]
    Changed { kind: Kind, path: PathBuf },
}

/// The kinds that can be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ipc,
    Network,
    Pid,
    User,
    Uts,
}

impl Kind {
    /// `CLONE_NEW*`.
    #[must_use]
    pub fn flag(self) -> i32 {
        match self {
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Network => libc::CLONE_NEWNET,
            Self::Pid => libc::CLONE_NEWPID,
            Self::User => libc::CLONE_NEWUSER,
            Self::Uts => libc::CLONE_NEWUTS,
        }
    }

    /// The name in `/proc/<pid>/ns`.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Network => "net",
            Self::Pid => "pid",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ipc => "ipc",
            Self::Network => "network",
            Self::Pid => "pid",
            Self::User => "user",
            Self::Uts => "uts",
        })
    }
}

/// The namespaces by their kinds, but for that of users.
#[must_use]
pub fn by_kind(namespaces: &Namespaces) -> [(Kind, &Namespace); 4] {
    [
        (Kind::Ipc, &namespaces.ipc),
        (Kind::Network, &namespaces.network),
        (Kind::Pid, &namespaces.pid),
        (Kind::Uts, &namespaces.uts),
    ]
}

/// Namespaces that were found at their paths, and that exist as long as this does.
#[derive(Debug)]
pub struct Joined(Vec<(Kind, PathBuf, File)>);

impl Joined {
    /// Opens those that are given by a path, that of users last: who has joined it has no right to the
    /// node's any more. Blocks.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Open`], [`Error::Other`].
    pub fn open(namespaces: &Namespaces, user: Option<&UserNamespace>) -> Result<Self, Error> {
        let paths =
            by_kind(namespaces).into_iter().filter_map(|(kind, namespace)| match namespace {
                Namespace::Path(path) => Some((kind, path)),
                Namespace::New | Namespace::Host => None,
            });
        let user = user.and_then(|user| Some((Kind::User, user.path.as_ref()?)));
        let opened =
            paths.chain(user).map(|(kind, path)| Ok((kind, path.clone(), open(kind, path)?)));
        Ok(Self(opened.collect::<Result<_, _>>()?))
    }

    /// Whether the process, which LXC has put into namespaces by their paths, is in these. Blocks.
    ///
    /// # Errors
    /// [`Error::Changed`], [`Error::Open`] if the process has ended.
    pub fn verify(&self, pid: i32) -> Result<(), Error> {
        for (kind, path, file) in &self.0 {
            let kind = *kind;
            let failed = |source| Error::Open { kind, path: path.clone(), source };
            let ours = file.metadata().map_err(failed)?;
            let theirs = std::fs::metadata(format!("/proc/{pid}/ns/{}", kind.file()));
            let theirs = theirs.map_err(failed)?;
            if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
                return Err(Error::Changed { kind, path: path.clone() });
            }
        }
        Ok(())
    }

    /// The user namespace that the network belongs to, if it is not the node's own: only who is in it
    /// may change that network, or mount a sysfs that shows it. Blocks.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn owner_of_network(&self) -> Result<Option<OwnedFd>, Error> {
        let network = self.0.iter().find(|(kind, ..)| *kind == Kind::Network);
        let Some((kind, path, file)) = network else { return Ok(None) };
        let failed = |source| Error::Open { kind: *kind, path: path.clone(), source };
        let owner = File::from(sys::namespace::owner(file.as_fd()).map_err(failed)?);
        let (theirs, ours) = (owner.metadata(), std::fs::metadata("/proc/self/ns/user"));
        let (theirs, ours) = (theirs.map_err(failed)?, ours.map_err(failed)?);
        let is_ours = (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino());
        Ok((!is_ours).then(|| owner.into()))
    }

    /// The open namespaces.
    #[must_use]
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.0.into_iter().map(|(_, _, file)| file.into()).collect()
    }
}

fn open(kind: Kind, path: &Path) -> Result<File, Error> {
    let opened = OpenOptions::new()
        .read(true)
        // What is there might be a FIFO, or a terminal.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(path);
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT) => Error::Gone { kind, path: path.to_owned() },
        // No namespace can ever be there.
        Some(libc::ENAMETOOLONG | libc::ENOTDIR | libc::ELOOP) => {
            Error::Other { kind, path: path.to_owned() }
        }
        _ => Error::Open { kind, path: path.to_owned(), source },
    })?;
    match sys::namespace::kind(file.as_fd()) {
        Ok(found) if found == kind.flag() => Ok(file),
        Ok(_) | Err(_) => Err(Error::Other { kind, path: path.to_owned() }),
    }
}

/// Whether any namespace is at the path.
#[must_use]
pub fn is_namespace(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| sys::namespace::kind(file.as_fd()).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joining(network: &str) -> Result<Joined, String> {
        let network = Namespace::Path(network.into());
        let namespaces = Namespaces {
            pid: Namespace::New,
            network,
            ipc: Namespace::Host,
            uts: Namespace::New,
            cgroup: Namespace::New,
            time: Namespace::Host,
        };
        Joined::open(&namespaces, None).map_err(|error| error.to_string())
    }

    #[test]
    fn only_a_namespace_of_the_right_kind_is_joined() {
        let own = format!("/proc/{}/ns/net", std::process::id());
        let joined = joining(&own).unwrap();
        joined.verify(std::process::id() as i32).unwrap();
        assert_eq!(joined.into_fds().len(), 1);
        for (path, problem) in [
            ("/proc/self/ns/uts", "is not a network namespace"),
            ("/etc/passwd", "is not a network namespace"),
            ("/nonexistent", "is gone: the pod sandbox has ended or its network was removed"),
            ("/proc/0/ns/net", "is gone: the pod sandbox has ended or its network was removed"),
            ("/dev", "is not a network namespace"),
            ("/etc/passwd/net", "is not a network namespace"),
            (&"x".repeat(5000), "is not a network namespace"),
        ] {
            let error = joining(path).unwrap_err();
            assert_eq!(error, format!("network namespace {path:?}: {problem}"));
        }
    }

    #[test]
    fn another_namespace_than_the_one_that_was_opened_is_told() {
        let joined = joining("/proc/self/ns/net").unwrap();
        let mut other = std::process::Command::new("unshare")
            .args(["--user", "--net", "sh", "-c", "echo; exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It is in its namespaces when it says something.
        io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let verified = joined.verify(other.id() as i32);
        other.kill().unwrap();
        assert!(matches!(verified, Err(Error::Changed { kind: Kind::Network, .. })));
        other.wait().unwrap();
        assert!(matches!(joined.verify(other.id() as i32), Err(Error::Open { .. })));
    }
}
