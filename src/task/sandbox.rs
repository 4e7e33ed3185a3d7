//! A pod sandbox as a task: what containerd's CRI plugin makes of a pause image.
//!
//! The actor answers the same commands as that of a container, and the answers are those of runc's
//! shim for a pause container, but there is no CT and no program of the image: the process is the
//! [holder](crate::sandbox::holder) of the pod's namespaces.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use nix::libc;
use tokio::sync::{mpsc, oneshot, watch};

use crate::events::Event;
use crate::ledger::{Record, RunDir};
use crate::lxc::exit::Exit;
use crate::oci;
use crate::oci::plan::{Namespace, Plan};
use crate::sandbox::holder::Waiting;
use crate::sandbox::pod::{self, Pod};
use crate::sys::pidfd::ExitStatus;
use crate::task::container::{Command, Ended, Handle, INBOX, Reply, answer, signal_one};
use crate::task::create::{self, CreateRequest, make_run_dir};
use crate::task::error::{Error, Result, sentence};
use crate::task::phase::Phase;
use crate::task::registry::Registration;
use crate::task::stdio::Stdio;
use crate::task::view::{INIT, ProcessView, View};
use crate::task::{Environment, blocking, hooks, teardown};

/// Starts the actor, which makes the sandbox at once. The answer is the host's pid of its holder.
pub fn spawn(
    env: Arc<Environment>,
    request: CreateRequest,
    registration: Registration,
) -> (Handle, oneshot::Receiver<Result<u32>>) {
    let (commands, inbox) = mpsc::channel(INBOX);
    let (view, viewer) = watch::channel(View::default());
    let (created, answer) = oneshot::channel();
    let handle = Handle::new(commands, viewer, request.bundle.clone());
    let actor = Actor { env, request, view, phase: Phase::Creating, registration };
    tokio::spawn(actor.run(inbox, created));
    (handle, answer)
}

/// What there is once it has been created.
struct Sandbox {
    pod: Pod,
    plan: Plan,
    waiting: Option<Waiting>,
    stdio: Stdio,
    exit: Option<Exit>,
}

