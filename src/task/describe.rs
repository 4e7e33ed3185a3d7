//! What Proxmox shows of a container.

use crate::config::Config;
use crate::images::Image;
use crate::ledger::RunDir;
use crate::oci::plan::{IdMapping, IdMappings, Limit, Plan, Resources};
use crate::pve::CtConfig;
use crate::pve::conf::{CpuLimit, CtDescription, Hostname, IdKind, IdRange, Tag};
use crate::pve::identity::Identity;

const MIB: u64 = 1 << 20;
/// Proxmox's smallest memory limit, in MiB.
const MEMORY_MIN: u64 = 16;
/// OCI's default period, in microseconds (cpu(7) of cgroup v1 and v2).
const PERIOD: u64 = 100_000;
/// Proxmox's largest weight on cgroup2.
const CPUUNITS_MAX: u64 = 10_000;

/// The CT's configuration file.
#[must_use]
pub fn ct(
    config: &Config,
    plan: &Plan,
    image: Option<&Image>,
    identity: &Identity,
    dir: &RunDir,
) -> CtDescription {
    let resources = &plan.resources;
    let mut tags: Vec<Tag> = config.ct.tags.iter().filter_map(|tag| Tag::new(tag)).collect();
    // In the web interface, a search for one of them finds a pod, or all pods of a namespace.
    let pod = plan.pod.as_ref();
    let names = [Some(&identity.namespace), pod.map(|p| &p.namespace), pod.map(|p| &p.name)];
    for tag in names.into_iter().flatten().filter_map(|name| Tag::sanitised(name)) {
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    CtDescription {
        hostname: match pod {
            Some(pod) => Hostname::from_pod(&pod.name, &pod.container),
            None => Hostname::from_name(plan.name.as_deref().unwrap_or(&identity.container_id)),
        },
        memory_mib: memory(resources.memory_limit).unwrap_or_else(node_memory),
        swap_mib: swap(resources).unwrap_or(0),
        cpulimit: cpulimit(resources),
        cpuunits: cpuunits(resources),
        tags,
        id_map: plan.user_namespace.as_ref().map(|user| id_map(&user.mappings)).unwrap_or_default(),
        notes: identity.notes(&about(plan, image)),
        rootfs: plan.root_path.clone(),
        include: dir.lxc_conf(),
    }
}

/// What the notes say of the container besides its identity.
fn about<'a>(plan: &'a Plan, image: Option<&'a Image>) -> Vec<(&'static str, &'a str)> {
    let mut about = Vec::new();
    if let Some(pod) = &plan.pod {
        about.extend([
            ("pod", pod.name.as_str()),
            ("pod namespace", &pod.namespace),
            ("pod uid", &pod.uid),
            ("container", &pod.container),
        ]);
    }
    about.extend(plan.name.as_deref().map(|name| ("name", name)));
    let name = image.map(|image| image.name.as_str());
    about.extend(name.or(plan.image.as_deref()).map(|name| ("image", name)));
    about.extend(image.and_then(|image| image.digest.as_deref()).map(|digest| ("digest", digest)));
    about.retain(|(_, value)| !value.is_empty());
    about
}

fn id_map(mappings: &IdMappings) -> Vec<IdRange> {
    let range = |kind: IdKind| {
        move |&IdMapping { container, host, size }: &IdMapping| IdRange {
            kind,
            container,
            host,
            size,
        }
    };
    let uids = mappings.uids.iter().map(range(IdKind::User));
    uids.chain(mappings.gids.iter().map(range(IdKind::Group))).collect()
}

