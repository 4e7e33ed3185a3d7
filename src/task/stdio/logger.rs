//! Logging programs: `binary://` and `binary-v2://`.
//!
//! The program reads the workload's output from its descriptors 3 and 4 and says on 5 that it is ready.
//! The workload's ends of the pipes go to the workload: nothing is copied.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use log::warn;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::uri::Program;
use super::{Context, Error, READ_LIMIT, until_read};
use crate::sys::command::pass_descriptors;
use crate::sys::limits::restore_descriptors_in;

/// How long it may take to become ready.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// From SIGTERM to SIGKILL: containerd's shim promises loggers ten seconds and allows twelve.
const GRACE: Duration = Duration::from_secs(12);
/// How long the workload's exit may wait for a logger that has read everything, and has its end of file.
/// A logger that goes on running is no reason to hide the exit: that of nerdctl waits for the exit itself.
const END_LIMIT: Duration = Duration::from_millis(100);

/// A running logger. It is told to end when this is dropped.
#[derive(Debug)]
pub(super) struct Logger {
    ended: watch::Receiver<bool>,
    /// The workload's ends of the pipes, which tell how much the logger has still to read.
    inputs: Vec<OwnedFd>,
    _end: oneshot::Sender<()>,
}

/// The ends of the pipes that are the workload's.
#[derive(Debug)]
pub(super) struct LoggerInput {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

impl Logger {
    /// Starts the program and waits until it is ready.
    pub(super) async fn start(
        program: &Program,
        context: &Context,
    ) -> Result<(Self, LoggerInput), Error> {
        let failed = |source| Error::StartLogger { program: program.path.clone(), source };
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| failed(errno.into()));
        let (from_stdout, stdout) = pipe()?;
        let (from_stderr, stderr) = pipe()?;
        let (ready, confirm) = pipe()?;
        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;

        let mut command = Command::new(&program.path);
        command
            .args(&program.args)
            // Nothing else, as with containerd's shim. An exec's logger gets the exec's id.
            .env_clear()
            .env("CONTAINER_ID", context.exec_id.as_ref().unwrap_or(&context.container_id))
            .env("CONTAINER_NAMESPACE", &context.namespace)
            .current_dir(&context.bundle)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        pass_descriptors(&mut command, vec![from_stdout, from_stderr, confirm]).map_err(failed)?;
        restore_descriptors_in(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        // Its copies of the logger's ends: with them open there would be no end of file on `ready`.
        drop(command);

        let mut byte = [0];
        let problem = match timeout(READY_LIMIT, ready.read(&mut byte)).await {
            Ok(Ok(0)) if program.must_confirm => {
                let status = timeout(Duration::from_secs(1), child.wait()).await;
                Some(match status {
                    Ok(Ok(status)) => format!("it ended first ({})", describe(status)),
                    _ => "it closed descriptor 5 without a word".to_owned(),
                })
            }
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("nothing on descriptor 5 within {} s", READY_LIMIT.as_secs())),
        };
        if let Some(reason) = problem {
            // It may have been reaped just now, which is as good.
            let _ = child.kill().await;
            return Err(Error::LoggerNotReady { program: program.path.clone(), reason });
        }

        // Too many open files: as if it had read everything.
        let inputs = [&stdout, &stderr].into_iter().flat_map(OwnedFd::try_clone).collect();
        let (ended_sender, ended) = watch::channel(false);
        let (end, asked_to_end) = oneshot::channel();
        let name = program.path.display().to_string();
        tokio::spawn(async move {
            supervise(child, asked_to_end, &name).await;
            let _ = ended_sender.send(true);
        });
        Ok((Self { ended, inputs, _end: end }, LoggerInput { stdout, stderr }))
    }

    /// Waits until it has read everything or has ended, within bounds; the workload must have ended.
    pub(super) fn done(
        &mut self,
        bound: Duration,
    ) -> impl Future<Output = ()> + Send + 'static + use<> {
        let (mut ended, inputs) = (self.ended.clone(), std::mem::take(&mut self.inputs));
        async move {
            let read = async {
                for input in &inputs {
                    until_read(input).await;
                }
            };
            tokio::select! {
                _ = timeout(bound.min(READ_LIMIT), read) => {}
                // An error means that the supervisor is gone, and the logger with it.
                _ = ended.wait_for(|ended| *ended) => {}
            }
            // Its end of file.
            drop(inputs);
            let _ = timeout(END_LIMIT, ended.wait_for(|ended| *ended)).await;
        }
    }
}

/// Reaps the logger; once asked to end it, terminates and at last kills it.
async fn supervise(mut child: Child, asked_to_end: oneshot::Receiver<()>, name: &str) {
    tokio::select! {
        status = child.wait() => return report(status, name),
        // Also when the sender is dropped.
        _ = asked_to_end => {}
    }
    terminate(&child);
    if let Ok(status) = timeout(GRACE, child.wait()).await {
        return report(status, name);
    }
    warn!(logger = name; "a logging program did not end within {} s after SIGTERM and is killed", GRACE.as_secs());
    let _ = child.kill().await;
}

fn terminate(child: &Child) {
    // The id is this process's until it is reaped, and afterwards there is none.
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}

fn report(status: std::io::Result<ExitStatus>, name: &str) {
    if let Ok(status) = status
        && !status.success()
        && status.signal() != Some(Signal::SIGTERM as i32)
    {
        warn!(logger = name; "a logging program failed: {}", describe(status));
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => "unknown status".to_owned(),
    }
}
