//! `/nodes/{node}/lxc/{vmid}/config` and `pending`

use std::collections::BTreeMap;

use super::{Answer, Context};
use crate::conf::{self, Config, OPTIONS, Section};
use crate::ct::check_lock;
use crate::error::ApiError;
use crate::generate::Limits;
use crate::mounts::Mount;
use crate::node::Node;
use crate::params::{Kind, Spec, opt, parse_bool, split_list, split_props};
use crate::profile::Call;
use crate::storage::VolumeId;

/// Options that take effect, or at least stand in the file, at once even if the CT runs.
const STORED: &[&str] = &[
    "cores",
    "description",
    "hookscript",
    "hostname",
    "lock",
    "onboot",
    "protection",
    "startup",
    "tags",
    "template",
];

/// `GET …/config`
pub fn get(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Audit")?;
    let vmid =
        cx.verify_ct(vmid, &[&[opt("current", Kind::Bool), opt("snapshot", Kind::Text(40))]])?;
    let current = cx.params().flag("current");
    let snapshot = cx.params().get("snapshot");
    if current && snapshot.is_some() {
        let text = "cannot use 'snapshot' parameter with 'current'";
        return Err(ApiError::param("snapshot", text));
    }
    let config = cx.node.load(vmid)?;
    let data = match snapshot {
        Some(name) => config
            .api_snapshot(name)
            .ok_or_else(|| ApiError::Failed(format!("snapshot '{name}' does not exist")))?,
        None => config.api(current),
    };
    Ok(Answer::plain(data))
}

/// `GET …/pending`
pub fn pending(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    cx.require(&format!("/vms/{vmid}"), "VM.Audit")?;
    let vmid = cx.verify_ct(vmid, &[])?;
    Ok(Answer::plain(cx.node.load(vmid)?.api_pending()))
}

/// A change, sorted into its parts.
struct Change {
    set: BTreeMap<String, String>,
    delete: Vec<String>,
    revert: Vec<String>,
    digest: Option<String>,
}

/// `PUT …/config`
pub async fn put(cx: &Context<'_>, vmid: &str) -> Result<Answer, ApiError> {
    const OWN: &[Spec] = &[
        opt("delete", Kind::Text(4096)),
        opt("digest", Kind::Text(40)),
        opt("revert", Kind::Text(4096)),
    ];
    cx.acl().require_any(
        cx.who,
        &format!("/vms/{vmid}"),
        &[
            "VM.Config.Disk",
            "VM.Config.CPU",
            "VM.Config.Memory",
            "VM.Config.Network",
            "VM.Config.Options",
        ],
    )?;
    let vmid = cx.verify_ct(vmid, &[OPTIONS, OWN])?;
    let mut change = split(cx)?;
    let set = change.set.iter().map(|(k, v)| (k.as_str(), Some(v.as_str())));
    let removed = change.delete.iter().chain(&change.revert).map(|k| (k.as_str(), None));
    // Without rights nobody learns whether the CT exists.
    let before = cx.node.load(vmid).unwrap_or_default();
    check_options(cx, vmid, None, &before.current, set.chain(removed))?;
    let _lock = cx.node.lock_ct(vmid).await?;
    let mut config = cx.node.load(vmid)?;
    check_lock(&config)?;
    if change.digest.as_ref().is_some_and(|d| *d != config.digest) {
        let text = "detected modified configuration - file changed by other user? Try again.";
        return Err(ApiError::Failed(text.into()));
    }
    let before = config.clone();
    let made = allocate(cx.node, vmid, &before, &mut change).await?;
    let changed = async {
        stage(&mut config, &change)?;
        let result = if cx.node.is_running(vmid) {
            let pid = cx.node.init_pid(vmid).await;
            apply_live(cx.node, pid, &mut config)?;
            Ok(())
        } else {
            apply_stopped(cx.node, &mut config)
        };
        cx.node.settle_volumes(&before, &mut config)?;
        cx.node.store(vmid, &config)?;
        Ok::<_, ApiError>(result)
    };
    match changed.await {
        Ok(result) => result?,
        Err(error) => {
            for volume in &made {
                cx.node.free_volume(volume)?;
            }
            return Err(error);
        }
    }
    Ok(Answer::protected(serde_json::Value::Null, Call::Put))
}

fn split(cx: &Context<'_>) -> Result<Change, ApiError> {
    let mut set = cx.params().0.clone();
    let mut list = |name: &str| -> Vec<String> {
        let text = set.remove(name).unwrap_or_default();
        split_list(&text).into_iter().map(str::to_owned).collect()
    };
    let (delete, revert) = (list("delete"), list("revert"));
    let digest = set.remove("digest").filter(|d| !d.is_empty());
    if set.is_empty() && delete.is_empty() && revert.is_empty() {
        return Err(ApiError::Failed("no options specified".into()));
    }
    for (name, keys) in [("delete", &delete), ("revert", &revert)] {
        for key in keys {
            if !conf::is_option(key) {
                return Err(ApiError::param(name, format!("unknown option '{key}'")));
            }
            if set.contains_key(key) {
                let text = format!("you can't use '-{key}' and -{name} {key}' at the same time");
                return Err(ApiError::param(name, text));
            }
        }
    }
    check_lines(set.iter())?;
    Ok(Change { set, delete, revert, digest })
}

