//! How a process ended: the live source is its pidfd, the record is what the stop hook wrote.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proxmox_shim_init::protocol::ExitRecord;
use tokio::io::unix::AsyncFd;

use crate::sys::pidfd::{self, ExitStatus, Info};

/// The stop hook runs within milliseconds of the end of PID 1; a host that is so slow that this
/// is not enough has lost the hook.
const RECORD_TIMEOUT: Duration = Duration::from_secs(10);
const RECORD_POLL: Duration = Duration::from_millis(2);

/// 128 + SIGKILL.
const KILLED: u32 = 137;
/// A zombie's status is complete once its parent has reaped it.
const REAPED_POLL: Duration = Duration::from_millis(1);

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub status: ExitStatus,
    pub at: SystemTime,
}

/// Why an end could not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pidfd could not be watched or read.
    #[error("watch the process")]
    Pidfd(#[source] io::Error),
    /// Neither the kernel nor the stop hook told the status.
    #[error("no stop hook wrote {path} within {} s", RECORD_TIMEOUT.as_secs())]
    NoRecord { path: PathBuf },
    /// The record exists but can't be used.
    #[error("read the exit record {path}")]
    Record { path: PathBuf, source: io::Error },
}

/// Waits until the process has ended (it may still be a zombie).
///
/// # Errors
/// [`Error::Pidfd`].
pub async fn ended(pidfd: &AsyncFd<OwnedFd>) -> Result<(), Error> {
    // A pidfd is level-triggered and stays readable for ever.
    let _ready = pidfd.readable().await.map_err(Error::Pidfd)?;
    Ok(())
}

/// Waits for the end of the CT's PID 1, whose parent is lxc-start.
///
/// The kernel's answer is taken where it can be trusted. After a `reboot(2)` in the CT it reports 0
/// if PID 1 made the call and SIGKILL if another process did, so with `may_reboot` both are checked
/// against the record (`exit.json`), which knows better; on a
/// kernel without `PIDFD_INFO_EXIT` (before 6.15) the record is all there is.
///
/// # Errors
/// [`Error`]; the process has ended nevertheless if it is [`Error::NoRecord`].
pub async fn of_init(
    pidfd: &AsyncFd<OwnedFd>,
    record_path: &Path,
    may_reboot: bool,
) -> Result<Exit, Error> {
    ended(pidfd).await?;
    let at = SystemTime::now();
    let deadline = tokio::time::Instant::now() + RECORD_TIMEOUT;
    let kernels = loop {
        match pidfd::exit_info(pidfd.as_fd()).map_err(Error::Pidfd)? {
            Info::Exited(status) => break Some(status),
            Info::Unsupported => break None,
            // Bounded like the record: lxc-start may be stopped or frozen.
            Info::Running if tokio::time::Instant::now() >= deadline => break None,
            Info::Running => tokio::time::sleep(REAPED_POLL).await,
        }
    };
    let doubtful = may_reboot && matches!(kernels, Some(ExitStatus(0 | KILLED)));
    if let (Some(status), false) = (kernels, doubtful) {
        return Ok(Exit { status, at });
    }
    let recorded = loop {
        match read_record(record_path) {
            // Neither of the hook's sources knew: that is no better than the kernel's word.
            Ok(Some(record)) if record.source == "unknown" && kernels.is_some() => {
                break Err(Error::NoRecord { path: record_path.to_owned() });
            }
            Ok(Some(record)) => {
                if record.source == "unknown" {
                    log::warn!(
                        "{}: neither the kernel nor lxc-start told the exit status",
                        record_path.display()
                    );
                }
                break Ok(ExitStatus(record.status));
            }
            Ok(None) if tokio::time::Instant::now() >= deadline => {
                break Err(Error::NoRecord { path: record_path.to_owned() });
            }
            Ok(None) => tokio::time::sleep(RECORD_POLL).await,
            Err(error) => break Err(error),
        }
    };
    // Without a record (somebody killed lxc-start) the kernel's word is still the likely truth.
    recorded.or_else(|error| kernels.ok_or(error)).map(|status| Exit { status, at })
}

/// Waits for the end of a child of the shim and reaps it.
///
/// # Errors
/// [`Error::Pidfd`].
pub async fn of_child(pidfd: &AsyncFd<OwnedFd>) -> Result<Exit, Error> {
    ended(pidfd).await?;
    let at = SystemTime::now();
    loop {
        if let Some(status) = pidfd::reap(pidfd.as_fd()).map_err(Error::Pidfd)? {
            return Ok(Exit { status, at });
        }
        // Readable but not waitable: another thread of it has not ended yet.
        tokio::time::sleep(REAPED_POLL).await;
    }
}

/// The record of the stop hook, if it has been written, or of a pod sandbox's holder, which is empty
/// until then.
///
/// # Errors
/// [`Error::Record`] if it is not readable or not a record.
pub fn read_record(path: &Path) -> Result<Option<ExitRecord>, Error> {
    let failed = |source| Error::Record { path: path.to_owned(), source };
    match std::fs::read(path) {
        Ok(bytes) if bytes.is_empty() => Ok(None),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| failed(e.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// The moment in a record.
#[must_use]
pub fn record_time(record: &ExitRecord) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(record.time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(script: &str) -> (AsyncFd<OwnedFd>, std::process::Child) {
        let child = std::process::Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        (crate::sys::watch(pidfd::open(child.id() as i32).unwrap()).unwrap(), child)
    }

    #[tokio::test]
    async fn a_child_is_reaped_with_its_exact_status() {
        for (script, expected) in [("exit 42", 42), ("kill -15 $$", 143)] {
            let (fd, _child) = watched(script);
            assert_eq!(of_child(&fd).await.unwrap().status, ExitStatus(expected));
        }
    }

    #[tokio::test]
    async fn a_zero_that_may_be_a_reboot_is_taken_from_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        let (fd, mut child) = watched("exit 0");
        let reap = tokio::task::spawn_blocking(move || child.wait());
        let write = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let record = ExitRecord {
                version: 1,
                status: 129,
                time: 5,
                oom_kills: 0,
                source: "reboot".into(),
            };
            std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        };
        let (exit, ()) = tokio::join!(of_init(&fd, &path, true), write);
        assert_eq!(exit.unwrap().status, ExitStatus(129));
        reap.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_kernels_word_is_taken_when_the_record_cannot_be() {
        let (fd, mut child) = watched("kill -9 $$");
        child.wait().unwrap();
        if pidfd::exit_info(fd.as_fd()).unwrap() == Info::Unsupported {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        std::fs::write(&path, "{").unwrap();
        assert_eq!(of_init(&fd, &path, true).await.unwrap().status, ExitStatus(137));
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_a_status() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        assert_eq!(read_record(&path).unwrap(), None);
        std::fs::write(&path, "").unwrap();
        assert_eq!(read_record(&path).unwrap(), None);
        std::fs::write(&path, "{\"status\":").unwrap();
        assert!(read_record(&path).is_err());
    }
}
