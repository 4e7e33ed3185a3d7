//! `/storage` and `/nodes/{node}/storage`

use serde_json::{Value as Json, json};
use sha1::{Digest, Sha1};

use super::{Answer, Context};
use crate::conf::hex;
use crate::error::ApiError;
use crate::params::{Kind, Spec, VMID, opt, req, verify};
use crate::profile::Call;
use crate::storage::{CONTENT, Entry, Storage, VolumeId};

/// What a caller needs to see a storage.
const SEE: [&str; 2] = ["Datastore.Audit", "Datastore.AllocateSpace"];

fn may_see(cx: &Context<'_>, storage: &Storage) -> bool {
    let path = format!("/storage/{}", storage.name);
    SEE.iter().any(|privilege| cx.may(&path, privilege))
}

/// The storage of a path, if the caller may see it.
fn find<'a>(cx: &Context<'a>, name: &str) -> Result<&'a Storage, ApiError> {
    cx.acl().require_any(cx.who, &format!("/storage/{name}"), &SEE)?;
    Ok(cx.node.storage(name)?)
}

/// `GET /storage`: the configuration.
pub fn configuration(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[opt("type", Kind::Text(32))])?;
    let wanted = cx.params().get("type");
    let rows = cx
        .node
        .storages
        .iter()
        .filter(|s| may_see(cx, s) && wanted.is_none_or(|t| t == s.backend().kind()))
        .map(|s| {
            let mut row = json!({
                "storage": s.name, "type": s.backend().kind(), "content": CONTENT,
                "path": s.backend().directory(),
                "priority": 0, "prune-backups": "keep-all=1",
                "digest": hex(&Sha1::digest(s.name.as_bytes())),
            });
            if s.shared {
                row["shared"] = json!(1);
            }
            row
        });
    Ok(Answer::plain(rows.collect()))
}

fn state(storage: &Storage) -> Json {
    let space = storage.space();
    json!({
        "type": storage.backend().kind(), "active": 1, "enabled": 1,
        "shared": i32::from(storage.shared), "content": CONTENT,
        "total": space.total, "used": space.used, "avail": space.avail,
    })
}

/// `GET /nodes/{node}/storage`
pub fn list(cx: &Context<'_>) -> Result<Answer, ApiError> {
    cx.verify(&[
        opt("content", Kind::Text(255)),
        opt("enabled", Kind::Bool),
        opt("format", Kind::Bool),
        opt("storage", Kind::Text(255)),
        opt("target", Kind::Text(63)),
    ])?;
    let params = cx.params();
    let fits = |storage: &Storage| {
        params.get("storage").is_none_or(|name| name == storage.name)
            && params.get("content").is_none_or(|list| {
                crate::params::split_list(list).iter().any(|c| CONTENT.split(',').any(|o| o == *c))
            })
    };
    let rows = cx.node.storages.iter().filter(|s| may_see(cx, s) && fits(s)).map(|s| {
        let mut row = state(s);
        let space = s.space();
        row["storage"] = json!(s.name);
        row["used_fraction"] = json!(match space.total {
            0 => 0.0,
            total => space.used as f64 / total as f64,
        });
        row
    });
    Ok(Answer::protected(rows.collect(), Call::Status))
}

/// `GET /nodes/{node}/storage/{storage}/status`
pub fn status(cx: &Context<'_>, name: &str) -> Result<Answer, ApiError> {
    let storage = find(cx, name)?;
    cx.verify(&[])?;
    Ok(Answer::protected(state(storage), Call::Status))
}

