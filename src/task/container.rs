//! The actor that owns one container.
//!
//! Every side effect on the container happens here or in a job that the actor started; a Task call
//! only sends a [`Command`] and awaits the answer, so that it may be dropped at any moment. The
//! actor never waits for anything but its inbox and its jobs, so a slow start does not delay a
//! kill. What can be answered without the actor is in the [`View`].

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::libc;
use proxmox_shim_init::protocol::{ExecSetup, Process as Program, VERSION};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::events::Event;
use crate::lxc::device_access::DeviceAccess;
use crate::lxc::exit::{self, Exit};
use crate::lxc::{device_control, exec, init};
use crate::oci::{self, plan::Resources};
use crate::sys;
use crate::sys::pidfd::{self, ExitStatus};
use crate::task::blocking;
use crate::task::create::{self, CreateRequest, RunningCt};
use crate::task::error::{Error, Result, sentence};
use crate::task::phase::Phase;
use crate::task::registry::Registration;
use crate::task::stdio::{Stdio, StdioRequest};
use crate::task::view::{INIT, ProcessView, View};
use crate::task::{Environment, hooks, seccomp_agent, teardown, user_namespace};

/// How many calls may queue for one container; more wait for their turn.
pub(super) const INBOX: usize = 64;
/// Output that a grandchild keeps open is waited for no longer, as with runc's shim.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) type Reply<T> = oneshot::Sender<Result<T>>;

/// What the actor can be asked to do. `exec_id` is [`INIT`] for the init process.
#[derive(Debug)]
pub enum Command {
    Start { exec_id: String, reply: Reply<u32> },
    Exec { exec_id: String, stdio: StdioRequest, spec: Vec<u8>, reply: Reply<()> },
    Kill { exec_id: String, signal: i32, all: bool, reply: Reply<()> },
    CloseIo { exec_id: String, reply: Reply<()> },
    Resize { exec_id: String, width: u32, height: u32, reply: Reply<()> },
    Pause { reply: Reply<()> },
    Resume { reply: Reply<()> },
    Update { resources: Vec<u8>, reply: Reply<()> },
    Delete { exec_id: String, reply: Reply<Ended> },
}

/// A process that has been deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub pid: u32,
    pub exit: Exit,
}

/// How the rest of the shim reaches a container.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    pub view: watch::Receiver<View>,
    pub bundle: PathBuf,
}

impl Handle {
    /// Of an actor that listens at the other ends.
    #[must_use]
    pub(super) fn new(
        commands: mpsc::Sender<Command>,
        view: watch::Receiver<View>,
        bundle: PathBuf,
    ) -> Self {
        Self { commands, view, bundle }
    }

    /// Of a container without an actor.
    #[cfg(test)]
    pub(crate) fn for_test(view: watch::Receiver<View>) -> Self {
        Self { commands: mpsc::channel(1).0, view, bundle: PathBuf::new() }
    }

    /// Has the actor carry out a command and awaits its answer.
    ///
    /// # Errors
    /// The command's own, or [`Error::Finished`] if the container was deleted meanwhile.
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::Finished)?;
        answer.await.map_err(|_| Error::Finished)?
    }
}

/// Starts the actor, which begins to create the container at once. The answer is the host's pid of
/// the container's init.
pub fn spawn(
    env: Arc<Environment>,
    request: CreateRequest,
    registration: Registration,
) -> (Handle, oneshot::Receiver<Result<u32>>) {
    let (commands, inbox) = mpsc::channel(INBOX);
    let (view, viewer) = watch::channel(View::default());
    let (created, answer) = oneshot::channel();
    let handle = Handle { commands, view: viewer, bundle: request.bundle.clone() };
    let actor = Actor {
        env,
        id: request.id.clone(),
        cancel: CancellationToken::new(),
        request: Arc::new(request),
        ct: None,
        processes: BTreeMap::new(),
        paused: false,
        freezing: false,
        killed: false,
        oom_kills: 0,
        jobs: JoinSet::new(),
        view,
        given_up: Vec::new(),
        registration: Some(registration),
    };
    tokio::spawn(actor.run(inbox, created));
    (handle, answer)
}

