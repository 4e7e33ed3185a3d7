//! Undoes everything that exists because of a container, from its record alone, so that the same
//! code serves a `Delete`, a failed `Create`, and a `delete` after a crash.

use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::Flock;
use nix::libc;
use proxmox_shim_init::protocol::Hook;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::{Config, Vmid};
use crate::ledger::{Poststop, ProcessId, Record, RunDir};
use crate::lxc::cgroup::Cgroup;
use crate::lxc::exit::{self, Exit};
use crate::lxc::{cgroup, rootfs};
use crate::pve;
use crate::pve::conf::ParsedConf;
use crate::pve::identity::{self, Identity};
use crate::sys::pidfd::ExitStatus;
use crate::sys::{self, pidfd};
use crate::task::container::Ended;
use crate::task::error::{Error, Result, sentence};
use crate::task::{blocking, hooks};

/// How long a killed CT may take until lxc-start has ended.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(15);
/// A killed holder of a pod's namespaces ends within a millisecond.
const HOLDER_TIMEOUT: Duration = Duration::from_secs(2);
/// The stop hook needs a few milliseconds; containerd gives a `delete` 5 s in all.
const RECORD_TIMEOUT: Duration = Duration::from_secs(1);
/// What a `delete` can spare of its 5 s for the end of lxc-start.
const RECLAIM_MONITOR_TIMEOUT: Duration = Duration::from_secs(2);
const DELETE_LIMIT: Duration = Duration::from_secs(3);
/// For a hook that sets no limit itself: nobody can give up a removal.
const POSTSTOP_SECONDS: u64 = 60;

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
        kill(record, limit.min(MONITOR_TIMEOUT)).await?;
        if record.shares_pids
            && pve.is_ours(&identity).await?
            && let Some(container) = record.cgroups.first()
        {
            Cgroup::at(container)?.kill_all().await?;
        }
        if destroy(pve, record, &identity, deadline).await? {
            remove_cgroups(record.cgroups.clone()).await?;
        }
    }
    if record.holder {
        end_pod_sandbox(dir, record, id).await?;
    }
    let mounted = record.rootfs();
    blocking(move || Ok(rootfs::unmount(&mounted)?)).await?;
    if let Some(hooks) = &record.poststop {
        poststop(id, &record.bundle, hooks).await;
    }
    let dir = dir.clone();
    blocking(move || Ok(dir.remove()?)).await
}

/// Ends the holder of a pod's namespaces, and unmounts what the pod shares.
///
/// The cgroup is removed but not emptied by force: a client has chosen its path, and only the holder
/// in it is ours.
async fn end_pod_sandbox(dir: &RunDir, record: &Record, id: &str) -> Result<()> {
    let holder = record.init.and_then(ProcessId::open);
    kill(record, Duration::ZERO).await?;
    if let Some(holder) = holder {
        let watched = sys::watch(holder)
            .map_err(|source| Error::Io { action: "watch the holder", source })?;
        if tokio::time::timeout(HOLDER_TIMEOUT, exit::ended(&watched)).await.is_err() {
            return Err(Error::SandboxPrecondition { id: id.to_owned(), reason: "does not end" });
        }
    }
    // A holder that came into being just before a failure is in no record. It ends by itself, as
    // nobody tells it to go on.
    if let Some(container) = record.cgroups.first() {
        let (cgroup, deadline) =
            (Arc::new(Cgroup::at(container)?), Instant::now() + HOLDER_TIMEOUT);
        let is_empty = || {
            let cgroup = cgroup.clone();
            blocking(move || Ok(cgroup.pids()?.is_empty()))
        };
        while !is_empty().await? && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        remove_cgroups(record.cgroups.clone()).await?;
    }
    let mounted = [dir.shm(), dir.etc()];
    blocking(move || Ok(mounted.iter().try_for_each(|path| rootfs::unmount(path))?)).await
}

