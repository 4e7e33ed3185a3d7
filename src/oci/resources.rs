//! `linux.resources`, at Create and in an Update request; devices are in [`super::devices`].

use std::collections::BTreeMap;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxThrottleDevice,
};

use super::document::Document;
use super::plan::{DeviceRule, Limit, Plan, Resources};
use super::{Error, Host, devices, fields};

/// What an Update request changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    pub resources: Resources,
    /// In the place of [`Plan::device_rules`].
    pub device_rules: Option<Vec<DeviceRule>>,
}

/// Reads an Update request for a container: the JSON of an OCI `LinuxResources` object. What it does
/// not set stays as it is.
///
/// # Errors
/// As [`super::plan()`].
pub fn update(json: &[u8], container: &Plan, host: &Host) -> Result<Update, Error> {
    let spec = Document::parse_resources(json)?;
    let mut warnings = fields::check(&spec)?;
    let rules = devices::rules(&spec)?;
    let resources = read(&spec, host, &mut warnings)?;
    for warning in warnings {
        log::warn!("update: {warning}");
    }
    // The runtime's own rules stay.
    let own = &container.device_rules[container.specified_device_rules..];
    let device_rules = (!rules.is_empty()).then(|| [&rules, own].concat());
    Ok(Update { resources, device_rules })
}

pub(super) fn read(
    spec: &Document,
    host: &Host,
    warnings: &mut Vec<String>,
) -> Result<Resources, Error> {
    let mut resources = Resources::default();
    memory(spec, host, &mut resources, warnings)?;
    cpu(spec, &mut resources)?;
    block_io(spec, &mut resources)?;
    resources.pids_limit =
        spec.read::<LinuxPids>("linux.resources.pids")?.and_then(|pids| limit(pids.limit()));
    resources.hugepages = hugepages(spec)?;
    resources.unified = unified(spec, host)?;
    Ok(resources)
}

/// Zero is what Go's clients write for "not set"; runc takes all negative values for "no limit".
fn limit(value: i64) -> Option<Limit> {
    match u64::try_from(value) {
        Ok(0) => None,
        Ok(value) => Some(Limit::Value(value)),
        Err(_) => Some(Limit::Max),
    }
}

fn memory(
    spec: &Document,
    host: &Host,
    resources: &mut Resources,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    const FIELD: &str = "linux.resources.memory";
    let Some(memory) = spec.read::<LinuxMemory>(FIELD)? else { return Ok(()) };
    let bytes = |name: &str, value: Option<i64>| match value {
        Some(value @ ..-1) => Err(Error::invalid(
            format!("{FIELD}.{name}"),
            format!("is {value}: only -1 is allowed below zero"),
        )),
        value => Ok(value.and_then(limit)),
    };
    resources.memory_limit = bytes("limit", memory.limit())?;
    resources.memory_swap = bytes("swap", memory.swap())?;
    resources.memory_reservation = bytes("reservation", memory.reservation())?;

    resources.memory_check_usage = memory.check_before_update().unwrap_or(false);

    let swap = format!("{FIELD}.swap");
    match (resources.memory_limit, resources.memory_swap) {
        // Unlimited memory with a limit on memory and swap together would be a contradiction.
        (Some(Limit::Max), None) => resources.memory_swap = Some(Limit::Max),
        (Some(Limit::Value(memory)), Some(Limit::Value(both))) if both < memory => {
            return Err(Error::invalid(swap, "is less than the memory limit, which it includes"));
        }
        (None, Some(Limit::Value(_))) if host.is_cgroup2() => {
            return Err(Error::invalid(swap, "needs a memory limit, which it includes"));
        }
        _ => {}
    }
    if let Some(swappiness) = memory.swappiness() {
        if swappiness > 100 {
            return Err(Error::invalid(format!("{FIELD}.swappiness"), "is not within 0 to 100"));
        }
        if host.is_cgroup2() {
            warnings.push(format!("{FIELD}.swappiness has no effect: cgroup2 has no such setting"));
        }
        resources.memory_swappiness = Some(swappiness);
    }
    Ok(())
}

fn cpu(spec: &Document, resources: &mut Resources) -> Result<(), Error> {
    const FIELD: &str = "linux.resources.cpu";
    let Some(cpu) = spec.read::<LinuxCpu>(FIELD)? else { return Ok(()) };
    resources.cpu_shares = cpu.shares().filter(|shares| *shares != 0);
    resources.cpu_quota = cpu.quota().and_then(limit);
    resources.cpu_period = cpu.period().filter(|period| *period != 0);
    resources.cpu_burst = cpu.burst();
    resources.cpu_idle = cpu.idle();
    let list = |name: &str, list: &Option<String>| match list.as_deref() {
        None | Some("") => Ok(None),
        Some(list) if is_list(list) => Ok(Some(list.to_owned())),
        Some(_) => Err(Error::invalid(format!("{FIELD}.{name}"), "is not a list such as 0-3,7")),
    };
    resources.cpuset_cpus = list("cpus", cpu.cpus())?;
    resources.cpuset_mems = list("mems", cpu.mems())?;
    Ok(())
}