/// The init process or an exec.
struct Process {
    phase: Phase,
    request: StdioRequest,
    pid: u32,
    /// Once it exists.
    pidfd: Option<Arc<AsyncFd<OwnedFd>>>,
    stdio: Option<Stdio>,
    /// `CloseIO` may come while the streams are being opened.
    stdin_closed: bool,
    /// `(width, height)` of a `ResizePty` that came before the streams: clients send it before the start.
    size: Option<(u32, u32)>,
    /// The init process before its start.
    session: Option<init::Session>,
    /// An exec before its start.
    program: Option<Program>,
    /// Known before [`Self::exit`], which waits for the output.
    ended: Option<Exit>,
    exit: Option<Exit>,
}

/// What a job reports when it has ended.
enum Done {
    Created { result: Result<Box<create::Created>>, reply: Reply<u32> },
    Started { result: Result<()>, reply: Reply<u32> },
    ExecStarted { exec_id: String, result: Result<StartedExec>, reply: Reply<u32> },
    Ended { exec_id: String, exit: Exit, oom_kills: u64 },
    Drained { exec_id: String, exit: Exit },
    Oom { kills: u64 },
    OomWatchEnded,
    Paused { result: Result<()>, freeze: bool, reply: Reply<()> },
    Updated { result: Result<()>, reply: Reply<()> },
    Deleted { result: Result<()>, reply: Reply<Ended> },
    Nothing,
}

/// An exec whose program has been executed.
struct StartedExec {
    pid: u32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    stdio: Stdio,
}

