//! CTs.

use std::net::IpAddr;

use serde_json::Value;

use super::{Loose, list};
use crate::config::Vmid;
use crate::pve::upid::Upid;

/// A CT's state: `GET /nodes/{node}/lxc/{vmid}/status/current`, or an entry of the CT list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CtStatus {
    /// The CT.
    pub vmid: Vmid,
    /// Whether LXC's monitor of the CT exists. It turns false 25 to 40 ms after init's death, and
    /// before the stop hooks have run.
    pub running: bool,
    /// Host pid of init; absent when stopped.
    pub pid: Option<u32>,
    /// The configuration's `lock`, such as `backup`.
    pub lock: Option<String>,
    /// Hostname as Proxmox shows it.
    pub name: String,
    /// As stored, separated by semicolons; empty if there are none.
    pub tags: String,
    /// Memory limit in bytes.
    pub max_memory: Option<u64>,
}

impl CtStatus {
    /// `vmid` is what was asked for, where the answer need not repeat it.
    pub(in crate::pve) fn from_json(data: &Value, vmid: Option<Vmid>) -> Option<CtStatus> {
        let data = Loose(data);
        let running = match data.text("status")?.as_str() {
            "running" => true,
            "stopped" => false,
            _ => return None,
        };
        Some(CtStatus {
            vmid: data.get("vmid").and_then(Loose::as_vmid).or(vmid)?,
            running,
            pid: data.number("pid").and_then(|n| u32::try_from(n).ok()).filter(|pid| *pid != 0),
            lock: data.text("lock").filter(|lock| !lock.is_empty()),
            name: data.text("name").unwrap_or_default(),
            tags: data.text("tags").unwrap_or_default(),
            max_memory: data.number("maxmem"),
        })
    }
}

/// A CT's configuration: `GET /nodes/{node}/lxc/{vmid}/config`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CtConfig {
    /// SHA-1 of the file, for changes that must not meet another's.
    pub digest: String,
    /// The notes, decoded; empty if there are none.
    pub description: String,
    /// Raw keys and values in their order.
    pub lxc: Vec<(String, String)>,
    /// `hostname`
    pub hostname: Option<String>,
    /// `tags`, separated by semicolons.
    pub tags: Option<String>,
    /// `lock`, such as `backup`.
    pub lock: Option<String>,
    /// `memory` in MiB.
    pub memory_mib: Option<u64>,
    /// `swap` in MiB.
    pub swap_mib: Option<u64>,
    /// `cpulimit`, a decimal number of CPUs.
    pub cpulimit: Option<String>,
    /// `cpuunits`
    pub cpuunits: Option<u64>,
    /// `rootfs`
    pub rootfs: Option<String>,
    /// `protection`: Proxmox refuses to destroy the CT.
    pub protection: bool,
    /// `entrypoint`: what init is, unquoted and unsplit.
    pub entrypoint: Option<String>,
    /// `env`, each as `NAME=VALUE`.
    pub env: Vec<String>,
}

impl CtConfig {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<CtConfig> {
        if !data.is_object() {
            return None;
        }
        let data = Loose(data);
        let pair = |entry: Loose<'_>| {
            let mut items = entry.items();
            Some((items.next()?.as_text()?, items.next()?.as_text().unwrap_or_default()))
        };
        let lxc = data.get("lxc").map(|list| list.items().filter_map(pair).collect());
        Some(CtConfig {
            digest: data.text("digest").unwrap_or_default(),
            description: data.text("description").unwrap_or_default(),
            lxc: lxc.unwrap_or_default(),
            hostname: data.text("hostname"),
            tags: data.text("tags"),
            lock: data.text("lock"),
            memory_mib: data.number("memory"),
            swap_mib: data.number("swap"),
            cpulimit: data.text("cpulimit"),
            cpuunits: data.number("cpuunits"),
            rootfs: data.text("rootfs"),
            protection: data.flag("protection"),
            entrypoint: data.text("entrypoint"),
            // Separated by NUL, in JSON as in the request.
            env: data
                .text("env")
                .map(|env| {
                    env.split('\0').filter(|one| !one.is_empty()).map(str::to_owned).collect()
                })
                .unwrap_or_default(),
        })
    }
}

