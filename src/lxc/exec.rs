//! Starts one more process in a running CT, through `init exec`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Stdio;

use proxmox_shim_init::protocol::{ExecCgroup, ExecSetup, Reply, Request};

use crate::lxc::init::{self, Session, memory_file};
use crate::sys::{limits, socket};

/// What can go wrong before the process runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The helper could not be started on the host.
    #[error("start proxmox-shim-init on the host")]
    Spawn(#[source] io::Error),
    /// The helper or the new process failed.
    #[error(transparent)]
    Init(#[from] init::Error),
}

/// What the helper needs besides the process itself.
#[derive(Debug)]
pub struct Entry {
    /// The CT's PID 1.
    pub init: OwnedFd,
    pub cgroup: ExecCgroup,
    /// See [`Request::Exec`].
    pub cgroup_files: Vec<OwnedFd>,
    /// `None` with a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
}

/// The new process. It may not have executed its program yet: see [`Session::executed`]. Whatever
/// becomes of it, it has to be reaped.
#[derive(Debug)]
pub struct Spawned {
    /// In the host's pid namespace.
    pub pid: i32,
    /// It is a child of this process.
    pub pidfd: OwnedFd,
    /// With which it can be told to go on.
    pub session: Session,
}

/// Runs `binary` (an open file on a mount that the CT can't write to) in exec mode.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub async fn spawn(binary: &OwnedFd, setup: &ExecSetup, entry: Entry) -> Result<Spawned, Error> {
    let request = Request::Exec {
        cgroup: entry.cgroup,
        cgroup_files: entry.cgroup_files.len(),
        stdio: entry.stdio.is_some(),
    };
    let mut fds = vec![memory_file(setup)?, entry.init];
    fds.extend(entry.cgroup_files);
    fds.extend(entry.stdio.into_iter().flatten());
    through_helper(binary, "exec", &request, fds).await
}

/// Runs `binary` in a mode that makes one process and ends.
///
/// That process is cloned with `CLONE_PARENT`, so that it becomes a child of the shim, which gets its
/// exact status.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub(crate) async fn through_helper(
    binary: &OwnedFd,
    mode: &str,
    request: &Request,
    fds: Vec<OwnedFd>,
) -> Result<Spawned, Error> {
    let (ours, theirs) = socket::pair().map_err(Error::Spawn)?;
    // By descriptor: the path may meanwhile name the binary of another release. The helper finds
    // its socket on stdin.
    let mut helper = tokio::process::Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()))
        .arg0("proxmox-shim-init")
        .arg(mode)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::Spawn)?;
    // It waits for its request.
    if let Some(pid) = helper.id() {
        limits::restore_descriptors(pid.cast_signed()).map_err(Error::Spawn)?;
    }
    let session = Session::new(ours)?;
    let spawned = async {
        session.send(request, fds).await?;
        match session.receive("the process existed").await? {
            (Reply::Spawned { pid }, mut fds) => match fds.pop() {
                Some(pidfd) => Ok((pid, pidfd)),
                None => Err(init::Error::Unexpected {
                    got: "no descriptor".to_owned(),
                    expected: "a pidfd",
                }),
            },
            (other, _) => Err(init::Error::Unexpected {
                got: format!("{other:?}"),
                expected: "the new process",
            }),
        }
    }
    .await;
    match spawned {
        Ok((pid, pidfd)) => {
            // It has nothing left to do, but it must be reaped.
            let _ = helper.wait().await;
            Ok(Spawned { pid, pidfd, session })
        }
        Err(error) => {
            let _ = helper.kill().await;
            Err(error.into())
        }
    }
}