struct Actor {
    env: Arc<Environment>,
    id: String,
    request: Arc<CreateRequest>,
    /// Ends a create that nobody waits for any more.
    cancel: CancellationToken,
    ct: Option<Arc<RunningCt>>,
    processes: BTreeMap<String, Process>,
    paused: bool,
    /// A pause or resume is under way.
    freezing: bool,
    /// The init process was sent SIGKILL.
    killed: bool,
    /// OOM kills that were published.
    oom_kills: u64,
    jobs: JoinSet<Done>,
    view: watch::Sender<View>,
    /// Deletes that wait for one that is under way, or for the end of the creation.
    given_up: Vec<Reply<Ended>>,
    /// Given back before the last answer: who has it may use the id again.
    registration: Option<Registration>,
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, created: Reply<u32>) {
        self.processes
            .insert(INIT.to_owned(), Process::new(Phase::Creating, self.request.stdio.clone()));
        self.publish_view();
        let creating = create::create(self.env.clone(), self.request.clone(), self.cancel.clone());
        self.job(
            async move { Done::Created { result: creating.await.map(Box::new), reply: created } },
        );
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.command(command),
                    // The service has forgotten the container.
                    None => break,
                },
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.done(done),
                    Err(error) => log::error!(container = self.id.as_str(); "a job ended: {error}"),
                },
            }
            if self.phase(INIT) == Some(Phase::Deleted) {
                break;
            }
        }
        // What is still queued is answered by the closed channel.
    }

    fn job(&mut self, work: impl Future<Output = Done> + Send + 'static) {
        self.jobs.spawn(work);
    }

    fn phase(&self, exec_id: &str) -> Option<Phase> {
        self.processes.get(exec_id).map(|process| process.phase)
    }

    fn process(&mut self, exec_id: &str) -> Result<&mut Process> {
        self.processes
            .get_mut(exec_id)
            .ok_or_else(|| Error::ExecNotFound { id: self.id.clone(), exec_id: exec_id.to_owned() })
    }

    fn advance(&mut self, exec_id: &str, to: Phase) -> Result<()> {
        let id = self.id.clone();
        self.process(exec_id)?.phase.advance(to).map_err(|source| Error::Phase { id, source })
    }

    /// The CT, if the init process runs or waits for its start.
    fn live(&self) -> Result<Arc<RunningCt>> {
        match (&self.ct, self.phase(INIT)) {
            (Some(ct), Some(Phase::Created | Phase::Starting | Phase::Running)) => Ok(ct.clone()),
            (_, Some(Phase::Stopped | Phase::Deleting | Phase::Deleted)) => Err(Error::Finished),
            _ => Err(self.precondition("is not created yet")),
        }
    }

    fn precondition(&self, reason: &'static str) -> Error {
        Error::Precondition { id: self.id.clone(), reason }
    }

    fn event(&self, event: Event) {
        self.env.events.publish(event);
    }

    fn publish_view(&self) {
        self.view.send_modify(|view| {
            view.paused = self.paused;
            view.leaving = self.cancel.is_cancelled()
                || matches!(self.phase(INIT), Some(Phase::Deleting | Phase::Deleted));
            view.cgroup = self.ct.as_ref().map(|ct| ct.cgroup.clone());
            view.processes =
                self.processes.iter().map(|(id, process)| (id.clone(), process.view())).collect();
        });
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start { exec_id, reply } if exec_id == INIT => self.start(reply),
            Command::Start { exec_id, reply } => self.start_exec(exec_id, reply),
            Command::Exec { exec_id, stdio, spec, reply } => {
                answer(reply, self.add_exec(exec_id, stdio, &spec));
            }
            Command::Kill { exec_id, signal, all, reply } => {
                self.kill(&exec_id, signal, all, reply)
            }
            Command::CloseIo { exec_id, reply } => answer(reply, self.close_io(&exec_id)),
            Command::Resize { exec_id, width, height, reply } => {
                answer(reply, self.resize(&exec_id, width, height));
            }
            Command::Pause { reply } => self.freeze(true, reply),
            Command::Resume { reply } => self.freeze(false, reply),
            Command::Update { resources, reply } => self.update(&resources, reply),
            Command::Delete { exec_id, reply } if exec_id == INIT => self.delete(reply),
            Command::Delete { exec_id, reply } => answer(reply, self.delete_exec(&exec_id)),
        }
        self.publish_view();
    }

    fn start(&mut self, reply: Reply<u32>) {
        if let Err(error) = self.advance(INIT, Phase::Starting) {
            return answer(reply, Err(error));
        }
        let (Some(session), Ok(ct)) =
            (self.processes.get_mut(INIT).and_then(|p| p.session.take()), self.live())
        else {
            return answer(reply, Err(self.precondition("has no init that waits for its start")));
        };
        let mut view = self.view.subscribe();
        self.job(async move {
            let result = async {
                session.go().await?;
                execute(session, &ct, ct.pid, "created").await?;
                hooks::run("poststart", &ct.plan.hooks.poststart, &ct.state("running")).await?;
                Ok(())
            }
            .await;
            if let Err(error) = &result {
                // After a refusal it ends by itself, with a status of its own.
                if !matches!(error, Error::Init(init::Error::Refused(_))) {
                    let _ = pidfd::send_signal(ct.pidfd.as_fd(), libc::SIGKILL);
                }
                // A delete may follow this answer at once, and must find it ended.
                let ended = view.wait_for(|v| v.process(INIT).is_none_or(|p| p.exit.is_some()));
                let _ = tokio::time::timeout(DRAIN_TIMEOUT, ended).await;
            }
            Done::Started { result, reply }
        });
    }

    fn add_exec(&mut self, exec_id: String, stdio: StdioRequest, spec: &[u8]) -> Result<()> {
        let ct = self.live()?;
        if self.paused {
            return Err(self.precondition("is paused"));
        }
        if self.processes.contains_key(&exec_id) {
            return Err(Error::Exists { what: "exec", id: exec_id });
        }
        let oci::Exec { process: program, warnings } =
            oci::exec_process(spec, &ct.plan.process, &ct.host)?;
        for warning in warnings {
            log::warn!(container = self.id.as_str(), exec = exec_id.as_str(); "{warning}");
        }
        let mut process = Process::new(Phase::Created, stdio);
        process.program = Some(program);
        self.processes.insert(exec_id.clone(), process);
        self.event(Event::ExecAdded { container_id: self.id.clone(), exec_id });
        Ok(())
    }

    fn start_exec(&mut self, exec_id: String, reply: Reply<u32>) {
        let begin = (|| {
            let ct = self.live()?;
            if self.phase(INIT) == Some(Phase::Created) {
                return Err(self.precondition("has not been started"));
            }
            if self.paused {
                return Err(self.precondition("is paused"));
            }
            if self.freezing {
                // It would stand still before it could report.
                return Err(self.precondition("is being paused or resumed"));
            }
            self.advance(&exec_id, Phase::Starting)?;
            let process = self.process(&exec_id)?;
            let program = process.program.take();
            Ok((ct, process.request.clone(), process.size, program))
        })();
        let (ct, request, size, program) = match begin {
            Ok((ct, request, size, Some(program))) => (ct, request, size, program),
            Ok(_) => return answer(reply, Err(self.precondition("has no such exec to start"))),
            Err(error) => return answer(reply, Err(error)),
        };
        let env = self.env.clone();
        let id = self.id.clone();
        self.job(async move {
            let result = run_exec(&env, &ct, &id, &exec_id, request, size, program).await;
            Done::ExecStarted { exec_id, result, reply }
        });
    }

    fn kill(&mut self, exec_id: &str, signal: i32, all: bool, reply: Reply<()>) {
        let begin = (|| {
            let ct = self.live()?;
            let process = self.process(exec_id)?;
            let alive = process.phase.is_alive();
            match (&process.pidfd, alive) {
                (Some(pidfd), true) => Ok((ct, pidfd.clone())),
                (_, false) => Err(Error::Finished),
                (None, true) => Err(self.precondition("has not started that process")),
            }
        })();
        let (ct, pidfd) = match begin {
            Ok(begun) => begun,
            Err(error) => return answer(reply, Err(error)),
        };
        if all && exec_id == INIT {
            self.job(async move {
                let result = signal_all(&ct, signal).await;
                answer(reply, result);
                Done::Nothing
            });
            return;
        }
        answer(reply, signal_one(&pidfd, signal));
        if exec_id == INIT && signal == libc::SIGKILL {
            self.killed = true;
            // One that is just being frozen is thawed when that is done: the two would fight.
            if self.paused && !self.freezing {
                self.thaw_killed(ct);
            }
        }
    }

    /// The freezer of cgroup v1 keeps a killed process from dying.
    fn thaw_killed(&mut self, ct: Arc<RunningCt>) {
        self.job(async move {
            if let Err(error) = ct.cgroup.thaw().await {
                log::warn!("thaw after a kill: {error}");
            }
            Done::Nothing
        });
    }

    fn close_io(&mut self, exec_id: &str) -> Result<()> {
        let process = self.process(exec_id)?;
        process.stdin_closed = true;
        if let Some(stdio) = &mut process.stdio {
            stdio.close_stdin();
        }
        Ok(())
    }

    fn resize(&mut self, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let process = self.process(exec_id)?;
        if !process.phase.is_alive() {
            return Err(Error::Finished);
        }
        match &mut process.stdio {
            Some(stdio) => Ok(stdio.resize(width, height)?),
            None => {
                process.size = Some((width, height));
                Ok(())
            }
        }
    }

    fn freeze(&mut self, freeze: bool, reply: Reply<()>) {
        let begin = self.live().and_then(|ct| match (self.phase(INIT), self.paused, freeze) {
            _ if self.freezing => Err(self.precondition("is being paused or resumed")),
            (Some(Phase::Running), false, true) | (_, true, false) => Ok(ct),
            (_, true, true) => Err(self.precondition("is paused already")),
            (_, false, true) => Err(self.precondition("is not running")),
            (_, false, false) => Err(self.precondition("is not paused")),
        });
        match begin {
            Err(error) => answer(reply, Err(error)),
            Ok(ct) => {
                self.freezing = true;
                self.job(async move {
                    let result =
                        if freeze { ct.cgroup.freeze().await } else { ct.cgroup.thaw().await };
                    Done::Paused { result: result.map_err(Error::from), freeze, reply }
                });
            }
        }
    }

    fn update(&mut self, resources: &[u8], reply: Reply<()>) {
        let begin = self.live().and_then(|ct| {
            let wanted = oci::update(resources, &ct.plan, &ct.host)?;
            Ok((ct, wanted))
        });
        match begin {
            Err(error) => answer(reply, Err(error)),
            Ok((ct, wanted)) => {
                self.job(async move { Done::Updated { result: update(&ct, wanted).await, reply } })
            }
        }
    }

    fn delete(&mut self, reply: Reply<Ended>) {
        match self.phase(INIT) {
            // The client gave up; it is answered when everything has been undone.
            Some(Phase::Creating) => {
                self.cancel.cancel();
                self.given_up.push(reply);
                return;
            }
            Some(Phase::Running | Phase::Starting) => {
                return answer(reply, Err(self.precondition("is running")));
            }
            // The first one's client has given up, but it goes on.
            Some(Phase::Deleting) => {
                self.given_up.push(reply);
                return;
            }
            _ => {}
        }
        if let Err(error) = self.advance(INIT, Phase::Deleting) {
            return answer(reply, Err(error));
        }
        let Some(ct) = self.ct.clone() else {
            return answer(reply, Err(self.precondition("has no CT")));
        };
        self.job(async move {
            let limit = ct.config.proxmox.task_timeout;
            let result = teardown::teardown(&ct.pve, &ct.dir, &ct.record, &ct.id, limit).await;
            Done::Deleted { result, reply }
        });
    }

    fn delete_exec(&mut self, exec_id: &str) -> Result<Ended> {
        let process = self.process(exec_id)?;
        let ended = match (process.phase, process.exit) {
            (Phase::Stopped, Some(exit)) => Ended { pid: process.pid, exit },
            // Never started: nothing ran, so nothing has a status.
            (Phase::Created, _) => {
                Ended { pid: 0, exit: Exit { status: ExitStatus(0), at: SystemTime::now() } }
            }
            _ => return Err(self.precondition("still runs that exec")),
        };
        self.processes.remove(exec_id);
        Ok(ended)
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Created { result: Ok(created), reply } => self.created(*created, reply),
            Done::Created { result: Err(error), reply } => {
                let _ = self.advance(INIT, Phase::Deleted);
                self.publish_view();
                self.registration = None;
                for reply in self.given_up.drain(..) {
                    answer(reply, Ok(killed()));
                }
                answer(reply, Err(error));
            }
            Done::Started { result, reply } => {
                let pid = self.processes.get(INIT).map_or(0, |process| process.pid);
                if result.is_ok() {
                    self.event(Event::Start { container_id: self.id.clone(), pid });
                    // Illegal only if it has ended meanwhile.
                    let _ = self.advance(INIT, Phase::Running);
                }
                self.publish_view();
                answer(reply, result.map(|()| pid));
            }
            Done::ExecStarted { exec_id, result, reply } => {
                let result = self.exec_started(&exec_id, result);
                self.publish_view();
                answer(reply, result);
            }
            Done::Ended { exec_id, exit, oom_kills } => {
                self.oom(oom_kills);
                if let Ok(process) = self.process(&exec_id) {
                    process.ended = Some(exit);
                }
                self.drain(exec_id, exit);
            }
            Done::Drained { exec_id, exit } => self.exited(&exec_id, exit),
            Done::Oom { kills } => {
                self.oom(kills);
                self.watch_oom();
            }
            Done::Paused { result, freeze, reply } => {
                self.freezing = false;
                // It may have ended meanwhile, and nothing of the kind may be told after its exit.
                let result = self.live().and_then(|ct| result.map(|()| ct)).map(|ct| {
                    self.paused = freeze;
                    let container_id = self.id.clone();
                    self.event(if freeze {
                        Event::Paused { container_id }
                    } else {
                        Event::Resumed { container_id }
                    });
                    if freeze && self.killed {
                        self.thaw_killed(ct);
                    }
                });
                self.publish_view();
                answer(reply, result);
            }
            Done::Updated { result, reply } => answer(reply, result),
            Done::Deleted { result, reply } => self.deleted(result, reply),
            Done::OomWatchEnded | Done::Nothing => {}
        }
    }

    fn created(&mut self, created: create::Created, reply: Reply<u32>) {
        let create::Created { ct, session, stdio } = created;
        let ct = Arc::new(ct);
        let pid = ct.pid.unsigned_abs();
        if let Some(process) = self.processes.get_mut(INIT) {
            process.pid = pid;
            process.pidfd = Some(ct.pidfd.clone());
            process.hold(stdio);
            process.session = Some(session);
            // The only move out of Creating besides failure, which did not happen.
            let _ = process.phase.advance(Phase::Created);
        }
        self.event(Event::Create {
            container_id: self.id.clone(),
            bundle: self.request.bundle.to_string_lossy().into_owned(),
            rootfs: self.request.rootfs.clone(),
            stdin: self.request.stdio.stdin.clone(),
            stdout: self.request.stdio.stdout.clone(),
            stderr: self.request.stdio.stderr.clone(),
            terminal: self.request.stdio.terminal,
            pid,
        });
        self.ct = Some(ct);
        self.watch_init();
        self.watch_oom();
        self.publish_view();
        answer(reply, Ok(pid));
        for reply in std::mem::take(&mut self.given_up) {
            self.delete(reply);
        }
    }

    fn watch_init(&mut self) {
        let Some(ct) = self.ct.clone() else { return };
        self.job(async move {
            let result = exit::of_init(&ct.pidfd, &ct.dir.exit(), ct.plan.may_reboot()).await;
            let oom_kills = ct.oom_kills_at_exit(result.as_ref().ok()).await;
            if ct.shares_pids() {
                // Without an own pid namespace nothing else ends what init left behind.
                if let Err(error) = signal_all(&ct, libc::SIGKILL).await {
                    log::warn!("kill what the container left behind: {}", sentence(&error));
                }
            }
            let exit = result.unwrap_or_else(|error| {
                // Neither the kernel nor the hook knows. 255 is containerd's own word for that.
                log::error!("the exit status of CT {} is lost: {error}", ct.vmid);
                Exit { status: ExitStatus(255), at: SystemTime::now() }
            });
            Done::Ended { exec_id: INIT.to_owned(), exit, oom_kills }
        });
    }

    fn watch_oom(&mut self) {
        let Some(ct) = self.ct.clone() else { return };
        self.job(async move {
            match ct.next_oom().await {
                Some(kills) => Done::Oom { kills },
                None => Done::OomWatchEnded,
            }
        });
    }

    fn oom(&mut self, kills: u64) {
        if kills > self.oom_kills {
            self.oom_kills = kills;
            self.event(Event::Oom { container_id: self.id.clone() });
        }
    }

    fn exec_started(&mut self, exec_id: &str, result: Result<StartedExec>) -> Result<u32> {
        let started = match result {
            Ok(started) => started,
            Err(error) => {
                self.fail_exec(exec_id);
                return Err(error);
            }
        };
        let StartedExec { pid, pidfd, stdio } = started;
        let process = self.process(exec_id)?;
        process.pid = pid;
        process.pidfd = Some(pidfd.clone());
        process.hold(stdio);
        self.advance(exec_id, Phase::Running)?;
        self.event(Event::ExecStarted {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            pid,
        });
        let exec_id = exec_id.to_owned();
        self.job(async move {
            let exit = reap(pidfd).await;
            Done::Ended { exec_id, exit, oom_kills: 0 }
        });
        Ok(pid)
    }

    /// An exec of which no process came into being: it can only be deleted.
    fn fail_exec(&mut self, exec_id: &str) {
        let _ = self.advance(exec_id, Phase::Stopped);
        if let Ok(process) = self.process(exec_id) {
            let status = ExitStatus(proxmox_shim_init::protocol::EXIT_NOT_EXECUTED.unsigned_abs());
            process.exit = Some(Exit { status, at: SystemTime::now() });
        }
    }

    /// Nobody may learn of the end before all output has been delivered.
    fn drain(&mut self, exec_id: String, exit: Exit) {
        let Ok(process) = self.process(&exec_id) else { return };
        let drained = process.stdio.as_mut().map(|stdio| stdio.drain(DRAIN_TIMEOUT));
        self.job(async move {
            if let Some(drained) = drained {
                drained.await;
            }
            Done::Drained { exec_id, exit }
        });
    }

    fn exited(&mut self, exec_id: &str, exit: Exit) {
        let Ok(process) = self.process(exec_id) else { return };
        if process.phase.is_alive() {
            let _ = process.phase.advance(Phase::Stopped);
        }
        process.exit = Some(exit);
        let pid = process.pid;
        if exec_id == INIT {
            self.paused = false;
        }
        self.event(Event::Exit {
            container_id: self.id.clone(),
            id: exec_id.to_owned(),
            pid,
            exit_status: exit.status.0,
            exited_at: exit.at,
        });
        // Only now do readers see the end of the output.
        if let Some(stdio) = self.processes.get_mut(exec_id).and_then(|p| p.stdio.as_mut()) {
            stdio.finish();
        }
        self.publish_view();
    }

    fn deleted(&mut self, result: Result<()>, reply: Reply<Ended>) {
        if let Err(error) = result {
            log::error!(container = self.id.as_str(); "delete: {}", sentence(&error));
            let _ = self.advance(INIT, Phase::Stopped);
            self.publish_view();
            for reply in std::mem::take(&mut self.given_up) {
                answer(reply, Err(self.precondition("could not be deleted; try again")));
            }
            return answer(reply, Err(error));
        }
        // Nobody reads their output any more, but somebody may wait for their exit.
        let draining: Vec<(String, Exit)> = self
            .processes
            .iter()
            .filter(|(id, process)| *id != INIT && process.exit.is_none())
            .filter_map(|(id, process)| Some((id.clone(), process.ended?)))
            .collect();
        for (exec_id, exit) in draining {
            self.exited(&exec_id, exit);
        }
        let _ = self.advance(INIT, Phase::Deleted);
        let mut ended = killed();
        if let Some(process) = self.processes.get_mut(INIT) {
            // For those who still wait: a task that was never started has ended with its delete.
            let exit = *process.exit.get_or_insert(ended.exit);
            ended = Ended { pid: process.pid, exit };
        }
        self.event(Event::Delete {
            container_id: self.id.clone(),
            id: INIT.to_owned(),
            pid: ended.pid,
            exit_status: ended.exit.status.0,
            exited_at: ended.exit.at,
        });
        self.publish_view();
        self.registration = None;
        for reply in self.given_up.drain(..) {
            answer(reply, Ok(ended));
        }
        answer(reply, Ok(ended));
    }
}