/// Returns whether the VMID was that of our CT.
async fn destroy(
    pve: &pve::Client,
    record: &Record,
    identity: &Identity,
    deadline: Instant,
) -> Result<bool> {
    // Without an init the start may be under way, or was cut off: only Proxmox knows.
    let mut stop = record.init.is_none();
    loop {
        let attempt = async {
            if stop {
                pve.stop_ours(identity, deadline).await?;
            }
            pve.destroy_ours(identity, deadline).await
        };
        match attempt.await {
            Ok(_) => return Ok(true),
            // Somebody was faster when the VMID was claimed, or has put another CT in our CT's
            // place. What we started has been killed, and nothing there is ours to remove.
            Err(error @ pve::Error::NotOurs { .. }) => {
                log::warn!("{error}");
                return Ok(false);
            }
            // The start has come to its end only now.
            Err(error)
                if error.failure() == Some(&pve::Failure::Running) && Instant::now() < deadline =>
            {
                stop = true;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn remove_cgroups(cgroups: Vec<String>) -> Result<()> {
    let names = move || {
        match cgroup::remove_stale(&cgroups.iter().map(String::as_str).collect::<Vec<_>>()) {
            // The VMID is free again, so this may be the next CT already.
            Err(error @ cgroup::Error::InUse { .. }) => log::warn!("{error}"),
            result => result?,
        }
        Ok(())
    };
    blocking(names).await
}

/// Whoever set a network up must get to take it down. A hook that fails keeps neither the task nor
/// the hooks after it.
async fn poststop(id: &str, bundle: &Path, poststop: &Poststop) {
    let state = hooks::State {
        oci_version: &poststop.oci_version,
        id,
        status: "stopped",
        pid: None,
        bundle,
        annotations: &poststop.annotations,
    };
    for hook in &poststop.hooks {
        let bounded = Hook { timeout: hook.timeout.or(Some(POSTSTOP_SECONDS)), ..hook.clone() };
        if let Err(error) = hooks::run("poststop", &[bounded], &state).await {
            log::warn!(container = id; "{}", sentence(&error.into()));
        }
    }
}

/// Kills PID 1 if it still is the recorded process, and waits until lxc-start has ended: until
/// then Proxmox counts the CT as running, and the stop hook has not written the status.
async fn kill(record: &Record, limit: Duration) -> Result<()> {
    if let Some(init) = record.init.and_then(ProcessId::open) {
        match pidfd::send_signal(init.as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                return Err(Error::Io { action: "kill the CT's init", source: error });
            }
            _ => {}
        }
    }
    match record.monitor.and_then(ProcessId::open) {
        Some(monitor) => wait(monitor, limit).await,
        None => Ok(()),
    }
}

async fn wait(process: OwnedFd, limit: Duration) -> Result<()> {
    let watched =
        sys::watch(process).map_err(|source| Error::Io { action: "watch lxc-start", source })?;
    // Past the deadline Proxmox is asked all the same: it refuses to destroy a running CT, and its
    // error tells more.
    let _ = tokio::time::timeout(limit, exit::ended(&watched)).await;
    Ok(())
}

/// Ends and removes a container in a fresh process after its shim has died (or was never there).
/// `known` is told how it ended as soon as that is known: whether and when Proxmox answers does not
/// matter to it.
///
/// # Errors
/// The ledger can't be read: nothing is touched then, and `known` not called. Or the clean-up
/// failed.
pub async fn reclaim(
    config: &Config,
    namespace: &str,
    id: &str,
    bundle: &Path,
    known: impl FnOnce(Ended),
) -> Result<()> {
    let dir = RunDir::new(&config.paths.run_dir, namespace, id);
    let killed =
        Exit { status: ExitStatus(128 + libc::SIGKILL.unsigned_abs()), at: SystemTime::now() };
    let Some(mut record) = dir.load()? else {
        known(Ended { pid: 0, exit: killed });
        return Ok(dir.remove()?);
    };
    if !same_file(&record.bundle, bundle) {
        // A container of the same name that belongs to another containerd.
        known(Ended { pid: 0, exit: killed });
        return Ok(());
    }
    if is_of_another_boot(&record)? {
        (record.init, record.monitor) = (None, None);
    }
    let pid = record.init.map_or(0, |init| init.pid.unsigned_abs());
    let ended = kill(&record, RECLAIM_MONITOR_TIMEOUT).await;
    // A holder has no stop hook: what it wrote was there before it ended.
    let exit = recorded(&dir, record.init.is_some() && !record.holder).await.unwrap_or(killed);
    known(Ended { pid, exit });
    ended?;
    let pve = pve::Client::new(config)?;
    teardown(&pve, &dir, &record, id, DELETE_LIMIT).await
}

/// Ends and removes the other containers of the shim that was started for `id`, as far as containerd
/// does not do it: from version 3 of its protocol on it calls `delete` only for those that it called
/// `start` for (`was_started`, by their bundles).
///
/// # Errors
/// The last that could not be removed.
pub async fn reclaim_members(
    config: &Config,
    namespace: &str,
    id: &str,
    was_started: impl Fn(&Path) -> bool,
) -> Result<()> {
    let mut work = JoinSet::new();
    for (member, dir) in RunDir::of_namespace(&config.paths.run_dir, namespace) {
        let Ok(Some(record)) = dir.load() else { continue };
        if member == id || record.shim.as_deref() != Some(id) || was_started(&record.bundle) {
            continue;
        }
        let (config, namespace) = (config.clone(), namespace.to_owned());
        work.spawn(
            async move { reclaim(&config, &namespace, &member, &record.bundle, |_| ()).await },
        );
    }
    let mut result = Ok(());
    while let Some(done) = work.join_next().await {
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => result = Err(error),
            Err(_) => result = Err(Error::ShuttingDown),
        }
    }
    result
}

fn same_file(one: &Path, other: &Path) -> bool {
    one == other
        || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Pids and start times mean nothing after a reboot.
fn is_of_another_boot(record: &Record) -> Result<bool> {
    let made = record.identity.as_deref().and_then(|marker| Identity::find(marker).ok());
    Ok(match made {
        Some(identity) => identity.boot_id != identity::boot_id()?,
        None => false,
    })
}

/// The container in `dir`, if nobody will ask for its removal any more: it has ended, and
/// containerd has removed its bundle, or has given the bundle to a new container, `next`.
///
/// A `delete` leaves such a container behind if Proxmox does not answer in time, as containerd
/// would not repeat it.
fn orphan(dir: &RunDir, next: Option<&Path>) -> Result<Option<(Flock<File>, Record)>> {
    // First the lock, so that the record is not one that somebody is just removing.
    let Some(lock) = dir.try_lock()? else { return Ok(None) };
    let Some(record) = dir.load()? else { return Ok(None) };
    let forgotten = match next {
        Some(bundle) => same_file(&record.bundle, bundle),
        None => !record.bundle.exists(),
    };
    let ended = !record.is_alive() || is_of_another_boot(&record)?;
    Ok((forgotten && ended).then_some((lock, record)))
}

/// Removes what is left of an earlier container of this id and `bundle`. Returns whether there was
/// one.
///
/// # Errors
/// It can't be removed, or the ledger can't be read.
pub async fn remove_orphan(
    pve: &pve::Client,
    dir: &RunDir,
    id: &str,
    bundle: &Path,
    limit: Duration,
) -> Result<bool> {
    let (of, bundle) = (dir.clone(), bundle.to_owned());
    let Some((_lock, record)) = blocking(move || orphan(&of, Some(&bundle))).await? else {
        return Ok(false);
    };
    log::warn!(container = id; "an earlier container of this id was left behind, removing it");
    teardown(pve, dir, &record, id, limit).await?;
    Ok(true)
}

/// Removes all containers that were left behind on this node. Failures are logged: the next shim
/// tries again.
pub async fn sweep(config: &Config, pve: &pve::Client) {
    if let Err(error) = sweep_earlier_boots(config, pve).await {
        log::warn!("remove the CTs of an earlier boot: {}", sentence(&error));
    }
    let root = config.paths.run_dir.clone();
    let all = tokio::task::spawn_blocking(move || RunDir::all(&root)).await.unwrap_or_default();
    for (id, dir) in all {
        let of = dir.clone();
        let swept = async {
            let Some((_lock, record)) = blocking(move || orphan(&of, None)).await? else {
                return Ok(());
            };
            log::warn!(container = id.as_str(); "this container was left behind, removing it");
            teardown(pve, &dir, &record, &id, config.proxmox.task_timeout).await
        };
        if let Err(error) = swept.await {
            log::warn!(container = id.as_str(); "{}", sentence(&error));
        }
    }
}

/// Destroys the CTs of this installation that were made before the node was booted. Their run
/// directories went with the boot, so the marks in their notes are all that is left of them; the
/// first shim of a boot looks for them, and a file in the new run directory remembers that.
async fn sweep_earlier_boots(config: &Config, pve: &pve::Client) -> Result<()> {
    let swept = config.paths.run_dir.join("swept");
    let (settings, once) = (config.clone(), swept.clone());
    let found = blocking(move || earlier_boots(&settings, &once)).await?;
    let mut result = Ok(());
    for identity in found {
        log::warn!(
            container = identity.container_id.as_str(), vmid = identity.vmid.get();
            "this CT is of an earlier boot, removing it"
        );
        let deadline = Instant::now() + config.proxmox.task_timeout;
        if let Err(error) = pve.destroy_ours(&identity, deadline).await {
            result = Err(error.into());
        }
    }
    if result.is_err() {
        // The next shim tries again.
        blocking(move || {
            let _ = std::fs::remove_file(&swept);
            Ok(())
        })
        .await?;
    }
    result
}

fn earlier_boots(config: &Config, once: &Path) -> Result<Vec<Identity>> {
    let io = |action| move |source| Error::Io { action, source };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.paths.run_dir)
        .map_err(io("create the run directory"))?;
    match File::options().write(true).create_new(true).open(once) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(Vec::new()),
        result => drop(result.map_err(io("remember that the node has been swept"))?),
    }
    let (install_id, boot_id) =
        (identity::install_id(&config.paths.state_dir)?, identity::boot_id()?);
    let directory = config.proxmox.pmxcfs.join("lxc");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io("list the node's CTs"))?.flatten() {
        let name = entry.file_name();
        let vmid = name.to_str().and_then(|name| name.strip_suffix(".conf")?.parse().ok());
        let Some(vmid) = vmid.and_then(Vmid::new) else { continue };
        if !config.ct.vmid_range.contains(vmid) {
            continue;
        }
        // One that is being removed is none of ours to remove.
        let Ok(text) = std::fs::read_to_string(entry.path()) else { continue };
        let notes = ParsedConf::parse(&text).description;
        found.extend(Identity::find(&notes).ok().filter(|identity| {
            identity.vmid == vmid
                && identity.install_id == install_id
                && identity.boot_id != boot_id
        }));
    }
    Ok(found)
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
