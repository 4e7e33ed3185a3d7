//! `/nodes/{node}/lxc`: the list of CTs, and their removal.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use tokio::process::Command;

use super::{Answer, Context, names};
use crate::conf::Section;
use crate::ct::Destroy;
use crate::error::ApiError;
use crate::generate::Limits;
use crate::node::Node;
use crate::params::{Kind, opt, split_props};
use crate::profile::Call;
use crate::storage::parse_size;
use crate::{lxc, proc, sys};

/// How long a list waits for the pid of a CT, which a starting one cannot tell.
const PID_WAIT: Duration = Duration::from_millis(200);

/// `GET /nodes/{node}/lxc`: live, and only the CTs that the caller may see.
pub async fn list(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let visible = |vmid: u32| cx.may(&format!("/vms/{vmid}"), "VM.Audit");
    let rows = rows(cx.node, visible).await;
    let count = rows.len();
    Ok(Answer::protected(Json::Array(rows), Call::List(count)))
}

/// One row per CT.
pub async fn rows(node: &Node, visible: impl Fn(u32) -> bool) -> Vec<Json> {
    let active = lxc::active(&node.paths.lxc);
    let mut rows = Vec::new();
    for vmid in node.vmids().into_iter().filter(|v| visible(*v)) {
        // It may have been removed since the directory was read.
        if let Ok(config) = node.load(vmid) {
            rows.push(row(node, vmid, &config.current, &active).await);
        }
    }
    rows
}

/// What list and `status/current` say about a CT.
pub async fn row(node: &Node, vmid: u32, conf: &Section, active: &HashSet<u32>) -> Json {
    let limits = Limits::of(conf);
    let cpus = conf
        .int("cores")
        .map(|n| json!(n))
        .or_else(|| conf.text("cpulimit").filter(|t| t != "0").map(|t| json!(t)))
        .unwrap_or_else(|| json!(proc::cpus()));
    let mut row = json!({
        "vmid": vmid,
        "type": "lxc",
        "status": "stopped",
        "name": conf.text("hostname").unwrap_or_else(|| format!("CT{vmid}")),
        "cpu": 0, "cpus": cpus,
        "mem": 0, "maxmem": limits.memory,
        "swap": 0, "maxswap": limits.swap,
        "disk": 0, "maxdisk": rootfs_size(conf), "diskread": 0, "diskwrite": 0,
        "netin": 0, "netout": 0,
        "uptime": 0,
    });
    for key in ["lock", "tags"] {
        if let Some(text) = conf.text(key) {
            row[key] = json!(text);
        }
    }
    if conf.flag("template") {
        row["template"] = json!(1);
    }
    if !active.contains(&vmid) {
        return row;
    }
    row["status"] = json!("running");
    for pressure in ["cpu", "io", "memory"] {
        for kind in ["some", "full"] {
            row[format!("pressure{pressure}{kind}")] = json!("0.00");
        }
    }
    let Some(pid) = lxc::init_pid(&node.paths.lxc, vmid, PID_WAIT).await else { return row };
    row["pid"] = json!(pid);
    row["uptime"] = json!(proc::age(pid).unwrap_or(0));
    row["cpu"] = json!(node.cpu_load(vmid, pid));
    row["mem"] = json!(node.cgroups.memory_usage(pid).unwrap_or(0));
    if let Ok((total, used, _)) = sys::disk(&PathBuf::from(format!("/proc/{pid}/root/"))) {
        row["disk"] = json!(used);
        row["maxdisk"] = json!(total);
    }
    let (received, sent) = proc::net_traffic(vmid);
    row["netin"] = json!(received);
    row["netout"] = json!(sent);
    row
}

/// `GET …/interfaces`: those of a running CT, `null` for any other.
pub async fn interfaces(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Audit")?;
    let vmid = cx.verify_ct(vmid, &[])?;
    let data = match lxc::init_pid(&cx.node.paths.lxc, vmid, PID_WAIT).await {
        Some(pid) => net_interfaces(pid).await.unwrap_or(Json::Null),
        None => Json::Null,
    };
    Ok(Answer::protected(data, Call::Status))
}

