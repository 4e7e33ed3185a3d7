//! `/nodes/{node}/lxc/{vmid}/snapshot` and `feature`. No storage here can have snapshots, so they
//! exist only in files.

use std::future::Future;
use std::sync::Arc;

use serde_json::json;

use super::{Answer, Context};
use crate::conf::Config;
use crate::ct::check_lock;
use crate::error::ApiError;
use crate::mounts::{self, Mount};
use crate::node::Node;
use crate::params::{Kind, Params, Spec, VMID, opt, req, verify};
use crate::profile::Call;
use crate::task::Task;

/// A name that a section of the configuration file can have.
fn is_config_id(text: &str) -> bool {
    text.len() > 1
        && text.len() <= 40
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
}

const NAME: Spec = req("snapname", Kind::Pattern(is_config_id));

fn verify_name(cx: &Context<'_>, vmid: &str, name: &str, own: &[Spec]) -> Result<u32, ApiError> {
    let mut all: Params = cx.params().clone();
    all.0.insert("vmid".into(), vmid.to_owned());
    all.0.insert("snapname".into(), name.to_owned());
    verify(&[&[VMID, NAME], own], &all)?;
    all.number("vmid").ok_or_else(|| ApiError::param("vmid", "value is not a number"))
}

/// Whether all volumes of a CT can have snapshots.
fn has_snapshots(node: &Node, config: &Config) -> bool {
    mounts::keys(&config.current).iter().all(|key| {
        let mount = Mount::parse(&config.current.text(key).unwrap_or_default());
        mount.is_ok_and(|m| match m.storage().map(|s| node.storage(s)) {
            Some(Ok(storage)) => storage.backend().has_snapshots(),
            _ => false,
        })
    })
}

/// `GET …/feature`
pub fn feature(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Audit")?;
    let own = [
        req("feature", Kind::Enum(&["snapshot", "clone", "copy"])),
        opt("snapname", Kind::Pattern(is_config_id)),
    ];
    let vmid = cx.verify_ct(vmid, &[&own])?;
    let config = cx.node.load(vmid)?;
    let has = match cx.params().get("feature") {
        Some("copy") => !cx.node.is_running(vmid),
        Some("clone") => config.current.flag("template") && has_snapshots(cx.node, &config),
        _ => has_snapshots(cx.node, &config),
    };
    Ok(Answer::protected(json!({"hasFeature": i32::from(has)}), Call::Status))
}

/// `GET …/snapshot`
pub fn list(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Audit")?;
    let vmid = cx.verify_ct(vmid, &[])?;
    let config = cx.node.load(vmid)?;
    Ok(Answer::protected(config.api_snapshots(cx.node.is_running(vmid)), Call::Status))
}

/// `GET …/snapshot/{name}/config`
pub fn config(cx: &Context<'_>, vmid: &str, name: &str) -> Result<Answer, ApiError> {
    let allowed = ["VM.Snapshot", "VM.Snapshot.Rollback", "VM.Audit"];
    cx.acl().require_any(cx.who, &format!("/vms/{vmid}"), &allowed)?;
    let vmid = verify_name(cx, vmid, name, &[])?;
    let found = cx.node.load(vmid)?.api_snapshot(name);
    let found = found.ok_or_else(|| missing(name))?;
    Ok(Answer::plain(found))
}

fn missing(name: &str) -> String {
    format!("snapshot '{name}' does not exist")
}

/// Starts a task that takes the CT's lock first.
fn spawn<F>(
    cx: &Context<'_>,
    kind: &str,
    vmid: u32,
    work: impl FnOnce(Arc<Node>, Config) -> F + Send + 'static,
) -> Answer
where
    F: Future<Output = Result<(), String>> + Send,
{
    let node = cx.node.clone();
    let body = |task: Arc<Task>| async move {
        let _lock = node.lock_ct(vmid).await?;
        task.reach("locked")?;
        let config = node.load(vmid)?;
        check_lock(&config)?;
        work(node.clone(), config).await
    };
    let upid = cx.node.tasks.spawn(&cx.node.name, kind, &vmid.to_string(), cx.who, body);
    Answer::protected(json!(upid), Call::Put)
}

/// `POST …/snapshot`
pub fn create(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Snapshot")?;
    let vmid = cx.verify_ct(vmid, &[&[NAME, opt("description", Kind::Text(8192))]])?;
    if matches!(cx.params().get("snapname"), Some("current" | "vzdump")) {
        let text = "unable to use snapshot name 'current' (reserved name)";
        return Err(ApiError::Failed(text.into()));
    }
    Ok(spawn(cx, "vzsnapshot", vmid, |_, _| async {
        Err("snapshot feature is not available".into())
    }))
}

/// `DELETE …/snapshot/{name}`: removes the section; there is no volume behind it.
pub fn delete(cx: &Context<'_>, vmid: &str, name: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Snapshot")?;
    let vmid = verify_name(cx, vmid, name, &[opt("force", Kind::Bool)])?;
    let name = name.to_owned();
    Ok(spawn(cx, "vzdelsnapshot", vmid, move |node, mut config| async move {
        config.snapshots.remove(&name).ok_or_else(|| missing(&name))?;
        node.store(vmid, &config)
    }))
}

/// `POST …/snapshot/{name}/rollback`
pub fn rollback(cx: &Context<'_>, vmid: &str, name: &str) -> Result<Answer, ApiError> {
    let allowed = ["VM.Snapshot", "VM.Snapshot.Rollback"];
    cx.acl().require_any(cx.who, &format!("/vms/{vmid}"), &allowed)?;
    let vmid = verify_name(cx, vmid, name, &[opt("start", Kind::Bool)])?;
    let name = name.to_owned();
    Ok(spawn(cx, "vzrollback", vmid, move |_, config| async move {
        match config.snapshots.contains_key(&name) {
            true => Err("snapshot feature is not available".into()),
            false => Err(missing(&name)),
        }
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::Value as Json;

    use crate::golden;

    #[test]
    fn the_recorded_list_of_snapshots_is_given() {
        let case = golden::case("snapshots");
        let (config, _) = crate::conf::parse(&case.conf, 500);
        let rows = |list: &Json| {
            let mut rows = list.as_array().unwrap().clone();
            rows.sort_by_key(|r| r["name"].as_str().unwrap().to_owned());
            rows
        };
        let expected = case.json("api-snapshots.json").unwrap();
        assert_eq!(rows(&config.api_snapshots(false)), rows(&expected["data"]));
    }
}
