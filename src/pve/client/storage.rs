//! `/nodes/{node}/storage`: volumes and templates.

use std::path::Path;

use tokio::time::Instant;

use super::{Client, Payload, query, segment};
use crate::pve::error::{Call, Error};
use crate::pve::http::Part;
use crate::pve::identity::Id128;
use crate::pve::types::{Loose, Storage, Volume, list};
use crate::pve::upid::Upid;

/// A file to be put into a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upload<'a> {
    /// What it is to Proxmox, such as `vztmpl`.
    pub content: &'a str,
    /// Its name there: letters, digits and `.`, `_`, `-`, `+`.
    pub name: &'a str,
    /// Where it is.
    pub path: &'a Path,
}

impl Client {
    /// The storages of the node that the token may see.
    pub async fn storages(&self) -> Result<Vec<Storage>, Error> {
        let call = self.call("GET", self.node_path("storage"), None);
        let data = self.get(&call).await?;
        let storages = list(&data, |entry| Storage::from_json(entry, None));
        storages.ok_or_else(|| self.unlike(call, "no list in the answer"))
    }

    /// One storage of the node.
    pub async fn storage_status(&self, storage: &str) -> Result<Storage, Error> {
        let call = self.storage_call("GET", storage, "/status");
        let data = self.get(&call).await?;
        let status = Storage::from_json(&data, Some(storage));
        status.ok_or_else(|| self.unlike(call, "no state in the answer"))
    }

    /// What is in a storage, all of it or one kind of content, such as `vztmpl`.
    pub async fn storage_content(
        &self,
        storage: &str,
        content: Option<&str>,
    ) -> Result<Vec<Volume>, Error> {
        let fields: Vec<_> = content.map(|content| ("content", content)).into_iter().collect();
        let call = self.storage_call("GET", storage, &format!("/content{}", query(&fields)));
        let data = self.get(&call).await?;
        list(&data, Volume::from_json).ok_or_else(|| self.unlike(call, "no list in the answer"))
    }

    /// Puts a file into a storage, before `deadline`; answers with the task that moves it to its
    /// place. The file is read as it is sent.
    ///
    /// An upload whose answer was lost is not looked for, since its task does not say what it is
    /// about; sending it again is safe, as it replaces the file.
    pub async fn upload(
        &self,
        storage: &str,
        upload: &Upload<'_>,
        deadline: Instant,
    ) -> Result<Upid, Error> {
        let call = self.storage_call("POST", storage, "/upload");
        let unsendable =
            |reason: String| Error::Unsendable { call: Box::new(call.clone()), reason };
        // Both stand in a header of the form, and Proxmox takes no others.
        let plain = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b))
        };
        if !plain(upload.name) || !plain(upload.content) {
            return Err(unsendable(format!(
                "'{}' is not a name for a file",
                upload.name.escape_debug()
            )));
        }
        let metadata = tokio::fs::metadata(upload.path).await;
        let metadata =
            metadata.map_err(|e| unsendable(format!("{}: {e}", upload.path.display())))?;
        // Nothing in a file can be made to contain it.
        let boundary = Id128::random().map_err(|e| unsendable(format!("/dev/urandom: {e}")))?;
        let payload = Payload::Multipart {
            boundary: boundary.to_string(),
            fields: vec![Part {
                name: "content",
                filename: None,
                value: upload.content.to_owned(),
            }],
            file: Part {
                name: "filename",
                filename: Some(upload.name.to_owned()),
                value: String::new(),
            },
            path: upload.path.to_owned(),
            size: metadata.len(),
        };
        let reply = self.send_until(&call, &payload, deadline).await?;
        let upid = Loose(&reply.data).as_text().and_then(|text| text.parse().ok());
        upid.ok_or_else(|| self.unlike(call, "no task id in the answer"))
    }

    fn storage_call(&self, method: &'static str, storage: &str, below: &str) -> Call {
        self.call(method, self.node_path(&format!("storage/{}{below}", segment(storage))), None)
    }
}