/// The list format of cpuset(7), with its strides `0-9/2` or `0-9:1/2`.
fn is_list(list: &str) -> bool {
    list.bytes().all(|b| b.is_ascii_digit() || b"-,/: ".contains(&b))
        && list.bytes().any(|b| b.is_ascii_digit())
}

fn block_io(spec: &Document, resources: &mut Resources) -> Result<(), Error> {
    const FIELD: &str = "linux.resources.blockIO";
    let Some(io) = spec.read::<LinuxBlockIo>(FIELD)? else { return Ok(()) };
    resources.blkio_weight = match io.weight() {
        None | Some(0) => None,
        Some(weight @ 10..=1000) => Some(weight),
        Some(_) => {
            return Err(Error::invalid(format!("{FIELD}.weight"), "is not within 10 to 1000"));
        }
    };
    let throttles = |name: &str| -> Result<Vec<(u64, u64, u64)>, Error> {
        spec.list::<LinuxThrottleDevice>(&format!("{FIELD}.{name}"))?
            .into_iter()
            .map(|item| {
                let (field, device) = (item.field, item.value);
                match (u64::try_from(device.major()), u64::try_from(device.minor())) {
                    (Ok(major), Ok(minor)) => Ok((major, minor, device.rate())),
                    _ => Err(Error::invalid(field, "does not name a device")),
                }
            })
            .collect()
    };
    resources.blkio_read_bps = throttles("throttleReadBpsDevice")?;
    resources.blkio_write_bps = throttles("throttleWriteBpsDevice")?;
    resources.blkio_read_iops = throttles("throttleReadIOPSDevice")?;
    resources.blkio_write_iops = throttles("throttleWriteIOPSDevice")?;
    Ok(())
}

fn hugepages(spec: &Document) -> Result<Vec<(String, u64)>, Error> {
    spec.list::<LinuxHugepageLimit>("linux.resources.hugepageLimits")?
        .into_iter()
        .map(|item| {
            let (field, size) = (item.field, item.value.page_size());
            let limit = u64::try_from(item.value.limit())
                .map_err(|_| Error::invalid(format!("{field}.limit"), "is negative"))?;
            // The size becomes part of a file's name.
            let number = ["KB", "MB", "GB"].iter().find_map(|unit| size.strip_suffix(unit));
            match number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
                true => Ok((size.clone(), limit)),
                false => Err(Error::invalid(
                    format!("{field}.pageSize"),
                    "is not a page size such as 2MB",
                )),
            }
        })
        .collect()
}

fn unified(spec: &Document, host: &Host) -> Result<BTreeMap<String, String>, Error> {
    const FIELD: &str = "linux.resources.unified";
    let unified: BTreeMap<String, String> = spec.read(FIELD)?.unwrap_or_default();
    if !unified.is_empty() && !host.is_cgroup2() {
        return Err(Error::unsupported(FIELD, "this host has cgroup v1; use the other fields"));
    }
    for key in unified.keys() {
        // The key is a file's name. `cgroup.*` moves processes and controllers, which is LXC's.
        let is_name = key.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if !is_name || !key.contains('.') || key.starts_with('.') {
            return Err(Error::invalid(
                format!("{FIELD} {key:?}"),
                "is not the name of a controller's file",
            ));
        }
    }
    Ok(unified)
}

#[cfg(test)]
mod tests {
    use super::super::Cgroups;
    use super::super::plan::DeviceKind;
    use super::super::tests::host;
    use super::*;

    fn cgroup2() -> Host {
        Host { cgroups: Cgroups::V2, ..host() }
    }

    const SPEC: &str = include_str!("fixtures/ctr-default.json");

    fn plan() -> Plan {
        super::super::plan(SPEC.as_bytes(), std::path::Path::new("/b"), &host()).unwrap()
    }

    fn read_json(json: &str, host: &Host) -> Result<Resources, String> {
        let update = update(json.as_bytes(), &plan(), host).map_err(|error| error.to_string())?;
        Ok(update.resources)
    }