struct Actor {
    env: Arc<Environment>,
    request: CreateRequest,
    view: watch::Sender<View>,
    phase: Phase,
    registration: Registration,
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, created: Reply<u32>) {
        self.publish_view(None);
        let Some(mut sandbox) = self.create(&mut inbox, created).await else { return };
        let ended = sandbox.pod.holder.ended();
        tokio::pin!(ended);
        loop {
            tokio::select! {
                biased;
                exit = &mut ended, if sandbox.exit.is_none() => self.exited(&mut sandbox, exit),
                command = inbox.recv() => match command {
                    Some(Command::Delete { exec_id, reply }) if exec_id == INIT => {
                        match self.delete(&mut sandbox).await {
                            Ok(ended) => {
                                drop(self.registration);
                                return answer(reply, Ok(ended));
                            }
                            Err(error) => answer(reply, Err(error)),
                        }
                    }
                    Some(command) => self.command(&mut sandbox, command, &mut inbox).await,
                    None => return,
                },
            }
        }
    }

    fn id(&self) -> &str {
        &self.request.id
    }

    fn precondition(&self, reason: &'static str) -> Error {
        Error::Precondition { id: self.id().to_owned(), reason }
    }

    fn advance(&mut self, to: Phase) -> Result<()> {
        let id = self.id().to_owned();
        self.phase.advance(to).map_err(|source| Error::Phase { id, source })
    }

    fn publish_view(&self, sandbox: Option<&Sandbox>) {
        let process = ProcessView {
            phase: self.phase,
            pid: sandbox.map_or(0, pid),
            stdio: self.request.stdio.clone(),
            exit: sandbox.and_then(|sandbox| sandbox.exit),
        };
        self.view.send_replace(View {
            processes: BTreeMap::from([(INIT.to_owned(), process)]),
            paused: false,
            leaving: matches!(self.phase, Phase::Deleting | Phase::Deleted),
            cgroup: sandbox.map(|sandbox| sandbox.pod.cgroup.clone()),
        });
    }

    /// `None` if it failed or was given up; everything has been undone then.
    async fn create(
        &mut self,
        inbox: &mut mpsc::Receiver<Command>,
        created: Reply<u32>,
    ) -> Option<Sandbox> {
        let made = make_run_dir(
            &self.request.pve,
            &self.request.config,
            &self.env.namespace,
            &self.request.id,
            &self.request.bundle,
        );
        let dir = match made.await {
            Ok(dir) => dir,
            Err(error) => {
                self.phase = Phase::Deleted;
                self.publish_view(None);
                answer(created, Err(error));
                return None;
            }
        };
        let mut record = self.env.record(self.request.bundle.clone());
        let mut given_up = None;
        let result = {
            let building = build(&self.env, &self.request, &dir, &mut record);
            tokio::pin!(building);
            loop {
                tokio::select! {
                    biased;
                    result = &mut building => break result,
                    Some(command) = inbox.recv() => match command {
                        Command::Delete { exec_id, reply } if exec_id == INIT => {
                            given_up = Some(reply);
                            break Err(Error::Cancelled { id: self.request.id.clone() });
                        }
                        command => refuse(command, || self.precondition("is not created yet")),
                    },
                }
            }
        };
        let error = match result {
            Ok(sandbox) => {
                self.created(&sandbox);
                answer(created, Ok(pid(&sandbox)));
                return Some(sandbox);
            }
            Err(error) => error,
        };
        let undone = self.tear_down(&dir, &record).await;
        self.phase = Phase::Deleted;
        self.publish_view(None);
        answer(created, Err(error.and_cleanup(undone)));
        if let Some(reply) = given_up {
            answer(reply, Ok(Ended { pid: 0, exit: killed() }));
        }
        None
    }

    fn created(&mut self, sandbox: &Sandbox) {
        // The only move out of Creating besides failure, which did not happen.
        let _ = self.phase.advance(Phase::Created);
        self.env.events.publish(Event::Create {
            container_id: self.request.id.clone(),
            bundle: self.request.bundle.to_string_lossy().into_owned(),
            rootfs: self.request.rootfs.clone(),
            stdin: self.request.stdio.stdin.clone(),
            stdout: self.request.stdio.stdout.clone(),
            stderr: self.request.stdio.stderr.clone(),
            terminal: false,
            pid: pid(sandbox),
        });
        self.publish_view(Some(sandbox));
    }

    async fn command(
        &mut self,
        sandbox: &mut Sandbox,
        command: Command,
        inbox: &mut mpsc::Receiver<Command>,
    ) {
        match command {
            Command::Start { exec_id, reply } if exec_id == INIT => {
                let result = self.start(sandbox, inbox).await;
                self.publish_view(Some(sandbox));
                answer(reply, result);
            }
            Command::Kill { exec_id, signal, all: _, reply } if exec_id == INIT => {
                answer(reply, self.kill(&sandbox.pod, signal));
            }
            Command::CloseIo { exec_id, reply } if exec_id == INIT => {
                sandbox.stdio.close_stdin();
                answer(reply, Ok(()));
            }
            Command::Update { resources, reply } => {
                answer(reply, self.update(&sandbox.pod, &sandbox.plan, &resources).await);
            }
            command => refuse(command, || {
                Error::Unimplemented("a pod sandbox only holds the pod's namespaces")
            }),
        }
    }

    /// The holder is the only process there is.
    fn kill(&self, pod: &Pod, signal: i32) -> Result<()> {
        if self.phase.is_alive() {
            signal_one(pod.holder.pidfd(), signal)
        } else {
            Err(Error::Finished)
        }
    }

    async fn start(
        &mut self,
        sandbox: &mut Sandbox,
        inbox: &mut mpsc::Receiver<Command>,
    ) -> Result<u32> {
        self.advance(Phase::Starting)?;
        let Some(waiting) = sandbox.waiting.take() else {
            return Err(self.precondition("has no holder that waits for its start"));
        };
        let id = pid(sandbox);
        let started = {
            let Sandbox { pod, plan, .. } = &*sandbox;
            let starting = async {
                waiting.go().await.map_err(pod::Error::from)?;
                let state = state(plan, &self.request, "running", Some(pod.holder.pid));
                hooks::run("poststart", &plan.hooks.poststart, &state).await?;
                Ok::<_, Error>(())
            };
            let ended = pod.holder.ended();
            tokio::pin!(starting, ended);
            loop {
                tokio::select! {
                    biased;
                    result = &mut starting => break result,
                    // A hook may take any time, and only matters to a sandbox that lives.
                    _ = &mut ended => {
                        break Err(self.precondition("has ended while it was being started"));
                    }
                    Some(command) = inbox.recv() => match command {
                        Command::Kill { exec_id, signal, all: _, reply } if exec_id == INIT => {
                            answer(reply, self.kill(pod, signal));
                        }
                        command => refuse(command, || self.precondition("is being started")),
                    },
                }
            }
        };
        if let Err(error) = started {
            // A delete may follow at once, and must find it ended.
            let _ = signal_one(sandbox.pod.holder.pidfd(), libc::SIGKILL);
            let exit = sandbox.pod.holder.ended().await;
            self.exited(sandbox, exit);
            return Err(error);
        }
        self.advance(Phase::Running)?;
        self.env.events.publish(Event::Start { container_id: self.request.id.clone(), pid: id });
        Ok(id)
    }

    async fn update(&self, pod: &Pod, plan: &Plan, resources: &[u8]) -> Result<()> {
        if !self.phase.is_alive() {
            return Err(Error::Finished);
        }
        // Its process never opens a device.
        let oci::Update { resources, .. } = oci::update(resources, plan, &self.env.host)?;
        let cgroup = pod.cgroup.clone();
        blocking(move || {
            cgroup.check_usage(&resources)?;
            Ok(cgroup.apply(&resources, false)?)
        })
        .await
    }

    fn exited(&mut self, sandbox: &mut Sandbox, exit: Exit) {
        if self.phase.is_alive() {
            let _ = self.phase.advance(Phase::Stopped);
        }
        sandbox.exit = Some(exit);
        self.env.events.publish(Event::Exit {
            container_id: self.request.id.clone(),
            id: INIT.to_owned(),
            pid: pid(sandbox),
            exit_status: exit.status.0,
            exited_at: exit.at,
        });
        // Readers see the end of the output only now.
        sandbox.stdio.finish();
        self.publish_view(Some(sandbox));
    }

    async fn delete(&mut self, sandbox: &mut Sandbox) -> Result<Ended> {
        if matches!(self.phase, Phase::Starting | Phase::Running) {
            return Err(self.precondition("is running"));
        }
        self.advance(Phase::Deleting)?;
        self.publish_view(Some(sandbox));
        if let Err(error) = self.tear_down(&sandbox.pod.dir, &sandbox.pod.record).await {
            log::error!(container = self.id(); "delete: {}", sentence(&error));
            let _ = self.phase.advance(Phase::Stopped);
            self.publish_view(Some(sandbox));
            return Err(error);
        }
        let _ = self.phase.advance(Phase::Deleted);
        let exit = *sandbox.exit.get_or_insert_with(killed);
        let ended = Ended { pid: pid(sandbox), exit };
        self.env.events.publish(Event::Delete {
            container_id: self.request.id.clone(),
            id: INIT.to_owned(),
            pid: ended.pid,
            exit_status: exit.status.0,
            exited_at: exit.at,
        });
        self.publish_view(Some(sandbox));
        Ok(ended)
    }

    async fn tear_down(&self, dir: &RunDir, record: &Record) -> Result<()> {
        let limit = self.request.config.proxmox.task_timeout;
        teardown::teardown(&self.request.pve, dir, record, self.id(), limit).await
    }
}

