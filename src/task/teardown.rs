//! Undoes everything that exists because of a container, from its record alone, so that the same
//! code serves a `Delete`, a failed `Create`, and a `delete` after a crash.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::libc;
use tokio::time::Instant;

use crate::config::Config;
use crate::ledger::{Record, RunDir};
use crate::lxc::{cgroup, exit, rootfs};
use crate::pve::{self, Identity, Vmid};
use crate::sys::{self, pidfd};
use crate::task::error::{Error, Result};

/// How long a killed CT may take until lxc-start has ended.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(15);

/// Removes the CT, the rootfs's mount and the run directory.
///
/// The order matters: nothing of the CT may run any more when its rootfs goes, and the run
/// directory, which remembers what exists, goes last. Each step succeeds if there is nothing to
/// do, so that a failed teardown can be repeated.
///
/// # Errors
/// The first step that failed; the run directory is kept then.
pub async fn teardown(
    config: &Config,
    pve: &pve::Client,
    dir: &RunDir,
    record: &Record,
    identity: Option<&Identity>,
) -> Result<()> {
    if let (Some(ct), Some(identity)) = (&record.ct, identity) {
        let vmid = Vmid::from(ct.vmid);
        kill(record).await?;
        if record.init.is_none() {
            // The start may still be under way, or was cut off; only Proxmox knows.
            pve.stop_ours(vmid, identity).await?;
        }
        pve.destroy_ours(vmid, identity).await?;
        let paths = dir.cgroups()?;
        blocking(move || Ok(cgroup::remove_stale(ct_cgroups(vmid, &paths).as_slice())?)).await?;
    }
    let mounted: PathBuf = record.rootfs.clone();
    blocking(move || Ok(rootfs::unmount(&mounted)?)).await?;
    let _ = config;
    dir.remove()?;
    Ok(())
}

/// Kills PID 1 if it still is the recorded process, and waits until lxc-start has ended.
async fn kill(record: &Record) -> Result<()> {
    if let Some(init) = record.init.and_then(crate::ledger::ProcessId::open) {
        match pidfd::send_signal(init.as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                return Err(Error::Io { action: "kill the CT's init", source: error });
            }
            _ => {}
        }
    }
    if let Some(monitor) = record.monitor.and_then(crate::ledger::ProcessId::open) {
        wait(monitor, MONITOR_TIMEOUT).await?;
    }
    Ok(())
}

async fn wait(process: OwnedFd, bound: Duration) -> Result<()> {
    let watched = sys::watch(process)
        .map_err(|source| Error::Io { action: "watch lxc-start", source })?;
    match tokio::time::timeout_at(Instant::now() + bound, exit::ended(&watched)).await {
        // Proxmox refuses to destroy a running CT, so going on is safe and gives a better error.
        Ok(_) | Err(_) => Ok(()),
    }
}