/// `GET /nodes/{node}/storage/{storage}/content`
pub fn content(cx: &Context<'_>, name: &str) -> Result<Answer, ApiError> {
    let storage = find(cx, name)?;
    cx.verify(&[opt("content", Kind::Text(32)), Spec { optional: true, ..VMID }])?;
    let params = cx.params();
    let vmid: Option<u32> = params.number("vmid");
    let rows = storage
        .backend()
        .entries()
        .into_iter()
        .filter(|e| vmid.is_none() || e.vmid == vmid)
        .filter(|e| match e.vmid {
            Some(owner) => {
                cx.may(&format!("/vms/{owner}"), "VM.Config.Disk")
                    || cx.may(&format!("/storage/{name}"), "Datastore.Allocate")
            }
            None => true,
        })
        .map(|entry| row(storage, &entry))
        .filter(|row| params.get("content").is_none_or(|c| row["content"] == c));
    Ok(Answer::protected(rows.collect(), Call::Status))
}

fn row(storage: &Storage, entry: &Entry) -> Json {
    let mut row = json!({
        "volid": format!("{}:{}", storage.name, entry.name),
        "content": entry.content, "format": entry.format, "size": entry.size,
        "ctime": entry.ctime,
    });
    if let Some(vmid) = entry.vmid {
        // All guests here are CTs.
        row["content"] = json!("rootdir");
        row["vmid"] = json!(vmid);
        row["parent"] = Json::Null;
        row["used"] = json!(entry.size);
    }
    row
}

/// The volume of a path: its name with or without the storage's.
fn parse_volume(cx: &Context<'_>, storage: &str, text: &str) -> Result<VolumeId, ApiError> {
    let text = match text.contains(':') {
        true => text.to_owned(),
        false => format!("{storage}:{text}"),
    };
    let volume: VolumeId = text.parse().map_err(|e| ApiError::Failed(format!("{e}")))?;
    if volume.storage != storage {
        let text = format!("storage ID missmatch ({storage} != {})", volume.storage);
        return Err(ApiError::Failed(text));
    }
    cx.node.storage(storage)?;
    Ok(volume)
}

/// `GET /nodes/{node}/storage/{storage}/content/{volume}`
pub fn volume(cx: &Context<'_>, name: &str, text: &str) -> Result<Answer, ApiError> {
    cx.verify(&[])?;
    let volume = parse_volume(cx, name, text)?;
    let storage = find(cx, name)?;
    let entry = storage.backend().entries().into_iter().find(|e| e.name == volume.name);
    let entry =
        entry.ok_or_else(|| ApiError::Failed(format!("volume '{volume}' does not exist")))?;
    let path = storage.backend().path(&volume.name)?;
    Ok(Answer::protected(
        json!({
            "path": path, "format": entry.format, "size": entry.size, "used": entry.size,
        }),
        Call::Status,
    ))
}

/// `DELETE /nodes/{node}/storage/{storage}/content/{volume}`
pub fn delete_volume(cx: &Context<'_>, name: &str, text: &str) -> Result<Answer, ApiError> {
    cx.verify(&[opt("delay", Kind::Int(1, 30))])?;
    let volume = parse_volume(cx, name, text)?;
    cx.require(&format!("/storage/{name}"), "Datastore.Allocate")?;
    let node = cx.node.clone();
    let storage = node.storage(name)?;
    storage.backend().path(&volume.name)?;
    let entry = storage.backend().entries().into_iter().find(|e| e.name == volume.name);
    let owner = entry.and_then(|e| e.vmid);
    if let Some(owner) = owner.filter(|v| cx.cluster.dc.owner(*v).is_some()) {
        let text = format!("cannot remove image, a guest with VMID '{owner}' exists!");
        return Err(ApiError::Failed(text));
    }
    let id = format!("{}@{name}", owner.map_or(String::new(), |v| v.to_string()));
    let work = |task: std::sync::Arc<crate::task::Task>| {
        let node = node.clone();
        async move {
            node.free_volume(&volume)?;
            task.log(&format!("Removed volume '{volume}'"));
            Ok(())
        }
    };
    let upid = cx.node.tasks.spawn(&cx.node.name, "imgdel", &id, cx.who, work);
    Ok(Answer::protected(json!(upid), Call::Status))
}

