//! `POST /nodes/{node}/lxc/{vmid}/migrate`

use std::sync::Arc;

use serde_json::json;

use super::{Answer, Context};
use crate::ct::check_lock;
use crate::error::ApiError;
use crate::mounts::{self, Mount, Source};
use crate::node::Node;
use crate::params::{Kind, opt, parse_bool, req};
use crate::profile::Call;
use crate::storage::VolumeId;
use crate::task::Task;

/// Moves a stopped CT to another node.
pub fn migrate(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Migrate")?;
    let vmid = cx.verify_ct(
        vmid,
        &[&[
            opt("bwlimit", Kind::Number(0.0, f64::MAX)),
            opt("online", Kind::Bool),
            opt("restart", Kind::Bool),
            req("target", Kind::Text(63)),
            opt("target-storage", Kind::Text(1024)),
            opt("timeout", Kind::Int(0, i64::MAX)),
        ]],
    )?;
    let params = cx.params();
    let name = params.get("target").unwrap_or_default();
    if name == cx.node.name {
        return Err(ApiError::param("target", "target is local node."));
    }
    let target = cx.cluster.node(name);
    let target = target.ok_or_else(|| format!("no such cluster node '{name}'"))?.clone();
    if !target.is_online() {
        return Err(ApiError::Failed(format!("node '{name}' is not online")));
    }
    cx.cluster.dc.check_quorum()?;
    check_lock(&cx.node.load(vmid)?)?;
    if let Some(list) = params.get("target-storage") {
        return Err(ApiError::Failed(format!("this simulator has no target-storage '{list}'")));
    }
    if cx.node.is_running(vmid) {
        if params.flag("online") {
            let text = "lxc live migration is currently not implemented";
            return Err(ApiError::Failed(text.into()));
        }
        let text = match params.flag("restart") {
            true => "this simulator does not restart containers on another node",
            false => "can't migrate running container without --online or --restart",
        };
        return Err(ApiError::Failed(text.into()));
    }
    let node = cx.node.clone();
    let upid = cx.node.tasks.spawn(&cx.node.name, "vzmigrate", &vmid.to_string(), cx.who, |task| {
        node.migrate_ct(task, vmid, target)
    });
    Ok(Answer::protected(json!(upid), Call::Create))
}

impl Node {
    /// The body of a migration task: volumes of storages that are not shared are copied.
    async fn migrate_ct(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        target: Arc<Node>,
    ) -> Result<(), String> {
        let _lock = self.lock_ct(vmid).await?;
        task.reach("locked")?;
        let mut config = self.load(vmid)?;
        check_lock(&config)?;
        task.log(&format!("starting migration of CT {vmid} to node '{}'", target.name));
        let mut copied: Vec<(VolumeId, VolumeId)> = Vec::new();
        let result = async {
            for key in mounts::keys(&config.current) {
                let mut mount = Mount::parse(&config.current.text(&key).unwrap_or_default())?;
                let shared = mount.prop("shared").and_then(parse_bool) == Some(true);
                let Some(volume) = mount.volume().cloned() else {
                    if shared {
                        continue;
                    }
                    return Err(format!(
                        "cannot migrate local {} mount point '{key}'",
                        mount.restricted().unwrap_or("volume")
                    ));
                };
                if self.storage(&volume.storage)?.shared {
                    continue;
                }
                task.log(&format!("found local volume '{volume}' (in current VM config)"));
                let path = self.volume_path(&volume)?;
                let copy =
                    target.import_volume(&task, &path, &volume, vmid, &volume.storage).await?;
                copied.push((volume, copy.clone()));
                mount.source = Source::Volume(copy);
                config.current.set(&key, &mount.to_string());
            }
            self.move_conf(vmid, &config, &target)
        };
        let result = result.await;
        if let Err(error) = result {
            for (_, copy) in &copied {
                let _ = target.free_volume(copy);
            }
            task.log(&format!("ERROR: {error}"));
            return Err("migration aborted".into());
        }
        for (volume, _) in &copied {
            self.free_volume(volume)?;
        }
        task.log("migration finished successfully");
        Ok(())
    }
}
