//! The Task service: one actor per container, and the edge to containerd.
//!
//! Flow: [`service`] turns a request into a [`container::Command`]; the actor in [`container`]
//! moves the container through the [`phase`] table, with [`create`] and [`teardown`] for the long
//! ways there and back; [`sandbox`] is the actor of a task that is a pod sandbox; [`view`] is what everybody may read meanwhile.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::Config;
use crate::events::Outbox;
use crate::idle::Idle;
use crate::ledger::Record;
use crate::lxc::detached;
use crate::oci::Host;
use crate::pve;
use crate::sandbox::member;

pub mod container;
pub mod create;
pub mod describe;
pub mod error;
pub mod hooks;
pub mod phase;
pub mod registry;
pub mod sandbox;
pub mod seccomp_agent;
pub mod service;
pub mod stdio;
pub mod teardown;
pub mod user_namespace;
pub mod view;

pub use error::{Error, Result, sentence};
pub use service::Service;

/// What all containers of a shim have in common.
pub struct Environment {
    pub config: Arc<Config>,
    pub pve: Arc<pve::Client>,
    pub events: Outbox,
    /// Told of each answer.
    pub idle: Idle,
    /// containerd's API socket.
    pub containerd: PathBuf,
    /// containerd's.
    pub namespace: String,
    /// The container that the shim was started for.
    pub id: String,
    pub host: Arc<Host>,
    /// What the shim's pod shares, if the Sandbox service holds it.
    pub sandbox: member::Slot,
    /// The init binary's path on the host.
    pub init_path: PathBuf,
    /// The init binary, open on a mount of its own that nobody can write to.
    pub init: OwnedFd,
}

impl Environment {
    /// Checks everything that a create will need, Proxmox included, so that what is wrong is told
    /// by `start` in one sentence and not by a create that fails later.
    ///
    /// # Errors
    /// The configuration's, the token's or Proxmox's.
    pub async fn prepare(
        config: Arc<Config>,
        containerd: PathBuf,
        namespace: String,
        id: String,
        events: Outbox,
    ) -> Result<Self> {
        let pve = pve::Client::new(&config)?;
        let checked = pve.check();
        let init_path = config.init_path()?;
        let path = init_path.clone();
        let local = blocking(move || {
            let host =
                Host::probe().map_err(|source| Error::Io { action: "look at the host", source })?;
            Ok((host, detached::read_only_file(&path)?))
        });
        let (checked, local) = tokio::join!(checked, local);
        checked?;
        let (host, init) = local?;
        Ok(Self {
            config,
            pve: Arc::new(pve),
            events,
            idle: Idle::default(),
            containerd,
            namespace,
            id,
            host: Arc::new(host),
            sandbox: member::Slot::default(),
            init_path,
            init,
        })
    }

    /// The record of a container of this shim.
    pub(crate) fn record(&self, bundle: PathBuf) -> Record {
        let mut record = Record::new(bundle);
        record.shim = Some(self.id.clone());
        record
    }

    fn stdio_context(&self, id: &str, exec_id: Option<&str>, bundle: &Path) -> stdio::Context {
        stdio::Context {
            container_id: id.to_owned(),
            exec_id: exec_id.map(str::to_owned),
            namespace: self.namespace.clone(),
            bundle: bundle.to_owned(),
        }
    }
}

/// Runs what may block for a moment (files, mounts) away from the runtime's thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::ShuttingDown)?
}
