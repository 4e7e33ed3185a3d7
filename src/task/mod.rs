//! Placeholder of the task service: enough for the bootstrap to be built and tested against.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use containerd_shim_protos::api::{ConnectRequest, ConnectResponse, Empty, ShutdownRequest};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::config::Config;
use crate::events::Outbox;

/// What the service works with.
pub struct Environment {
    /// Validated.
    pub config: Arc<Config>,
    /// Where events go.
    pub events: Outbox,
    /// containerd's namespace.
    pub namespace: String,
    /// The bundle `start` was called for.
    pub bundle: PathBuf,
}

/// The service.
pub struct Service {
    finished: watch::Sender<bool>,
}

impl Service {
    /// Makes the service.
    pub fn new(_environment: Environment) -> Arc<Service> {
        Arc::new(Service { finished: watch::Sender::new(false) })
    }

    /// Checks the configuration against the node.
    pub async fn prepare(&self) -> Result<(), Infallible> {
        Ok(())
    }

    /// Resolves when Shutdown was accepted.
    pub async fn finished(&self) {
        let _ = self.finished.subscribe().wait_for(|finished| *finished).await;
    }
}

#[async_trait]
impl containerd_shim_protos::shim_async::Task for Service {
    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let mut response = ConnectResponse::new();
        response.shim_pid = std::process::id();
        Ok(response)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.finished.send_replace(true);
        Ok(Empty::new())
    }
}

/// What a dead container was.
pub struct Reclaimed {
    /// Host pid.
    pub pid: u32,
    /// 0..255.
    pub status: u32,
    /// When it ended.
    pub exited_at: SystemTime,
}

/// Cleans up after a dead shim.
pub async fn reclaim(_: &Config, _: &str, _: &str, _: &Path) -> Result<Reclaimed, Infallible> {
    Ok(Reclaimed { pid: 0, status: 137, exited_at: UNIX_EPOCH })
}