/// The interfaces in the network namespace of a process.
async fn net_interfaces(pid: u32) -> Option<Json> {
    let output = Command::new("nsenter")
        .args(["--target", &pid.to_string(), "--net", "ip", "-json", "address"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .ok()?;
    let links: Json = serde_json::from_slice(&output.stdout).ok()?;
    let list = links.as_array()?.iter().filter(|link| !link["ifname"].is_null());
    Some(list.map(net_interface).collect())
}

fn net_interface(link: &Json) -> Json {
    let mac = link["address"].as_str().unwrap_or_default();
    let mut row = json!({
        "name": link["ifname"], "hwaddr": mac, "hardware-address": mac, "ip-addresses": [],
    });
    for address in link["addr_info"].as_array().into_iter().flatten() {
        let family = address["family"].as_str().unwrap_or_default();
        let (ip, prefix) = (&address["local"], &address["prefixlen"]);
        // The last one of a family is shown once more.
        row[family] = json!(format!("{}/{prefix}", ip.as_str().unwrap_or_default()));
        if let Some(list) = row["ip-addresses"].as_array_mut() {
            let prefix = prefix.to_string();
            list.push(json!({"ip-address": ip, "ip-address-type": family, "prefix": prefix}));
        }
    }
    row
}

/// The size in `rootfs:`; 4 GiB if it says none.
fn rootfs_size(conf: &Section) -> i64 {
    let props = split_props("volume", &conf.text("rootfs").unwrap_or_default());
    let size = props.iter().find(|(k, _)| k == "size").and_then(|(_, v)| parse_size(v));
    match size.and_then(|n| i64::try_from(n).ok()) {
        Some(n) if n > 0 => n,
        _ => 4 << 30,
    }
}

/// `GET /nodes/{node}/lxc/{vmid}`
pub fn index(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    let vmid = cx.verify_ct(vmid, &[])?;
    cx.node.load(vmid)?;
    Ok(Answer::plain(names(
        "subdir",
        &[
            "config",
            "pending",
            "status",
            "vncproxy",
            "termproxy",
            "vncwebsocket",
            "spiceproxy",
            "migrate",
            "clone",
            "rrd",
            "rrddata",
            "firewall",
            "snapshot",
            "resize",
            "interfaces",
        ],
    )))
}

/// `DELETE /nodes/{node}/lxc/{vmid}`
pub fn destroy(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    let posted = cx.request.at.unwrap_or_else(Instant::now);
    cx.require(&format!("/vms/{vmid}"), "VM.Allocate")?;
    let vmid = cx.verify_ct(
        vmid,
        &[&[
            opt("destroy-unreferenced-disks", Kind::Bool),
            opt("force", Kind::Bool),
            opt("purge", Kind::Bool),
        ]],
    )?;
    let params = cx.params();
    let how = Destroy {
        force: params.flag("force"),
        purge: params.flag("purge"),
        unreferenced: params.flag("destroy-unreferenced-disks"),
    };
    let node = cx.node.clone();
    node.check_destroy(vmid, how.force)?;
    let upid = cx.node.tasks.spawn(&cx.node.name, "vzdestroy", &vmid.to_string(), cx.who, |task| {
        node.destroy_ct(task, vmid, how, posted)
    });
    Ok(Answer::protected(json!(upid), Call::Delete))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_size_comes_from_the_rootfs() {
        let size = |rootfs: &str| {
            let mut conf = Section::default();
            conf.set("rootfs", rootfs);
            rootfs_size(&conf)
        };
        assert_eq!(size("local:1/vm-1-disk-0.raw,size=1G"), 1 << 30);
        assert_eq!(size("local:1/subvol,size=0T"), 4 << 30);
        assert_eq!(size("/srv/x"), 4 << 30);
        assert_eq!(size("x,size=512M"), 512 << 20);
    }
}