async fn build(
    env: &Environment,
    request: &CreateRequest,
    dir: &RunDir,
    record: &mut Record,
) -> Result<Sandbox> {
    if request.stdio.terminal {
        return Err(Error::Argument {
            field: "terminal",
            reason: "a pod sandbox executes no program that could use one".to_owned(),
        });
    }
    let bundle = request.bundle.clone();
    let programs = create::programs(request);
    let plan = blocking(move || Ok(oci::load(&bundle, false, &programs)?)).await?;
    for warning in &plan.warnings {
        log::warn!(container = request.id.as_str(); "{warning}");
    }
    for (field, hooks) in [
        ("hooks.createContainer", &plan.hooks.create_container),
        ("hooks.startContainer", &plan.hooks.start_container),
    ] {
        if !hooks.is_empty() {
            return Err(Error::Argument {
                field,
                reason: "a pod sandbox has no root file system to run them in".to_owned(),
            });
        }
    }
    if plan.namespaces.time != Namespace::Host {
        return Err(Error::Argument {
            field: "linux.namespaces",
            reason: "a pod sandbox cannot hold a time namespace".to_owned(),
        });
    }
    let context = env.stdio_context(&request.id, None, &request.bundle);
    let mut stdio = Stdio::open(&request.stdio, &context).await?;
    // Nothing will ever be written; what is held until the exit is enough for a reader.
    drop(stdio.child_fds());
    let sandbox = pod::Plan::of_pause_container(&plan, &env.namespace, &request.id);
    let (mut pod, waiting) = pod::create(&env.init, dir, record, &sandbox).await?;
    if let Some(hooks) = create::poststop(&plan) {
        record.poststop = Some(hooks.clone());
        pod.record.poststop = Some(hooks);
        let (dir, record) = (dir.clone(), record.clone());
        blocking(move || Ok(dir.save(&record)?)).await?;
    }
    let state = state(&plan, request, "creating", Some(pod.holder.pid));
    hooks::run("prestart", &plan.hooks.prestart, &state).await?;
    hooks::run("createRuntime", &plan.hooks.create_runtime, &state).await?;
    Ok(Sandbox { pod, plan, waiting: Some(waiting), stdio, exit: None })
}

fn state<'a>(
    plan: &'a Plan,
    request: &'a CreateRequest,
    status: &'a str,
    pid: Option<i32>,
) -> hooks::State<'a> {
    hooks::State {
        oci_version: &plan.oci_version,
        id: &request.id,
        status,
        pid,
        bundle: &request.bundle,
        annotations: &plan.annotations,
    }
}

fn pid(sandbox: &Sandbox) -> u32 {
    sandbox.pod.holder.pid.unsigned_abs()
}

/// Of a sandbox that was never started: its delete has ended it.
fn killed() -> Exit {
    Exit { status: ExitStatus(128 + libc::SIGKILL.unsigned_abs()), at: SystemTime::now() }
}

/// Answers a command that can't be carried out; one for an exec finds none.
fn refuse(command: Command, error: impl Fn() -> Error) {
    match command {
        Command::Start { reply, .. } => answer(reply, Err(error())),
        Command::Exec { reply, .. }
        | Command::Kill { reply, .. }
        | Command::CloseIo { reply, .. }
        | Command::Resize { reply, .. }
        | Command::Pause { reply }
        | Command::Resume { reply }
        | Command::Update { reply, .. } => answer(reply, Err(error())),
        Command::Delete { reply, .. } => answer(reply, Err(error())),
    }
}
