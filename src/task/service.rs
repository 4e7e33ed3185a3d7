//! The ttrpc edge: protobuf in, protobuf out, and nothing else.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::{any::Any, timestamp::Timestamp};
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::types::task::{ProcessInfo, Status};
use ttrpc::r#async::TtrpcContext;

use crate::config::{Config, ConfigError, RuntimeOptions};
use crate::lxc::exit::Exit;
use crate::lxc::rootfs::RootfsMount;
use crate::oci;
use crate::pve;
use crate::task::Environment;
use crate::task::blocking;
use crate::task::container::{self, Command, Handle};
use crate::task::create::CreateRequest;
use crate::task::error::{Error, Result, sentence};
use crate::task::phase::Phase;
use crate::task::registry::Registry;
use crate::task::sandbox;
use crate::task::stdio::StdioRequest;
use crate::task::teardown;
use crate::task::view::{INIT, ProcessView, View};

/// The Task service of one shim.
pub struct Service {
    env: Arc<Environment>,
    containers: Arc<Registry>,
}

impl Service {
    #[must_use]
    pub fn new(env: Environment) -> Arc<Self> {
        Arc::new(Self { env: Arc::new(env), containers: Arc::default() })
    }

    /// What the Sandbox service shares with this one.
    #[must_use]
    pub fn parts(&self) -> (Arc<Environment>, Arc<Registry>) {
        (self.env.clone(), self.containers.clone())
    }

    /// Resolves when containerd has asked the shim to end and no task is left.
    pub async fn finished(&self) {
        self.containers.finished().await;
    }

    /// Removes what dead shims left behind on this node.
    pub fn sweep(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let env = self.env.clone();
        async move { teardown::sweep(&env.config, &env.pve).await }
    }

    /// Every failure is logged once, here, and becomes a status with the code containerd expects.
    fn reply<T>(&self, method: &'static str, id: &str, result: Result<T>) -> ttrpc::Result<T> {
        self.env.idle.used();
        result.map_err(|error| {
            let text = sentence(&error);
            log::debug!(method = method, container = id; "{text}");
            ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), text))
        })
    }

    fn handle(&self, id: &str) -> Result<Handle> {
        self.containers.get(id)
    }

    async fn create(&self, request: api::CreateTaskRequest) -> Result<u32> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented(
                "checkpoint: restoring from a checkpoint is not supported",
            ));
        }
        // It names a directory that is removed later. containerd's own rule is stricter.
        if matches!(request.id.as_str(), "" | "." | "..") || request.id.contains(['/', '\0']) {
            return Err(Error::Argument {
                field: "id",
                reason: format!("{:?} is no name", request.id),
            });
        }
        let (config, pve) = self.configuration(request.options.as_ref()).await?;
        let bundle = PathBuf::from(&request.bundle);
        let role = blocking(move || Ok(oci::role(&bundle)?)).await?;
        let id = request.id.clone();
        let create = CreateRequest {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs.into_iter().map(rootfs_mount).collect(),
            stdio: StdioRequest {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            config,
            pve,
            role,
        };
        let spawn = if role == oci::Role::Sandbox { sandbox::spawn } else { container::spawn };
        let created = self
            .containers
            .add(&id, |registration| spawn(self.env.clone(), create, registration))?;
        created.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// The shim's configuration, or the one that the request's options name.
    async fn configuration(
        &self,
        options: Option<&Any>,
    ) -> Result<(Arc<Config>, Arc<pve::Client>)> {
        // Only options that name a configuration change anything: a foreign type was warned of at
        // the start.
        let own = options
            .map(|any| RuntimeOptions::from_any(&any.type_url, &any.value))
            .transpose()
            .map_err(ConfigError::from)?
            .flatten()
            .filter(|options| *options != RuntimeOptions::default());
        let Some(options) = own else {
            return Ok((self.env.config.clone(), self.env.pve.clone()));
        };
        let config = blocking(move || Ok(Config::resolve(Some(&options))?)).await?;
        if config == *self.env.config {
            return Ok((self.env.config.clone(), self.env.pve.clone()));
        }
        let pve = pve::Client::new(&config)?;
        Ok((Arc::new(config), Arc::new(pve)))
    }

    async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let mut view = self.handle(id)?.view;
        let ended = view
            .wait_for(|view| view.process(exec_id).is_none_or(|process| process.exit.is_some()))
            .await
            .map_err(|_| Error::NotFound { id: id.to_owned() })?;
        ended
            .process(exec_id)
            .and_then(|process| process.exit)
            .ok_or_else(|| Error::ExecNotFound { id: id.to_owned(), exec_id: exec_id.to_owned() })
    }

    fn state(&self, id: &str, exec_id: &str) -> Result<api::StateResponse> {
        let handle = self.handle(id)?;
        let view = handle.view.borrow();
        let process = view.process(exec_id).ok_or_else(|| Error::ExecNotFound {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        })?;
        // As with runc's shim. containerd's restart monitor would take a task that it finds for one that
        // has to be replaced, and end its creation.
        if process.phase == Phase::Creating {
            return Err(Error::NotFound { id: id.to_owned() });
        }
        let mut response = api::StateResponse {
            id: id.to_owned(),
            bundle: handle.bundle.to_string_lossy().into_owned(),
            pid: process.pid,
            status: EnumOrUnknown::new(status(process, view.paused)),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        if let Some(exit) = process.exit {
            response.exit_status = exit.status.0;
            response.exited_at = timestamp(exit.at);
        }
        Ok(response)
    }

    async fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let view = self.handle(id)?.view.borrow().clone();
        let cgroup = view.cgroup.clone().ok_or_else(|| not_created(id))?;
        let pids = match view.process(INIT) {
            // containerd, when it starts, takes a shim that lists no process for one that has leaked,
            // and removes its task together with the exit status. So an ended container is listed with
            // the process it had until it is deleted.
            Some(init) if init.phase == Phase::Stopped => vec![init.pid],
            _ => blocking(move || Ok(cgroup.pids()?)).await?,
        };
        Ok(pids.into_iter().map(|pid| process_info(pid, &view)).collect())
    }

    async fn stats(&self, id: &str) -> Result<Any> {
        let cgroup = self.handle(id)?.view.borrow().cgroup.clone();
        let cgroup = cgroup.ok_or_else(|| not_created(id))?;
        blocking(move || Ok(cgroup.metrics()?)).await
    }

    async fn delete(&self, id: &str, exec_id: String) -> Result<container::Ended> {
        self.handle(id)?.ask(|reply| Command::Delete { exec_id, reply }).await
    }
}

