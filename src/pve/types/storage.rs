//! Storages and what is in them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Loose, words};
use crate::config::Vmid;

/// A storage as a node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Its name.
    pub name: String,
    /// Such as `dir` or `zfspool`.
    pub kind: String,
    /// What may be in it, such as `rootdir` and `vztmpl`.
    pub content: BTreeSet<String>,
    /// It is there and can be used.
    pub active: bool,
    /// An administrator allows it.
    pub enabled: bool,
    /// All nodes see the same.
    pub shared: bool,
    /// Size in bytes.
    pub total: Option<u64>,
    /// Free bytes.
    pub available: Option<u64>,
}

impl Storage {
    /// `name` is what was asked for, where the answer does not repeat it.
    pub(in crate::pve) fn from_json(data: &Value, name: Option<&str>) -> Option<Storage> {
        let data = Loose(data);
        Some(Storage {
            name: data.text("storage").or(name.map(str::to_owned))?,
            kind: data.text("type")?,
            content: words(&data.text("content").unwrap_or_default()),
            active: data.flag("active"),
            enabled: data.flag("enabled"),
            shared: data.flag("shared"),
            total: data.number("total"),
            available: data.number("avail"),
        })
    }
}

/// An entry of a storage's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// `STORAGE:PATH`
    pub id: String,
    /// Such as `vztmpl`.
    pub content: String,
    /// Such as `tgz`.
    pub format: String,
    /// Size in bytes.
    pub size: Option<u64>,
    /// The guest it belongs to.
    pub vmid: Option<Vmid>,
}

impl Volume {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<Volume> {
        let data = Loose(data);
        Some(Volume {
            id: data.text("volid")?,
            content: data.text("content").unwrap_or_default(),
            format: data.text("format").unwrap_or_default(),
            size: data.number("size"),
            vmid: data.get("vmid").and_then(Loose::as_vmid),
        })
    }
}
