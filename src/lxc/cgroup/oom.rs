//! OOM kills: how many there were, and being told of the next.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::processes::{subtree, value_of};
use super::{Cgroup, Error, Version, read, write};
use crate::sys;

/// v1 tells of an OOM before it has chosen and killed a victim: how long to look for the kill. The
/// sum is below half a second; a notification without a kill within it was one that the kernel
/// resolved otherwise.
const V1_PATIENCE_MS: [u64; 8] = [0, 1, 2, 5, 20, 50, 100, 250];

impl Cgroup {
    /// The OOM kills among the CT's processes since its cgroup exists; 0 without the memory
    /// controller.
    ///
    /// # Errors
    /// The cgroup is gone ([`Error::is_gone`]), or its file could not be read.
    pub fn oom_kills(&self) -> Result<u64, Error> {
        match self.controller("memory", "memory") {
            Some((place, Version::V2)) => {
                let text = read(&place.limit.join("memory.events"))?;
                Ok(value_of(&text, "oom_kill").unwrap_or(0))
            }
            Some((place, Version::V1)) => {
                // v1 counts at the victim's cgroup only.
                let mut sum = 0;
                for (n, directory) in subtree(&place.limit).iter().enumerate() {
                    match read(&directory.join("memory.oom_control")) {
                        Ok(text) => sum += value_of(&text, "oom_kill").unwrap_or(0),
                        Err(error) if n > 0 && error.is_gone() => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(sum)
            }
            None => Ok(0),
        }
    }

    /// Watches for OOM kills from now on. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::NoController`] without the memory controller, or [`Error::Watch`].
    pub fn watch_oom(&self) -> Result<OomWatch, Error> {
        let (place, version) = self.require("memory", "memory", "watching for OOM kills")?;
        let path = match version {
            Version::V1 => place.inner.join("memory.oom_control"),
            Version::V2 => place.limit.join("memory.events"),
        };
        let failed = |source: io::Error| Error::Watch { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        let source = match version {
            Version::V2 => Source::V2(sys::watch_priority(OwnedFd::from(file)).map_err(failed)?),
            Version::V1 => {
                // An OOM of a cgroup is told to all cgroups below it, never to those above: the
                // inner one hears of its own limits and of the outer ones.
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                    .map_err(|errno| failed(errno.into()))?;
                write(
                    &place.inner.join("cgroup.event_control"),
                    &format!("{} {}", event.as_raw_fd(), file.as_raw_fd()),
                )?;
                Source::V1(sys::watch(event.into()).map_err(failed)?)
            }
        };
        Ok(OomWatch { cgroup: self.clone(), source, seen: self.oom_kills()?, told: false })
    }
}

/// See [`Cgroup::watch_oom`].
#[derive(Debug)]
pub struct OomWatch {
    cgroup: Cgroup,
    source: Source,
    seen: u64,
    /// v1: there was a notification, and its kill has still to be looked for.
    told: bool,
}

#[derive(Debug)]
enum Source {
    /// `memory.events`.
    V2(AsyncFd<OwnedFd>),
    /// An eventfd.
    V1(AsyncFd<OwnedFd>),
}

impl OomWatch {
    /// Waits for the next OOM kill and returns how many there were in all; `None` once the cgroup is
    /// gone. It may also wait for ever then: drop it when the CT has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<u64> {
        loop {
            let kills = match &self.source {
                Source::V2(file) => {
                    file.ready(Interest::PRIORITY).await.ok()?.clear_ready();
                    // Reading re-arms the notification; it has to be this open file.
                    let mut buffer = [0; 1024];
                    let file = File::from(file.get_ref().try_clone().ok()?);
                    let n = file.read_at(&mut buffer, 0).ok()?;
                    value_of(&String::from_utf8_lossy(&buffer[..n]), "oom_kill")?
                }
                Source::V1(event) => {
                    if !self.told {
                        let mut guard = event.readable().await.ok()?;
                        match nix::unistd::read(event.get_ref(), &mut [0; 8]) {
                            Ok(_) => self.told = true,
                            Err(Errno::EAGAIN) => guard.clear_ready(),
                            Err(_) => return None,
                        }
                        continue;
                    }
                    let mut kills = self.seen;
                    for pause in V1_PATIENCE_MS {
                        tokio::time::sleep(Duration::from_millis(pause)).await;
                        kills = self.cgroup.oom_kills().ok()?;
                        if kills > self.seen {
                            break;
                        }
                    }
                    self.told = false;
                    kills
                }
            };
            if kills > self.seen {
                self.seen = kills;
                return Some(kills);
            }
        }
    }
}
