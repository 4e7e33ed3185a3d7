//! Tasks.

use serde_json::Value;

use super::Loose;
use crate::pve::upid::Upid;

/// `GET /nodes/{node}/tasks/{upid}/status`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskStatus {
    /// The worker is at work.
    Running,
    /// It ended.
    Stopped {
        /// `OK`, `WARNINGS: n`, or the error's first line.
        exitstatus: String,
    },
}

impl TaskStatus {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<TaskStatus> {
        let data = Loose(data);
        match data.text("status")?.as_str() {
            "running" => Some(TaskStatus::Running),
            // Absent when the worker died without a last word.
            "stopped" => Some(TaskStatus::Stopped {
                exitstatus: data.text("exitstatus").unwrap_or_else(|| "unexpected status".into()),
            }),
            _ => None,
        }
    }
}

/// The lines of a task's log; none if it is empty.
pub(in crate::pve) fn log_lines(data: &Value) -> Vec<String> {
    let lines: Vec<String> = Loose(data).items().filter_map(|line| line.text("t")).collect();
    // Proxmox's way of saying that there is no line.
    if lines == ["no content"] { Vec::new() } else { lines }
}

/// An entry of a task list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The task, with its type, its user and when it began.
    pub upid: Upid,
    /// As it is now.
    pub status: TaskStatus,
    /// When it ended, in seconds since the epoch.
    pub ended: Option<u64>,
}

impl Task {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<Task> {
        let data = Loose(data);
        // `RUNNING` is said of active tasks by some lists, nothing by others.
        let status = match data.text("status") {
            Some(text) if text != "RUNNING" => TaskStatus::Stopped { exitstatus: text },
            _ => TaskStatus::Running,
        };
        Some(Task { upid: data.text("upid")?.parse().ok()?, status, ended: data.number("endtime") })
    }
}
