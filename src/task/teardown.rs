//! Undoes everything that exists because of a container, from its record alone, so that the same
//! code serves a `Delete`, a failed `Create`, and a `delete` after a crash.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::libc;
use tokio::time::Instant;

use crate::config::Config;
use crate::ledger::{ProcessId, Record, RunDir};
use crate::lxc::exit::{self, Exit};
use crate::lxc::{cgroup, rootfs};
use crate::oci;
use crate::pve;
use crate::pve::identity::Identity;
use crate::sys::pidfd::ExitStatus;
use crate::sys::{self, pidfd};
use crate::task::error::{Error, Result, sentence};
use crate::task::{blocking, hooks};

/// How long a killed CT may take until lxc-start has ended.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(15);
/// The stop hook needs a few milliseconds; containerd gives a `delete` 5 s in all.
const RECORD_TIMEOUT: Duration = Duration::from_secs(1);
const DELETE_LIMIT: Duration = Duration::from_secs(3);

/// Removes the CT, the rootfs's mount and the run directory; runs the poststop hooks.
///
/// The order matters: nothing of the CT may run any more when its rootfs goes, and the run
/// directory, which remembers what exists, goes last. Each step succeeds if there is nothing to
/// do, so that a failed teardown can be repeated.
///
/// # Errors
/// The first step that failed; the run directory is kept then.
pub async fn teardown(
    pve: &pve::Client,
    dir: &RunDir,
    record: &Record,
    id: &str,
    limit: Duration,
) -> Result<()> {
    if let Some(marker) = &record.identity {
        let identity = Identity::find(marker).map_err(|reason| Error::Argument {
            field: "state.json",
            reason: reason.to_string(),
        })?;
        let deadline = Instant::now() + limit;
        kill(record).await?;
        if record.init.is_none() {
            // The start may be under way, or was cut off: only Proxmox knows.
            pve.stop_ours(&identity, deadline).await?;
        }
        pve.destroy_ours(&identity, deadline).await?;
        let cgroups = record.cgroups.clone();
        blocking(move || {
            Ok(cgroup::remove_stale(&cgroups.iter().map(String::as_str).collect::<Vec<_>>())?)
        })
        .await?;
    }
    let mounted = record.rootfs();
    blocking(move || Ok(rootfs::unmount(&mounted)?)).await?;
    if record.hooks_ran {
        poststop(id, &record.bundle).await;
    }
    let dir = dir.clone();
    blocking(move || Ok(dir.remove()?)).await
}

/// Whoever set a network up must get to take it down. A hook that fails does not keep the task.
async fn poststop(id: &str, bundle: &Path) {
    let path = bundle.to_owned();
    let run = async {
        let plan = blocking(move || Ok(oci::load(&path)?)).await?;
        let state = hooks::State {
            oci_version: &plan.oci_version,
            id,
            status: "stopped",
            pid: None,
            bundle,
            annotations: &plan.annotations,
        };
        Ok::<_, Error>(hooks::run("poststop", &plan.hooks.poststop, &state).await?)
    };
    if let Err(error) = run.await {
        log::warn!(container = id; "{}", sentence(&error));
    }
}

/// Kills PID 1 if it still is the recorded process, and waits until lxc-start has ended: until
/// then Proxmox counts the CT as running, and the stop hook has not written the status.
async fn kill(record: &Record) -> Result<()> {
    if let Some(init) = record.init.and_then(ProcessId::open) {
        match pidfd::send_signal(init.as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                return Err(Error::Io { action: "kill the CT's init", source: error });
            }
            _ => {}
        }
    }
    match record.monitor.and_then(ProcessId::open) {
        Some(monitor) => wait(monitor).await,
        None => Ok(()),
    }
}

async fn wait(process: OwnedFd) -> Result<()> {
    let watched =
        sys::watch(process).map_err(|source| Error::Io { action: "watch lxc-start", source })?;
    // Past the deadline Proxmox is asked all the same: it refuses to destroy a running CT, and its
    // error tells more.
    let _ = tokio::time::timeout_at(Instant::now() + MONITOR_TIMEOUT, exit::ended(&watched)).await;
    Ok(())
}

/// What `delete` found out about a container whose shim is gone.
#[derive(Debug)]
pub struct Reclaimed {
    pub pid: u32,
    pub exit: Exit,
    /// How the cleaning up went. The status is known whether or not Proxmox answers.
    pub cleanup: Result<()>,
}

/// Ends and removes a container in a fresh process after its shim has died (or was never there).
///
/// # Errors
/// The ledger can't be read: nothing is touched then.
pub async fn reclaim(config: &Config, namespace: &str, id: &str) -> Result<Reclaimed> {
    let dir = RunDir::new(&config.paths.run_dir, namespace, id);
    let killed =
        Exit { status: ExitStatus(128 + libc::SIGKILL.unsigned_abs()), at: SystemTime::now() };
    let Some(record) = dir.load()? else {
        return Ok(Reclaimed { pid: 0, exit: killed, cleanup: dir.remove().map_err(Error::from) });
    };
    let pid = record.init.map_or(0, |init| init.pid.unsigned_abs());
    let cleanup = kill(&record).await;
    let exit = recorded(&dir, record.init.is_some()).await.unwrap_or(killed);
    let cleanup = match cleanup {
        Ok(()) => {
            async {
                let pve = pve::Client::new(config)?;
                teardown(&pve, &dir, &record, id, DELETE_LIMIT).await
            }
            .await
        }
        failed => failed,
    };
    Ok(Reclaimed { pid, exit, cleanup })
}

/// The status that the stop hook wrote, which it does while lxc-start ends.
async fn recorded(dir: &RunDir, ran: bool) -> Option<Exit> {
    let deadline = Instant::now() + RECORD_TIMEOUT;
    loop {
        match exit::read_record(&dir.exit()) {
            Ok(Some(record)) => {
                return Some(Exit {
                    status: ExitStatus(record.status),
                    at: exit::record_time(&record),
                });
            }
            Ok(None) if ran && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(None) => return None,
            Err(error) => {
                log::error!("{error}");
                return None;
            }
        }
    }
}
