//! `/cluster`, `/version`.

use serde_json::{Value as Json, json};

use super::{Answer, Context, lxc};
use crate::error::ApiError;
use crate::node::Node;
use crate::params::{Kind, VMID, opt};
use crate::profile::Call;
use crate::storage::CONTENT;

/// The version that the recordings were made with.
const VERSION: &str = "9.2.11";
/// Its commit.
pub const REPOID: &str = "14a22df3";
/// What `pveversion` would say.
pub const PVE_VERSION: &str = "pve-manager/9.2.11/14a22df3";

/// `GET /version`
pub fn version(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    Ok(Answer::plain(json!({"release": "9.2", "repoid": REPOID, "version": VERSION})))
}

/// `GET /cluster/nextid`: the lowest free VMID, which is reserved for nobody.
pub fn nextid(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[crate::params::Spec { optional: true, ..VMID }])?;
    let used = cx.cluster.dc.used_vmids();
    let id = match cx.params().number::<u32>("vmid") {
        Some(vmid) if used.contains(&vmid) => {
            return Err(ApiError::param("vmid", format!("VM {vmid} already exists")));
        }
        Some(vmid) => vmid,
        None => (100..1_000_000)
            .find(|id| !used.contains(id))
            .ok_or_else(|| ApiError::Failed("unable to get any free VMID".into()))?,
    };
    // A number, but as text: so does the real server.
    Ok(Answer::plain(json!(id.to_string())))
}

/// `GET /cluster/resources`: as old as the status daemon's last round.
pub async fn resources(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("type", Kind::Enum(&["vm", "storage", "node", "sdn"]))])?;
    let all = match cx.node.cached_resources() {
        Some(list) => list,
        None => {
            let list = collect(cx).await;
            cx.node.cache_resources(&list);
            list
        }
    };
    let wanted = cx.params().get("type");
    let rows = all.as_array().into_iter().flatten().filter(|row| {
        let kind = row["type"].as_str().unwrap_or_default();
        let selected = match wanted {
            None => true,
            Some("vm") => kind == "lxc",
            Some("sdn") => kind == "network",
            Some(other) => kind == other,
        };
        let visible = match kind {
            "lxc" => cx.may(&format!("/vms/{}", row["vmid"]), "VM.Audit"),
            "storage" => cx.may(
                &format!("/storage/{}", row["storage"].as_str().unwrap_or_default()),
                "Datastore.Audit",
            ),
            "network" => cx.may("/sdn/zones/localnetwork", "SDN.Audit"),
            _ => true,
        };
        selected && visible
    });
    Ok(Answer::plain(rows.cloned().collect()))
}

/// Everything on all nodes that can be reached.
async fn collect(cx: &Context<'_>) -> Json {
    let mut list = Vec::new();
    for node in cx.cluster.nodes() {
        let status = if node.is_online() { "online" } else { "offline" };
        list.push(json!({
            "id": format!("node/{}", node.name), "node": node.name, "status": status,
            "type": "node",
        }));
        if node.is_online() {
            collect_node(node, &mut list).await;
        }
    }
    Json::Array(list)
}

async fn collect_node(node: &Node, list: &mut Vec<Json>) {
    for row in lxc::rows(node, |_| true).await {
        let mut guest = json!({
            "id": format!("lxc/{}", row["vmid"]),
            "node": node.name,
            "type": "lxc",
            "vmid": row["vmid"], "name": row["name"], "status": row["status"],
            "cpu": row["cpu"], "maxcpu": row["cpus"],
            "mem": row["mem"], "maxmem": row["maxmem"], "memhost": row["mem"],
            "disk": row["disk"], "maxdisk": row["maxdisk"],
            "diskread": row["diskread"], "diskwrite": row["diskwrite"],
            "netin": row["netin"], "netout": row["netout"],
            "uptime": row["uptime"], "template": row["template"].as_i64().unwrap_or(0),
        });
        for key in ["tags", "lock"] {
            if !row[key].is_null() {
                guest[key] = row[key].clone();
            }
        }
        if let Some(pool) = row["vmid"]
            .as_u64()
            .and_then(|v| u32::try_from(v).ok())
            .and_then(|vmid| node.dc.acl().pool_of(vmid).map(str::to_owned))
        {
            guest["pool"] = json!(pool);
        }
        list.push(guest);
    }
    for storage in &node.storages {
        let space = storage.space();
        list.push(json!({
            "id": format!("storage/{}/{}", node.name, storage.name), "node": node.name,
            "storage": storage.name, "type": "storage", "plugintype": storage.backend().kind(),
            "status": "available", "shared": i32::from(storage.shared), "content": CONTENT,
            "disk": space.used, "maxdisk": space.total,
        }));
    }
    list.push(json!({
        "id": format!("network/{}/zone/localnetwork", node.name), "network": "localnetwork",
        "network-type": "zone", "node": node.name, "status": "ok", "type": "network",
    }));
}

/// `GET /cluster/status`: the quorum, if there is more than one node, and the nodes.
pub fn status(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.require("/", "Sys.Audit")?;
    cx.verify(&[])?;
    let nodes = cx.cluster.nodes();
    let mut rows = Vec::new();
    if nodes.len() > 1 {
        rows.push(json!({
            "id": "cluster", "type": "cluster", "name": "pve-sim", "nodes": nodes.len(),
            "quorate": i32::from(cx.cluster.dc.is_quorate()), "version": nodes.len(),
        }));
    }
    for (n, node) in nodes.iter().enumerate() {
        // A node without a cluster has no number.
        let id = if nodes.len() > 1 { n + 1 } else { 0 };
        rows.push(json!({
            "id": format!("node/{}", node.name), "name": node.name, "type": "node",
            "ip": "127.0.0.1", "level": "", "local": i32::from(node.name == cx.node.name),
            "nodeid": id, "online": i32::from(node.is_online()),
        }));
    }
    Ok(Answer::protected(Json::Array(rows), Call::Plain))
}

/// `GET /cluster/tasks`: the latest of all nodes.
pub fn tasks(cx: &Context<'_>) -> Result<Answer, ApiError> {
    const SHOWN: usize = 25;
    cx.verify(&[])?;
    let mut rows = Vec::new();
    for node in cx.cluster.nodes() {
        let all = cx.may(&format!("/nodes/{}", node.name), "Sys.Audit");
        let tasks = node.tasks.list().into_iter().filter(|t| all || t.belongs_to(cx.who));
        rows.extend(tasks.take(SHOWN).map(|t| t.cluster_entry()));
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row["starttime"].as_u64()));
    rows.truncate(SHOWN);
    Ok(Answer::plain(Json::Array(rows)))
}
