//! `resize`, `move_volume` and `template` of `/nodes/{node}/lxc/{vmid}`

use serde_json::{Value as Json, json};

use super::{Answer, Context};
use crate::ct::check_lock;
use crate::error::ApiError;
use crate::mounts::{self, Mount, Source};
use crate::params::{Kind, Spec, VMID, opt, req};
use crate::profile::Call;
use crate::storage::{format_size, parse_size};

/// `rootfs` or `mp0` to `mp255`.
fn is_mount_key(text: &str) -> bool {
    text == "rootfs" || text.strip_prefix("mp").is_some_and(|n| n.parse::<u8>().is_ok())
}

fn is_size(text: &str) -> bool {
    parse_size(text.strip_prefix('+').unwrap_or(text)).is_some()
}

const DIGEST: Spec = opt("digest", Kind::Text(40));

/// `PUT …/resize`
pub fn resize(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Config.Disk")?;
    let own =
        [DIGEST, req("disk", Kind::Pattern(is_mount_key)), req("size", Kind::Pattern(is_size))];
    let vmid = cx.verify_ct(vmid, &[&own])?;
    let text = |name: &str| cx.params().get(name).unwrap_or_default().to_owned();
    let (key, size, digest) = (text("disk"), text("size"), text("digest"));
    cx.node.load(vmid)?;
    let node = cx.node.clone();
    let work = |task: std::sync::Arc<crate::task::Task>| async move {
        let _lock = node.lock_ct(vmid).await?;
        task.reach("locked")?;
        let mut config = node.load(vmid)?;
        check_lock(&config)?;
        check_digest(&config, &digest)?;
        let value = config.current.text(&key).ok_or(format!("no such mount point '{key}'"))?;
        let mut mount = Mount::parse(&value)?;
        let volume = mount.volume().ok_or("can't resize mount point of type bind")?.clone();
        let storage = node.storage(&volume.storage)?;
        let now = mount.prop("size").and_then(parse_size).unwrap_or(0);
        let wanted = match size.strip_prefix('+') {
            Some(more) => now + parse_size(more).unwrap_or(0),
            None => parse_size(&size).unwrap_or(0),
        };
        if wanted < now {
            return Err("unable to shrink disk size".into());
        }
        storage.check_room()?;
        storage.backend().resize(&volume.name, wanted)?;
        task.log("Image resized.");
        mount.set_prop("size", format_size(wanted));
        config.current.set(&key, &mount.to_string());
        node.store(vmid, &config)
    };
    let upid = cx.node.tasks.spawn(&cx.node.name, "resize", &vmid.to_string(), cx.who, work);
    Ok(Answer::protected(json!(upid), Call::Put))
}

fn check_digest(config: &crate::conf::Config, digest: &str) -> Result<(), String> {
    if digest.is_empty() || digest == config.digest {
        return Ok(());
    }
    Err("detected modified configuration - file changed by other user? Try again.".into())
}

/// `POST …/move_volume`: into a storage, which may be the same.
pub fn move_volume(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Config.Disk")?;
    let own = [
        opt("bwlimit", Kind::Number(0.0, f64::MAX)),
        opt("delete", Kind::Bool),
        DIGEST,
        opt("storage", Kind::Text(100)),
        opt("target-digest", Kind::Text(40)),
        Spec { name: "target-vmid", optional: true, ..VMID },
        opt("target-volume", Kind::Pattern(is_mount_key)),
        req("volume", Kind::Pattern(is_mount_key)),
    ];
    let vmid = cx.verify_ct(vmid, &[&own])?;
    let params = cx.params();
    if params.get("target-vmid").is_some() || params.get("target-volume").is_some() {
        let text = "this simulator does not move volumes to other containers";
        return Err(ApiError::Failed(text.into()));
    }
    let storage = params.get("storage").unwrap_or_default().to_owned();
    if storage.is_empty() {
        let text = "both storage and target vmid are missing, one needs to be set";
        return Err(ApiError::Failed(text.into()));
    }
    cx.node.storage(&storage)?;
    cx.require(&format!("/storage/{storage}"), "Datastore.AllocateSpace")?;
    let key = params.get("volume").unwrap_or_default().to_owned();
    let digest = params.get("digest").unwrap_or_default().to_owned();
    let delete = params.flag("delete");
    let config = cx.node.load(vmid)?;
    check_lock(&config)?;
    check_digest(&config, &digest)?;
    let value = config.current.text(&key);
    let value = value.ok_or_else(|| ApiError::Failed(format!("no such mount point '{key}'")))?;
    if Mount::parse(&value)?.volume().is_none() {
        return Err(ApiError::Failed("you can't move bind or device mount points".into()));
    }
    if cx.node.is_running(vmid) {
        return Err(ApiError::Failed("cannot move volumes of a running container".into()));
    }
    let node = cx.node.clone();
    let work = |task: std::sync::Arc<crate::task::Task>| async move {
        let _lock = node.lock_ct(vmid).await?;
        task.reach("locked")?;
        let mut config = node.load(vmid)?;
        check_digest(&config, &digest)?;
        let before = config.clone();
        let value = config.current.text(&key).ok_or(format!("no such mount point '{key}'"))?;
        let mut mount = Mount::parse(&value)?;
        let old = mount.volume().ok_or("you can't move bind or device mount points")?.clone();
        let new = node.copy_volume(&task, &old, vmid, &storage).await?;
        mount.source = Source::Volume(new.clone());
        config.current.set(&key, &mount.to_string());
        if !delete {
            node.settle_volumes(&before, &mut config)?;
        }
        if let Err(error) = node.store(vmid, &config) {
            let _ = node.free_volume(&new);
            return Err(error);
        }
        if delete { node.free_volume(&old) } else { Ok(()) }
    };
    let upid = cx.node.tasks.spawn(&cx.node.name, "move_volume", &vmid.to_string(), cx.who, work);
    Ok(Answer::protected(json!(upid), Call::Put))
}

/// `POST …/template`: makes the CT a template, which cannot be started any more. There is a task,
/// but the answer does not name it.
pub fn template(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Allocate")?;
    let vmid = cx.verify_ct(vmid, &[])?;
    let config = cx.node.load(vmid)?;
    check_lock(&config)?;
    if config.current.flag("template") {
        let text = "you can't convert a template to a template";
        return Err(ApiError::Failed(text.into()));
    }
    if cx.node.is_running(vmid) {
        let text = "you can't convert a container to template if the CT is running";
        return Err(ApiError::Failed(text.into()));
    }
    for key in mounts::keys(&config.current) {
        let value = config.current.text(&key).unwrap_or_default();
        if let Some(kind) = Mount::parse(&value)?.restricted() {
            return Err(ApiError::Failed(format!("you can't convert mount points of type {kind}")));
        }
    }
    let node = cx.node.clone();
    let work = |task: std::sync::Arc<crate::task::Task>| async move {
        let _lock = node.lock_ct(vmid).await?;
        task.reach("locked")?;
        let mut config = node.load(vmid)?;
        check_lock(&config)?;
        config.current.set("template", "1");
        node.store(vmid, &config)
    };
    cx.node.tasks.spawn(&cx.node.name, "vztemplate", &vmid.to_string(), cx.who, work);
    Ok(Answer::protected(Json::Null, Call::Put))
}