    #[test]
    fn everything_at_once() {
        let json = r#"{
            "memory":{"limit":1048576,"swap":2097152,"reservation":4096,"swappiness":10,
                "checkBeforeUpdate":true},
            "cpu":{"shares":512,"quota":50000,"period":100000,"burst":1,"idle":0,"cpus":"0-1","mems":"0"},
            "pids":{"limit":64},
            "blockIO":{"weight":500,
                "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}],
                "throttleWriteBpsDevice":[{"major":8,"minor":0,"rate":2}],
                "throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":3}],
                "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":4}]},
            "hugepageLimits":[{"pageSize":"2MB","limit":5}],
            "unified":{"memory.high":"max"}}"#;
        let pairs = [("memory.high".to_owned(), "max".to_owned())];
        assert_eq!(
            read_json(json, &cgroup2()).unwrap(),
            Resources {
                memory_limit: Some(Limit::Value(1_048_576)),
                memory_swap: Some(Limit::Value(2_097_152)),
                memory_reservation: Some(Limit::Value(4096)),
                memory_swappiness: Some(10),
                memory_check_usage: true,
                cpu_shares: Some(512),
                cpu_quota: Some(Limit::Value(50_000)),
                cpu_period: Some(100_000),
                cpu_burst: Some(1),
                cpu_idle: Some(0),
                cpuset_cpus: Some("0-1".to_owned()),
                cpuset_mems: Some("0".to_owned()),
                pids_limit: Some(Limit::Value(64)),
                blkio_weight: Some(500),
                blkio_read_bps: vec![(8, 0, 1)],
                blkio_write_bps: vec![(8, 0, 2)],
                blkio_read_iops: vec![(8, 0, 3)],
                blkio_write_iops: vec![(8, 0, 4)],
                hugepages: vec![("2MB".to_owned(), 5)],
                unified: BTreeMap::from(pairs),
            }
        );
    }

    #[test]
    fn an_update_replaces_the_specified_device_rules_only() {
        let plan = plan();
        let rules = |json: &str| update(json.as_bytes(), &plan, &host()).unwrap().device_rules;
        assert_eq!(rules(r#"{"pids":{"limit":5}}"#), None);
        assert_eq!(rules(r#"{"devices":[]}"#), None);
        let whole: serde_json::Value = serde_json::from_str(SPEC).unwrap();
        let repeated = serde_json::json!({ "devices": whole["linux"]["resources"]["devices"] });
        assert_eq!(rules(&repeated.to_string()).as_ref(), Some(&plan.device_rules));
        let other =
            rules(r#"{"devices":[{"allow":true,"type":"c","major":1,"minor":11,"access":"wr"}]}"#)
                .unwrap();
        let rule = DeviceRule {
            allow: true,
            kind: DeviceKind::Char,
            major: Some(1),
            minor: Some(11),
            access: "rw".to_owned(),
        };
        let runtimes_own = &plan.device_rules[plan.specified_device_rules..];
        assert_eq!(other, [&[rule], runtimes_own].concat());
    }

    #[test]
    fn zero_is_unset_and_negative_is_unlimited() {
        let zero = r#"{"memory":{"limit":0,"swap":0,"reservation":0},"pids":{"limit":0},
            "cpu":{"shares":0,"quota":0,"period":0,"cpus":"","mems":""},"blockIO":{"weight":0}}"#;
        assert_eq!(read_json(zero, &host()).unwrap(), Resources::default());
        let unlimited = r#"{"memory":{"limit":-1},"pids":{"limit":-1},"cpu":{"quota":-1}}"#;
        assert_eq!(
            read_json(unlimited, &host()).unwrap(),
            Resources {
                memory_limit: Some(Limit::Max),
                memory_swap: Some(Limit::Max),
                pids_limit: Some(Limit::Max),
                cpu_quota: Some(Limit::Max),
                ..Resources::default()
            }
        );
    }

    #[test]
    fn wrong_limits_are_refused_by_name() {
        for (json, expected) in [
            (r#"{"memory":{"limit":-2}}"#, "linux.resources.memory.limit is -2"),
            (r#"{"memory":{"limit":10,"swap":5}}"#, "linux.resources.memory.swap is less"),
            (r#"{"memory":{"swap":5}}"#, "linux.resources.memory.swap needs"),
            (r#"{"memory":{"swappiness":101}}"#, "linux.resources.memory.swappiness is not"),
            (r#"{"memory":{"limit":"1g"}}"#, "linux.resources.memory: invalid type"),
            (r#"{"cpu":{"cpus":"0\n1"}}"#, "linux.resources.cpu.cpus is not"),
            (r#"{"blockIO":{"weight":5}}"#, "linux.resources.blockIO.weight is not"),
            (
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":-1,"minor":0,"rate":1}]}}"#,
                "linux.resources.blockIO.throttleReadBpsDevice[0] does not",
            ),
            (
                r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#,
                "linux.resources.hugepageLimits[0].pageSize is not",
            ),
            (r#"{"unified":{"../x.y":"1"}}"#, "linux.resources.unified \"../x.y\" is not"),
            (r#"{"unified":{"nodot":"1"}}"#, "linux.resources.unified \"nodot\" is not"),
            (r#"{"rdma":{"mlx":{"hcaHandles":1}}}"#, "linux.resources.rdma is not supported"),
        ] {
            let error = read_json(json, &cgroup2()).unwrap_err();
            assert!(error.starts_with(expected), "{json}: {error}");
        }
        assert!(read_json(r#"{"unified":{"a.b":"1"}}"#, &host()).is_err(), "v1 has no unified");
    }
}
