//! The actor that owns the shim's pod sandbox.
//!
//! As with containers, handlers only send a [`Command`] and await the answer, so that they may be
//! dropped at any moment; what can be answered without the actor is in the [`View`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::libc;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::ledger::{Record, RunDir};
use crate::lxc::cgroup::Cgroup;
use crate::lxc::exit::Exit;
use crate::oci;
use crate::oci::plan::Hooks;
use crate::sandbox::holder::Waiting;
use crate::sandbox::member::{Shared, State};
use crate::sandbox::namespace;
use crate::sandbox::pod::{self, Pod};
use crate::sandbox::spec::{self, Network};
use crate::task::container::{self, signal_one};
use crate::task::create::make_run_dir;
use crate::task::error::{Error, Result, sentence};
use crate::task::phase::Phase;
use crate::task::registry::Registry;
use crate::task::view::INIT;
use crate::task::{Environment, blocking, teardown};

/// The size of the kubelet's `/dev/shm`, in bytes.
const SHARED_MEMORY: u64 = 64 << 20;
/// The holder ends within a millisecond of being asked to.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// A killed container and its output, or a creation that is undone, are waited for at most this long.
const EXIT_LIMIT: Duration = Duration::from_secs(15);
/// Calls that may wait for their turn.
const INBOX: usize = 16;

type Reply<T> = oneshot::Sender<Result<T>>;

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub id: String,
    pub bundle: PathBuf,
    /// Type and value.
    pub options: Option<(String, Vec<u8>)>,
    /// `None` for the node's network.
    pub network: Option<PathBuf>,
}

/// What the actor can be asked to do.
#[derive(Debug)]
pub enum Command {
    Create { request: CreateRequest, reply: Reply<()> },
    Start { id: String, reply: Reply<View> },
    Stop { id: String, reply: Reply<()> },
    Shutdown { id: String, reply: Reply<()> },
}

/// The sandbox as its actor last described it.
#[derive(Debug, Clone)]
pub struct View {
    pub id: String,
    /// The holder's, on the host.
    pub pid: u32,
    /// It has been started.
    pub started: bool,
    pub created_at: SystemTime,
    pub exit: Option<Exit>,
    pub network: Option<PathBuf>,
    pub cgroup: Arc<Cgroup>,
}

impl View {
    /// Whether containers can be added to it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.started && self.exit.is_none()
    }
}

/// How handlers reach the actor.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    /// `None` as long as there is no sandbox.
    pub view: watch::Receiver<Option<View>>,
}

impl Handle {
    /// Has the actor carry out a command and awaits its answer.
    ///
    /// # Errors
    /// The command's own, or [`Error::ShuttingDown`].
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::ShuttingDown)?;
        answer.await.map_err(|_| Error::ShuttingDown)?
    }
}

/// Starts the actor.
#[must_use]
pub fn spawn(env: Arc<Environment>, containers: Arc<Registry>) -> Handle {
    let (commands, inbox) = mpsc::channel(INBOX);
    let (view, viewer) = watch::channel(None);
    tokio::spawn(Actor { env, containers, view, sandbox: None }.run(inbox));
    Handle { commands, view: viewer }
}

/// A sandbox that exists.
struct Sandbox {
    pod: Pod,
    plan: pod::Plan,
    waiting: Option<Waiting>,
}

