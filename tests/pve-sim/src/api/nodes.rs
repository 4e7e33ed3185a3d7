//! `/nodes`: the node itself and its storage.

use std::fs;

use serde_json::json;

use super::cluster::PVE_VERSION;
use super::{Answer, Context};
use crate::error::ApiError;
use crate::params::{Kind, opt};
use crate::{proc, sys};

/// `GET /nodes`
pub fn list(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let fingerprint = cx.cluster.certificate.fingerprint();
    let rows = cx.cluster.nodes().iter().map(|node| {
        json!({
            "id": format!("node/{}", node.name), "node": node.name, "type": "node",
            "status": if node.is_online() { "online" } else { "offline" },
            "ssl_fingerprint": fingerprint,
        })
    });
    Ok(Answer::plain(rows.collect()))
}

/// `GET /nodes/{node}/network`: the bridges of the host.
pub fn network(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("type", Kind::Text(32))])?;
    let wanted = cx.params().get("type");
    let mut names: Vec<String> = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    let mut rows = Vec::new();
    for name in names {
        let dir = std::path::Path::new("/sys/class/net").join(&name);
        let (kind, bridge) = match (dir.join("bridge").exists(), dir.join("device").exists()) {
            (true, _) => ("bridge", true),
            (false, true) => ("eth", false),
            (false, false) => continue,
        };
        let fits = match wanted {
            None => true,
            Some("any_bridge" | "any_local_bridge") => bridge,
            Some(wanted) => wanted == kind,
        };
        if fits {
            rows.push(json!({
                "iface": name, "type": kind, "active": 1, "families": ["inet"],
                "method": "manual", "method6": "manual", "priority": rows.len() + 3,
            }));
        }
    }
    Ok(Answer::plain(rows.into_iter().collect()))
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
    let (disk, disk_used, disk_avail) = sys::disk(&cx.cluster.dc.root).unwrap_or_default();
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
