//! What survives the shim: one run directory per container.
//!
//! `state.json` is written before each change of Proxmox's or the host's state, so that a `delete`
//! in a fresh process finds everything that may exist. `exit.json` is written by the stop hook.
//! The directory lies on a tmpfs: after a reboot it is gone, and so is the CT's process.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use proxmox_shim_init::protocol::Hook;
use serde::{Deserialize, Serialize};

use crate::sys::pidfd;

/// Raised by any change of [`Record`] that an older release can't read.
const VERSION: u32 = 1;
/// Each can only fail if another container of the namespace ends at the same instant.
const CREATE_ATTEMPTS: u32 = 1000;

/// Why the ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A container of this name has not been cleaned up.
    #[error(
        "{dir} exists: another container of this id is running, or was not cleaned up; delete it \
         with containerd first"
    )]
    Exists { dir: PathBuf },
    /// A file operation failed.
    #[error("{action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// The record is not one.
    #[error("parse {path}")]
    Parse { path: PathBuf, source: serde_json::Error },
    /// It was written by a later release.
    #[error("{path} has version {version}, this release reads {VERSION}")]
    Version { path: PathBuf, version: u32 },
}

/// The run directory of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// `<root>/<namespace>/<id>`; both names are containerd identifiers and so safe in a path.
    #[must_use]
    pub fn new(root: &Path, namespace: &str, id: &str) -> Self {
        Self(root.join(namespace).join(id))
    }

    /// Creates it, with mode 0700 as all above it: its socket is open to everybody who can reach
    /// it.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`].
    pub fn create(&self) -> Result<(), Error> {
        let io = |source| Error::Io { action: "create", path: self.0.clone(), source };
        let try_once = || {
            if let Some(parent) = self.0.parent() {
                match DirBuilder::new().recursive(true).mode(0o700).create(parent) {
                    // It was there and is gone again; else the next call says what is wrong.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    result => result?,
                }
            }
            DirBuilder::new().mode(0o700).create(&self.0)
        };
        // Another shim may just be removing its container, and the directory of the namespace with it.
        let mut result = try_once();
        for _ in 0..CREATE_ATTEMPTS {
            if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                break;
            }
            result = try_once();
        }
        match result {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists { dir: self.0.clone() })
            }
            result => result.map_err(io),
        }
    }

    /// Lets a group pass: root of a user namespace is nobody on the node, but LXC's child has to reach
    /// what lies below by its path. The directories above can be passed by all, as only this one keeps
    /// others out.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn admit(&self, group: u32) -> Result<(), Error> {
        for above in self.0.ancestors().skip(1).take(2) {
            std::fs::set_permissions(above, Permissions::from_mode(0o711))
                .map_err(|source| Error::Io { action: "open", path: above.to_owned(), source })?;
        }
        chown(&self.0, None, Some(group))
            .and_then(|()| std::fs::set_permissions(&self.0, Permissions::from_mode(0o710)))
            .map_err(|source| Error::Io { action: "open", path: self.0.clone(), source })
    }

    /// Removes it and, if it was the last, its namespace's directory. Succeeds if it is gone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self) -> Result<(), Error> {
        match std::fs::remove_dir_all(&self.0) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Io { action: "remove", path: self.0.clone(), source });
            }
            _ => {}
        }
        if let Some(parent) = self.0.parent() {
            // Not empty while the namespace has other containers.
            let _ = std::fs::remove_dir(parent);
        }
        Ok(())
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The directory of init's socket.
    #[must_use]
    pub fn ctl(&self) -> PathBuf {
        self.0.join("ctl")
    }

    /// The included LXC configuration.
    #[must_use]
    pub fn lxc_conf(&self) -> PathBuf {
        self.0.join("lxc.conf")
    }

    /// liblxc's log of this CT.
    #[must_use]
    pub fn lxc_log(&self) -> PathBuf {
        self.0.join("lxc.log")
    }

    /// What the stop hook writes, or the holder of a pod sandbox.
    #[must_use]
    pub fn exit(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// Names the CT's memory cgroup for the stop hook.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        self.0.join("cgroup")
    }

    /// Where a pod sandbox's shared memory is mounted.
    #[must_use]
    pub fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    /// Where the files are mounted that a pod's containers have in `/etc`.
    #[must_use]
    pub fn etc(&self) -> PathBuf {
        self.0.join("etc")
    }

    fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }

    /// Replaces a file of the directory at once: a reader sees the old or the new content.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path, content: &[u8]) -> Result<(), Error> {
        let temporary = path.with_extension("new");
        let write = || {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            std::fs::rename(&temporary, path)
        };
        write().map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
    }

    /// Writes the record.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, record: &Record) -> Result<(), Error> {
        let path = self.state();
        let json = serde_json::to_vec(record)
            .map_err(|source| Error::Parse { path: path.clone(), source })?;
        self.write(&path, &json)
    }

    /// Keeps others from removing the directory, until the lock is dropped; `None` if another has
    /// it, or the directory is gone. What was read before may be outdated.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn try_lock(&self) -> Result<Option<Flock<File>>, Error> {
        let io = |source| Error::Io { action: "lock", path: self.0.clone(), source };
        let directory = match File::open(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(io)?,
        };
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(io(errno.into())),
        }
    }

    /// Those of one namespace of containerd, with their containers' ids.
    #[must_use]
    pub fn of_namespace(root: &Path, namespace: &str) -> Vec<(String, Self)> {
        let all = Self::all(root).into_iter();
        all.filter(|(_, dir)| dir.0.parent() == Some(&root.join(namespace))).collect()
    }

    /// All below `root`, with their containers' ids.
    #[must_use]
    pub fn all(root: &Path) -> Vec<(String, Self)> {
        let below = |directory: &Path| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
        };
        let dirs = below(root).into_iter().flat_map(|namespace| below(&namespace));
        dirs.filter_map(|dir| Some((dir.file_name()?.to_str()?.to_owned(), Self(dir)))).collect()
    }

    /// Reads the record; `None` if the container never got one.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load(&self) -> Result<Option<Record>, Error> {
        let path = self.state();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { action: "read", path, source }),
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let parse = |source| Error::Parse { path: path.clone(), source };
        let Versioned { version } = serde_json::from_slice(&bytes).map_err(parse)?;
        if version != VERSION {
            return Err(Error::Version { path, version });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(parse)
    }
}

