//! `/nodes`: the node itself and its storage.

use std::fs;

use serde_json::{Value as Json, json};

use super::cluster::PVE_VERSION;
use super::{Answer, Context};
use crate::error::ApiError;
use crate::node::Node;
use crate::params::{Kind, opt};
use crate::profile::Call;
use crate::{proc, sys};

/// What the storage `local` is for.
pub const LOCAL_CONTENT: &str = "backup,images,iso,rootdir,snippets,vztmpl";

/// `GET /nodes`
pub fn list(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let mut row = json!({
        "id": format!("node/{}", cx.node.name), "node": cx.node.name,
        "status": "online", "type": "node",
    });
    row["ssl_fingerprint"] = json!(cx.node.fingerprint);
    Ok(Answer::plain(json!([row])))
}

/// Total, used and available bytes of the storage `local`.
pub fn local_disk(node: &Node) -> (u64, u64, u64) {
    sys::disk(&node.paths.root).unwrap_or_default()
}

/// `GET /nodes/{node}/storage`
pub fn storage(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("content", Kind::Text(255)),
        opt("enabled", Kind::Bool),
        opt("format", Kind::Bool),
        opt("storage", Kind::Text(255)),
        opt("target", Kind::Text(63)),
    ])?;
    let mut rows = Vec::new();
    if cx.may("/storage/local", "Datastore.Audit") {
        let (total, used, avail) = local_disk(cx.node);
        rows.push(json!({
            "storage": "local", "type": "dir", "active": 1, "enabled": 1, "shared": 0,
            "content": LOCAL_CONTENT, "total": total, "used": used, "avail": avail,
            "used_fraction": if total == 0 { 0.0 } else { used as f64 / total as f64 },
        }));
    }
    Ok(Answer::protected(Json::Array(rows), Call::Status))
}

/// `GET /nodes/{node}/status`
pub fn status(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.require(&format!("/nodes/{}", cx.node.name), "Sys.Audit")?;
    cx.verify(&[])?;
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let memory = read("/proc/meminfo");
    let mem = |key: &str| proc::meminfo(&memory, key);
    let (total, free, available) = (mem("MemTotal"), mem("MemFree"), mem("MemAvailable"));
    let (swap, swap_free) = (mem("SwapTotal"), mem("SwapFree"));
    let load = read("/proc/loadavg");
    let load: Vec<&str> = load.split(' ').take(3).collect();
    let release = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let version = read("/proc/sys/kernel/version").trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = |key: &str| {
        let mut values = cpuinfo.lines().filter_map(|l| l.split_once(':'));
        values.find(|(k, _)| k.trim() == key).map_or("", |(_, v)| v.trim())
    };
    let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let (disk, disk_used, disk_avail) = local_disk(cx.node);
    Ok(Answer::plain(json!({
        "boot-info": {"mode": "efi"},
        "cpu": 0,
        "cpuinfo": {
            "cores": cpus, "cpus": cpus, "sockets": 1, "user_hz": 100, "hvm": "",
            "family": cpu("cpu family"), "flags": cpu("flags"), "mhz": cpu("cpu MHz"),
            "model": cpu("model name"), "vendor": cpu("vendor_id"),
        },
        "current-kernel": {
            "machine": std::env::consts::ARCH, "release": release, "sysname": "Linux",
            "version": version,
        },
        "idle": 0,
        "ksm": {"shared": 0},
        "kversion": format!("Linux {release} {version}"),
        "loadavg": load,
        "memory": {
            "available": available, "free": free, "total": total,
            "used": total.saturating_sub(available),
        },
        "pveversion": PVE_VERSION,
        "rootfs": {
            "avail": disk_avail, "free": disk.saturating_sub(disk_used), "total": disk,
            "used": disk_used,
        },
        "swap": {"free": swap_free, "total": swap, "used": swap.saturating_sub(swap_free)},
        "uptime": proc::uptime() as u64,
        "wait": 0,
    })))
}
