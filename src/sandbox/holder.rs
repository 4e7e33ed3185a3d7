//! The process that holds a pod's namespaces: `proxmox-shim-init` in holder mode.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::libc;
use proxmox_shim_init::protocol::{ExecCgroup, HolderSetup, Request};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::lxc::exit::{self, Exit};
use crate::lxc::{exec, init};
use crate::sys;
use crate::sys::pidfd::{self, ExitStatus};

/// Making it takes milliseconds; a node that is slower than this has other troubles.
const LIMIT: Duration = Duration::from_secs(30);

/// Why there is no holder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("start the holder of the pod's namespaces")]
    Spawn(#[from] exec::Error),
    /// It could not do its work.
    #[error("hold the pod's namespaces")]
    Init(#[from] init::Error),
    /// It can't be watched.
    #[error("watch the holder of the pod's namespaces")]
    Watch(#[source] io::Error),
    /// It says nothing.
    #[error("the holder of the pod's namespaces was not ready within {} s", LIMIT.as_secs())]
    Slow,
}

/// A running holder, a child of the shim. It outlives this value.
#[derive(Debug)]
pub struct Holder {
    /// In the host's pid namespace.
    pub pid: i32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    exit: watch::Receiver<Option<Exit>>,
}

/// A holder that has made the namespaces and waits for its start.
#[derive(Debug)]
pub struct Waiting(init::Session);

impl Waiting {
    /// Has it go on: from now on it holds the namespaces although the shim ends.
    ///
    /// # Errors
    /// [`Error::Init`], [`Error::Slow`].
    pub async fn go(self) -> Result<(), Error> {
        let gone = async {
            self.0.go().await?;
            // It closes the socket, although it executes nothing.
            self.0.executed().await
        };
        Ok(tokio::time::timeout(LIMIT, gone).await.map_err(|_| Error::Slow)??)
    }
}

impl Holder {
    /// Starts it from `binary`, as in [`exec::spawn`]. `cgroup` is from
    /// [`Cgroup::entry_files`](crate::lxc::cgroup::Cgroup::entry_files). What is written to
    /// `exit_record` tells its status to those who come when the shim has gone.
    ///
    /// # Errors
    /// [`Error`]; no process is left then.
    pub async fn start(
        binary: &OwnedFd,
        setup: &HolderSetup,
        exit_record: OwnedFd,
        cgroup: (ExecCgroup, Vec<OwnedFd>),
        joined: Vec<OwnedFd>,
    ) -> Result<(Self, Waiting), Error> {
        let (cgroup, files) = cgroup;
        let request =
            Request::Holder { cgroup, cgroup_files: files.len(), namespaces: joined.len() };
        let mut fds = vec![init::memory_file(setup)?, exit_record];
        fds.extend(files);
        fds.extend(joined);
        let spawned = exec::through_helper(binary, "holder", &request, fds);
        let spawned = tokio::time::timeout(LIMIT, spawned).await.map_err(|_| Error::Slow)??;
        let exec::Spawned { pid, pidfd, session } = spawned;
        let holder = Self::watch(pid, pidfd)?;
        let ready = tokio::time::timeout(LIMIT, session.ready()).await;
        match ready.map_err(|_| Error::Slow).and_then(|ready| Ok(ready?)) {
            Ok(_) => Ok((holder, Waiting(session))),
            Err(error) => {
                // After a failure it ends by itself, unless it hangs.
                let _ = pidfd::send_signal(holder.pidfd.as_fd(), libc::SIGKILL);
                Err(error)
            }
        }
    }

    /// Reaps it in a task of its own, so that no zombie stays, whoever gives up on it.
    fn watch(pid: i32, pidfd: OwnedFd) -> Result<Self, Error> {
        let pidfd = Arc::new(sys::watch(pidfd).map_err(Error::Watch)?);
        let (ended, exit) = watch::channel(None);
        let child = pidfd.clone();
        tokio::spawn(async move {
            let exit = exit::of_child(&child).await.unwrap_or_else(|error| {
                log::error!("the exit status of the pod sandbox is lost: {error}");
                lost()
            });
            let _ = ended.send(Some(exit));
        });
        Ok(Self { pid, pidfd, exit })
    }

    /// For signals.
    #[must_use]
    pub fn pidfd(&self) -> &Arc<AsyncFd<OwnedFd>> {
        &self.pidfd
    }

    /// How it ended, once it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub fn ended(&self) -> impl Future<Output = Exit> + Send + 'static + use<> {
        let mut exit = self.exit.clone();
        async move {
            let ended = exit.wait_for(Option::is_some).await.map(|exit| *exit);
            // The channel closes without a value only when the runtime ends.
            ended.ok().flatten().unwrap_or_else(lost)
        }
    }
}

/// 255 is containerd's own word for a status that nobody knows.
fn lost() -> Exit {
    Exit { status: ExitStatus(255), at: SystemTime::now() }
}
