//! Which processes a CT has; freezing, thawing and killing all of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;

use super::{Cgroup, Error, Kind, Membership, Place, Version, read, write};
use crate::sys::pidfd;

/// Freezing waits for each process to come to a point where it can stop.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// A killed process may have to finish a system call, or to free much memory.
const KILL_LIMIT: Duration = Duration::from_secs(10);

impl Cgroup {
    /// The processes of the CT as pids of this pid namespace, ascending.
    ///
    /// # Errors
    /// A file could not be read. A cgroup that is gone has no processes.
    pub fn pids(&self) -> Result<Vec<u32>, Error> {
        // Any hierarchy would do, but the CT may have moved processes about in those it can write to.
        let place = self
            .controller("freezer", "")
            .or_else(|| self.controller("pids", "pids"))
            .map(|(place, _)| place)
            .or_else(|| self.unified())
            .or_else(|| self.places.first());
        let mut pids = BTreeSet::new();
        if let Some(place) = place {
            collect(place, &mut pids)?;
        }
        Ok(pids.into_iter().collect())
    }

    /// Stops all processes of the CT until [`Self::thaw`].
    ///
    /// # Errors
    /// [`Error::Freezer`] after 10 s; what was frozen is running again.
    pub async fn freeze(&self) -> Result<(), Error> {
        let result = self.set_frozen(true).await;
        if matches!(result, Err(Error::Freezer { .. })) {
            // A container half frozen is worse than one that runs: nobody would thaw it.
            let _ = self.request_freezer(false);
        }
        result
    }

    /// # Errors
    /// [`Error::Freezer`] after 10 s.
    pub async fn thaw(&self) -> Result<(), Error> {
        self.set_frozen(false).await
    }

