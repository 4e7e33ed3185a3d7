//! `/nodes/{node}/lxc/{vmid}/status`

use std::time::Instant;

use serde_json::json;

use super::{Answer, Context, SKIPLOCK, lxc, names};
use crate::ct::{Shutdown, check_lock};
use crate::error::ApiError;
use crate::lxc::active;
use crate::params::{Kind, Spec, opt};
use crate::profile::Call;

/// What can be done to a CT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start it.
    Start,
    /// Kill it.
    Stop,
    /// Ask its init to end.
    Shutdown,
    /// Shutdown and start.
    Reboot,
    /// Write it to disk by CRIU, which is not there.
    Suspend,
    /// Read it from disk.
    Resume,
}

impl Action {
    /// The last segment of the path.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "start" => Self::Start,
            "stop" => Self::Stop,
            "shutdown" => Self::Shutdown,
            "reboot" => Self::Reboot,
            "suspend" => Self::Suspend,
            "resume" => Self::Resume,
            _ => return None,
        })
    }

    fn task_type(self) -> &'static str {
        match self {
            Self::Start => "vzstart",
            Self::Stop => "vzstop",
            Self::Shutdown => "vzshutdown",
            Self::Reboot => "vzreboot",
            Self::Suspend => "vzsuspend",
            Self::Resume => "vzresume",
        }
    }

    fn specs(self) -> &'static [Spec] {
        const START: &[Spec] = &[opt("debug", Kind::Bool), SKIPLOCK];
        const STOP: &[Spec] = &[opt("overrule-shutdown", Kind::Bool), SKIPLOCK];
        const SHUTDOWN: &[Spec] =
            &[opt("forceStop", Kind::Bool), opt("timeout", Kind::Int(0, 1 << 31))];
        const REBOOT: &[Spec] = &[opt("timeout", Kind::Int(0, 1 << 31))];
        match self {
            Self::Start => START,
            Self::Stop => STOP,
            Self::Shutdown => SHUTDOWN,
            Self::Reboot => REBOOT,
            Self::Suspend | Self::Resume => &[],
        }
    }
}

/// `GET …/status`
pub fn index(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    let vmid = cx.verify_ct(vmid, &[])?;
    cx.node.load(vmid)?;
    Ok(Answer::plain(names(
        "subdir",
        &["current", "start", "stop", "shutdown", "reboot", "migrate"],
    )))
}

/// `GET …/status/current`
pub async fn current(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Audit")?;
    let vmid = cx.verify_ct(vmid, &[])?;
    let config = cx.node.load(vmid)?;
    let mut row = lxc::row(cx.node, vmid, &config.current, &active(&cx.node.paths.lxc)).await;
    row["ha"] = json!({"managed": 0});
    Ok(Answer::protected(row, Call::Status))
}

/// `POST …/status/{action}`
pub fn act(cx: &Context<'_>, vmid: &str, action: Action) -> Result<Answer, ApiError> {
    let posted = cx.request.at.unwrap_or_else(Instant::now);
    cx.require(&format!("/vms/{vmid}"), "VM.PowerMgmt")?;
    let vmid = cx.verify_ct(vmid, &[action.specs()])?;
    let skiplock = cx.params().flag("skiplock");
    if skiplock && !cx.who.is_root() {
        // Not even a token of root@pam is root@pam.
        return Err(ApiError::param("skiplock", "Only root may use this option."));
    }
    match (action, cx.node.is_running(vmid)) {
        (Action::Start | Action::Resume, true) => {
            return Err(ApiError::Failed(format!("CT {vmid} already running")));
        }
        (Action::Reboot, false) => {
            return Err(ApiError::Failed(format!("VM {vmid} not running")));
        }
        (Action::Stop | Action::Shutdown | Action::Suspend, false) => {
            return Err(ApiError::Failed(format!("CT {vmid} not running")));
        }
        _ => {}
    }
    let timeout = cx.params().number("timeout").unwrap_or(60);
    let force = cx.params().flag("forceStop");
    let node = cx.node.clone();
    let work = |task| async move {
        match action {
            Action::Start => node.start_ct(task, vmid, skiplock, posted).await,
            Action::Stop => node.stop_ct(task, vmid, skiplock, posted).await,
            Action::Shutdown => node.shutdown_ct(task, vmid, Shutdown { timeout, force }).await,
            Action::Reboot => node.reboot_ct(task, vmid, timeout).await,
            Action::Suspend | Action::Resume => {
                let _lock = node.lock_ct(vmid).await?;
                check_lock(&node.load(vmid)?)?;
                let how = if action == Action::Suspend { "-s" } else { "-r --foreground" };
                Err(format!(
                    "command 'lxc-checkpoint -n {vmid} {how} -D {}' failed: exit code 1",
                    node.paths.vz.join("dump").display()
                ))
            }
        }
    };
    let id = vmid.to_string();
    let upid = cx.node.tasks.spawn(&cx.node.name, action.task_type(), &id, cx.who, work);
    let call = if action == Action::Start { Call::Start } else { Call::Stop };
    Ok(Answer::protected(json!(upid), call))
}
