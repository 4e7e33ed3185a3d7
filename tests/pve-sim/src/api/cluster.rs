//! `/cluster`, `/version`, `/pools`.

use serde_json::{Value as Json, json};

use super::{Answer, Context, lxc, nodes};
use crate::error::ApiError;
use crate::params::{Kind, VMID, opt};

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

/// `GET /pools`: there are none.
pub fn pools(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("poolid", Kind::Text(255)), opt("type", Kind::Text(16))])?;
    Ok(Answer::plain(json!([])))
}

/// `GET /cluster/nextid`: the lowest free VMID, which is reserved for nobody.
pub fn nextid(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[crate::params::Spec { optional: true, ..VMID }])?;
    let used = cx.node.used_vmids();
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
            "storage" => cx.may("/storage/local", "Datastore.Audit"),
            "network" => cx.may("/sdn/zones/localnetwork", "SDN.Audit"),
            _ => true,
        };
        selected && visible
    });
    Ok(Answer::plain(rows.cloned().collect()))
}

async fn collect(cx: &Context<'_>) -> Json {
    let node = cx.node;
    let mut list = Vec::new();
    for row in lxc::rows(node, |_| true).await {
        list.push(json!({
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
        }));
        if let Some(last) = list.last_mut() {
            for key in ["tags", "lock"] {
                if !row[key].is_null() {
                    last[key] = row[key].clone();
                }
            }
        }
    }
    list.push(json!({
        "id": format!("node/{}", node.name), "node": node.name, "status": "online", "type": "node",
    }));
    let (total, used, _) = nodes::local_disk(node);
    list.push(json!({
        "id": format!("storage/{}/local", node.name), "node": node.name, "storage": "local",
        "type": "storage", "plugintype": "dir", "status": "available", "shared": 0,
        "content": nodes::LOCAL_CONTENT, "disk": used, "maxdisk": total,
    }));
    list.push(json!({
        "id": format!("network/{}/zone/localnetwork", node.name), "network": "localnetwork",
        "network-type": "zone", "node": node.name, "status": "ok", "type": "network",
    }));
    Json::Array(list)
}