impl Process {
    fn new(phase: Phase, request: StdioRequest) -> Self {
        Self {
            phase,
            request,
            pid: 0,
            pidfd: None,
            stdio: None,
            stdin_closed: false,
            size: None,
            session: None,
            program: None,
            ended: None,
            exit: None,
        }
    }

    /// Keeps the open streams of the process.
    fn hold(&mut self, mut stdio: Stdio) {
        if self.stdin_closed {
            stdio.close_stdin();
        }
        if let Some((width, height)) = self.size
            && let Err(error) = stdio.resize(width, height)
        {
            log::warn!("{error}");
        }
        self.stdio = Some(stdio);
    }

    fn view(&self) -> ProcessView {
        ProcessView {
            phase: self.phase,
            pid: self.pid,
            stdio: self.request.clone(),
            exit: self.exit,
        }
    }
}

/// What a task that was killed before it was started is reported as.
fn killed() -> Ended {
    let status = ExitStatus(128 + libc::SIGKILL.unsigned_abs());
    Ended { pid: 0, exit: Exit { status, at: SystemTime::now() } }
}

/// The client may have gone; then nobody needs the answer.
pub(super) fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}

pub(crate) fn signal_one(pidfd: &AsyncFd<OwnedFd>, signal: i32) -> Result<()> {
    match pidfd::send_signal(pidfd.as_fd(), signal) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(Error::Finished),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Err(Error::Argument { field: "signal", reason: format!("{signal} is not a signal") })
        }
        Err(source) => Err(Error::Io { action: "send the signal", source }),
    }
}

