//! `POST /nodes/{node}/lxc/{vmid}/clone`

use serde_json::json;

use super::config::random_mac;
use super::{Answer, Context, pools};
use crate::conf::check_dns_name;
use crate::create::NewClone;
use crate::ct::check_lock;
use crate::error::ApiError;
use crate::mounts::{self, Mount};
use crate::params::{Kind, Spec, opt, split_props};
use crate::profile::Call;

const OWN: &[Spec] = &[
    opt("bwlimit", Kind::Number(0.0, f64::MAX)),
    opt("description", Kind::Text(8192)),
    opt("full", Kind::Bool),
    opt("hostname", Kind::Format(check_dns_name)),
    Spec { name: "newid", ..crate::params::VMID },
    opt("pool", Kind::Pattern(pools::is_pool_id)),
    opt("snapname", Kind::Text(40)),
    opt("storage", Kind::Text(100)),
    opt("target", Kind::Text(63)),
];

/// Checks the request, claims the VMID, and starts the task that copies the CT.
pub fn clone(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Clone")?;
    let vmid = cx.verify_ct(vmid, &[OWN])?;
    let params = cx.params();
    let to: u32 = params.number("newid").ok_or_else(|| ApiError::param("newid", "no number"))?;
    let pool = params.get("pool");
    if !pool.is_some_and(|p| cx.may(&format!("/pool/{p}"), "VM.Allocate")) {
        cx.require(&format!("/vms/{to}"), "VM.Allocate")?;
    }
    if pool.is_some_and(|p| !cx.acl().pools.contains_key(p)) {
        return Err(pools::missing(pool.unwrap_or_default()));
    }
    if params.get("target").is_some_and(|t| t != cx.node.name) {
        let text = "can't clone to another node: the storage is not shared";
        return Err(ApiError::Failed(text.into()));
    }
    let source = cx.node.load(vmid)?;
    check_lock(&source)?;
    if let Some(name) = params.get("snapname") {
        let text = format!("snapshot '{name}' does not exist");
        return Err(ApiError::Failed(text));
    }
    let storage = params.get("storage");
    let mut config = source.current;
    for key in mounts::keys(&config) {
        let mount = Mount::parse(&config.text(&key).unwrap_or_default())?;
        let Some(used) = mount.storage() else {
            return Err(ApiError::Failed(format!(
                "unable to clone mountpoint '{key}' (type {})",
                mount.restricted().unwrap_or("volume")
            )));
        };
        let storage = storage.unwrap_or(used);
        cx.node.storage(storage)?;
        cx.require(&format!("/storage/{storage}"), "Datastore.AllocateSpace")?;
    }
    if cx.node.is_running(vmid) {
        let text = "Cannot do full clones on a running container without snapshots";
        return Err(ApiError::Failed(text.into()));
    }
    let unused: Vec<String> =
        config.values.keys().filter(|k| k.starts_with("unused")).cloned().collect();
    for key in ["lock", "template", "parent", "snaptime"].map(str::to_owned).iter().chain(&unused) {
        config.remove(key);
    }
    let nets: Vec<String> =
        config.values.keys().filter(|k| k.starts_with("net")).cloned().collect();
    for key in nets {
        let value = config.text(&key).unwrap_or_default();
        let fresh = |(k, v): (String, String)| match k.as_str() {
            "hwaddr" => format!("hwaddr={}", random_mac()),
            _ => format!("{k}={v}"),
        };
        let props: Vec<String> = split_props("name", &value).into_iter().map(fresh).collect();
        config.set(&key, &props.join(","));
    }
    for key in ["hostname", "description"] {
        if let Some(value) = params.get(key) {
            config.set(key, value);
        }
    }
    let claim = cx.node.claim(to)?;
    if let Some(pool) = pool
        && let Some(pool) = cx.cluster.dc.acl_mut().pools.get_mut(pool)
    {
        pool.vms.insert(to);
    }
    let new = NewClone { from: vmid, claim, config, storage: storage.map(str::to_owned) };
    let node = cx.node.clone();
    let upid = cx.node.tasks.spawn(&cx.node.name, "vzclone", &vmid.to_string(), cx.who, |task| {
        node.clone_ct(task, new)
    });
    Ok(Answer::protected(json!(upid), Call::Create))
}
