//! `/pools`

use serde_json::{Value as Json, json};

use super::{Answer, Context};
use crate::acl::Pool;
use crate::error::ApiError;
use crate::params::{Kind, Spec, opt, req, split_list};
use crate::profile::Call;

const POOL_ID: Spec = req("poolid", Kind::Pattern(is_pool_id));

/// Whether the text is the name of a pool; nested ones are separated by slashes.
pub fn is_pool_id(text: &str) -> bool {
    let word = |w: &str| {
        !w.is_empty() && w.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
    };
    text.split('/').count() <= 3 && text.split('/').all(word)
}

/// The error for a pool that does not exist.
pub fn missing(name: &str) -> ApiError {
    ApiError::Failed(format!("pool '{name}' does not exist"))
}

/// `GET /pools`: the pools that the caller may see; one with its members if asked for.
pub fn list(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("poolid", Kind::Text(255)), opt("type", Kind::Text(16))])?;
    let acl = cx.acl();
    let row = |name: &str, pool: &Pool| {
        let mut row = json!({"poolid": name});
        if let Some(comment) = &pool.comment {
            row["comment"] = json!(comment);
        }
        row
    };
    let Some(name) = cx.params().get("poolid") else {
        let visible = acl.pools.iter().filter(|(n, _)| {
            let path = format!("/pool/{n}");
            acl.may(cx.who, &path, "Pool.Audit") || acl.may(cx.who, &path, "Pool.Allocate")
        });
        return Ok(Answer::plain(visible.map(|(name, pool)| row(name, pool)).collect()));
    };
    acl.require_any(cx.who, &format!("/pool/{name}"), &["Pool.Audit", "Pool.Allocate"])?;
    let pool = acl.pools.get(name).ok_or_else(|| missing(name))?;
    let guests = pool.vms.iter().map(|vmid| {
        let node = cx.cluster.dc.owner(*vmid).map_or(String::new(), |(node, _)| node);
        json!({"id": format!("lxc/{vmid}"), "type": "lxc", "vmid": vmid, "node": node})
    });
    let storages = pool.storages.iter().map(|storage| {
        let node = &cx.node.name;
        json!({
            "id": format!("storage/{node}/{storage}"), "type": "storage", "storage": storage,
            "node": node,
        })
    });
    let mut data = row(name, pool);
    data["members"] = guests.chain(storages).collect();
    Ok(Answer::plain(json!([data])))
}

/// `POST /pools`
pub fn create(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("comment", Kind::Text(4096)), POOL_ID])?;
    let name = cx.params().get("poolid").unwrap_or_default();
    cx.require(&format!("/pool/{name}"), "Pool.Allocate")?;
    let mut acl = cx.cluster.dc.acl_mut();
    if acl.pools.contains_key(name) {
        return Err(ApiError::Failed(format!("create pool failed: pool '{name}' already exists")));
    }
    let comment = cx.params().get("comment").map(str::to_owned);
    acl.pools.insert(name.to_owned(), Pool { comment, ..Pool::default() });
    Ok(Answer::protected(Json::Null, Call::Plain))
}

/// `PUT /pools`: adds members, or removes them.
pub fn change(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("allow-move", Kind::Bool),
        opt("comment", Kind::Text(4096)),
        opt("delete", Kind::Bool),
        POOL_ID,
        opt("storage", Kind::Text(4096)),
        opt("vms", Kind::Text(4096)),
    ])?;
    let params = cx.params();
    let name = params.get("poolid").unwrap_or_default();
    cx.require(&format!("/pool/{name}"), "Pool.Allocate")?;
    let delete = params.flag("delete");
    let failed = |text: String| ApiError::Failed(format!("update pools failed: {text}"));
    let mut vmids = Vec::new();
    for text in split_list(params.get("vms").unwrap_or_default()) {
        let vmid: u32 = text
            .parse()
            .map_err(|_| ApiError::param("vms", format!("invalid format - '{text}'\n")))?;
        cx.require(&format!("/vms/{vmid}"), "VM.Allocate")?;
        vmids.push(vmid);
    }
    let mut acl = cx.cluster.dc.acl_mut();
    for vmid in &vmids {
        match acl.pool_of(*vmid) {
            Some(other) if other != name && !params.flag("allow-move") => {
                return Err(failed(format!(
                    "VM {vmid} belongs already to pool '{other}' and 'allow-move' is not set"
                )));
            }
            other if delete && other != Some(name) => {
                return Err(failed(format!("VM {vmid} is not a pool member")));
            }
            _ => {}
        }
    }
    if !acl.pools.contains_key(name) {
        return Err(missing(name));
    }
    for (other, pool) in &mut acl.pools {
        for vmid in &vmids {
            pool.vms.remove(vmid);
        }
        if other == name {
            if !delete {
                pool.vms.extend(&vmids);
            }
            for storage in split_list(params.get("storage").unwrap_or_default()) {
                if delete {
                    pool.storages.remove(storage);
                } else {
                    pool.storages.insert(storage.to_owned());
                }
            }
            if let Some(comment) = params.get("comment") {
                pool.comment = Some(comment.to_owned());
            }
        }
    }
    Ok(Answer::protected(Json::Null, Call::Plain))
}

/// `DELETE /pools`
pub fn delete(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[POOL_ID])?;
    let name = cx.params().get("poolid").unwrap_or_default();
    cx.require(&format!("/pool/{name}"), "Pool.Allocate")?;
    let mut acl = cx.cluster.dc.acl_mut();
    let pool = acl.pools.get(name).ok_or_else(|| missing(name))?;
    if !pool.vms.is_empty() || !pool.storages.is_empty() {
        return Err(ApiError::Failed(format!("delete pool failed: pool '{name}' is not empty")));
    }
    acl.pools.remove(name);
    Ok(Answer::protected(Json::Null, Call::Plain))
}
