//! The ttrpc edge of containerd's Sandbox service (`containerd.runtime.sandbox.v1`).

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox;
use ttrpc::r#async::TtrpcContext;

use crate::bootstrap::Identifier;
use crate::lxc::exit::Exit;
use crate::sandbox::actor::{self, Command, CreateRequest, Handle, View};
use crate::task::error::{Error, Result, sentence};
use crate::task::registry::Registry;
use crate::task::{Environment, blocking};

/// What the kubelet calls the states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox service of one shim.
pub struct Service {
    env: Arc<Environment>,
    sandbox: Handle,
}

impl Service {
    /// Shares the environment and the containers with the Task service.
    #[must_use]
    pub fn new(env: Arc<Environment>, containers: Arc<Registry>) -> Arc<Self> {
        Arc::new(Self { sandbox: actor::spawn(env.clone(), containers), env })
    }

    /// Every failure is logged once, here.
    fn reply<T>(&self, method: &'static str, id: &str, result: Result<T>) -> ttrpc::Result<T> {
        self.env.idle.used();
        result.map_err(|error| {
            let text = sentence(&error);
            log::debug!(method = method, sandbox = id; "{text}");
            ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), text))
        })
    }

    fn view(&self, id: &str) -> Result<View> {
        let view = self.sandbox.view.borrow().clone();
        view.filter(|view| view.id == id)
            .ok_or_else(|| Error::SandboxNotFound { id: id.to_owned() })
    }

    async fn create(&self, request: api::CreateSandboxRequest) -> Result<()> {
        if Identifier::new(request.sandbox_id.as_str()).is_none() {
            let reason = format!("{:?} is not an identifier of containerd", request.sandbox_id);
            return Err(Error::Argument { field: "sandbox_id", reason });
        }
        let request = CreateRequest {
            id: request.sandbox_id,
            bundle: PathBuf::from(request.bundle_path),
            options: request.options.into_option().map(|any| (any.type_url, any.value)),
            network: Some(request.netns_path).filter(|path| !path.is_empty()).map(PathBuf::from),
        };
        self.sandbox.ask(|reply| Command::Create { request, reply }).await
    }

    async fn wait(&self, id: &str) -> Result<Exit> {
        self.view(id)?;
        let mut view = self.sandbox.view.clone();
        let ended = view.wait_for(|view| view.as_ref().is_none_or(|view| view.exit.is_some()));
        let ended = ended.await.map_err(|_| Error::ShuttingDown)?;
        let exit = ended.as_ref().and_then(|view| view.exit);
        exit.ok_or_else(|| Error::SandboxNotFound { id: id.to_owned() })
    }

    fn ping(&self, id: &str) -> Result<()> {
        match self.view(id)?.is_ready() {
            true => Ok(()),
            false => {
                Err(Error::SandboxPrecondition { id: id.to_owned(), reason: "is not running" })
            }
        }
    }

    async fn metrics(&self, id: &str) -> Result<api::SandboxMetricsResponse> {
        let cgroup = self.view(id)?.cgroup;
        let data = blocking(move || Ok(cgroup.metrics()?)).await?;
        let mut response = api::SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(SystemTime::now());
        metric.id = id.to_owned();
        metric.data = MessageField::some(data);
        Ok(response)
    }
}

#[async_trait]
impl Sandbox for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        let id = r.sandbox_id.clone();
        self.reply("CreateSandbox", &id, self.create(r).await)?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let id = r.sandbox_id.clone();
        let started = self.sandbox.ask(|reply| Command::Start { id: r.sandbox_id, reply }).await;
        let view = self.reply("StartSandbox", &id, started)?;
        Ok(api::StartSandboxResponse {
            pid: view.pid,
            created_at: timestamp(view.created_at),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        let mut response = api::PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = architecture().to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        let id = r.sandbox_id.clone();
        let stopped = self.sandbox.ask(|reply| Command::Stop { id: r.sandbox_id, reply }).await;
        self.reply("StopSandbox", &id, stopped)?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        let exit = self.reply("WaitSandbox", &r.sandbox_id, self.wait(&r.sandbox_id).await)?;
        Ok(api::WaitSandboxResponse {
            exit_status: exit.status.0,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        let view = self.reply("SandboxStatus", &r.sandbox_id, self.view(&r.sandbox_id))?;
        let state = if view.is_ready() { READY } else { NOT_READY };
        let mut response = api::SandboxStatusResponse {
            sandbox_id: r.sandbox_id,
            pid: view.pid,
            state: state.to_owned(),
            created_at: timestamp(view.created_at),
            exited_at: view.exit.map(|exit| Timestamp::from(exit.at)).into(),
            ..Default::default()
        };
        if r.verbose {
            response.info = info(&view, state);
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        self.reply("PingSandbox", &r.sandbox_id, self.ping(&r.sandbox_id))?;
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        let id = r.sandbox_id.clone();
        let ended = self.sandbox.ask(|reply| Command::Shutdown { id: r.sandbox_id, reply }).await;
        self.reply("ShutdownSandbox", &id, ended)?;
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        self.reply("SandboxMetrics", &r.sandbox_id, self.metrics(&r.sandbox_id).await)
    }
}

fn info(view: &View, state: &str) -> HashMap<String, String> {
    let mut info = HashMap::from([
        ("pid".to_owned(), view.pid.to_string()),
        ("state".to_owned(), state.to_owned()),
    ]);
    if let Some(network) = &view.network {
        info.insert("networkSandboxPath".to_owned(), network.display().to_string());
    }
    info
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

/// In the words of Go, which the OCI image specification uses.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