/// A file name as the server makes it of what a client sent.
fn normalise(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    last.trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '_' })
        .collect()
}

/// Checks what an upload or download makes of a storage: the volume.
pub fn new_file(
    cx: &Context<'_>,
    storage: &str,
    content: &str,
    file: &str,
) -> Result<VolumeId, ApiError> {
    cx.node.storage(storage)?;
    let file = normalise(file);
    let valid = match content {
        "vztmpl" => {
            file.starts_with(|c: char| c.is_ascii_alphanumeric())
                && [".tar.gz", ".tar.xz", ".tar.zst", ".tar"].iter().any(|e| file.ends_with(e))
        }
        _ => file.ends_with(".iso") || file.ends_with(".img"),
    };
    let id = format!("{storage}:{content}/{file}");
    match id.parse() {
        Ok(volume) if valid => Ok(volume),
        _ => Err(ApiError::param("filename", "wrong file extension")),
    }
}

/// `POST /nodes/{node}/storage/{storage}/upload`: the file lies beside already.
pub fn upload(cx: &Context<'_>, name: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/storage/{name}"), "Datastore.AllocateTemplate")?;
    let algorithms = Kind::Enum(&["md5", "sha1", "sha224", "sha256", "sha384", "sha512"]);
    let specs = [
        opt("checksum", Kind::Text(128)),
        opt("checksum-algorithm", algorithms),
        req("content", Kind::Enum(&["iso", "vztmpl"])),
        req("filename", Kind::Text(255)),
    ];
    verify(&[&specs], cx.params())?;
    let params = cx.params();
    let text = |key: &str| params.get(key).unwrap_or_default().to_owned();
    let volume = new_file(cx, name, &text("content"), &text("filename"))?;
    let upload = cx.request.upload.clone();
    let upload = upload.ok_or_else(|| ApiError::param("filename", "there is no file"))?;
    let expected = match (params.get("checksum"), params.get("checksum-algorithm")) {
        (None, None) => None,
        (Some(sum), Some("sha256")) => Some(sum.to_ascii_lowercase()),
        _ => return Err(ApiError::param("checksum-algorithm", "this simulator knows sha256 only")),
    };
    let node = cx.node.clone();
    let storage = node.storage(name)?;
    let target = storage.backend().path(&volume.name)?;
    storage.check_room().map_err(|e| format!("unable to import '{volume}' - {e}"))?;
    let (shown, name) = (node.name.clone(), name.to_owned());
    let work = |task: std::sync::Arc<crate::task::Task>| {
        let node = node.clone();
        async move {
            let from = upload.path();
            task.log(&format!("starting file import from: {}", from.display()));
            task.log(&format!("target node: {shown}"));
            task.log(&format!("target file: {}", target.display()));
            task.log(&format!("file size is: {}", upload.size()));
            if expected.is_some_and(|sum| sum != upload.sha256()) {
                return Err("checksum mismatch: got unexpected checksum".into());
            }
            task.log(&format!("command: cp -- {} {}", from.display(), target.display()));
            node.storage(&name)?.check_room()?;
            upload.move_to(&target).map_err(|e| format!("import failed: {e}"))?;
            task.log("finished file import successfully");
            Ok(())
        }
    };
    let upid = cx.node.tasks.spawn(&cx.node.name, "imgcopy", "", cx.who, work);
    // A connection that carried a file is closed.
    Ok(Answer { close: true, ..Answer::protected(json!(upid), Call::Status) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_are_made_harmless() {
        for (name, expected) in [
            ("a.tar.gz", "a.tar.gz"),
            ("../../etc/passwd", "passwd"),
            ("C:\\x\\a b.tar", "a_b.tar"),
            ("a\0b\n.tar", "a_b_.tar"),
            ("/", ""),
            ("..", ".."),
        ] {
            assert_eq!(normalise(name), expected, "{name:?}");
        }
    }
}