/// What may exist because of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// containerd's directory of the container; its rootfs is mounted below.
    pub bundle: PathBuf,
    /// The marker by which the CT is ours (`pve::identity`); set just before the CT is created.
    pub identity: Option<String>,
    /// Set just before the first OCI hook runs: from then on those of poststop must. The bundle may
    /// be gone by then.
    #[serde(default)]
    pub poststop: Option<Poststop>,
    /// PID 1, once it has connected.
    pub init: Option<ProcessId>,
    /// lxc-start, once init has connected.
    pub monitor: Option<ProcessId>,
    /// The CT's cgroups, relative to each hierarchy's root; set together with `identity`.
    pub cgroups: Vec<String>,
    /// Its processes may outlive PID 1: it has no pid namespace of its own.
    #[serde(default)]
    pub shares_pids: bool,
    /// It is no CT but a pod sandbox: `init` is the holder of the pod's namespaces.
    #[serde(default)]
    pub holder: bool,
    /// The container for which its shim was started: itself, or another one of its pod.
    #[serde(default)]
    pub shim: Option<String>,
}

impl Record {
    /// Whether a process of the CT may still run.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        [self.init, self.monitor].into_iter().flatten().any(|process| process.open().is_some())
    }

    /// Where the rootfs is mounted.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    #[must_use]
    pub fn new(bundle: PathBuf) -> Self {
        Self {
            version: VERSION,
            bundle,
            identity: None,
            poststop: None,
            init: None,
            monitor: None,
            cgroups: Vec::new(),
            shares_pids: false,
            holder: false,
            shim: None,
        }
    }
}

/// OCI poststop hooks with what the state tells them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poststop {
    pub hooks: Vec<Hook>,
    pub oci_version: String,
    pub annotations: BTreeMap<String, String>,
}