/// Each process of the container gets the signal, those of execs too. PID 1 does so wherever it is:
/// in the host's cgroup namespace a privileged container can have moved itself out of its cgroup.
async fn signal_all(ct: &RunningCt, signal: i32) -> Result<()> {
    if signal == libc::SIGKILL {
        // With PID 1 all of its pid namespace ends. It may have ended already.
        let _ = pidfd::send_signal(ct.pidfd.as_fd(), signal);
        return Ok(ct.cgroup.kill_all().await?);
    }
    let cgroup = ct.cgroup.clone();
    let reached = blocking(move || Ok(cgroup.signal_all(signal)?)).await?;
    if !reached.contains(&ct.pid.unsigned_abs()) {
        let _ = pidfd::send_signal(ct.pidfd.as_fd(), signal);
    }
    Ok(())
}

/// Reaps a child of the shim, even if nobody waits for its status any more: the end of a pid
/// namespace's init is not told before all processes in it have been reaped.
async fn reap(pidfd: Arc<AsyncFd<OwnedFd>>) -> Exit {
    let lost = || Exit { status: ExitStatus(255), at: SystemTime::now() };
    let reaped = tokio::spawn(async move { exit::of_child(&pidfd).await }).await;
    match reaped {
        Ok(Ok(exit)) => exit,
        Ok(Err(error)) => {
            log::error!("the exit status of an exec is lost: {error}");
            lost()
        }
        // The runtime ends.
        Err(_) => lost(),
    }
}