    async fn set_frozen(&self, frozen: bool) -> Result<(), Error> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            // With v1 a request may have to be repeated: processes that are born while their
            // parent is being frozen leave the state at FREEZING.
            let place = self.request_freezer(frozen)?;
            if is_frozen(place)? == Some(frozen) {
                return Ok(());
            }
            if start.elapsed() > FREEZE_LIMIT {
                return Err(Error::Freezer {
                    path: place.0.limit.clone(),
                    wanted: if frozen { "frozen" } else { "thawed" },
                    seconds: FREEZE_LIMIT.as_secs(),
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    fn freezer(&self) -> Result<(&Place, Version), Error> {
        if let Some(place) = self.places.iter().find(|p| has(p, "freezer")) {
            return Ok((place, Version::V1));
        }
        // Part of the core of cgroup2.
        self.unified()
            .map(|place| (place, Version::V2))
            .ok_or(Error::NoController { controller: "freezer", needed_for: "pausing" })
    }

    fn request_freezer(&self, frozen: bool) -> Result<(&Place, Version), Error> {
        let (place, version) = self.freezer()?;
        let (file, value) = match (version, frozen) {
            (Version::V1, true) => ("freezer.state", "FROZEN"),
            (Version::V1, false) => ("freezer.state", "THAWED"),
            (Version::V2, true) => ("cgroup.freeze", "1"),
            (Version::V2, false) => ("cgroup.freeze", "0"),
        };
        write(&place.limit.join(file), value)?;
        Ok((place, version))
    }

    /// Kills every process of the CT and waits until none is left. A frozen CT is thawed: a process in
    /// the freezer of v1 dies only then.
    ///
    /// # Errors
    /// [`Error::Unkillable`] after 10 s.
    pub async fn kill_all(&self) -> Result<(), Error> {
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let left = self.kill_once()?;
            let Some(&pid) = left.first() else { return Ok(()) };
            if start.elapsed() > KILL_LIMIT {
                return Err(Error::Unkillable {
                    path: self.places[0].limit.clone(),
                    count: left.len(),
                    pid,
                    seconds: KILL_LIMIT.as_secs(),
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Sends SIGKILL to all there are at this moment and returns who that was.
    fn kill_once(&self) -> Result<Vec<u32>, Error> {
        if let Some(place) = self.unified() {
            match write(&place.limit.join("cgroup.kill"), "1") {
                Ok(()) => {}
                // Kernels before 5.14 do not have it, and the CT may be gone.
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        // A process may have left the cgroup in one hierarchy, hardly in all.
        let mut pids = BTreeSet::new();
        for place in &self.places {
            collect(place, &mut pids)?;
        }
        for &pid in &pids {
            self.signal(pid, libc::SIGKILL);
        }
        if self.freezer().is_ok_and(|(place, version)| {
            version == Version::V1
                && read(&place.limit.join("freezer.state")).is_ok_and(|s| s.trim() != "THAWED")
        }) {
            let _ = self.request_freezer(false);
        }
        Ok(pids.into_iter().collect())
    }

    /// Sends a signal to all there are at this moment and returns who that was.
    ///
    /// # Errors
    /// As [`Self::pids`].
    pub fn signal_all(&self, signal: i32) -> Result<Vec<u32>, Error> {
        let pids = self.pids()?;
        for &pid in &pids {
            self.signal(pid, signal);
        }
        Ok(pids)
    }

    /// The pid may have been reused since it was read from the cgroup; with a pidfd open, membership
    /// is known to be that of the process that gets the signal.
    pub(super) fn signal(&self, pid: u32, signal: i32) {
        let Ok(number) = i32::try_from(pid) else { return };
        let Ok(process) = pidfd::open(number) else { return };
        let Ok(membership) = Membership::of(&pid.to_string()) else { return };
        if self.contains(&membership) {
            // It may have ended: then all is well.
            let _ = pidfd::send_signal(process.as_fd(), signal);
        }
    }

    fn contains(&self, membership: &Membership) -> bool {
        self.places.iter().any(|place| {
            membership
                .in_hierarchy(&place.kind)
                .and_then(|cgroup| cgroup.strip_prefix(place.cgroup.as_str()))
                .is_some_and(|below| below.is_empty() || below.starts_with('/'))
        })
    }
}

fn has(place: &Place, controller: &str) -> bool {
    matches!(&place.kind, Kind::V1(c) if c.iter().any(|c| c == controller))
}

/// `None` while it changes.
fn is_frozen((place, version): (&Place, Version)) -> Result<Option<bool>, Error> {
    Ok(match version {
        Version::V1 => match read(&place.limit.join("freezer.state"))?.trim() {
            "FROZEN" => Some(true),
            "THAWED" => Some(false),
            _ => None,
        },
        Version::V2 => match value_of(&read(&place.limit.join("cgroup.events"))?, "frozen") {
            Some(1) => Some(true),
            Some(_) => Some(false),
            None => None,
        },
    })
}

/// A value of a file of `key value` lines.
pub(super) fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (k, v) = line.split_once(' ')?;
        (k == key).then(|| v.trim().parse().ok())?
    })
}

fn collect(place: &Place, pids: &mut BTreeSet<u32>) -> Result<(), Error> {
    for directory in subtree(&place.limit) {
        pids.extend(in_directory(&directory)?);
    }
    Ok(())
}

/// The processes of one cgroup.
pub(super) fn in_directory(directory: &Path) -> Result<Vec<u32>, Error> {
    match read(&directory.join("cgroup.procs")) {
        // 0 stands for a process of another pid namespace.
        Ok(text) => Ok(text.lines().filter_map(|l| l.parse().ok()).filter(|&p| p != 0).collect()),
        Err(error) if error.is_gone() => Ok(Vec::new()),
        // A threaded cgroup; its processes are listed above it.
        Err(Error::Read { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// A directory and all below it, parents first. What vanishes meanwhile is left out.
pub(super) fn subtree(top: &Path) -> Vec<PathBuf> {
    let mut all = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = all.get(next) {
        next += 1;
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let children: Vec<_> = entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .map(|e| e.path())
            .collect();
        all.extend(children);
    }
    all
}