#[async_trait]
impl Task for Service {
    async fn state(
        &self,
        _: &TtrpcContext,
        r: api::StateRequest,
    ) -> ttrpc::Result<api::StateResponse> {
        self.reply("State", &r.id, Self::state(self, &r.id, &r.exec_id))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        r: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let id = r.id.clone();
        let pid = self.reply("Create", &id, Self::create(self, r).await)?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        r: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        let pid = async {
            self.handle(&r.id)?.ask(|reply| Command::Start { exec_id: r.exec_id, reply }).await
        };
        let pid = self.reply("Start", &r.id, pid.await)?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        r: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let ended = self.reply("Delete", &r.id, Self::delete(self, &r.id, r.exec_id).await)?;
        Ok(api::DeleteResponse {
            pid: ended.pid,
            exit_status: ended.exit.status.0,
            exited_at: timestamp(ended.exit.at),
            ..Default::default()
        })
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        r: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let processes = self.reply("Pids", &r.id, Self::pids(self, &r.id).await)?;
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> ttrpc::Result<api::Empty> {
        let done = async { self.handle(&r.id)?.ask(|reply| Command::Pause { reply }).await };
        empty(self.reply("Pause", &r.id, done.await))
    }

    async fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> ttrpc::Result<api::Empty> {
        let done = async { self.handle(&r.id)?.ask(|reply| Command::Resume { reply }).await };
        empty(self.reply("Resume", &r.id, done.await))
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        r: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        let refused =
            Error::Unimplemented("checkpoint is not supported: a CT can't be checkpointed");
        empty(self.reply("Checkpoint", &r.id, Err(refused)))
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> ttrpc::Result<api::Empty> {
        let done = async {
            let signal = i32::try_from(r.signal).map_err(|_| Error::Argument {
                field: "signal",
                reason: format!("{} is not a signal", r.signal),
            })?;
            self.handle(&r.id)?
                .ask(|reply| Command::Kill { exec_id: r.exec_id, signal, all: r.all, reply })
                .await
        };
        empty(self.reply("Kill", &r.id, done.await))
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        r: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let done = async {
            if r.exec_id.is_empty() {
                return Err(Error::Argument { field: "exec_id", reason: "is empty".to_owned() });
            }
            let spec = r.spec.into_option().map(|any| any.value).unwrap_or_default();
            let stdio = StdioRequest {
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
                terminal: r.terminal,
            };
            self.handle(&r.id)?
                .ask(|reply| Command::Exec { exec_id: r.exec_id, stdio, spec, reply })
                .await
        };
        empty(self.reply("Exec", &r.id, done.await))
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        r: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::Empty> {
        let done = async {
            let (width, height) = (r.width, r.height);
            self.handle(&r.id)?
                .ask(|reply| Command::Resize { exec_id: r.exec_id, width, height, reply })
                .await
        };
        empty(self.reply("ResizePty", &r.id, done.await))
    }

    async fn close_io(
        &self,
        _: &TtrpcContext,
        r: api::CloseIORequest,
    ) -> ttrpc::Result<api::Empty> {
        let done = async {
            let handle = self.handle(&r.id)?;
            if !r.stdin {
                return Ok(());
            }
            handle.ask(|reply| Command::CloseIo { exec_id: r.exec_id, reply }).await
        };
        empty(self.reply("CloseIO", &r.id, done.await))
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        r: api::UpdateTaskRequest,
    ) -> ttrpc::Result<api::Empty> {
        let done = async {
            let resources = r.resources.into_option().map(|any| any.value).unwrap_or_default();
            self.handle(&r.id)?.ask(|reply| Command::Update { resources, reply }).await
        };
        empty(self.reply("Update", &r.id, done.await))
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        r: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let exit = self.reply("Wait", &r.id, Self::wait(self, &r.id, &r.exec_id).await)?;
        Ok(api::WaitResponse {
            exit_status: exit.status.0,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        r: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.reply("Stats", &r.id, Self::stats(self, &r.id).await)?;
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        r: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        // containerd asks before the first create, too.
        let task_pid = self
            .handle(&r.id)
            .ok()
            .and_then(|handle| handle.view.borrow().process(INIT).map(|process| process.pid))
            .unwrap_or(0);
        Ok(api::ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: api::ShutdownRequest,
    ) -> ttrpc::Result<api::Empty> {
        self.containers.shut_down();
        Ok(api::Empty::new())
    }
}

fn not_created(id: &str) -> Error {
    Error::Precondition { id: id.to_owned(), reason: "is not created yet" }
}

fn empty(result: ttrpc::Result<()>) -> ttrpc::Result<api::Empty> {
    result.map(|()| api::Empty::new())
}

fn rootfs_mount(mount: api::Mount) -> RootfsMount {
    RootfsMount {
        fstype: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

fn status(process: &ProcessView, paused: bool) -> Status {
    match process.phase {
        // "Starting" is answered by Start itself; until then the task counts as created.
        Phase::Creating | Phase::Created | Phase::Starting => Status::CREATED,
        Phase::Running if paused => Status::PAUSED,
        Phase::Running => Status::RUNNING,
        Phase::Stopped | Phase::Deleting | Phase::Deleted => Status::STOPPED,
    }
}

/// `containerd.runc.v1.ProcessDetails`: clients show the exec that a pid belongs to.
fn process_info(pid: u32, view: &View) -> ProcessInfo {
    const EXEC_ID: u8 = 1 << 3 | 2;
    let mut info = ProcessInfo { pid, ..Default::default() };
    let exec = view.processes.iter().find(|(id, p)| !id.is_empty() && p.pid == pid);
    if let Some((id, _)) = exec {
        // One field whose length fits in one byte: containerd's ids have at most 76 characters.
        if let Ok(length @ ..128) = u8::try_from(id.len()) {
            let value = [&[EXEC_ID, length], id.as_bytes()].concat();
            info.info = MessageField::some(Any {
                type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
                value,
                ..Default::default()
            });
        }
    }
    info
}
