//! The cgroups of a CT: limits, freezing, killing, OOM kills and figures, on cgroup v1, hybrid and
//! cgroup2 hosts alike.
//!
//! liblxc puts PID 1 into `<container>/ns` in every hierarchy, where `<container>` is
//! `lxc.cgroup.dir.container` (`lxc/<vmid>` on Proxmox VE) and `ns`
//! `lxc.cgroup.dir.container.inner`. `ns` is the root of the CT's cgroup namespace; limits are set on
//! its parent, which the CT can neither see nor change; `ns` repeats the ones that programs look at.
//!
//! All functions that are not `async` block, for microseconds as a rule; lowering a memory limit may
//! block for as long as the kernel reclaims memory.

mod create;
mod devices;
mod hierarchy;
mod limits;
mod metrics;
mod oom;
mod processes;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use proxmox_shim_init::protocol::ExecCgroup;

pub use create::pass_cpuset_on;
pub(crate) use hierarchy::unescape;
pub use hierarchy::{Hierarchies, Hierarchy, Kind, Membership, Mode};
pub use oom::OomWatch;

/// `lxc.cgroup.dir.container.inner`, as Proxmox sets it.
const INNER: &str = "ns";

/// What can go wrong with cgroups.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Also if the cgroup is gone: see [`Error::is_gone`].
    #[error("read {}: {}", path.display(), describe(source))]
    Read { path: PathBuf, source: io::Error },
    /// The kernel refused a value.
    #[error("write {value:?} to {}: {}", path.display(), describe(source))]
    Write { path: PathBuf, value: String, source: io::Error },
    /// A directory could not be made.
    #[error("make cgroup {}: {}", path.display(), describe(source))]
    Create { path: PathBuf, source: io::Error },
    /// A directory could not be removed.
    #[error("remove cgroup {}: {}", path.display(), describe(source))]
    Remove { path: PathBuf, source: io::Error },
    /// The host has no usable cgroup file system.
    #[error("no cgroup file system is mounted on this host")]
    NoHierarchy,
    /// The process is not below a CT's inner cgroup.
    #[error("process {pid} is in no cgroup of a CT (none of its cgroups has a directory \"ns\")")]
    NotInCt { pid: i32 },
    /// A limit cannot be honoured.
    #[error(
        "{needed_for} needs the cgroup controller {controller:?}, which the CT does not have: enable it on the host"
    )]
    NoController { controller: &'static str, needed_for: &'static str },
    /// A limit cannot be honoured.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// Freezing or thawing took too long; the CT is running.
    #[error("cgroup {} did not become {wanted} within {seconds} s", path.display())]
    Freezer { path: PathBuf, wanted: &'static str, seconds: u64 },
    /// Processes that SIGKILL did not end in time.
    #[error("cgroup {} still has {count} processes {seconds} s after SIGKILL, such as {pid}", path.display())]
    Unkillable { path: PathBuf, count: usize, pid: u32, seconds: u64 },
    /// Someone else's, or a CT that is still running.
    #[error("cgroup {} still has process {pid}: the CT is running, or its id is in use", path.display())]
    InUse { path: PathBuf, pid: u32 },
    /// The watch for OOM kills could not be set up.
    #[error("watch {}: {}", path.display(), describe(source))]
    Watch { path: PathBuf, source: io::Error },
    /// Not a path relative to the hierarchies' roots.
    #[error("{path:?} is no relative cgroup path")]
    BadPath { path: String },
}

impl Error {
    /// Whether the cgroup (or the process) has ceased to exist, as it does when the CT ends.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } | Self::Watch { source, .. } => {
                gone(source)
            }
            _ => false,
        }
    }
}

fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ESRCH))
}

/// The cgroups of one CT, in all hierarchies it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    mode: Mode,
    places: Vec<Place>,
}

