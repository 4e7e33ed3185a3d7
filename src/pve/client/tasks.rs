//! `/nodes/{node}/tasks`: what Proxmox does in the background.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::{Client, Payload, Reply, query, segment};
use crate::config::Vmid;
use crate::pve::error::{self, Call, Error};
use crate::pve::types::{Task, TaskStatus, list, log_lines};
use crate::pve::upid::Upid;

/// Lines of a failed task's log that its error carries.
const LOG_LINES: u64 = 10;
/// How long a task that is being stopped may take for it. Proxmox's own answer takes 1 s.
const STOPPING: Duration = Duration::from_secs(5);

/// Which tasks of the node to list; with the defaults, the newest of all that the token may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskFilter<'a> {
    /// Only those about this guest.
    pub vmid: Option<Vmid>,
    /// Only those of this type, such as `vzstart`.
    pub kind: Option<&'a str>,
    /// Only those started at this time or later, in seconds since the epoch.
    pub since: Option<u64>,
    /// Only those that are still at work.
    pub active: bool,
    /// At most so many.
    pub limit: u32,
}

impl Default for TaskFilter<'_> {
    fn default() -> Self {
        TaskFilter { vmid: None, kind: None, since: None, active: false, limit: 50 }
    }
}

impl Client {
    /// The node's tasks, the newest first.
    pub async fn tasks(&self, filter: &TaskFilter<'_>) -> Result<Vec<Task>, Error> {
        let (vmid, since) =
            (filter.vmid.map(|v| v.to_string()), filter.since.map(|s| s.to_string()));
        let limit = filter.limit.to_string();
        let mut fields = vec![("source", if filter.active { "active" } else { "all" })];
        fields.extend(vmid.as_deref().map(|vmid| ("vmid", vmid)));
        fields.extend(filter.kind.map(|kind| ("typefilter", kind)));
        fields.extend(since.as_deref().map(|since| ("since", since)));
        fields.push(("limit", &limit));
        let path = self.node_path(&format!("tasks{}", query(&fields)));
        let call = self.call("GET", path, filter.vmid);
        let data = self.get(&call).await?;
        list(&data, Task::from_json).ok_or_else(|| self.unlike(call, "no list in the answer"))
    }

    /// `GET …/tasks/{upid}/status`. 7 to 10 ms on a real node.
    pub async fn task_status(&self, upid: &Upid) -> Result<TaskStatus, Error> {
        let call = task_call("GET", upid, "/status");
        let data = self.get(&call).await?;
        TaskStatus::from_json(&data).ok_or_else(|| self.unlike(call, "no task state in the answer"))
    }

    /// At most `limit` lines of a task's log from line `start` on, counted from 0.
    pub async fn task_log(
        &self,
        upid: &Upid,
        start: u64,
        limit: u64,
    ) -> Result<Vec<String>, Error> {
        Ok(log_lines(&self.log_page(upid, start, limit).await?.data))
    }

    async fn log_page(&self, upid: &Upid, start: u64, limit: u64) -> Result<Reply, Error> {
        let (start, limit) = (start.to_string(), limit.to_string());
        let below = format!("/log{}", query(&[("start", &start), ("limit", &limit)]));
        self.send(&task_call("GET", upid, &below), &Payload::Nothing).await
    }

    /// The last lines of a task's log.
    async fn log_end(&self, upid: &Upid, lines: u64) -> Result<Vec<String>, Error> {
        let first = self.log_page(upid, 0, lines).await?;
        match first.total {
            Some(total) if total > lines => self.task_log(upid, total - lines, lines).await,
            _ => Ok(log_lines(&first.data)),
        }
    }

    /// Interrupts a task; nothing happens to one that has ended. It is still there for a moment:
    /// [`Client::wait`] tells when it is gone.
    pub async fn stop_task(&self, upid: &Upid) -> Result<(), Error> {
        self.send(&task_call("DELETE", upid, ""), &Payload::Nothing).await.map(drop)
    }

    /// Waits for the end of a task, at most until `deadline`.
    ///
    /// Asks often at first, then ever more rarely: the pause is an eighth of the time waited so
    /// far, from 4 to 400 ms. A connection that breaks meanwhile does not end the wait. The error
    /// of a failed task is its meaning, or [`Error::TaskFailed`] with the last lines of its log.
    pub async fn wait(&self, upid: &Upid, deadline: Instant) -> Result<(), Error> {
        let begun = Instant::now();
        let mut last = None;
        loop {
            let pause = pause(begun.elapsed());
            if Instant::now() + pause > deadline {
                break;
            }
            sleep(pause).await;
            match timeout_at(deadline, self.task_status(upid)).await {
                Err(_) => break,
                Ok(Ok(TaskStatus::Running)) => last = None,
                Ok(Ok(TaskStatus::Stopped { exitstatus })) => {
                    return self.ended(upid, &exitstatus).await;
                }
                Ok(Err(error))
                    if matches!(error, Error::Unreachable { .. } | Error::Timeout { .. }) =>
                {
                    last = Some(error);
                }
                Ok(Err(error)) => return Err(error),
            }
        }
        let (upid, waited) = (Box::new(upid.clone()), begun.elapsed());
        Err(last.unwrap_or(Error::TaskTimeout { upid, waited, stopped: false }))
    }

    /// As [`Client::wait`], but a task that has not ended at `deadline` is stopped; some seconds
    /// more are spent on that. For tasks that leave nothing half done, such as one that waits: a
    /// destruction that is stopped leaves a locked CT.
    pub async fn wait_or_stop(&self, upid: &Upid, deadline: Instant) -> Result<(), Error> {
        let late = match self.wait(upid, deadline).await {
            Err(error @ Error::TaskTimeout { .. }) => error,
            result => return result,
        };
        let limit = Instant::now() + STOPPING;
        if !matches!(timeout_at(limit, self.stop_task(upid)).await, Ok(Ok(()))) {
            return Err(late);
        }
        match self.wait(upid, limit).await {
            // It was faster than the interruption.
            Ok(()) => Ok(()),
            Err(Error::TaskFailed { .. } | Error::Api { .. }) => match late {
                Error::TaskTimeout { upid, waited, .. } => {
                    Err(Error::TaskTimeout { upid, waited, stopped: true })
                }
                late => Err(late),
            },
            Err(_) => Err(late),
        }
    }

    async fn ended(&self, upid: &Upid, exitstatus: &str) -> Result<(), Error> {
        if exitstatus == "OK" || exitstatus.starts_with("WARNINGS: ") {
            return Ok(());
        }
        // The log is context; without it the error is still true.
        let mut log = self.log_end(upid, LOG_LINES + 1).await.unwrap_or_default();
        if log.last().is_some_and(|line| line.starts_with("TASK ERROR: ")) {
            log.pop();
        }
        log.drain(..log.len().saturating_sub(LOG_LINES as usize));
        Err(error::from_task(upid, exitstatus, log))
    }
}

/// The task's own node is asked: it need not be the shim's.
fn task_call(method: &'static str, upid: &Upid, below: &str) -> Call {
    let path = format!("/nodes/{}/tasks/{}{below}", upid.node(), segment(&upid.to_string()));
    Call { method, path, vmid: upid.id().parse().ok() }
}

/// The pause before the next question about a task that has been waited for so long.
pub(super) fn pause(waited: Duration) -> Duration {
    (waited / 8).clamp(Duration::from_millis(4), Duration::from_millis(400))
}
