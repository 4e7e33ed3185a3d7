//! The figures of Task.Stats, in containerd's own message types.
//!
//! Each field is read once into the message that goes out; a second set of structures of sixty
//! fields between the two would only be another place for mistakes.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::{Cgroup, Error, Mode, Place, Version, read};

/// Nanoseconds per tick of `cpuacct.stat`: `USER_HZ` is 100 on all of Linux's architectures that
/// Proxmox VE supports.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

impl Cgroup {
    /// The CT's figures: `io.containerd.cgroups.v2.Metrics` on a host with cgroup2 alone, else
    /// `io.containerd.cgroups.v1.Metrics`. What the host does not count is left out.
    ///
    /// # Errors
    /// The CT is gone: its cgroup does not exist any more.
    pub fn metrics(&self) -> Result<Any, Error> {
        for place in &self.places {
            // A CT that ends while this runs shows as zeros in some fields, at worst.
            if !place.limit.is_dir() {
                return Err(Error::Read {
                    path: place.limit.clone(),
                    source: std::io::Error::from_raw_os_error(nix::libc::ENOENT),
                });
            }
        }
        // containerd compares type names as Go prints them, without a host.
        let (name, encoded) = if self.mode == Mode::V2 {
            ("io.containerd.cgroups.v2.Metrics", self.metrics_v2().write_to_bytes())
        } else {
            ("io.containerd.cgroups.v1.Metrics", self.metrics_v1().write_to_bytes())
        };
        // Messages without required fields always encode.
        let value = encoded.unwrap_or_default();
        Ok(Any { type_url: name.to_owned(), value, ..Any::default() })
    }

    fn legacy(&self, controller: &str) -> Option<&Place> {
        match self.controller(controller, "") {
            Some((place, Version::V1)) => Some(place),
            _ => None,
        }
    }

    fn metrics_v1(&self) -> v1::Metrics {
        let mut metrics = v1::Metrics::new();
        if let Some(dir) = self.legacy("pids").map(|p| &p.limit) {
            metrics.pids = MessageField::some(v1::PidsStat {
                current: number(dir, "pids.current"),
                // No limit is 0 here.
                limit: number(dir, "pids.max"),
                ..Default::default()
            });
        }
        let usage = self.legacy("cpuacct").map(|p| cpu_usage_v1(&p.limit));
        let throttling = self.legacy("cpu").map(|p| {
            let stat = Table::read(&p.limit, "cpu.stat");
            v1::Throttle {
                periods: stat.get("nr_periods"),
                throttled_periods: stat.get("nr_throttled"),
                throttled_time: stat.get("throttled_time"),
                ..Default::default()
            }
        });
        if usage.is_some() || throttling.is_some() {
            metrics.cpu = MessageField::some(v1::CPUStat {
                usage: usage.into(),
                throttling: throttling.into(),
                ..Default::default()
            });
        }
        if let Some(place) = self.legacy("memory") {
            metrics.memory = MessageField::some(memory_v1(&place.limit));
            let control = Table::read(&place.limit, "memory.oom_control");
            metrics.memory_oom_control = MessageField::some(v1::MemoryOomControl {
                oom_kill_disable: control.get("oom_kill_disable"),
                under_oom: control.get("under_oom"),
                oom_kill: self.oom_kills().unwrap_or(0),
                ..Default::default()
            });
        }
        if let Some(place) = self.legacy("blkio") {
            metrics.blkio = MessageField::some(blkio_v1(&place.limit));
        }
        if let Some(dir) = self.legacy("hugetlb").map(|p| &p.limit) {
            for size in page_sizes(dir, ".limit_in_bytes") {
                metrics.hugetlb.push(v1::HugetlbStat {
                    usage: number(dir, &format!("hugetlb.{size}.usage_in_bytes")),
                    max: number(dir, &format!("hugetlb.{size}.max_usage_in_bytes")),
                    failcnt: number(dir, &format!("hugetlb.{size}.failcnt")),
                    pagesize: size,
                    ..Default::default()
                });
            }
        }
        metrics
    }