/// The `oom_score_adj` of the container's own process if it is above the shim's, which an exec would
/// otherwise keep: containerd protects its shims, and the kernel would end the container rather than a
/// greedy exec. Raising the value needs no capability.
fn oom_score_adj(pid: i32) -> Option<i32> {
    let read = |process: &str| -> Option<i32> {
        let text = std::fs::read_to_string(format!("/proc/{process}/oom_score_adj")).ok()?;
        text.trim().parse().ok()
    };
    read(&pid.to_string()).filter(|score| read("self").is_some_and(|own| *score > own))
}

/// Starts an exec up to and including its `execve`.
async fn run_exec(
    env: &Environment,
    ct: &RunningCt,
    id: &str,
    exec_id: &str,
    request: StdioRequest,
    size: Option<(u32, u32)>,
    mut program: Program,
) -> Result<StartedExec> {
    let context = env.stdio_context(id, Some(exec_id), &ct.bundle);
    let mut stdio = Stdio::open(&request, &context).await?;
    // Set by init: it does not wait between opening the terminal and executing the program.
    if let (Some((width, height)), Some(terminal)) = (size, &mut program.terminal) {
        let bounded = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        (terminal.columns, terminal.rows) = (bounded(width), bounded(height));
    }
    let (cgroup, files, init) = {
        let (cgroup, pid) = (ct.cgroup.clone(), ct.pid);
        let init = ct.pidfd.get_ref().try_clone();
        let init = init.map_err(|source| Error::Io { action: "copy the pidfd of init", source })?;
        let inherits = program.oom_score_adj.is_none();
        let (kind, files, score) = blocking(move || {
            let score = if inherits { oom_score_adj(pid) } else { None };
            let (kind, files) = cgroup.exec_files(pid)?;
            Ok((kind, files, score))
        })
        .await?;
        program.oom_score_adj = program.oom_score_adj.or(score);
        (kind, files, init)
    };
    if let Some(user) = &ct.plan.user_namespace {
        stdio.give(user_namespace::host_uid(user, program.uid)?);
    }
    let setup = ExecSetup { version: VERSION, namespaces: ct.exec_namespaces, process: program };
    let entry = exec::Entry { init, cgroup, cgroup_files: files, stdio: stdio.child_fds() };
    let exec::Spawned { pid, pidfd, session } = exec::spawn(&env.init, &setup, entry).await?;
    let executed = async {
        if let Some(master) = session.ready().await? {
            stdio.attach_terminal(master)?;
        }
        execute(session, ct, pid, "running").await
    }
    .await;
    let pidfd = sys::watch(pidfd).map_err(|source| Error::Io { action: "watch the exec", source });
    let pidfd = Arc::new(pidfd?);
    match executed {
        Ok(()) => Ok(StartedExec { pid: pid.unsigned_abs(), pidfd, stdio }),
        Err(error) => {
            // It ends by itself.
            let _ = tokio::time::timeout(DRAIN_TIMEOUT, reap(pidfd)).await;
            Err(error)
        }
    }
}

