//! `/nodes/{node}/tasks`

use std::sync::Arc;

use serde_json::Value as Json;
use tokio::time::sleep;

use super::{Answer, Context};
use crate::error::ApiError;
use crate::params::{Kind, VMID, opt};
use crate::profile::Call;
use crate::task::{NotAUpid, Task, Upid};

const MAX: i64 = i64::MAX;

/// `GET …/tasks`
pub fn list(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("errors", Kind::Bool),
        opt("limit", Kind::Int(0, MAX)),
        opt("since", Kind::Int(0, MAX)),
        opt("source", Kind::Enum(&["archive", "active", "all"])),
        opt("start", Kind::Int(0, MAX)),
        opt("statusfilter", Kind::Text(255)),
        opt("typefilter", Kind::Text(255)),
        opt("until", Kind::Int(0, MAX)),
        opt("userfilter", Kind::Text(255)),
        crate::params::Spec { optional: true, ..VMID },
    ])?;
    let params = cx.params();
    let see_all = cx.may(&format!("/nodes/{}", cx.node.name), "Sys.Audit");
    let source = params.get("source").unwrap_or("archive");
    let selected = |task: &Arc<Task>| {
        let in_source = match source {
            "archive" => task.ended(),
            "active" => !task.ended(),
            _ => true,
        };
        let started = task.upid.starttime;
        in_source
            && (see_all || task.belongs_to(cx.who))
            && (!params.flag("errors") || task.failed())
            && params.get("typefilter").is_none_or(|t| t == task.upid.kind)
            && params.get("userfilter").is_none_or(|u| task.upid.user.contains(u))
            && params.get("vmid").is_none_or(|v| v == task.upid.id)
            && params.number("since").is_none_or(|t: u64| started >= t)
            && params.number("until").is_none_or(|t: u64| started <= t)
            && params.get("statusfilter").is_none_or(|s| status_matches(s, task))
    };
    let tasks: Vec<_> = cx.node.tasks.list().into_iter().filter(selected).collect();
    let start = params.number("start").unwrap_or(0);
    let limit = match params.number("limit").unwrap_or(50) {
        0 => usize::MAX,
        n => n,
    };
    let rows: Json = tasks.iter().skip(start).take(limit).map(|t| t.entry()).collect();
    Ok(Answer::plain(rows).with_total(tasks.len()))
}

fn status_matches(filter: &str, task: &Task) -> bool {
    crate::params::split_list(filter).iter().any(|s| match *s {
        "ok" => task.ended() && !task.failed(),
        "error" => task.failed(),
        _ => false,
    })
}

/// Finds a task that the caller may see.
fn find(cx: &Context<'_>, upid: &str, privilege: &str) -> Result<Arc<Task>, ApiError> {
    let parsed: Upid =
        upid.parse().map_err(|e: NotAUpid| ApiError::param("upid", e.to_string()))?;
    let known = cx.node.tasks.get(upid);
    let own = match &known {
        Some(task) => task.belongs_to(cx.who),
        None => parsed.user == cx.who.auth_id(),
    };
    if !own {
        cx.require(&format!("/nodes/{}", cx.node.name), privilege)?;
    }
    known.ok_or_else(|| ApiError::param("upid", "no such task"))
}

/// `GET …/tasks/{upid}/status`
pub fn status(cx: &Context<'_>, upid: &str) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let task = find(cx, upid, "Sys.Audit")?;
    Ok(Answer::protected(task.status(), Call::Task))
}

/// `GET …/tasks/{upid}/log`
pub fn log(cx: &Context<'_>, upid: &str) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("download", Kind::Bool),
        opt("limit", Kind::Int(0, MAX)),
        opt("start", Kind::Int(0, MAX)),
    ])?;
    let task = find(cx, upid, "Sys.Audit")?;
    let start = cx.params().number("start").unwrap_or(0);
    let limit = cx.params().number("limit").unwrap_or(50);
    let (total, lines) = task.page(start, limit);
    Ok(Answer::protected(lines, Call::Task).with_total(total))
}

/// `DELETE …/tasks/{upid}`
pub async fn stop(cx: &Context<'_>, upid: &str) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let task = find(cx, upid, "Sys.Modify")?;
    if !task.ended() {
        task.interrupt();
        sleep(cx.node.profile.interrupt()).await;
    }
    Ok(Answer::protected(Json::Null, Call::Task))
}