    fn metrics_v2(&self) -> v2::Metrics {
        let mut metrics = v2::Metrics::new();
        let Some(dir) = self.unified().map(|p| &p.limit) else { return metrics };
        let enabled = read(&dir.join("cgroup.controllers")).unwrap_or_default();
        let has = |controller: &str| enabled.split_whitespace().any(|c| c == controller);
        if has("pids") {
            metrics.pids = MessageField::some(v2::PidsStat {
                current: number(dir, "pids.current"),
                limit: limit(dir, "pids.max"),
                ..Default::default()
            });
        }
        // Without the controller it has the times alone.
        let stat = Table::read(dir, "cpu.stat");
        metrics.cpu = MessageField::some(v2::CPUStat {
            usage_usec: stat.get("usage_usec"),
            user_usec: stat.get("user_usec"),
            system_usec: stat.get("system_usec"),
            nr_periods: stat.get("nr_periods"),
            nr_throttled: stat.get("nr_throttled"),
            throttled_usec: stat.get("throttled_usec"),
            nr_bursts: stat.get("nr_bursts"),
            burst_usec: stat.get("burst_usec"),
            psi: pressure(dir, "cpu.pressure"),
            ..Default::default()
        });
        if has("memory") {
            metrics.memory = MessageField::some(memory_v2(dir));
            let events = Table::read(dir, "memory.events");
            metrics.memory_events = MessageField::some(v2::MemoryEvents {
                low: events.get("low"),
                high: events.get("high"),
                max: events.get("max"),
                oom: events.get("oom"),
                oom_kill: events.get("oom_kill"),
                oom_group_kill: events.get("oom_group_kill"),
                ..Default::default()
            });
        }
        if has("io") {
            let text = read(&dir.join("io.stat")).unwrap_or_default();
            metrics.io = MessageField::some(v2::IOStat {
                usage: text.lines().filter_map(io_line).collect(),
                psi: pressure(dir, "io.pressure"),
                ..Default::default()
            });
        }
        if has("hugetlb") {
            for size in page_sizes(dir, ".max") {
                metrics.hugetlb.push(v2::HugeTlbStat {
                    current: number(dir, &format!("hugetlb.{size}.current")),
                    max: limit(dir, &format!("hugetlb.{size}.max")),
                    failcnt: Table::read(dir, &format!("hugetlb.{size}.events")).get("max"),
                    pagesize: size,
                    ..Default::default()
                });
            }
        }
        metrics
    }
}

fn cpu_usage_v1(dir: &Path) -> v1::CPUUsage {
    let stat = Table::read(dir, "cpuacct.stat");
    let per_cpu = read(&dir.join("cpuacct.usage_percpu")).unwrap_or_default();
    v1::CPUUsage {
        total: number(dir, "cpuacct.usage"),
        kernel: stat.get("system") * NANOSECONDS_PER_TICK,
        user: stat.get("user") * NANOSECONDS_PER_TICK,
        per_cpu: per_cpu.split_whitespace().filter_map(|n| n.parse().ok()).collect(),
        ..Default::default()
    }
}