/// Fails for a value that would become lines of its own in the file; notes are encoded.
pub fn check_lines<'a>(
    mut options: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), ApiError> {
    match options.find(|(key, value)| *key != "description" && value.contains('\n')) {
        Some((key, _)) => {
            let text = format!("detected invalid newline inside property '{key}'");
            Err(ApiError::Failed(text))
        }
        None => Ok(()),
    }
}

/// What each option needs, and what only root@pam with a ticket may set. `before` is what the
/// CT is without the change; rights may also come from the pool in which it will be.
pub fn check_options<'a>(
    cx: &Context<'_>,
    vmid: u32,
    pool: Option<&str>,
    before: &Section,
    changes: impl Iterator<Item = (&'a str, Option<&'a str>)>,
) -> Result<(), ApiError> {
    if cx.who.is_root() {
        return Ok(());
    }
    let need = |privilege: &str| match pool {
        Some(pool) if cx.may(&format!("/pool/{pool}"), privilege) => Ok(()),
        _ => cx.require(&format!("/vms/{vmid}"), privilege),
    };
    for (key, value) in changes {
        match stem(key) {
            "cores" | "cpulimit" | "cpuunits" => need("VM.Config.CPU")?,
            "memory" | "swap" => need("VM.Config.Memory")?,
            "net" => {
                need("VM.Config.Network")?;
                if let Some(bridge) = value.and_then(bridge_of) {
                    cx.require(&format!("/sdn/zones/localnetwork/{bridge}"), "SDN.Use")?;
                }
            }
            "nameserver" | "searchdomain" | "hostname" => need("VM.Config.Network")?,
            "rootfs" | "mp" | "unused" => {
                need("VM.Config.Disk")?;
                if let Some(mount) = value.and_then(|v| Mount::parse(v).ok()) {
                    check_mount(cx, &mount)?;
                }
            }
            "dev" => return Err(ApiError::root_only("configuring device passthrough")),
            "hookscript" => return Err(ApiError::root_only("changing the hookscript")),
            "features" => {
                check_features(before, value.unwrap_or_default())?;
                need("VM.Allocate")?;
            }
            _ => need("VM.Config.Options")?,
        }
    }
    Ok(())
}

/// Checks that the caller may use the source of a mount point, and that its storage exists.
pub fn check_mount(cx: &Context<'_>, mount: &Mount) -> Result<(), ApiError> {
    if let Some(kind) = mount.restricted().filter(|_| !cx.who.is_root()) {
        return Err(ApiError::root_only(&format!("mount point type {kind}")));
    }
    if let Some(storage) = mount.storage() {
        cx.node.storage(storage)?;
        cx.require(&format!("/storage/{storage}"), "Datastore.AllocateSpace")?;
    }
    Ok(())
}

fn bridge_of(net: &str) -> Option<String> {
    let bridge = split_props("name", net).into_iter().find(|(key, _)| key == "bridge");
    bridge.map(|(_, value)| value)
}

fn check_features(before: &Section, value: &str) -> Result<(), ApiError> {
    if !before.flag("unprivileged") {
        return Err(ApiError::root_only("changing feature flags for privileged container"));
    }
    let flags = |text: &str| -> BTreeMap<String, String> {
        let on = |v: &str| parse_bool(v) != Some(false);
        split_props("", text).into_iter().filter(|(k, v)| k != "nesting" && on(v)).collect()
    };
    if flags(value) != flags(&before.text("features").unwrap_or_default()) {
        return Err(ApiError::root_only("changing feature flags (except nesting)"));
    }
    Ok(())
}

