//! [`Resources`] into cgroup files, by the rules that runc follows (the OCI runtime specification
//! leaves the mapping to cgroup2 open).

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use log::warn;
use nix::libc;

use super::{Cgroup, Error, Mode, Place, Version, processes, read, write};
use crate::oci::plan::{Limit, Resources};

/// The kernel's own, and what a quota without a period means in OCI.
const DEFAULT_PERIOD: u64 = 100_000;

/// Files of cgroup2 from which programs learn their limits: language runtimes size heaps and pools of
/// threads by them. `memory.oom.group` is not one of these, but counts where the limit is hit.
const LOOKED_AT: [&str; 6] =
    ["memory.oom.group", "memory.high", "memory.max", "memory.swap.max", "cpu.max", "pids.max"];

impl Cgroup {
    /// Sets the limits that `resources` names and leaves all others alone.
    ///
    /// With `reset_proxmox_defaults` memory and swap without a limit in `resources` become unlimited:
    /// Proxmox gives each CT whose configuration names none 512 MB of memory. That is for Create; an
    /// update must not touch what it does not name.
    ///
    /// # Errors
    /// [`Error`] naming the file and the value, or the controller that is missing. Limits before the
    /// failing one have been set.
    pub fn apply(&self, resources: &Resources, reset_proxmox_defaults: bool) -> Result<(), Error> {
        self.apply_memory(resources, reset_proxmox_defaults)?;
        self.apply_cpu(resources)?;
        self.apply_cpuset(resources)?;
        if let Some(limit) = resources.pids_limit {
            let (place, _) = self.require("pids", "pids", "a limit on processes")?;
            let value = match limit {
                // As runc: in OCI, nothing positive means no limit.
                Limit::Max | Limit::Value(0) => "max".to_owned(),
                Limit::Value(n) => n.to_string(),
            };
            place.set("pids.max", &value)?;
        }
        self.apply_blkio(resources)?;
        self.apply_hugepages(resources)?;
        self.apply_unified(resources)?;
        self.show()
    }

    /// Repeats in the inner cgroup what programs look for: it is the root of all that they see. v1 needs
    /// it less, for there `memory.stat` tells the limit of the cgroups above.
    fn show(&self) -> Result<(), Error> {
        let Some(place) = self.unified() else { return Ok(()) };
        for file in LOOKED_AT {
            let shown = place.inner.join(file);
            // Without the controller there is nothing to look at.
            let (Ok(limit), Ok(old)) = (read(&place.limit.join(file)), read(&shown)) else {
                continue;
            };
            if limit != old {
                write(&shown, limit.trim())?;
            }
        }
        Ok(())
    }

