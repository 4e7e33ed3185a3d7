//! The cluster, its nodes and pools.

use serde_json::Value;

use super::Loose;
use crate::config::Vmid;

/// `GET /version`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Such as `9.2.11`.
    pub version: String,
    /// Such as `9.2`.
    pub release: String,
}

impl Version {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<Version> {
        let data = Loose(data);
        let version = data.text("version")?;
        let release = data.text("release").unwrap_or_default();
        Some(Version { version, release })
    }
}

/// An entry of `GET /nodes`. Figures are up to 10 s old, and missing if nobody has collected any.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSummary {
    /// Its name.
    pub name: String,
    /// `online`, `offline` or `unknown`.
    pub status: String,
    /// Load, from 0 to 1.
    pub cpu: Option<f64>,
    /// CPUs.
    pub cpus: Option<u64>,
    /// Used bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of memory.
    pub max_memory: Option<u64>,
}

impl NodeSummary {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<NodeSummary> {
        let data = Loose(data);
        Some(NodeSummary {
            name: data.text("node")?,
            status: data.text("status").unwrap_or_default(),
            cpu: data.get("cpu").and_then(Loose::as_fraction),
            cpus: data.number("maxcpu"),
            memory: data.number("mem"),
            max_memory: data.number("maxmem"),
        })
    }
}

/// `GET /nodes/{node}/status`
#[derive(Debug, Clone, PartialEq)]
pub struct NodeStatus {
    /// Such as `pve-manager/9.2.11/14a22df3`.
    pub pve_version: String,
    /// The kernel's release.
    pub kernel: String,
    /// Seconds since boot.
    pub uptime: u64,
    /// Load, from 0 to 1.
    pub cpu: Option<f64>,
    /// CPUs.
    pub cpus: Option<u64>,
    /// Used and all bytes of memory.
    pub memory: Option<(u64, u64)>,
    /// Averages over 1, 5 and 15 minutes.
    pub load: Vec<f64>,
}

impl NodeStatus {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<NodeStatus> {
        let data = Loose(data);
        let kernel = data.get("current-kernel").and_then(|kernel| kernel.text("release"));
        let memory = data.get("memory");
        Some(NodeStatus {
            pve_version: data.text("pveversion")?,
            kernel: kernel.or_else(|| data.text("kversion")).unwrap_or_default(),
            uptime: data.number("uptime").unwrap_or_default(),
            cpu: data.get("cpu").and_then(Loose::as_fraction),
            cpus: data.get("cpuinfo").and_then(|info| info.number("cpus")),
            memory: memory.and_then(|m| Some((m.number("used")?, m.number("total")?))),
            load: data
                .get("loadavg")
                .map(|list| list.items().filter_map(Loose::as_fraction).collect())
                .unwrap_or_default(),
        })
    }
}

/// `GET /cluster/status`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterStatus {
    /// The cluster's name; `None` if the node is alone.
    pub name: Option<String>,
    /// Whether `/etc/pve` can be written. A node that is alone always can.
    pub quorate: bool,
    /// The nodes.
    pub members: Vec<Member>,
}

/// A node of [`ClusterStatus`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Whether the others can reach it.
    pub online: bool,
    /// It is the one that answered.
    pub local: bool,
    /// Its address in the cluster's network.
    pub address: Option<String>,
}

impl ClusterStatus {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<ClusterStatus> {
        if !data.is_array() {
            return None;
        }
        let of = |kind: &'static str| {
            Loose(data).items().filter(move |entry| entry.text("type").as_deref() == Some(kind))
        };
        let member = |entry: Loose<'_>| {
            Some(Member {
                name: entry.text("name")?,
                online: entry.flag("online"),
                local: entry.flag("local"),
                address: entry.text("ip"),
            })
        };
        let cluster = of("cluster").next();
        Some(ClusterStatus {
            name: cluster.and_then(|cluster| cluster.text("name")),
            quorate: cluster.is_none_or(|cluster| cluster.flag("quorate")),
            members: of("node").filter_map(member).collect(),
        })
    }
}

/// An entry of `GET /cluster/resources`: a guest, a node, a storage or a network. States are up to
/// 10 s old.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Such as `lxc/100`.
    pub id: String,
    /// `lxc`, `qemu`, `node`, `storage`, `network` or another.
    pub kind: String,
    /// Where it is.
    pub node: Option<String>,
    /// Of a guest.
    pub vmid: Option<Vmid>,
    /// Of a guest: its name.
    pub name: Option<String>,
    /// Such as `running` or `available`.
    pub status: String,
    /// Of a guest: its pool.
    pub pool: Option<String>,
    /// Of a guest: as stored, separated by semicolons.
    pub tags: Option<String>,
}

impl Resource {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<Resource> {
        let data = Loose(data);
        Some(Resource {
            id: data.text("id")?,
            kind: data.text("type")?,
            node: data.text("node"),
            vmid: data.get("vmid").and_then(Loose::as_vmid),
            name: data.text("name"),
            status: data.text("status").unwrap_or_default(),
            pool: data.text("pool"),
            tags: data.text("tags"),
        })
    }
}

/// An entry of `GET /pools`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub id: String,
    /// Words about it; empty if there are none.
    pub comment: String,
}

impl Pool {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<Pool> {
        let data = Loose(data);
        Some(Pool { id: data.text("poolid")?, comment: data.text("comment").unwrap_or_default() })
    }
}