/// The CT's cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    kind: Kind,
    /// The name of `limit` in `/proc/<pid>/cgroup`.
    cgroup: String,
    /// Limits and figures.
    limit: PathBuf,
    /// Where its processes are.
    inner: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Cgroup {
    /// The cgroups of the CT whose PID 1 is `pid`, a process of this pid namespace which is still where
    /// liblxc has put it: later it may have moved itself further down.
    ///
    /// # Errors
    /// [`Error::NotInCt`] if the process is not in a CT's inner cgroup: nothing may then be limited,
    /// frozen or killed, because it would hit the host.
    pub fn of_process(pid: i32) -> Result<Self, Error> {
        let hierarchies = Hierarchies::detect()?;
        let membership = Membership::of(&pid.to_string())?;
        Self::find(&hierarchies, |kind| {
            membership.in_hierarchy(kind).and_then(split_inner).map(str::to_owned)
        })
        .ok_or(Error::NotInCt { pid })
    }

    /// The cgroups of a CT by `lxc.cgroup.dir.container`, such as `lxc/700`; they may or may not exist.
    ///
    /// # Errors
    /// [`Error::BadPath`], or no hierarchy is mounted.
    pub fn at(container: &str) -> Result<Self, Error> {
        let container = relative(container)?;
        Self::find(&Hierarchies::detect()?, |_| Some(format!("/{container}")))
            .ok_or(Error::NoHierarchy)
    }

    fn find(
        hierarchies: &Hierarchies,
        limit_cgroup: impl Fn(&Kind) -> Option<String>,
    ) -> Option<Self> {
        let places: Vec<_> = hierarchies
            .iter()
            .filter_map(|hierarchy| {
                let cgroup = limit_cgroup(&hierarchy.kind)?;
                let limit = hierarchy.directory(&cgroup)?;
                Some(Place {
                    kind: hierarchy.kind.clone(),
                    cgroup,
                    inner: limit.join(INNER),
                    limit,
                })
            })
            .collect();
        (!places.is_empty()).then(|| Self { mode: hierarchies.mode(), places })
    }

    /// How the host uses cgroups.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The directory whose `memory.events` (cgroup2) or `memory.oom_control` (v1) counts the OOM kills
    /// of the CT's processes: on cgroup2 the CT's own, which counts those below it too; on v1, where
    /// nothing is added up, the inner one. `None` without the memory controller.
    #[must_use]
    pub fn memory_dir(&self) -> Option<&Path> {
        match self.controller("memory", "memory") {
            Some((place, Version::V1)) => Some(&place.inner),
            Some((place, Version::V2)) => Some(&place.limit),
            None => None,
        }
    }

    /// What `init exec` needs to put a process where PID 1 is, which is below the inner cgroup if the
    /// CT's own init system moved it: the kernel allows no process in a cgroup2 with children that
    /// have controllers.
    ///
    /// # Errors
    /// PID 1 has ended, or is in no CT.
    pub fn exec_files(&self, init_pid: i32) -> Result<(ExecCgroup, Vec<OwnedFd>), Error> {
        let hierarchies = Hierarchies::detect()?;
        let theirs = Membership::of(&init_pid.to_string())?;
        let ours = Membership::of("self")?;
        let mut directory = None;
        let mut tasks = Vec::new();
        for hierarchy in hierarchies.iter() {
            let Some(cgroup) = theirs.in_hierarchy(&hierarchy.kind) else { continue };
            let Some(path) = hierarchy.directory(cgroup) else { continue };
            match hierarchy.kind {
                Kind::V2 => {
                    directory = Some(open(&path, libc::O_RDONLY | libc::O_DIRECTORY)?);
                }
                // The new process starts where the shim is.
                Kind::V1(_) if ours.in_hierarchy(&hierarchy.kind) == Some(cgroup) => {}
                Kind::V1(_) => tasks.push(open(&path.join("tasks"), libc::O_WRONLY)?),
            }
        }
        Ok(match directory {
            Some(directory) => {
                tasks.insert(0, directory);
                (ExecCgroup::Directory, tasks)
            }
            None => (ExecCgroup::Tasks, tasks),
        })
    }

    /// The place of a controller by its name on v1 and on cgroup2.
    fn controller(&self, v1: &str, v2: &str) -> Option<(&Place, Version)> {
        let legacy = self
            .places
            .iter()
            .find(|p| matches!(&p.kind, Kind::V1(c) if c.iter().any(|c| c == v1)));
        if let Some(place) = legacy {
            return Some((place, Version::V1));
        }
        let place = self.unified()?;
        let enabled = read(&place.limit.join("cgroup.controllers")).ok()?;
        enabled.split_whitespace().any(|c| c == v2).then_some((place, Version::V2))
    }

    /// As [`Self::controller`], for a limit that must not be lost.
    fn require(
        &self,
        v1: &'static str,
        v2: &'static str,
        needed_for: &'static str,
    ) -> Result<(&Place, Version), Error> {
        self.controller(v1, v2).ok_or(Error::NoController {
            controller: if self.mode == Mode::V2 { v2 } else { v1 },
            needed_for,
        })
    }

    /// The place in cgroup2, whatever controllers it has.
    fn unified(&self) -> Option<&Place> {
        self.places.iter().find(|p| p.kind == Kind::V2)
    }
}

/// The cgroup above the inner one. The last component decides: a path that a client chose may hold a
/// directory `ns` of its own, and what is above that one belongs to others.
fn split_inner(cgroup: &str) -> Option<&str> {
    cgroup.strip_suffix(INNER)?.strip_suffix('/').filter(|container| !container.is_empty())
}

/// Refuses what would name the root or leave it.
fn relative(path: &str) -> Result<&str, Error> {
    let sane = !path.is_empty()
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !path.chars().any(char::is_control);
    if sane { Ok(path) } else { Err(Error::BadPath { path: path.to_owned() }) }
}

/// Removes what an earlier CT of the same id left when its monitor was killed, and what would make
/// liblxc refuse the next start (`Failed to create monitor cgroup`): the given cgroups, such as
/// `lxc/700` and `lxc.monitor/700`, and all below them, in every hierarchy. Nothing there is fine.
///
/// # Errors
/// [`Error::InUse`] if there is a process in any of them; nothing was removed then.
pub fn remove_stale(cgroups: &[&str]) -> Result<(), Error> {
    remove_stale_in(&Hierarchies::detect()?, cgroups)
}

fn remove_stale_in(hierarchies: &Hierarchies, cgroups: &[&str]) -> Result<(), Error> {
    let mut stale = Vec::new();
    for cgroup in cgroups {
        let cgroup = format!("/{}", relative(cgroup)?);
        for hierarchy in hierarchies.iter() {
            if let Some(directory) = hierarchy.directory(&cgroup)
                && directory.is_dir()
            {
                stale.extend(processes::subtree(&directory));
            }
        }
    }
    for directory in &stale {
        if let Some(&pid) = processes::in_directory(directory)?.first() {
            return Err(Error::InUse { path: directory.clone(), pid });
        }
    }
    // Parents come before their children.
    for directory in stale.iter().rev() {
        if let Err(source) = fs::remove_dir(directory)
            && source.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::Remove { path: directory.clone(), source });
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// Writes to a file that must exist, in one system call, as cgroup files require.
fn write(path: &Path, value: &str) -> Result<(), Error> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| Error::Write { path: path.to_owned(), value: value.to_owned(), source })
}

fn open(path: &Path, flags: i32) -> Result<OwnedFd, Error> {
    let write = flags & libc::O_WRONLY != 0;
    OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(flags & !libc::O_ACCMODE)
        .open(path)
        .map(File::into)
        .map_err(|source| Error::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