struct Actor {
    env: Arc<Environment>,
    containers: Arc<Registry>,
    view: watch::Sender<Option<View>>,
    sandbox: Option<Sandbox>,
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        loop {
            let ended = self.ended();
            tokio::select! {
                biased;
                exit = ended => self.exited(exit),
                command = inbox.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return,
                },
            }
        }
    }

    /// The end of the holder, if it is still to be told.
    fn ended(&self) -> impl Future<Output = Exit> + Send + 'static + use<> {
        let running = self.view.borrow().as_ref().is_some_and(|view| view.exit.is_none());
        let holder = self.sandbox.as_ref().filter(|_| running);
        let ended = holder.map(|sandbox| sandbox.pod.holder.ended());
        async {
            match ended {
                Some(ended) => ended.await,
                None => std::future::pending().await,
            }
        }
    }

    async fn command(&mut self, command: Command) {
        // The client may have gone; then nobody needs the answer.
        match command {
            Command::Create { request, reply } => {
                let _ = reply.send(self.create(request).await);
            }
            Command::Start { id, reply } => {
                let _ = reply.send(self.start(&id).await);
            }
            Command::Stop { id, reply } => {
                let _ = reply.send(self.stop(&id).await);
            }
            Command::Shutdown { id, reply } => {
                let _ = reply.send(self.shut_down(&id).await);
            }
        }
    }

    fn check(&self, id: &str) -> Result<()> {
        match &*self.view.borrow() {
            Some(view) if view.id == id => Ok(()),
            _ => Err(Error::SandboxNotFound { id: id.to_owned() }),
        }
    }

    fn change_view(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(|view| {
            if let Some(view) = view {
                change(view);
            }
        });
    }

    async fn create(&mut self, request: CreateRequest) -> Result<()> {
        if let Some(view) = &*self.view.borrow() {
            return Err(Error::Exists { what: "pod sandbox", id: view.id.clone() });
        }
        self.containers.hold()?;
        let created = self.make(&request).await;
        match created {
            Ok(sandbox) => {
                let pid = sandbox.pod.holder.pid.unsigned_abs();
                let cgroup = sandbox.pod.cgroup.clone();
                self.sandbox = Some(sandbox);
                self.env.sandbox.set(State::NotRunning);
                self.view.send_replace(Some(View {
                    id: request.id,
                    pid,
                    started: false,
                    created_at: SystemTime::now(),
                    exit: None,
                    network: request.network,
                    cgroup,
                }));
                Ok(())
            }
            Err(error) => {
                self.containers.release();
                Err(error)
            }
        }
    }

    async fn make(&self, request: &CreateRequest) -> Result<Sandbox> {
        let (env, owned) = (self.env.clone(), request.clone());
        let plan = blocking(move || plan(&env.namespace, &owned)).await?;
        let env = &self.env;
        let made =
            make_run_dir(&env.pve, &env.config, &env.namespace, &request.id, &request.bundle);
        let dir = made.await?;
        let mut record = env.record(request.bundle.clone());
        match pod::create(&env.init, &dir, &mut record, &plan).await {
            Ok((pod, waiting)) => Ok(Sandbox { pod, plan, waiting: Some(waiting) }),
            Err(error) => {
                let undone = self.tear_down(&dir, &record, &request.id).await;
                Err(Error::from(error).and_cleanup(undone))
            }
        }
    }

    async fn start(&mut self, id: &str) -> Result<View> {
        let refuse = |reason| Err(Error::SandboxPrecondition { id: id.to_owned(), reason });
        let Some(sandbox) = &mut self.sandbox else { return refuse("has not been created") };
        if self.view.borrow().as_ref().is_none_or(|view| view.id != id) {
            return Err(Error::SandboxNotFound { id: id.to_owned() });
        }
        let Some(waiting) = sandbox.waiting.take() else { return refuse("has been started") };
        waiting.go().await.map_err(pod::Error::from)?;
        let shared = Shared {
            pid: sandbox.pod.holder.pid,
            namespaces: sandbox.plan.namespaces.clone(),
            maps_users: sandbox.plan.user_namespace.is_some(),
            memory: sandbox.pod.dir.shm(),
            etc: sandbox.pod.dir.etc(),
            names: sandbox.pod.names.clone(),
        };
        self.env.sandbox.set(State::Running(Arc::new(shared)));
        self.change_view(|view| view.started = true);
        let view = self.view.borrow().clone();
        view.ok_or_else(|| Error::SandboxNotFound { id: id.to_owned() })
    }

    fn exited(&mut self, exit: Exit) {
        self.env.sandbox.set(State::NotRunning);
        self.change_view(|view| view.exit = Some(exit));
        log::info!(status = exit.status.0; "the pod sandbox has ended");
    }

    /// Ends the holder, and the containers that are left of the pod. May be repeated.
    async fn stop(&mut self, id: &str) -> Result<()> {
        self.check(id)?;
        // From here on nothing can join it.
        self.env.sandbox.set(State::NotRunning);
        let mut ending: JoinSet<()> = self.containers.all().into_iter().map(end).collect();
        let all = async { while ending.join_next().await.is_some() {} };
        if tokio::time::timeout(EXIT_LIMIT, all).await.is_err() {
            log::warn!("a container of the pod does not end within {} s", EXIT_LIMIT.as_secs());
            // What it was asked to do goes on.
        }
        let Some(sandbox) = &mut self.sandbox else { return Ok(()) };
        sandbox.waiting = None;
        let ended = sandbox.pod.holder.ended();
        tokio::pin!(ended);
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            match signal_one(sandbox.pod.holder.pidfd(), signal) {
                Ok(()) | Err(Error::Finished) => {}
                Err(error) => return Err(error),
            }
            if let Ok(exit) = tokio::time::timeout(STOP_LIMIT, &mut ended).await {
                if self.view.borrow().as_ref().is_some_and(|view| view.exit.is_none()) {
                    self.exited(exit);
                }
                return Ok(());
            }
        }
        Err(Error::SandboxPrecondition { id: id.to_owned(), reason: "does not end" })
    }

    async fn shut_down(&mut self, id: &str) -> Result<()> {
        if self.sandbox.is_some() {
            self.check(id)?;
            self.stop(id).await?;
            self.delete_containers(id).await?;
        }
        if let Some(sandbox) = &self.sandbox {
            self.tear_down(&sandbox.pod.dir, &sandbox.pod.record, id).await?;
        }
        self.sandbox = None;
        self.containers.release();
        self.containers.shut_down();
        Ok(())
    }

    /// The pod's end is that of its containers, which have been killed.
    async fn delete_containers(&self, id: &str) -> Result<()> {
        for container in self.containers.all() {
            let mut view = container.view.clone();
            let ended = view.wait_for(|view| view.process(INIT).is_none_or(|p| p.exit.is_some()));
            if tokio::time::timeout(EXIT_LIMIT, ended).await.is_err() {
                let reason = "has a container that does not end";
                return Err(Error::SandboxPrecondition { id: id.to_owned(), reason });
            }
            let delete = |reply| container::Command::Delete { exec_id: INIT.to_owned(), reply };
            match container.ask(delete).await {
                // Somebody else was faster.
                Ok(_) | Err(Error::Finished) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn tear_down(&self, dir: &RunDir, record: &Record, id: &str) -> Result<()> {
        let limit = self.env.config.proxmox.task_timeout;
        teardown::teardown(&self.env.pve, dir, record, id, limit).await
    }
}

/// Kills a container, or gives up its creation, so that nobody can start it any more.
async fn end(container: container::Handle) {
    let is_created =
        container.view.borrow().process(INIT).is_some_and(|p| p.phase != Phase::Creating);
    let ended = if is_created {
        let (exec_id, signal) = (INIT.to_owned(), libc::SIGKILL);
        let kill = |reply| container::Command::Kill { exec_id, signal, all: true, reply };
        container.ask(kill).await
    } else {
        let delete = |reply| container::Command::Delete { exec_id: INIT.to_owned(), reply };
        container.ask(delete).await.map(drop)
    };
    if let Err(error) = ended {
        log::debug!("end a container of the pod: {}", sentence(&error));
    }
}

/// Blocks: it reads the bundle and looks at the network namespace.
fn plan(containerd: &str, request: &CreateRequest) -> Result<pod::Plan> {
    let config = match std::fs::read(request.bundle.join("config.json")) {
        Ok(json) => Some(
            serde_json::from_slice::<Value>(&json)
                .map_err(|error| spec::Error::Bundle { reason: error.to_string() })?,
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => return Err(Error::Io { action: "read the sandbox's config.json", source }),
    };
    let options = request.options.as_ref();
    let options = options.map(|(kind, value)| (kind.as_str(), value.as_slice()));
    let spec = spec::of_pause_container(&spec::Request {
        id: &request.id,
        config,
        options,
        network: request.network.as_deref().map(network),
    })?;
    let host =
        oci::Host::probe().map_err(|source| Error::Io { action: "look at the host", source })?;
    let plan = oci::plan(spec.to_string().as_bytes(), &request.bundle, &host)?;
    for warning in &plan.warnings {
        log::warn!(sandbox = request.id.as_str(); "{warning}");
    }
    if plan.hooks != Hooks::default() {
        return Err(Error::Argument {
            field: "hooks",
            reason: "a pod sandbox of the Sandbox service has none".to_owned(),
        });
    }
    let mut plan = pod::Plan::of_pause_container(&plan, containerd, &request.id);
    plan.shared_memory = Some(SHARED_MEMORY);
    plan.names = spec::names(options)?;
    Ok(plan)
}

/// An empty file is where a network namespace was, or is to be, mounted: it has no network to give, so
/// the pod gets none, and never the node's. Anything else is taken for a namespace, and refused later
/// if it is none.
fn network(path: &Path) -> Network<'_> {
    let is_empty_file = std::fs::metadata(path)
        .is_ok_and(|file| file.is_file() && file.len() == 0 && !namespace::is_namespace(path));
    if is_empty_file {
        log::warn!("no network namespace is mounted at {}: the pod has no network", path.display());
        return Network::New;
    }
    Network::Path(path)
}