/// The end of a start: a process (`pid` on the host) that is ready executes its program. `status` is
/// the container's, for the agent of its seccomp filter.
async fn execute(session: init::Session, ct: &RunningCt, pid: i32, status: &str) -> Result<()> {
    if let Some(agent) = &ct.plan.seccomp_agent {
        let listener = session.listener().await?;
        seccomp_agent::introduce(agent, listener, pid, ct.state(status)).await?;
        session.listening().await?;
    }
    Ok(session.executed().await?)
}

/// Devices first: they can be taken back, limits cannot.
async fn update(ct: &RunningCt, wanted: oci::Update) -> Result<()> {
    let changed = match wanted.device_rules {
        Some(rules) => {
            let (devices, version) = (ct.devices.clone(), (&ct.host.cgroups).into());
            let change = move || {
                let access =
                    DeviceAccess::of(&rules, version).map_err(device_control::Error::from)?;
                Ok(devices.change(&access)?)
            };
            Some(blocking(change).await?)
        }
        None => None,
    };
    let limited = limit(ct, wanted.resources).await;
    if let (Err(_), Some(changed)) = (&limited, changed) {
        let devices = ct.devices.clone();
        if let Err(error) = blocking(move || Ok(devices.take_back(&changed)?)).await {
            log::warn!("the former devices of CT {}: {}", ct.vmid, sentence(&error));
        }
    }
    limited
}

/// Proxmox first: it may refuse, and its own live change of the cgroup must not come last.
async fn limit(ct: &RunningCt, resources: Resources) -> Result<()> {
    let (cgroup, checked) = (ct.cgroup.clone(), resources.clone());
    blocking(move || Ok(cgroup.check_usage(&checked)?)).await?;
    let former = ct.show_limits(&resources).await?;
    let cgroup = ct.cgroup.clone();
    let applied = blocking(move || Ok(cgroup.apply(&resources, false)?)).await;
    if applied.is_err() {
        // Nobody shall read in Proxmox what does not hold.
        if let Err(error) = ct.show(&former).await {
            log::warn!("show the former limits of CT {}: {}", ct.vmid, sentence(&error));
        }
    }
    applied
}