/// A process that can be recognised later: pids are reused, pids with a start time are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks since boot (`proc_pid_stat(5)`, field 22).
    pub start_time: u64,
}

impl ProcessId {
    /// Reads the start time of a process that the caller knows to exist.
    ///
    /// # Errors
    /// [`Error::Io`] if it has ended.
    pub fn of(pid: i32) -> Result<Self, Error> {
        let stat = Stat::read(pid)?;
        Ok(Self { pid, start_time: stat.start_time })
    }

    /// Opens the process, if it still is the same one.
    #[must_use]
    pub fn open(self) -> Option<OwnedFd> {
        let fd = pidfd::open(self.pid).ok()?;
        // Checked after the open: from now on the descriptor can't change its meaning.
        let same = Stat::read(self.pid).is_ok_and(|stat| stat.start_time == self.start_time);
        // A process that ended between the two would fail the signal 0.
        (same && pidfd::send_signal(fd.as_fd(), 0).is_ok()).then_some(fd)
    }
}

/// The fields of `/proc/<pid>/stat` that identify a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    pub parent: i32,
    pub start_time: u64,
}

impl Stat {
    /// # Errors
    /// [`Error::Io`] if there is no such process.
    pub fn read(pid: i32) -> Result<Self, Error> {
        let path = PathBuf::from(format!("/proc/{pid}/stat"));
        let failed = |source| Error::Io { action: "read", path: path.clone(), source };
        let text = std::fs::read_to_string(&path).map_err(failed)?;
        Self::parse(&text)
            .ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidData, "unknown format")))
    }

    fn parse(text: &str) -> Option<Self> {
        // The command's name, in parentheses, may itself hold anything.
        let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
        let parent = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(17)?.parse().ok()?;
        Some(Self { parent, start_time })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, RunDir) {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::new(&root.path().join("run"), "default", "web");
        (root, dir)
    }

    #[test]
    fn one_container_comes_while_the_last_other_one_goes() {
        let root = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for id in ["a", "b"] {
                let dir = RunDir::new(root.path(), "ns", id);
                scope.spawn(move || {
                    for _ in 0..2000 {
                        dir.create().unwrap();
                        dir.remove().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn a_record_survives_and_a_second_container_of_the_id_is_refused() {
        let (_root, dir) = dir();
        dir.create().unwrap();
        assert_eq!(dir.load().unwrap(), None);
        let mut record = Record::new("/b".into());
        record.identity = Some("marker".into());
        dir.save(&record).unwrap();
        assert_eq!(dir.load().unwrap(), Some(record));
        assert!(matches!(dir.create(), Err(Error::Exists { .. })));
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert!(!dir.path().parent().unwrap().exists(), "empty namespace directory");
    }

    #[test]
    fn a_namespace_that_others_empty_meanwhile_is_no_obstacle() {
        let root = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for n in 0..4 {
                let dir = RunDir::new(root.path(), "default", &format!("c{n}"));
                scope.spawn(move || {
                    for _ in 0..100 {
                        dir.create().unwrap();
                        dir.remove().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn damaged_and_newer_records_are_errors() {
        let (_root, dir) = dir();
        dir.create().unwrap();
        std::fs::write(dir.state(), "{").unwrap();
        assert!(matches!(dir.load(), Err(Error::Parse { .. })));
        std::fs::write(dir.state(), r#"{"version":99,"future":true}"#).unwrap();
        assert!(matches!(dir.load(), Err(Error::Version { version: 99, .. })));
    }

    #[test]
    fn stat_is_parsed_behind_any_command_name() {
        let text = "7 (a) b (c) S 3 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(Stat::parse(text), Some(Stat { parent: 3, start_time: 4711 }));
        assert_eq!(Stat::parse("7 (a"), None);
        assert_eq!(Stat::parse("7 (a) S x"), None);
    }

    #[test]
    fn a_process_is_recognised_by_its_start_time() {
        let me = ProcessId::of(std::process::id() as i32).unwrap();
        assert!(me.open().is_some());
        assert!(ProcessId { start_time: me.start_time + 1, ..me }.open().is_none());
    }
}