/// One key of `GET /nodes/{node}/lxc/{vmid}/pending`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingValue {
    /// Such as `hostname`.
    pub key: String,
    /// What the CT has now.
    pub current: Option<String>,
    /// What it gets with its next start.
    pub pending: Option<String>,
    /// It loses the key with its next start.
    pub delete: bool,
}

impl PendingValue {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<PendingValue> {
        let data = Loose(data);
        Some(PendingValue {
            key: data.text("key")?,
            current: data.text("value"),
            pending: data.text("pending"),
            // 1, or 2 if it is forced.
            delete: data.flag("delete"),
        })
    }
}

/// An entry of `GET /nodes/{node}/lxc/{vmid}/snapshot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Its notes; empty if there are none.
    pub description: String,
    /// When it was taken, in seconds since the epoch.
    pub taken: Option<u64>,
    /// The snapshot it was taken after.
    pub parent: Option<String>,
}

impl Snapshot {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<Snapshot> {
        let data = Loose(data);
        // Not a snapshot but the state of now: Proxmox gives no snapshot this name.
        let name = data.text("name").filter(|name| name != "current")?;
        Some(Snapshot {
            name,
            description: data.text("description").unwrap_or_default(),
            taken: data.number("snaptime"),
            parent: data.text("parent").filter(|parent| !parent.is_empty()),
        })
    }
}

/// A network interface in a CT: an entry of `GET /nodes/{node}/lxc/{vmid}/interfaces`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name in the CT.
    pub name: String,
    /// Its MAC address.
    pub mac: String,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
}

impl Interface {
    fn from_json(data: &Value) -> Option<Interface> {
        let data = Loose(data);
        let address = |entry: Loose<'_>| {
            let prefix = entry.number("prefix").and_then(|n| u8::try_from(n).ok())?;
            Some((entry.text("ip-address")?.parse().ok()?, prefix))
        };
        // Releases before 9 have `inet` and `inet6` alone.
        let cidr = |key: &str| {
            let text = data.text(key)?;
            let (address, prefix) = text.split_once('/')?;
            Some((address.parse().ok()?, prefix.parse().ok()?))
        };
        let addresses = match data.get("ip-addresses") {
            Some(entries) => entries.items().filter_map(address).collect(),
            None => ["inet", "inet6"].into_iter().filter_map(cidr).collect(),
        };
        Some(Interface {
            name: data.text("name")?,
            mac: data.text("hwaddr").or_else(|| data.text("hardware-address")).unwrap_or_default(),
            addresses,
        })
    }
}

/// `Some(None)` if there is no CT that could have any; `None` if it is no list.
pub(in crate::pve) fn interfaces(data: &Value) -> Option<Option<Vec<Interface>>> {
    if data.is_null() { Some(None) } else { list(data, Interface::from_json).map(Some) }
}

/// `POST /nodes/{node}/lxc/{vmid}/termproxy`. Not for debug output: the ticket opens the terminal.
pub(in crate::pve) struct TerminalTicket {
    pub(in crate::pve) port: String,
    pub(in crate::pve) ticket: String,
    /// With the token's id, if there is one.
    pub(in crate::pve) user: String,
    pub(in crate::pve) upid: Upid,
}

impl TerminalTicket {
    pub(in crate::pve) fn from_json(data: &Value) -> Option<TerminalTicket> {
        let data = Loose(data);
        Some(TerminalTicket {
            port: data.text("port")?,
            ticket: data.text("ticket")?,
            user: data.text("user")?,
            upid: data.text("upid")?.parse().ok()?,
        })
    }
}