/// The option without its index.
fn stem(key: &str) -> &str {
    key.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// Makes the volumes that new mount points ask for. Gives those that were made.
async fn allocate(
    node: &Node,
    vmid: u32,
    before: &Config,
    change: &mut Change,
) -> Result<Vec<VolumeId>, ApiError> {
    let mut made = Vec::new();
    let unprivileged = before.current.flag("unprivileged");
    for (key, value) in change.set.iter_mut().filter(|(k, _)| matches!(stem(k), "rootfs" | "mp")) {
        let mut mount = Mount::parse(value)?;
        if *key == "rootfs" && mount.source != Mount::parse(&before_rootfs(before))?.source {
            let text = "this simulator does not replace a root file system";
            return Err(ApiError::Failed(text.into()));
        }
        match node.allocate(vmid, &mut mount, unprivileged).await {
            Ok(volume) => made.extend(volume),
            Err(error) => {
                for volume in &made {
                    node.free_volume(volume)?;
                }
                return Err(ApiError::Failed(error));
            }
        }
        *value = mount.to_string();
    }
    Ok(made)
}

fn before_rootfs(before: &Config) -> String {
    before.current.text("rootfs").unwrap_or_default()
}

/// Puts the change into the pending section.
fn stage(config: &mut Config, change: &Change) -> Result<(), ApiError> {
    let failed = |text: String| Err(ApiError::Failed(text));
    for key in &change.revert {
        config.revert(key);
    }
    for key in &change.delete {
        if !config.current.has(key) && !config.pending.has(key) {
            continue;
        }
        match key.as_str() {
            "memory" | "rootfs" | "ostype" => {
                return failed(format!("unable to delete required option '{key}'"));
            }
            "unprivileged" => return failed(format!("unable to delete read-only option: '{key}'")),
            _ => config.add_pending_delete(key),
        }
    }
    for (key, value) in &change.set {
        match stem(key) {
            "unprivileged" => {
                return failed("unable to modify read-only option: 'unprivileged'".into());
            }
            "net" => {
                config.revert(key);
                config.pending.set(key, &complete_net(value));
            }
            _ => {
                config.revert(key);
                config.pending.set(key, value);
            }
        }
    }
    Ok(())
}

/// An address with Proxmox's prefix.
pub fn random_mac() -> String {
    let [a, b, c]: [u8; 3] = rand::random();
    format!("BC:24:11:{a:02X}:{b:02X}:{c:02X}")
}

/// Adds address and type to a network interface and sorts its properties, the name first.
pub fn complete_net(value: &str) -> String {
    let mut props: BTreeMap<String, String> = split_props("name", value).into_iter().collect();
    let name = props.remove("name").unwrap_or_default();
    props.entry("type".into()).or_insert_with(|| "veth".into());
    props.entry("hwaddr".into()).or_insert_with(random_mac);
    let bridge = props.remove("bridge").map(|b| format!(",bridge={b}")).unwrap_or_default();
    let rest: String = props.iter().map(|(k, v)| format!(",{k}={v}")).collect();
    format!("name={name}{bridge}{rest}")
}

/// A stopped CT takes all changes. A missing bridge is an error, and stored nevertheless.
fn apply_stopped(node: &Node, config: &mut Config) -> Result<(), ApiError> {
    let bridges: Vec<String> = config
        .pending
        .values
        .iter()
        .filter(|(k, _)| stem(k) == "net")
        .flat_map(|(_, v)| split_props("name", &v.to_text()))
        .filter(|(k, _)| k == "bridge")
        .map(|(_, v)| v)
        .collect();
    config.apply_pending();
    match bridges.iter().find(|b| (node.host.bridge_mtu)(b).is_none()) {
        Some(bridge) => Err(ApiError::Failed(format!("bridge '{bridge}' does not exist"))),
        None => Ok(()),
    }
}

/// A running CT takes limits into its cgroup, some options into the file, and keeps the rest
/// pending. If a limit cannot be set, nothing is stored.
fn apply_live(node: &Node, pid: Option<u32>, config: &mut Config) -> Result<(), ApiError> {
    let mut applied = config.clone();
    let deleted = config.pending_deletes();
    let touched: Vec<String> =
        config.pending.entries().into_iter().map(|(k, _)| k).chain(deleted.clone()).collect();
    let is_live = |key: &str| matches!(key, "memory" | "swap" | "cpulimit" | "cpuunits");
    for key in &touched {
        if !is_live(key) && !STORED.contains(&key.as_str()) {
            continue;
        }
        match config.pending.text(key) {
            Some(text) => applied.current.set(key, &text),
            None => {
                applied.current.remove(key);
            }
        }
        applied.revert(key);
    }
    let limits = Limits::of(&applied.current);
    for (keys, kind) in [(["memory", "swap"], "memory"), (["cpulimit", "cpuunits"], "cpu")] {
        let Some(key) = keys.iter().find(|k| touched.iter().any(|t| t == *k)) else { continue };
        let result = match (kind, pid) {
            (_, None) => Err(std::io::Error::other("container not running")),
            ("memory", Some(pid)) => node.cgroups.set_memory(pid, &limits),
            (_, Some(pid)) => node.cgroups.set_cpu(pid, &limits),
        };
        if let Err(error) = result {
            let text = format!(
                "unable to hotplug {key}: trying to change {kind} cgroup values: {error}\n"
            );
            return Err(ApiError::param(key, text));
        }
    }
    *config = applied;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_interface_gets_what_is_missing() {
        let net = complete_net("bridge=vmbr0,ip=dhcp,name=eth0,hwaddr=BC:24:11:00:00:01");
        assert_eq!(net, "name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=dhcp,type=veth");
        assert!(complete_net("name=eth0").starts_with("name=eth0,hwaddr=BC:24:11:"));
    }
}