    /// Refuses a memory limit below what is in use, if `resources` ask for that
    /// (`checkBeforeUpdate`). Comes before any limit is set, by Proxmox too.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check_usage(&self, resources: &Resources) -> Result<(), Error> {
        let (true, Some(Limit::Value(limit))) =
            (resources.memory_check_usage, resources.memory_limit)
        else {
            return Ok(());
        };
        let used = match self.require("memory", "memory", "a memory limit")? {
            (place, Version::V1) => place.number("memory.usage_in_bytes"),
            (place, Version::V2) => place.number("memory.current"),
        };
        match used {
            Some(used) if used > limit => Err(Error::Invalid {
                field: "linux.resources.memory.limit",
                reason: format!("{limit} bytes are less than the {used} in use"),
            }),
            _ => Ok(()),
        }
    }

    fn apply_memory(&self, r: &Resources, reset: bool) -> Result<(), Error> {
        let wanted = r.memory_limit.is_some()
            || r.memory_swap.is_some()
            || r.memory_reservation.is_some()
            || r.memory_swappiness.is_some();
        let (place, version) = match self.require("memory", "memory", "a memory limit") {
            Ok(found) => found,
            // Without the controller Proxmox cannot have set anything.
            Err(_) if !wanted => return Ok(()),
            Err(error) => return Err(error),
        };
        match version {
            Version::V1 => memory_v1(place, r, reset),
            Version::V2 => memory_v2(place, r, reset),
        }
    }

    fn apply_cpu(&self, r: &Resources) -> Result<(), Error> {
        if r.cpu_shares.is_none()
            && r.cpu_quota.is_none()
            && r.cpu_period.is_none()
            && r.cpu_burst.is_none()
            && r.cpu_idle.is_none()
        {
            return Ok(());
        }
        let (place, version) = self.require("cpu", "cpu", "a cpu limit")?;
        // The kernel refuses a weight for an idle cgroup: leave idle before, become idle after.
        let idle = r.cpu_idle.map(|idle| idle.to_string());
        if r.cpu_idle == Some(0) {
            place.set("cpu.idle", "0")?;
        }
        if let Some(shares) = r.cpu_shares.filter(|&shares| shares != 0) {
            match version {
                Version::V1 => place.set("cpu.shares", &shares.to_string())?,
                Version::V2 => place.set("cpu.weight", &cpu_weight(shares).to_string())?,
            }
        }
        match version {
            Version::V1 => cpu_bandwidth_v1(place, r)?,
            Version::V2 => cpu_bandwidth_v2(place, r)?,
        }
        match idle {
            Some(idle) if idle != "0" => place.set("cpu.idle", &idle),
            _ => Ok(()),
        }
    }

    fn apply_cpuset(&self, r: &Resources) -> Result<(), Error> {
        for (file, list) in [("cpuset.cpus", &r.cpuset_cpus), ("cpuset.mems", &r.cpuset_mems)] {
            let Some(list) = list.as_deref().filter(|list| !list.is_empty()) else { continue };
            let (place, version) =
                self.require("cpuset", "cpuset", "a set of cpus or memory nodes")?;
            match version {
                Version::V1 => cpuset_v1(place, file, list)?,
                Version::V2 => place.set(file, list)?,
            }
        }
        Ok(())
    }

    fn apply_blkio(&self, r: &Resources) -> Result<(), Error> {
        let throttles = [
            (&r.blkio_read_bps, "read_bps", "rbps"),
            (&r.blkio_write_bps, "write_bps", "wbps"),
            (&r.blkio_read_iops, "read_iops", "riops"),
            (&r.blkio_write_iops, "write_iops", "wiops"),
        ];
        let weight = r.blkio_weight.filter(|&weight| weight != 0);
        if weight.is_none() && throttles.iter().all(|(list, ..)| list.is_empty()) {
            return Ok(());
        }
        let (place, version) = self.require("blkio", "io", "a block I/O limit")?;
        if let Some(weight) = weight {
            let (bfq, other, converted) = match version {
                Version::V1 => ("blkio.bfq.weight", "blkio.weight", u64::from(weight)),
                Version::V2 => ("io.bfq.weight", "io.weight", io_weight(weight)),
            };
            if place.limit.join(bfq).exists() {
                place.set(bfq, &weight.to_string())?;
            } else if place.limit.join(other).exists() {
                place.set(other, &converted.to_string())?;
            } else {
                return Err(Error::Invalid {
                    field: "linux.resources.blockIO.weight",
                    reason: "no scheduler of block I/O on this node has weights; load the module \
                             bfq, or leave it out"
                        .to_owned(),
                });
            }
        }
        for (list, v1, v2) in throttles {
            for (major, minor, rate) in list {
                match version {
                    Version::V1 => place.set(
                        &format!("blkio.throttle.{v1}_device"),
                        &format!("{major}:{minor} {rate}"),
                    )?,
                    Version::V2 => {
                        // 0 removes the limit with v1, and is refused here.
                        let rate = if *rate == 0 { "max".to_owned() } else { rate.to_string() };
                        place.set("io.max", &format!("{major}:{minor} {v2}={rate}"))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn apply_hugepages(&self, r: &Resources) -> Result<(), Error> {
        for (size, bytes) in &r.hugepages {
            if size.contains('/') {
                return Err(Error::Invalid {
                    field: "hugepageLimits",
                    reason: format!("{size:?} is no page size"),
                });
            }
            let (place, version) = self.require("hugetlb", "hugetlb", "a limit on huge pages")?;
            let file = match version {
                Version::V1 => "limit_in_bytes",
                Version::V2 => "max",
            };
            place.set(&format!("hugetlb.{size}.{file}"), &bytes.to_string())?;
            // Reservations count separately since Linux 5.7.
            place.set_if_present(&format!("hugetlb.{size}.rsvd.{file}"), &bytes.to_string())?;
        }
        Ok(())
    }

    fn apply_unified(&self, r: &Resources) -> Result<(), Error> {
        if r.unified.is_empty() {
            return Ok(());
        }
        let place = match self.unified() {
            Some(place) if self.mode == Mode::V2 => place,
            _ => {
                return Err(Error::Invalid {
                    field: "linux.resources.unified",
                    reason: "this host uses cgroup v1, where it has no meaning".to_owned(),
                });
            }
        };
        for (file, value) in &r.unified {
            // Only files of this cgroup, and no control of the cgroup itself.
            if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
                return Err(Error::Invalid {
                    field: "linux.resources.unified",
                    reason: format!("{file:?} is no file of a cgroup controller"),
                });
            }
            // Files such as io.max take one line at a time.
            for line in value.lines() {
                place.set(file, line)?;
            }
        }
        Ok(())
    }
}

impl Place {
    fn set(&self, file: &str, value: &str) -> Result<(), Error> {
        write(&self.limit.join(file), value)
    }

    fn set_if_present(&self, file: &str, value: &str) -> Result<(), Error> {
        match self.set(file, value) {
            Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn number(&self, file: &str) -> Option<u64> {
        read(&self.limit.join(file)).ok()?.trim().parse().ok()
    }
}

fn v1_number(limit: Limit) -> String {
    match limit {
        Limit::Max => "-1".to_owned(),
        Limit::Value(n) => n.to_string(),
    }
}

fn v2_number(limit: Limit) -> String {
    match limit {
        Limit::Max => "max".to_owned(),
        Limit::Value(n) => n.to_string(),
    }
}

fn memory_v1(place: &Place, r: &Resources, reset: bool) -> Result<(), Error> {
    const MEMORY: &str = "memory.limit_in_bytes";
    const WITH_SWAP: &str = "memory.memsw.limit_in_bytes";
    if reset {
        // The kernel keeps memory <= memory with swap: the larger goes up first.
        place.set_if_present(WITH_SWAP, "-1")?;
        if r.memory_limit.is_none() {
            place.set(MEMORY, "-1")?;
        }
    }
    let has_swap = place.limit.join(WITH_SWAP).exists();
    let swap = match (r.memory_limit, r.memory_swap) {
        // Unlimited memory with a bound on memory and swap together would be no limit at all.
        (Some(Limit::Max), None) if has_swap => Some(Limit::Max),
        (_, swap) => swap,
    };
    match (r.memory_limit, swap) {
        (Some(memory), Some(swap)) => {
            let raised = match swap {
                Limit::Max => true,
                Limit::Value(swap) => place.number(MEMORY).is_none_or(|current| current < swap),
            };
            if raised {
                place.set(WITH_SWAP, &v1_number(swap))?;
                place.set(MEMORY, &v1_number(memory))?;
            } else {
                place.set(MEMORY, &v1_number(memory))?;
                place.set(WITH_SWAP, &v1_number(swap))?;
            }
        }
        (Some(memory), None) => place.set(MEMORY, &v1_number(memory))?,
        (None, Some(swap)) => place.set(WITH_SWAP, &v1_number(swap))?,
        (None, None) => {}
    }
    if let Some(reservation) = r.memory_reservation {
        place.set("memory.soft_limit_in_bytes", &v1_number(reservation))?;
    }
    if let Some(swappiness) = r.memory_swappiness {
        place.set("memory.swappiness", &swappiness.to_string())?;
        // Unlike limits it is not inherited by a cgroup that exists.
        write(&place.inner.join("memory.swappiness"), &swappiness.to_string())?;
    }
    Ok(())
}

fn memory_v2(place: &Place, r: &Resources, reset: bool) -> Result<(), Error> {
    if r.memory_swappiness.is_some() {
        warn!("memory swappiness is ignored: cgroup2 has no such setting");
    }
    let memory = r.memory_limit.or(reset.then_some(Limit::Max));
    let swap = swap_v2(r, || place.number("memory.max"))?.or(reset.then_some(Limit::Max));
    match swap {
        // Without swap accounting there is nothing to switch off either.
        Some(swap @ (Limit::Max | Limit::Value(0))) => {
            place.set_if_present("memory.swap.max", &v2_number(swap))?;
        }
        Some(swap) => place.set("memory.swap.max", &v2_number(swap))?,
        None => {}
    }
    if let Some(memory) = memory {
        // Proxmox sets it just below its own limit, where it would throttle the CT.
        place.set("memory.high", "max")?;
        place.set("memory.max", &v2_number(memory))?;
    }
    if let Some(reservation) = r.memory_reservation {
        place.set("memory.low", &v2_number(reservation))?;
    }
    Ok(())
}

/// OCI counts memory and swap together, cgroup2 counts swap alone.
fn swap_v2(r: &Resources, current: impl Fn() -> Option<u64>) -> Result<Option<Limit>, Error> {
    let invalid = |reason: &str| {
        Err(Error::Invalid { field: "linux.resources.memory.swap", reason: reason.to_owned() })
    };
    match (r.memory_limit, r.memory_swap) {
        (Some(Limit::Max), None) | (_, Some(Limit::Max)) => Ok(Some(Limit::Max)),
        (_, None) => Ok(None),
        (Some(Limit::Max), Some(Limit::Value(_))) => invalid("is limited while memory is not"),
        (Some(Limit::Value(memory)), Some(Limit::Value(both))) => match both.checked_sub(memory) {
            Some(swap) => Ok(Some(Limit::Value(swap))),
            None => invalid("is memory and swap together, so it cannot be below the memory limit"),
        },
        (None, Some(Limit::Value(both))) => match current().and_then(|m| both.checked_sub(m)) {
            Some(swap) => Ok(Some(Limit::Value(swap))),
            None => invalid("needs a memory limit that is not above it"),
        },
    }
}

fn cpu_bandwidth_v1(place: &Place, r: &Resources) -> Result<(), Error> {
    const QUOTA: &str = "cpu.cfs_quota_us";
    let quota = r.cpu_quota.map(v1_number);
    let first = [("cpu.cfs_period_us", r.cpu_period), ("cpu.cfs_burst_us", r.cpu_burst)];
    let mut retry = Vec::new();
    for (file, value) in first {
        let Some(value) = value else { continue };
        let value = value.to_string();
        match place.set(file, &value) {
            // Together with the old quota it may exceed the parent's share, or the quota. With
            // the new one it may not.
            Err(error) if quota.is_some() && is_invalid(&error) => retry.push((file, value)),
            other => other?,
        }
    }
    if let Some(quota) = quota {
        place.set(QUOTA, &quota)?;
    }
    for (file, value) in retry {
        place.set(file, &value)?;
    }
    Ok(())
}

fn cpu_bandwidth_v2(place: &Place, r: &Resources) -> Result<(), Error> {
    const BURST: &str = "cpu.max.burst";
    let mut burst = r.cpu_burst.map(|burst| burst.to_string());
    if let Some(value) = &burst {
        match place.set(BURST, value) {
            // Above the old quota; the new one may be higher.
            Err(error) if r.cpu_quota.is_some() && is_invalid(&error) => {}
            other => {
                other?;
                burst = None;
            }
        }
    }
    if r.cpu_quota.is_some() || r.cpu_period.is_some() {
        // "max 100000": an update that names one of both keeps the other.
        let current = read(&place.limit.join("cpu.max")).unwrap_or_default();
        let mut current = current.split_whitespace();
        let (old_quota, old_period) = (current.next(), current.next());
        let quota = match r.cpu_quota {
            Some(quota) => v2_number(quota),
            None => old_quota.unwrap_or("max").to_owned(),
        };
        let period = match r.cpu_period {
            Some(period) => period,
            None => old_period.and_then(|p| p.parse().ok()).unwrap_or(DEFAULT_PERIOD),
        };
        place.set("cpu.max", &format!("{quota} {period}"))?;
    }
    match burst {
        Some(value) => place.set(BURST, &value),
        None => Ok(()),
    }
}

fn is_invalid(error: &Error) -> bool {
    matches!(error, Error::Write { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
}

/// With v1 a set must stay within the parent's and around its children's at each step, and is not
/// handed down: the CT's processes are in the inner cgroup, which therefore needs the same.
fn cpuset_v1(place: &Place, file: &str, list: &str) -> Result<(), Error> {
    let invalid = || Error::Invalid {
        field: "linux.resources.cpu",
        reason: format!("{list:?} is no list for {file}"),
    };
    let wanted = parse_list(list).filter(|set| !set.is_empty()).ok_or_else(invalid)?;
    let current = |directory: &Path| -> Result<BTreeSet<u32>, Error> {
        Ok(parse_list(read(&directory.join(file))?.trim()).unwrap_or_default())
    };
    for directory in [&place.limit, &place.inner] {
        let wider = &current(directory)? | &wanted;
        write(&directory.join(file), &render_list(&wider))?;
    }
    for directory in processes::subtree(&place.limit).iter().rev() {
        let set = if *directory == place.limit || *directory == place.inner {
            wanted.clone()
        } else {
            // The CT's own division, as far as it still fits.
            let kept = &current(directory)? & &wanted;
            if kept.is_empty() { wanted.clone() } else { kept }
        };
        write(&directory.join(file), &render_list(&set))?;
    }
    Ok(())
}

/// `0-2,7` (`cpuset(7)`, without strides).
fn parse_list(list: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (u32, u32) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        // The kernel knows at most 8192 cpus; a list must not fill the memory.
        if from > to || to >= 1 << 16 {
            return None;
        }
        set.extend(from..=to);
    }
    Some(set)
}

fn render_list(set: &BTreeSet<u32>) -> String {
    set.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// cgroup v1's 2..262144 to cgroup2's 1..10000, linear as in runc up to 1.3.
fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// 10..1000 to 1..10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lxc::cgroup::Kind;
    use std::fs;

    /// Directories that look like the CT's cgroup; writes can be read back.
    fn fake(kind: Kind, files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let dir = tempfile::tempdir().unwrap();
        let limit = dir.path().join("lxc/700");
        let inner = limit.join("ns");
        fs::create_dir_all(&inner).unwrap();
        for (file, content) in files {
            fs::write(limit.join(file), content).unwrap();
            fs::write(inner.join(file), content).unwrap();
        }
        let mode = if kind == Kind::V2 { Mode::V2 } else { Mode::V1 };
        let place = Place { kind, cgroup: "/lxc/700".into(), limit, inner };
        (dir, Cgroup { mode, places: vec![place] })
    }

    /// A write does not truncate a regular file, so reading back starts with what was written.
    fn written(dir: &tempfile::TempDir, file: &str) -> String {
        fs::read_to_string(dir.path().join("lxc/700").join(file)).unwrap()
    }

    const V2_FILES: &[(&str, &str)] = &[
        ("cgroup.controllers", "cpuset cpu io memory pids hugetlb\n"),
        ("memory.max", ""),
        ("memory.high", ""),
        ("memory.low", ""),
        ("memory.swap.max", ""),
        ("cpu.weight", ""),
        ("cpu.idle", ""),
        ("cpu.max", ""),
        ("cpu.max.burst", ""),
        ("cpuset.cpus", ""),
        ("cpuset.mems", ""),
        ("pids.max", ""),
        ("io.weight", ""),
        ("io.max", ""),
        ("hugetlb.2MB.max", ""),
        ("hugetlb.2MB.rsvd.max", ""),
        ("memory.oom.group", ""),
    ];

    fn v2() -> (tempfile::TempDir, Cgroup) {
        fake(Kind::V2, V2_FILES)
    }

    fn v1(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let all = ["memory", "cpu", "cpuset", "pids", "blkio", "hugetlb"];
        fake(Kind::V1(all.map(str::to_owned).to_vec()), files)
    }

    #[test]
    fn a_limit_below_what_is_used_is_refused_only_if_asked() {
        for (kind, file) in [
            (Kind::V2, "memory.current"),
            (Kind::V1(vec!["memory".to_owned()]), "memory.usage_in_bytes"),
        ] {
            let files = [("cgroup.controllers", "memory\n"), (file, "2048\n")];
            let (_dir, cgroup) = fake(kind, &files);
            let check = |bytes, asked| {
                cgroup.check_usage(&Resources {
                    memory_limit: Some(Limit::Value(bytes)),
                    memory_check_usage: asked,
                    ..Resources::default()
                })
            };
            let error = check(2047, true).unwrap_err().to_string();
            assert!(error.contains("2047 bytes are less than the 2048 in use"), "{error}");
            check(2048, true).unwrap();
            check(1024, false).unwrap();
        }
    }

    #[test]
    fn every_field_reaches_its_cgroup2_file() {
        let cases: Vec<(Resources, &[(&str, &str)])> = vec![
            (
                Resources {
                    memory_limit: Some(Limit::Value(64 << 20)),
                    memory_swap: Some(Limit::Value(96 << 20)),
                    memory_reservation: Some(Limit::Value(32 << 20)),
                    ..Resources::default()
                },
                &[
                    ("memory.max", "67108864"),
                    ("memory.high", "max"),
                    ("memory.swap.max", "33554432"),
                    ("memory.low", "33554432"),
                ],
            ),
            (
                Resources {
                    memory_limit: Some(Limit::Value(4096)),
                    memory_swap: Some(Limit::Value(4096)),
                    ..Resources::default()
                },
                &[("memory.swap.max", "0")],
            ),
            (
                Resources { memory_limit: Some(Limit::Max), ..Resources::default() },
                &[("memory.max", "max"), ("memory.swap.max", "max")],
            ),
            (
                Resources { memory_swap: Some(Limit::Max), ..Resources::default() },
                &[("memory.max", ""), ("memory.swap.max", "max")],
            ),
            (
                Resources { cpu_shares: Some(1024), ..Resources::default() },
                &[("cpu.weight", "39"), ("cpu.max", "")],
            ),
            (
                Resources {
                    cpu_quota: Some(Limit::Value(50_000)),
                    cpu_burst: Some(1000),
                    ..Resources::default()
                },
                &[("cpu.max", "50000 100000"), ("cpu.max.burst", "1000")],
            ),
            (
                Resources {
                    cpu_quota: Some(Limit::Max),
                    cpu_period: Some(20_000),
                    ..Resources::default()
                },
                &[("cpu.max", "max 20000")],
            ),
            (Resources { cpu_idle: Some(1), ..Resources::default() }, &[("cpu.idle", "1")]),
            (
                Resources {
                    cpuset_cpus: Some("0-1".into()),
                    cpuset_mems: Some("0".into()),
                    ..Resources::default()
                },
                &[("cpuset.cpus", "0-1"), ("cpuset.mems", "0")],
            ),
            (
                Resources { pids_limit: Some(Limit::Value(10)), ..Resources::default() },
                &[("pids.max", "10")],
            ),
            (
                Resources { pids_limit: Some(Limit::Value(0)), ..Resources::default() },
                &[("pids.max", "max")],
            ),
            (
                Resources { blkio_weight: Some(500), ..Resources::default() },
                &[("io.weight", "4950")],
            ),
            (
                Resources { blkio_write_iops: vec![(8, 0, 7)], ..Resources::default() },
                &[("io.max", "8:0 wiops=7")],
            ),
            (
                Resources { blkio_read_bps: vec![(8, 16, 0)], ..Resources::default() },
                &[("io.max", "8:16 rbps=max")],
            ),
            (
                Resources { hugepages: vec![("2MB".into(), 4096)], ..Resources::default() },
                &[("hugetlb.2MB.max", "4096"), ("hugetlb.2MB.rsvd.max", "4096")],
            ),
            (
                Resources {
                    unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
                    ..Resources::default()
                },
                &[("memory.oom.group", "1")],
            ),
        ];
        for (resources, expected) in cases {
            let (dir, cgroup) = v2();
            cgroup.apply(&resources, false).unwrap();
            for (file, value) in expected {
                assert_eq!(written(&dir, file), *value, "{file} for {resources:?}");
            }
        }
    }

    #[test]
    fn programs_find_their_limits_where_they_look() {
        let (dir, cgroup) = v2();
        let resources = Resources {
            memory_limit: Some(Limit::Value(4096)),
            cpu_quota: Some(Limit::Value(50_000)),
            pids_limit: Some(Limit::Value(10)),
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        cgroup.apply(&resources, false).unwrap();
        for (file, value) in [
            ("memory.max", "4096"),
            ("cpu.max", "50000 100000"),
            ("pids.max", "10"),
            ("memory.oom.group", "1"),
            ("cpu.weight", ""),
        ] {
            assert_eq!(written(&dir, &format!("ns/{file}")), value, "{file}");
        }
        fs::remove_file(dir.path().join("lxc/700/ns/memory.max")).unwrap();
        cgroup.apply(&resources, false).unwrap();
    }

    #[test]
    fn nothing_set_writes_nothing_but_the_reset() {
        let (dir, cgroup) = v2();
        cgroup.apply(&Resources::default(), false).unwrap();
        for (file, content) in V2_FILES {
            assert_eq!(written(&dir, file), *content, "{file}");
        }
        cgroup.apply(&Resources::default(), true).unwrap();
        for file in ["memory.max", "memory.high", "memory.swap.max"] {
            assert_eq!(written(&dir, file), "max", "{file}");
        }
        assert_eq!(written(&dir, "memory.low"), "");
    }

    #[test]
    fn a_limit_of_the_plan_wins_over_the_reset() {
        let (dir, cgroup) = v2();
        let limit = Resources { memory_limit: Some(Limit::Value(4096)), ..Resources::default() };
        cgroup.apply(&limit, true).unwrap();
        assert_eq!(written(&dir, "memory.max"), "4096");
        assert_eq!(written(&dir, "memory.swap.max"), "max");
    }

    #[test]
    fn an_update_of_the_period_keeps_the_quota() {
        let (dir, cgroup) = v2();
        fs::write(dir.path().join("lxc/700/cpu.max"), "50000 100000\n").unwrap();
        let r = Resources { cpu_period: Some(200_000), ..Resources::default() };
        cgroup.apply(&r, false).unwrap();
        assert_eq!(written(&dir, "cpu.max").trim(), "50000 200000");
    }

    #[test]
    fn swap_alone_is_counted_from_the_current_memory_limit() {
        let r = |swap| Resources { memory_swap: Some(Limit::Value(swap)), ..Resources::default() };
        assert_eq!(swap_v2(&r(10), || Some(4)).unwrap(), Some(Limit::Value(6)));
        assert!(swap_v2(&r(10), || None).is_err());
        assert!(swap_v2(&r(3), || Some(4)).is_err());
    }

    #[test]
    fn a_missing_controller_or_file_is_named() {
        let (_dir, cgroup) =
            fake(Kind::V2, &[("cgroup.controllers", "memory\n"), ("memory.high", "")]);
        let pids = Resources { pids_limit: Some(Limit::Value(1)), ..Resources::default() };
        let text = cgroup.apply(&pids, false).unwrap_err().to_string();
        assert!(text.contains("\"pids\""), "{text}");
        let memory = Resources { memory_limit: Some(Limit::Value(7)), ..Resources::default() };
        let text = cgroup.apply(&memory, false).unwrap_err().to_string();
        assert!(text.contains("\"7\"") && text.contains("lxc/700/memory.max"), "{text}");
    }

    #[test]
    fn unified_keys_stay_within_the_controllers() {
        for key in ["../x.max", "cgroup.procs", "tasks", "a/b.c"] {
            let (_dir, cgroup) = v2();
            let r = Resources {
                unified: [(key.to_owned(), "1".to_owned())].into(),
                ..Resources::default()
            };
            assert!(matches!(cgroup.apply(&r, false), Err(Error::Invalid { .. })), "{key}");
        }
        let (_dir, cgroup) = v1(&[]);
        let r = Resources {
            unified: [("memory.max".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        assert!(matches!(cgroup.apply(&r, false), Err(Error::Invalid { .. })));
    }

    #[test]
    fn every_field_reaches_its_v1_file() {
        let (dir, cgroup) = v1(&[
            ("memory.limit_in_bytes", ""),
            ("memory.memsw.limit_in_bytes", ""),
            ("memory.soft_limit_in_bytes", ""),
            ("memory.swappiness", ""),
            ("cpu.shares", ""),
            ("cpu.cfs_quota_us", ""),
            ("cpu.cfs_period_us", ""),
            ("cpu.cfs_burst_us", ""),
            ("cpu.idle", ""),
            ("pids.max", ""),
            ("blkio.weight", ""),
            ("blkio.throttle.read_bps_device", ""),
            ("hugetlb.2MB.limit_in_bytes", ""),
        ]);
        let r = Resources {
            memory_limit: Some(Limit::Value(4096)),
            memory_swap: Some(Limit::Max),
            memory_reservation: Some(Limit::Value(5)),
            memory_swappiness: Some(60),
            cpu_shares: Some(512),
            cpu_quota: Some(Limit::Max),
            cpu_period: Some(1000),
            cpu_burst: Some(0),
            cpu_idle: Some(0),
            pids_limit: Some(Limit::Max),
            blkio_weight: Some(10),
            blkio_read_bps: vec![(8, 0, 100)],
            hugepages: vec![("2MB".into(), 1)],
            ..Resources::default()
        };
        cgroup.apply(&r, false).unwrap();
        for (file, value) in [
            ("memory.limit_in_bytes", "4096"),
            ("memory.memsw.limit_in_bytes", "-1"),
            ("memory.soft_limit_in_bytes", "5"),
            ("memory.swappiness", "60"),
            ("cpu.shares", "512"),
            ("cpu.cfs_quota_us", "-1"),
            ("cpu.cfs_period_us", "1000"),
            ("cpu.cfs_burst_us", "0"),
            ("cpu.idle", "0"),
            ("pids.max", "max"),
            ("blkio.weight", "10"),
            ("blkio.throttle.read_bps_device", "8:0 100"),
            ("hugetlb.2MB.limit_in_bytes", "1"),
        ] {
            assert_eq!(written(&dir, file), value, "{file}");
        }
        assert_eq!(written(&dir, "ns/memory.swappiness"), "60");
    }

    #[test]
    fn lists_of_cpus_are_parsed_and_bounded() {
        assert_eq!(parse_list("0-2,7").unwrap(), BTreeSet::from([0, 1, 2, 7]));
        assert_eq!(parse_list("").unwrap(), BTreeSet::new());
        for bad in ["a", "2-1", "0-4294967295", "1-", "-"] {
            assert_eq!(parse_list(bad), None, "{bad}");
        }
    }

    #[test]
    fn weights_keep_the_ends_of_their_ranges() {
        assert_eq!([2, 262_144].map(cpu_weight), [1, 10_000]);
        assert_eq!([10, 1000].map(io_weight), [1, 10_000]);
    }
}