/// The keys that an update changes.
#[must_use]
pub fn changes(resources: &Resources) -> Vec<(&'static str, String)> {
    let mut changes = Vec::new();
    if let Some(limit) = resources.memory_limit {
        let shown = memory(Some(limit)).unwrap_or_else(node_memory);
        changes.push(("memory", shown.to_string()));
    }
    if let Some(swap) = swap(resources) {
        changes.push(("swap", swap.to_string()));
    }
    if let Some(limit) = cpulimit(resources) {
        changes.push(("cpulimit", limit.to_string()));
    } else if resources.cpu_quota == Some(Limit::Max) {
        changes.push(("cpulimit", "0".to_owned()));
    }
    if let Some(units) = cpuunits(resources) {
        changes.push(("cpuunits", units.to_string()));
    }
    changes
}

/// A key of a CT's configuration and its value; `None` if it is not set.
pub type Shown = (&'static str, Option<String>);

/// The present values of keys that [`changes`] knows.
pub fn shown(config: &CtConfig, keys: impl Iterator<Item = &'static str>) -> Vec<Shown> {
    let value = |key| match key {
        "memory" => config.memory_mib.map(|mib| mib.to_string()),
        "swap" => config.swap_mib.map(|mib| mib.to_string()),
        "cpulimit" => config.cpulimit.clone(),
        "cpuunits" => config.cpuunits.map(|units| units.to_string()),
        _ => None,
    };
    keys.map(|key| (key, value(key))).collect()
}

/// Rounded up to MiB, because Proxmox has no finer unit; the cgroup gets the exact value.
fn memory(limit: Option<Limit>) -> Option<u64> {
    match limit {
        Some(Limit::Value(bytes)) => Some(bytes.div_ceil(MIB).max(MEMORY_MIN)),
        Some(Limit::Max) | None => None,
    }
}

/// Proxmox counts swap alone, OCI memory and swap together.
fn swap(resources: &Resources) -> Option<u64> {
    match (resources.memory_swap, resources.memory_limit) {
        (Some(Limit::Value(both)), Some(Limit::Value(memory))) => {
            Some(both.saturating_sub(memory).div_ceil(MIB))
        }
        _ => None,
    }
}

/// Without a limit the CT may use all of the node's memory, and so it is shown.
fn node_memory() -> u64 {
    let total = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    total.map_or(MEMORY_MIN, |kib| (kib / 1024).max(MEMORY_MIN))
}

fn cpulimit(resources: &Resources) -> Option<CpuLimit> {
    match resources.cpu_quota {
        Some(Limit::Value(quota)) => {
            let period = resources.cpu_period.filter(|period| *period > 0).unwrap_or(PERIOD);
            CpuLimit::new(quota as f64 / period as f64)
        }
        Some(Limit::Max) | None => None,
    }
}

/// cgroup2's weight for cgroup v1's shares, as runc converts it.
fn cpuunits(resources: &Resources) -> Option<u32> {
    let shares = resources.cpu_shares.filter(|shares| *shares > 0)?.clamp(2, 262_144);
    let weight = 1 + (shares - 2) * 9_999 / 262_142;
    u32::try_from(weight.min(CPUUNITS_MAX)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_in_proxmox_units() {
        let mut resources = Resources {
            memory_limit: Some(Limit::Value(20_000_000)),
            memory_swap: Some(Limit::Value(40_000_000)),
            cpu_quota: Some(Limit::Value(50_000)),
            cpu_shares: Some(1024),
            ..Resources::default()
        };
        let changed = |resources: &Resources| -> Vec<(&str, String)> { changes(resources) };
        assert_eq!(
            changed(&resources),
            [
                ("memory", "20".to_owned()),
                ("swap", "20".to_owned()),
                ("cpulimit", "0.5".to_owned()),
                ("cpuunits", "39".to_owned()),
            ]
        );
        resources = Resources {
            memory_limit: Some(Limit::Value(1)),
            cpu_quota: Some(Limit::Max),
            ..Resources::default()
        };
        assert_eq!(
            changed(&resources),
            [("memory", "16".to_owned()), ("cpulimit", "0".to_owned())],
            "Proxmox's smallest memory, no limit of CPU time"
        );
        assert!(changed(&Resources::default()).is_empty());
    }
}
