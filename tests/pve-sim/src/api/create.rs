//! `POST /nodes/{node}/lxc`

use serde_json::json;

use super::config::{check_lines, check_mount, check_options, complete_net};
use super::{Answer, Context, pools};
use crate::conf::{OPTIONS, Section};
use crate::create::NewCt;
use crate::error::ApiError;
use crate::mounts::Mount;
use crate::params::{Kind, Spec, VMID, opt, req, verify};
use crate::profile::Call;
use crate::storage::VolumeId;

/// What create takes beside the options of a CT.
const OWN: &[Spec] = &[
    opt("bwlimit", Kind::Number(0.0, f64::MAX)),
    opt("force", Kind::Bool),
    opt("ha-managed", Kind::Bool),
    opt("ignore-unpack-errors", Kind::Bool),
    req("ostemplate", Kind::Text(255)),
    opt("password", Kind::Text(4096)),
    opt("pool", Kind::Pattern(pools::is_pool_id)),
    opt("restore", Kind::Bool),
    opt("ssh-public-keys", Kind::Text(65536)),
    opt("start", Kind::Bool),
    opt("storage", Kind::Text(100)),
    opt("unique", Kind::Bool),
    VMID,
];

/// What a real node can do here and the simulator cannot.
const REFUSED: [&str; 6] =
    ["force", "ha-managed", "ignore-unpack-errors", "password", "restore", "ssh-public-keys"];

/// Checks the request, claims the VMID, and starts the task that makes the CT.
pub fn create(cx: &Context<'_>) -> Result<Answer, ApiError> {
    let params = cx.params();
    verify(&[OPTIONS, OWN], params)?;
    let vmid: u32 = params.number("vmid").ok_or_else(|| ApiError::param("vmid", "no number"))?;
    let pool = params.get("pool");
    let may = cx.may(&format!("/vms/{vmid}"), "VM.Allocate")
        || pool.is_some_and(|p| cx.may(&format!("/pool/{p}"), "VM.Allocate"));
    if !may {
        return Err(ApiError::Forbidden(None));
    }
    if pool.is_some_and(|p| !cx.acl().pools.contains_key(p)) {
        return Err(pools::missing(pool.unwrap_or_default()));
    }
    if let Some(name) = REFUSED.iter().find(|n| params.get(n).is_some_and(|v| v != "0")) {
        return Err(ApiError::Failed(format!("this simulator has no '{name}'")));
    }
    cx.node.check_unused(vmid)?;

    let asked = params.0.iter().filter(|(k, _)| OPTIONS.iter().any(|s| s.matches(k)));
    check_lines(asked.clone())?;
    let mut config = Section::default();
    let mut mounts = Vec::new();
    for (key, value) in asked.clone() {
        if key == "rootfs" || key.strip_prefix("mp").is_some_and(|n| n.parse::<u8>().is_ok()) {
            mounts.push((key.clone(), Mount::parse(value).map_err(ApiError::Failed)?));
        } else if key.starts_with("unused") {
            return Err(ApiError::param(key, "a new container has no unused volumes"));
        } else if key.starts_with("net") {
            config.set(key, &complete_net(value));
        } else if key == "description" {
            // As it will be read from the file.
            config.set(key, &format!("{}\n", value.trim_end_matches('\n')));
        } else {
            config.set(key, value);
        }
    }
    if params.get("rootfs").is_none() {
        let storage = params.get("storage").unwrap_or("local");
        let rootfs = Mount::parse(&format!("{storage}:4")).map_err(ApiError::Failed)?;
        mounts.push(("rootfs".into(), rootfs));
    }
    // The root file system has the first volume.
    mounts.sort_by_key(|(key, _)| key != "rootfs");
    let defaults = [("memory", "512"), ("swap", "512"), ("unprivileged", "1")];
    for (key, value) in defaults {
        if !config.has(key) {
            config.set(key, value);
        }
    }
    if !config.has("hostname") {
        config.set("hostname", &format!("CT{vmid}"));
    }
    if config.int("unprivileged") == Some(0) {
        // A file without the flag says the same.
        config.remove("unprivileged");
        cx.require("/", "Sys.Modify")?;
    }
    let mut before = Section::default();
    if config.flag("unprivileged") {
        before.set("unprivileged", "1");
    }
    let asked = asked.map(|(k, v)| (k.as_str(), Some(v.as_str())));
    check_options(cx, vmid, pool, &before, asked)?;
    for (_, mount) in &mounts {
        check_mount(cx, mount)?;
    }
    let template = params.get("ostemplate").unwrap_or_default();
    let template: VolumeId = template.parse().map_err(|e| ApiError::Failed(format!("{e}")))?;
    cx.node.storage(&template.storage)?;
    if !template.name.starts_with("vztmpl/") {
        return Err(ApiError::Failed(format!("'{template}' is no template")));
    }
    let path = format!("/storage/{}", template.storage);
    let allowed = ["Datastore.AllocateSpace", "Datastore.Audit", "Datastore.AllocateTemplate"];
    cx.acl().require_any(cx.who, &path, &allowed)?;

    let claim = cx.node.claim(vmid).map_err(|e| format!("unable to create CT {vmid} - {e}"))?;
    if let Some(pool) = pool
        && let Some(pool) = cx.cluster.dc.acl_mut().pools.get_mut(pool)
    {
        pool.vms.insert(vmid);
    }
    let new = NewCt { claim, config, mounts, template };
    let (node, who) = (cx.node.clone(), cx.who.clone());
    let start = params.flag("start");
    let upid = cx.node.tasks.spawn(
        &cx.node.name,
        "vzcreate",
        &vmid.to_string(),
        cx.who,
        |task| async move {
            node.clone().create_ct(task, new).await?;
            if start {
                // A task of its own, whose end does not matter to this one.
                let this = node.clone();
                node.tasks.spawn(&node.name, "vzstart", &vmid.to_string(), &who, |task| {
                    this.start_ct(task, vmid, false, std::time::Instant::now())
                });
            }
            Ok(())
        },
    );
    Ok(Answer::protected(json!(upid), Call::Create))
}