fn memory_v1(dir: &Path) -> v1::MemoryStat {
    let stat = Table::read(dir, "memory.stat");
    let entry = |prefix: &str| {
        MessageField::some(v1::MemoryEntry {
            limit: number(dir, &format!("{prefix}.limit_in_bytes")),
            usage: number(dir, &format!("{prefix}.usage_in_bytes")),
            max: number(dir, &format!("{prefix}.max_usage_in_bytes")),
            failcnt: number(dir, &format!("{prefix}.failcnt")),
            ..Default::default()
        })
    };
    // The processes are one level below: the cgroup's own figures are all zero, and clients that
    // read them expect those of the container.
    let all = |key: &str| stat.get(&format!("total_{key}"));
    v1::MemoryStat {
        cache: all("cache"),
        rss: all("rss"),
        rss_huge: all("rss_huge"),
        mapped_file: all("mapped_file"),
        dirty: all("dirty"),
        writeback: all("writeback"),
        pg_pg_in: all("pgpgin"),
        pg_pg_out: all("pgpgout"),
        pg_fault: all("pgfault"),
        pg_maj_fault: all("pgmajfault"),
        inactive_anon: all("inactive_anon"),
        active_anon: all("active_anon"),
        inactive_file: all("inactive_file"),
        active_file: all("active_file"),
        unevictable: all("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: all("cache"),
        total_rss: all("rss"),
        total_rss_huge: all("rss_huge"),
        total_mapped_file: all("mapped_file"),
        total_dirty: all("dirty"),
        total_writeback: all("writeback"),
        total_pg_pg_in: all("pgpgin"),
        total_pg_pg_out: all("pgpgout"),
        total_pg_fault: all("pgfault"),
        total_pg_maj_fault: all("pgmajfault"),
        total_inactive_anon: all("inactive_anon"),
        total_active_anon: all("active_anon"),
        total_inactive_file: all("inactive_file"),
        total_active_file: all("active_file"),
        total_unevictable: all("unevictable"),
        usage: entry("memory"),
        swap: entry("memory.memsw"),
        kernel: entry("memory.kmem"),
        kernel_tcp: entry("memory.kmem.tcp"),
        ..Default::default()
    }
}

fn blkio_v1(dir: &Path) -> v1::BlkIOStat {
    // The files of the throttling policy exist with every scheduler; the recursive ones count what
    // the processes in the inner cgroup did.
    let entries = |file: &str| {
        let text = read(&dir.join(file)).unwrap_or_default();
        text.lines().filter_map(blkio_line).collect()
    };
    v1::BlkIOStat {
        io_service_bytes_recursive: entries("blkio.throttle.io_service_bytes_recursive"),
        io_serviced_recursive: entries("blkio.throttle.io_serviced_recursive"),
        ..Default::default()
    }
}

/// `8:0 Read 4096`; the last line, `Total 4096`, is of no device.
fn blkio_line(line: &str) -> Option<v1::BlkIOEntry> {
    let mut fields = line.split_whitespace();
    let (major, minor) = device(fields.next()?)?;
    Some(v1::BlkIOEntry {
        op: fields.next()?.to_owned(),
        value: fields.next()?.parse().ok()?,
        device: device_name(major, minor),
        major,
        minor,
        ..Default::default()
    })
}

/// `/dev/sda`, from sysfs; empty for a device that is gone.
fn device_name(major: u64, minor: u64) -> String {
    let uevent =
        read(format!("/sys/dev/block/{major}:{minor}/uevent").as_ref()).unwrap_or_default();
    uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .map(|name| format!("/dev/{name}"))
        .unwrap_or_default()
}

fn memory_v2(dir: &Path) -> v2::MemoryStat {
    let stat = Table::read(dir, "memory.stat");
    v2::MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        // Counted together until Linux 5.9.
        workingset_refault: stat.get("workingset_refault")
            + stat.get("workingset_refault_anon")
            + stat.get("workingset_refault_file"),
        workingset_activate: stat.get("workingset_activate")
            + stat.get("workingset_activate_anon")
            + stat.get("workingset_activate_file"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: number(dir, "memory.current"),
        usage_limit: limit(dir, "memory.max"),
        max_usage: number(dir, "memory.peak"),
        swap_usage: number(dir, "memory.swap.current"),
        swap_limit: limit(dir, "memory.swap.max"),
        swap_max_usage: number(dir, "memory.swap.peak"),
        psi: pressure(dir, "memory.pressure"),
        ..Default::default()
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`
fn io_line(line: &str) -> Option<v2::IOEntry> {
    let mut fields = line.split_whitespace();
    let (major, minor) = device(fields.next()?)?;
    let mut entry = v2::IOEntry { major, minor, ..Default::default() };
    for field in fields {
        let Some((key, value)) = field.split_once('=') else { continue };
        let Ok(value) = value.parse() else { continue };
        match key {
            "rbytes" => entry.rbytes = value,
            "wbytes" => entry.wbytes = value,
            "rios" => entry.rios = value,
            "wios" => entry.wios = value,
            _ => {}
        }
    }
    Some(entry)
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; absent where the kernel does not count it.
fn pressure(dir: &Path, file: &str) -> MessageField<v2::PSIStats> {
    let Ok(text) = read(&dir.join(file)) else { return MessageField::none() };
    let mut stats = v2::PSIStats::new();
    for line in text.lines() {
        let (kind, fields) = line.split_once(' ').unwrap_or((line, ""));
        let mut data = v2::PSIData::new();
        for (key, value) in fields.split_whitespace().filter_map(|f| f.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = MessageField::some(data),
            "full" => stats.full = MessageField::some(data),
            _ => {}
        }
    }
    MessageField::some(stats)
}

fn device(numbers: &str) -> Option<(u64, u64)> {
    let (major, minor) = numbers.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The sizes in the names `hugetlb.<size><suffix>`.
fn page_sizes(dir: &Path, suffix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut sizes: Vec<_> = entries
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?;
            (!size.contains('.')).then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    sizes
}

/// The number in a file; 0 if there is none.
fn number(dir: &Path, file: &str) -> u64 {
    read(&dir.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// As [`number`], with containerd's value for `max`.
fn limit(dir: &Path, file: &str) -> u64 {
    match read(&dir.join(file)) {
        Ok(text) if text.trim() == "max" => u64::MAX,
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(_) => 0,
    }
}

/// A file of `key value` lines.
struct Table(HashMap<String, u64>);

impl Table {
    fn read(dir: &Path, file: &str) -> Self {
        let text = read(&dir.join(file)).unwrap_or_default();
        let pairs = text.lines().filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        });
        Self(pairs.collect())
    }

    /// 0 for what this kernel does not count.
    fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lxc::cgroup::Kind;

    fn fake(kind: Kind, mode: Mode, files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let dir = tempfile::tempdir().unwrap();
        for (file, content) in files {
            fs::write(dir.path().join(file), content).unwrap();
        }
        let limit = dir.path().to_owned();
        let inner = limit.join("ns");
        let place = Place { kind, cgroup: "/lxc/1".into(), limit, inner };
        (dir, Cgroup { mode, places: vec![place] })
    }

    #[test]
    fn cgroup2_files_become_v2_metrics() {
        let (_dir, cgroup) = fake(
            Kind::V2,
            Mode::V2,
            &[
                ("cgroup.controllers", "cpu io memory pids hugetlb\n"),
                ("pids.current", "3\n"),
                ("pids.max", "max\n"),
                ("cpu.stat", "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_throttled 2\n"),
                ("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.25 total=99\n"),
                ("memory.current", "4096\n"),
                ("memory.max", "8192\n"),
                ("memory.swap.max", "max\n"),
                (
                    "memory.stat",
                    "anon 1000\nfile 2000\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
                ),
                ("memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n"),
                ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16\n"),
                ("hugetlb.2MB.max", "max\n"),
                ("hugetlb.2MB.rsvd.max", "max\n"),
                ("hugetlb.2MB.current", "5\n"),
                ("hugetlb.2MB.events", "max 6\n"),
            ],
        );
        let any = cgroup.metrics().unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let m = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((m.pids.current, m.pids.limit), (3, u64::MAX));
        assert_eq!((m.cpu.usage_usec, m.cpu.system_usec, m.cpu.nr_throttled), (10, 3, 2));
        assert_eq!((m.cpu.psi.some.avg10, m.cpu.psi.some.total), (1.5, 99));
        assert_eq!((m.memory.usage, m.memory.usage_limit), (4096, 8192));
        assert_eq!((m.memory.swap_limit, m.memory.workingset_refault), (u64::MAX, 3));
        assert_eq!((m.memory_events.max, m.memory_events.oom_kill), (5, 1));
        assert_eq!((m.io.usage[0].rbytes, m.io.usage[0].wios), (1, 4));
        assert_eq!(m.hugetlb.len(), 1);
        assert_eq!((m.hugetlb[0].current, m.hugetlb[0].failcnt), (5, 6));
    }

    #[test]
    fn v1_files_become_v1_metrics() {
        let controllers = ["memory", "cpu", "cpuacct", "pids", "blkio"];
        let (_dir, cgroup) = fake(
            Kind::V1(controllers.map(str::to_owned).to_vec()),
            Mode::Hybrid,
            &[
                ("pids.current", "2\n"),
                ("pids.max", "max\n"),
                ("cpuacct.usage", "123456789\n"),
                ("cpuacct.stat", "user 4\nsystem 5\n"),
                ("cpuacct.usage_percpu", "1 2 \n"),
                ("cpu.stat", "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n"),
                ("memory.usage_in_bytes", "4096\n"),
                ("memory.limit_in_bytes", "8192\n"),
                (
                    "memory.stat",
                    "rss 0\ntotal_rss 77\ntotal_inactive_file 8\nhierarchical_memsw_limit 9\n",
                ),
                ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"),
                (
                    "blkio.throttle.io_service_bytes_recursive",
                    "8:0 Read 10\n8:0 Write 20\nTotal 30\n",
                ),
            ],
        );
        let any = cgroup.metrics().unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let m = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((m.pids.current, m.pids.limit), (2, 0));
        assert_eq!((m.cpu.usage.total, m.cpu.usage.user), (123_456_789, 40_000_000));
        assert_eq!(m.cpu.usage.per_cpu, [1, 2]);
        assert_eq!(m.cpu.throttling.throttled_time, 3);
        assert_eq!((m.memory.usage.usage, m.memory.usage.limit), (4096, 8192));
        assert_eq!((m.memory.rss, m.memory.total_rss), (77, 77));
        assert_eq!((m.memory.total_inactive_file, m.memory.hierarchical_swap_limit), (8, 9));
        assert_eq!(m.memory_oom_control.oom_kill, 4);
        let blkio: Vec<_> =
            m.blkio.io_service_bytes_recursive.iter().map(|e| (e.op.as_str(), e.value)).collect();
        assert_eq!(blkio, [("Read", 10), ("Write", 20)]);
    }

    #[test]
    fn a_cgroup_that_is_gone_has_no_metrics() {
        let (dir, cgroup) = fake(Kind::V2, Mode::V2, &[]);
        drop(dir);
        assert!(cgroup.metrics().unwrap_err().is_gone());
    }
}
