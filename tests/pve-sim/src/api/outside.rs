//! Calls that need the outside world or programs that the recording node lacked. They fail as
//! recorded: the simulator never connects to anything.

use serde_json::json;

use super::storage::new_file;
use super::{Answer, Context};
use crate::error::ApiError;
use crate::params::{Kind, Spec, opt, req, split_list};
use crate::profile::Call;

/// A reference of a registry: `[HOST[:PORT]/]NAME[:TAG]`.
fn is_reference(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:/".contains(&b))
}

const REFERENCE: Spec = req("reference", Kind::Pattern(is_reference));

/// `GET /nodes/{node}/query-oci-repo-tags`
pub fn oci_tags(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.require(&format!("/nodes/{}", cx.node.name), "Sys.AccessNetwork")?;
    cx.verify(&[REFERENCE])?;
    let reference = cx.params().get("reference").unwrap_or_default();
    let command = format!("skopeo list-tags docker://{reference}");
    Err(ApiError::Failed(format!("command '{command}' failed: exit code 1")))
}

/// `POST /nodes/{node}/storage/{storage}/oci-registry-pull`
pub fn oci_pull(cx: &Context<'_>, storage: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/storage/{storage}"), "Datastore.AllocateTemplate")?;
    cx.require(&format!("/nodes/{}", cx.node.name), "Sys.AccessNetwork")?;
    cx.verify(&[opt("filename", Kind::Text(255)), REFERENCE])?;
    let reference = cx.params().get("reference").unwrap_or_default().to_owned();
    let last = reference.rsplit('/').next().unwrap_or_default().replace(':', "_");
    let file = format!("{}.tar", cx.params().get("filename").unwrap_or(&last));
    let volume = new_file(cx, storage, "vztmpl", &file)?;
    let path = cx.node.volume_path(&volume)?;
    let work = |task: std::sync::Arc<crate::task::Task>| async move {
        let pid = task.upid.pid;
        task.log("the simulator is not connected to any registry");
        Err(format!(
            "command 'skopeo copy docker://{reference} oci-archive:{}.tmp.{pid}' failed: \
             exit code 1",
            path.display()
        ))
    };
    let upid = cx.node.tasks.spawn(&cx.node.name, "ociregistrypull", &file, cx.who, work);
    Ok(Answer::protected(json!(upid), Call::Status))
}

/// The host and port of a URL.
fn authority(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let host = rest.split('/').next().unwrap_or_default();
    match host.rsplit_once(':') {
        Some(_) => host.to_owned(),
        None => format!("{host}:{}", if scheme == "https" { 443 } else { 80 }),
    }
}

/// `POST /nodes/{node}/storage/{storage}/download-url`
pub fn download(cx: &Context<'_>, storage: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/storage/{storage}"), "Datastore.AllocateTemplate")?;
    if !(cx.may("/", "Sys.Audit") && cx.may("/", "Sys.Modify")) {
        cx.require(&format!("/nodes/{}", cx.node.name), "Sys.AccessNetwork")?;
    }
    cx.verify(&[
        opt("checksum", Kind::Text(128)),
        opt("checksum-algorithm", Kind::Text(16)),
        opt("compression", Kind::Text(16)),
        req("content", Kind::Enum(&["iso", "vztmpl"])),
        req("filename", Kind::Text(255)),
        req("url", Kind::Pattern(|u| u.starts_with("http://") || u.starts_with("https://"))),
        opt("verify-certificates", Kind::Bool),
    ])?;
    let text = |key: &str| cx.params().get(key).unwrap_or_default().to_owned();
    let volume = new_file(cx, storage, &text("content"), &text("filename"))?;
    let (path, url) = (cx.node.volume_path(&volume)?, text("url"));
    let work = |task: std::sync::Arc<crate::task::Task>| async move {
        task.log(&format!("downloading {url} to {}", path.display()));
        let host = authority(&url);
        Err(format!("download failed: Connecting to {host}... failed: Connection refused."))
    };
    let id = text("filename");
    let upid = cx.node.tasks.spawn(&cx.node.name, "download", &id, cx.who, work);
    Ok(Answer::protected(json!(upid), Call::Status))
}

/// `POST /nodes/{node}/vzdump`
pub fn backup(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("compress", Kind::Enum(&["0", "1", "gzip", "lzo", "zstd"])),
        opt("mode", Kind::Enum(&["snapshot", "suspend", "stop"])),
        opt("notes-template", Kind::Text(1024)),
        opt("protected", Kind::Bool),
        opt("remove", Kind::Bool),
        opt("storage", Kind::Text(100)),
        req("vmid", Kind::Text(4096)),
    ])?;
    let vmids = cx.params().get("vmid").unwrap_or_default();
    for vmid in split_list(vmids) {
        cx.require(&format!("/vms/{vmid}"), "VM.Backup")?;
    }
    if let Some(storage) = cx.params().get("storage") {
        cx.node.storage(storage)?;
        cx.require(&format!("/storage/{storage}"), "Datastore.AllocateSpace")?;
    }
    let id = if split_list(vmids).len() == 1 { vmids } else { "" };
    let work = |_| async { Err("unable to find command 'cstream'".to_owned()) };
    let upid = cx.node.tasks.spawn(&cx.node.name, "vzdump", id, cx.who, work);
    Ok(Answer::protected(json!(upid), Call::Status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_a_port() {
        assert_eq!(authority("http://a.example:1/x"), "a.example:1");
        assert_eq!(authority("https://a.example/x"), "a.example:443");
        assert_eq!(authority("http://a.example"), "a.example:80");
    }
}
