//! Resource limits: in the cgroup, in what Proxmox shows, and in effect.

use containerd_client::services::v1::UpdateTaskRequest;
use serde_json::{Value, json};

use crate::harness::direct::{Shim, Stdio3};
use crate::harness::process::{self, Slice, cgroup_value, eventually};
use crate::harness::test::Test;
use crate::suites::cases;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

cases!("limits":
    memory_limit_is_in_the_cgroup,
    cpu_limit_is_in_the_cgroup,
    cpu_shares_are_in_the_cgroup,
    pids_limit_stops_a_fork_bomb,
    without_a_limit_there_is_none,
    programs_see_their_limits,
    update_changes_a_running_container,
    update_of_an_exited_container_is_refused,
    updates_at_once_do_not_refuse_each_other,
    metrics_tell_usage_and_limit,
    processes_of_the_container_are_listed,
    pause_stops_and_resume_continues,
    exec_in_a_paused_container_is_refused,
    a_paused_container_can_be_killed,
    an_oom_kill_is_counted;
    proxmox:
    proxmox_shows_the_limits,
    proxmox_shows_an_update,
    proxmox_does_not_show_an_update_that_failed,
    every_limit_of_the_specification_is_in_the_cgroup,
    a_weight_of_block_io,
    a_limit_of_huge_pages,
    idle_processor_time,
    cgroup2_files_by_name,
    limits_that_the_node_cannot_keep_are_refused,
    an_update_checks_what_is_in_use_if_asked,
    an_update_may_repeat_the_devices,
    cgroups_path_in_the_form_of_systemd,
    exec_follows_the_container_below_its_cgroup,
);

const MIB: u64 = 1 << 20;

fn memory_limit(t: &Test, id: &str) -> String {
    cgroup_value(t.pid(id), id, "memory", "memory.limit_in_bytes", "memory.max")
}

fn memory_limit_is_in_the_cgroup(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string()], &id);
    assert_eq!(memory_limit(t, &id), (64 * MIB).to_string());
}

/// Quota and period in microseconds.
fn cpu_quota(pid: u32, id: &str) -> (String, String) {
    let v2 = cgroup_value(pid, id, "cpu", "cpu.cfs_quota_us", "cpu.max");
    match v2.split_once(' ') {
        Some((quota, period)) => (quota.to_owned(), period.to_owned()),
        None => (v2, cgroup_value(pid, id, "cpu", "cpu.cfs_period_us", "cpu.max")),
    }
}

fn cpu_limit_is_in_the_cgroup(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--cpus", "0.5"], &id);
    assert_eq!(cpu_quota(t.pid(&id), &id), ("50000".to_owned(), "100000".to_owned()));
}

fn cpu_shares_are_in_the_cgroup(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--cpu-shares", "512"], &id);
    let value = cgroup_value(t.pid(&id), &id, "cpu", "cpu.shares", "cpu.weight");
    // runtime-spec's conversion of 512 shares, and the one newer runtimes use.
    assert!(["512", "20", "59"].contains(&value.as_str()), "{value}");
}

fn pids_limit_stops_a_fork_bomb(t: &Test) {
    let script = "for n in $(seq 40); do sleep 3 & done; echo started";
    let (status, text) = t
        .run_spec(&t.id("a"), &["sh", "-c", script], |spec| {
            spec["linux"]["resources"]["pids"] = json!({"limit": 16});
        })
        .expect("runs");
    assert_ne!((status, text.as_str()), (0, "started"), "40 processes with a limit of 16");
    assert!(text.contains("can't fork"), "{text}");
}

fn without_a_limit_there_is_none(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let limit = memory_limit(t, &id);
    let unlimited = limit == "max" || limit.parse::<u64>().is_ok_and(|bytes| bytes > 1 << 60);
    assert!(unlimited, "{limit}");
}

/// The root of what a program sees of cgroups is the one that it is in. Language runtimes look for their
/// limits there, and size heaps and pools of threads by them.
fn programs_see_their_limits(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string(), "--cpus", "0.5"], &id);
    let groups = format!("/proc/{}/cgroup", t.pid(&id));
    let groups = std::fs::read_to_string(groups).expect("its cgroups");
    let path = |prefix: &str| {
        let found = groups.lines().find_map(|line| line.split_once(prefix));
        found.map(|(_, path)| path.to_owned()).expect("it is in a cgroup")
    };
    let read = |path: String| std::fs::read_to_string(path).expect("read a file of its cgroup");
    let seen = || {
        if is_cgroup2() {
            let files = ["memory.max", "cpu.max", "pids.max"];
            return files
                .map(|file| read(format!("/sys/fs/cgroup{}/{file}", path("0::"))))
                .concat();
        }
        let stat = read(format!("/sys/fs/cgroup/memory{}/memory.stat", path(":memory:")));
        let limit = stat.lines().find_map(|line| line.strip_prefix("hierarchical_memory_limit "));
        format!("{}\n", limit.expect("a limit"))
    };
    let expected =
        |mib: u64, rest: &str| format!("{}\n{}", mib * MIB, if is_cgroup2() { rest } else { "" });
    assert_eq!(seen(), expected(64, "50000 100000\nmax\n"));
    let lower = json!({"memory": {"limit": 48 * MIB, "swap": 48 * MIB},
        "cpu": {"quota": 25000, "period": 100_000}, "pids": {"limit": 50}});
    update(t, &id, &lower).expect("update");
    assert_eq!(seen(), expected(48, "25000 100000\n50\n"));
}

/// containerd's Tasks.Update with the JSON of OCI LinuxResources.
#[track_caller]
fn update(t: &Test, id: &str, resources: &serde_json::Value) -> Result<(), String> {
    let url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
    let value = resources.to_string().into_bytes();
    let request = UpdateTaskRequest {
        container_id: id.to_owned(),
        resources: Some(prost_types::Any { type_url: url.to_owned(), value }),
        ..UpdateTaskRequest::default()
    };
    let updated = t.node.tasks(request, async |mut tasks, request| tasks.update(request).await);
    updated.map(|_| ()).map_err(|failure| failure.message)
}

fn update_changes_a_running_container(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string(), "--cpus", "0.5"], &id);
    let pid = t.pid(&id);
    let memory = json!({"memory": {"limit": 96 * MIB, "swap": 96 * MIB}});
    update(t, &id, &memory).expect("update of the memory limit");
    assert_eq!(memory_limit(t, &id), (96 * MIB).to_string());
    assert_eq!(cpu_quota(pid, &id).0, "50000", "what is not named stays");
    let more = json!({"cpu": {"quota": 25000, "period": 100_000}, "pids": {"limit": 50}});
    update(t, &id, &more).expect("update of cpu and pids");
    assert_eq!(cpu_quota(pid, &id).0, "25000");
    assert_eq!(cgroup_value(pid, &id, "pids", "pids.max", "pids.max"), "50");
    assert_eq!(memory_limit(t, &id), (96 * MIB).to_string(), "what is not named stays");
}

fn updates_at_once_do_not_refuse_each_other(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--cpus", "0.5"], &id);
    std::thread::scope(|scope| {
        let id = &id;
        let updates: Vec<_> = (1..=4)
            .map(|n| json!({"cpu": {"quota": n * 10_000, "period": 100_000}}))
            .map(|resources| scope.spawn(move || update(t, id, &resources)))
            .collect();
        for update in updates {
            update.join().expect("no panic").expect("update");
        }
    });
}

fn update_of_an_exited_container_is_refused(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["true"]);
    t.wait_exit(&id);
    t.wait_status(&id, "STOPPED");
    let memory = json!({"memory": {"limit": 96 * MIB}});
    update(t, &id, &memory).expect_err("an exited container cannot be updated");
}

/// A figure of `ctr tasks metrics`, under either cgroup version's name.
fn metric(t: &Test, id: &str, names: [&str; 2]) -> u64 {
    let text = t.ctr(&["tasks", "metrics", id]).ok().text();
    text.lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(name, _)| names.contains(name))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {names:?} in {text}"))
}

fn metrics_tell_usage_and_limit(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string()], &id);
    let cpu = ["cpuacct.usage", "cpu.usage_usec"];
    let before = metric(t, &id, cpu);
    t.exec_sh(&id, "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done").ok();
    assert!(metric(t, &id, cpu) > before, "processor time grows");
    assert!(metric(t, &id, ["memory.usage_in_bytes", "memory.usage"]) > 0);
    assert_eq!(metric(t, &id, ["memory.limit_in_bytes", "memory.usage_limit"]), 64 * MIB);
    assert!(metric(t, &id, ["pids.current", "pids.current"]) >= 1);
}

fn processes_of_the_container_are_listed(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sh", "-c", "sleep 1000 & sleep 1000 & wait"]);
    let pid = t.pid(&id);
    let pids = eventually("three processes", Duration::from_secs(5), || {
        let text = t.ctr(&["tasks", "ps", &id]).ok().text();
        let pids: Vec<u32> =
            text.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
        (pids.len() == 3).then_some(pids)
    });
    assert!(pids.contains(&pid), "{pids:?} without {pid}");
    for child in pids.iter().filter(|child| **child != pid) {
        let comm = std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        assert_eq!(comm.trim(), "sleep", "host pid {child}");
    }
}

fn pause_stops_and_resume_continues(t: &Test) {
    let (id, log) = (t.id("a"), t.file("log"));
    let script = "while :; do echo tick; sleep 0.05; done";
    t.start(&["--log-uri", &format!("file://{log}")], &id, &["sh", "-c", script]);
    let size = || std::fs::metadata(&log).map(|meta| meta.len()).unwrap_or(0);
    eventually("ticks", Duration::from_secs(5), || (size() > 20).then_some(()));
    t.ctr(&["tasks", "pause", &id]).ok();
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("PAUSED"));
    std::thread::sleep(Duration::from_millis(100));
    let before = size();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(size(), before, "it ran while paused");
    t.ctr(&["tasks", "resume", &id]).ok();
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("RUNNING"));
    eventually("more ticks", Duration::from_secs(5), || (size() > before).then_some(()));
    t.node.events.wait(&id, "paused", "");
    t.node.events.wait(&id, "resumed", "");
}

fn exec_in_a_paused_container_is_refused(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    t.ctr(&["tasks", "pause", &id]).ok();
    let out = t.exec(&[], &id, &["true"]);
    t.ctr(&["tasks", "resume", &id]).ok();
    assert_ne!(out.code, 0);
    assert!(out.stderr.contains("paused"), "{}", out.stderr);
}

fn a_paused_container_can_be_killed(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sh", "-c", "sleep 1000 & trap 'exit 0' TERM; wait"]);
    let pid = t.pid(&id);
    let child = eventually("it has a child", Duration::from_secs(5), || {
        process::children(pid).first().copied()
    });
    t.ctr(&["tasks", "pause", &id]).ok();
    t.kill(&id, "SIGKILL").ok();
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
    assert!(!process::is_alive(child), "a frozen process has outlived the container");
    t.delete(&id);
}

fn an_oom_kill_is_counted(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(32 * MIB).to_string()], &id);
    let pid = t.pid(&id);
    let kills = || {
        let text = cgroup_value(pid, &id, "memory", "ns/memory.oom_control", "memory.events");
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.expect("a count").parse::<u64>().expect("a number")
    };
    assert_eq!(kills(), 0);
    t.exec(&[], &id, &["probe", "eat-memory", "4096"]).expect(137);
    t.node.events.wait(&id, "oom", "");
    assert_eq!(kills(), 1);
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("RUNNING"));
}

/// A figure of the API, which answers numbers or strings.
fn number(value: &serde_json::Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

fn configuration(t: &Test, id: &str) -> serde_json::Value {
    let pve = t.node.pve();
    let vmid = pve.vmid_of(id).expect("the container has a CT");
    pve.call("GET", &pve.lxc(&format!("/{vmid}/config")), &[])
}

fn proxmox_shows_the_limits(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string(), "--cpus", "1.5"], &id);
    let shown = configuration(t, &id);
    assert_eq!(number(&shown["memory"]), Some(64.0), "{shown}");
    assert_eq!(number(&shown["cpulimit"]), Some(1.5), "{shown}");
}

fn proxmox_shows_an_update(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string()], &id);
    update(t, &id, &json!({"memory": {"limit": 96 * MIB}})).expect("update");
    eventually("Proxmox shows 96 MiB", Duration::from_secs(10), || {
        (number(&configuration(t, &id)["memory"]) == Some(96.0)).then_some(())
    });
}

fn proxmox_does_not_show_an_update_that_failed(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", &(64 * MIB).to_string()], &id);
    let failing = json!({"memory": {"limit": 96 * MIB},
        "cpu": {"cpus": "4000", "quota": 50_000, "period": 100_000}});
    update(t, &id, &failing).expect_err("no node has that CPU");
    let shown = configuration(t, &id);
    assert_eq!(number(&shown["memory"]), Some(64.0), "{shown}");
    assert_eq!(number(&shown["cpulimit"]).unwrap_or(0.0), 0.0, "{shown}");
}

/// A container in the background, without containerd.
fn start_with(
    t: &Test,
    id: &str,
    command: &[&str],
    change: impl FnOnce(&mut Value),
) -> (Shim, u32) {
    let driver = t.driver();
    let mut spec = driver.spec(id, command);
    change(&mut spec);
    let shim = driver.start(id, &spec);
    let started = shim.create(&Stdio3::default()).and_then(|pid| shim.start("").map(|_| pid));
    match started {
        Ok(pid) => (shim, pid),
        Err(refusal) => {
            finish(t, &shim);
            panic!("{refusal:?}");
        }
    }
}

fn finish(t: &Test, shim: &Shim) {
    shim.finish();
    t.driver().remove_bundle(&shim.id);
}

fn is_cgroup2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// The numbers of a disk of this machine.
fn disk() -> (u64, u64) {
    let numbers = std::fs::read_dir("/sys/block")
        .expect("list the disks")
        .flatten()
        .filter(|disk| disk.path().join("device").exists())
        .find_map(|disk| std::fs::read_to_string(disk.path().join("dev")).ok())
        .expect("a disk");
    let (major, minor) = numbers.trim().split_once(':').expect("major:minor");
    (major.parse().expect("major"), minor.parse().expect("minor"))
}

fn every_limit_of_the_specification_is_in_the_cgroup(t: &Test) {
    let id = t.id("a");
    let (major, minor) = disk();
    let throttle = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let (shim, pid) = start_with(t, &id, &["sleep", "1000"], |spec| {
        let resources = &mut spec["linux"]["resources"];
        resources["memory"] = json!({
            "limit": 64 * MIB, "swap": 64 * MIB, "reservation": 32 * MIB, "swappiness": 7,
        });
        resources["cpu"] = json!({
            "shares": 512, "quota": 50_000, "period": 200_000, "burst": 10_000,
            "cpus": "0", "mems": "0",
        });
        resources["pids"] = json!({"limit": 99});
        resources["blockIO"] = json!({
            "throttleReadBpsDevice": throttle(MIB), "throttleWriteBpsDevice": throttle(2 * MIB),
            "throttleReadIOPSDevice": throttle(300), "throttleWriteIOPSDevice": throttle(400),
        });
    });
    let value = |controller: &str, v1: &str, v2: &str| cgroup_value(pid, &id, controller, v1, v2);
    let mut expected = vec![
        (value("pids", "pids.max", "pids.max"), "99".to_owned()),
        (value("cpuset", "cpuset.cpus", "cpuset.cpus"), "0".to_owned()),
        (value("cpuset", "cpuset.mems", "cpuset.mems"), "0".to_owned()),
        (value("cpu", "cpu.cfs_burst_us", "cpu.max.burst"), "10000".to_owned()),
        (value("memory", "memory.limit_in_bytes", "memory.max"), (64 * MIB).to_string()),
        (value("memory", "memory.soft_limit_in_bytes", "memory.low"), (32 * MIB).to_string()),
    ];
    let device = format!("{major}:{minor}");
    if is_cgroup2() {
        expected.push((value("cpu", "", "cpu.max"), "50000 200000".to_owned()));
        let line = format!("{device} rbps={} wbps={} riops=300 wiops=400", MIB, 2 * MIB);
        expected.push((value("io", "", "io.max"), line));
    } else {
        let throttle = |file: &str, rate: u64| {
            let file = format!("blkio.throttle.{file}_device");
            (value("blkio", &file, ""), format!("{device} {rate}"))
        };
        expected.extend([
            (value("cpu", "cpu.cfs_quota_us", ""), "50000".to_owned()),
            (value("cpu", "cpu.cfs_period_us", ""), "200000".to_owned()),
            (value("cpu", "cpu.shares", ""), "512".to_owned()),
            (value("memory", "memory.swappiness", ""), "7".to_owned()),
            (value("memory", "ns/memory.swappiness", ""), "7".to_owned()),
            throttle("read_bps", MIB),
            throttle("write_bps", 2 * MIB),
            throttle("read_iops", 300),
            throttle("write_iops", 400),
        ]);
    }
    let allowed = process::status_field(pid, "Cpus_allowed_list");
    finish(t, &shim);
    for (value, expected) in expected {
        assert_eq!(value, expected);
    }
    assert_eq!(allowed.as_deref(), Some("0"), "in effect for the process");
}

/// Which file a weight is in depends on the schedulers of block I/O that the kernel has, if any.
fn a_weight_of_block_io(t: &Test) {
    let id = t.id("a");
    let (controller, files) = match is_cgroup2() {
        true => ("io", [("io.bfq.weight", "default 500"), ("io.weight", "default 4950")]),
        false => ("blkio", [("blkio.bfq.weight", "500"), ("blkio.weight", "500")]),
    };
    let has = |file: &str| process::cgroup_directories("/").iter().any(|d| d.join(file).exists());
    let driver = t.driver();
    let mut spec = driver.spec(&id, &["sleep", "1000"]);
    spec["linux"]["resources"]["blockIO"] = json!({"weight": 500});
    let shim = driver.start(&id, &spec);
    let outcome = shim.create(&Stdio3::default());
    let file = files.iter().find(|(name, _)| has(name));
    let value = match (&outcome, file) {
        (Ok(pid), Some((name, _))) => cgroup_value(*pid, &id, controller, name, name),
        _ => String::new(),
    };
    finish(t, &shim);
    match (outcome, file) {
        (Ok(_), file) => assert_eq!(Some(value.as_str()), file.map(|(_, expected)| *expected)),
        (Err(refusal), None) => {
            assert!(refusal.message.contains("linux.resources.blockIO.weight"), "{refusal:?}");
        }
        (Err(refusal), Some(_)) => panic!("{refusal:?}"),
    }
}

fn a_limit_of_huge_pages(t: &Test) {
    let id = t.id("a");
    let sizes = std::fs::read_dir("/sys/kernel/mm/hugepages").expect("list the sizes").flatten();
    let kilobytes = sizes
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()
        })
        .min()
        .expect("a size of huge pages");
    let (name, limit) = (format!("{}MB", kilobytes >> 10), 3 * (kilobytes << 10));
    let change = |spec: &mut Value| {
        spec["linux"]["resources"]["hugepageLimits"] = json!([{"pageSize": name, "limit": limit}]);
    };
    let has_controller = match std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(list) => list.split_whitespace().any(|name| name == "hugetlb"),
        Err(_) => Path::new("/sys/fs/cgroup/hugetlb").exists(),
    };
    if !has_controller {
        let refusal = t.run_spec(&id, &["true"], change).expect_err("no controller");
        return assert!(refusal.message.contains("a limit on huge pages"), "{refusal:?}");
    }
    let (shim, pid) = start_with(t, &id, &["sleep", "1000"], change);
    let value = |kind: &str| {
        let [v1, v2] = ["limit_in_bytes", "max"].map(|end| format!("hugetlb.{name}.{kind}{end}"));
        cgroup_value(pid, &id, "hugetlb", &v1, &v2)
    };
    let values = ["", "rsvd."].map(value);
    finish(t, &shim);
    assert_eq!(values, [limit.to_string(), limit.to_string()]);
}

fn idle_processor_time(t: &Test) {
    let id = t.id("a");
    let (shim, pid) = start_with(t, &id, &["sleep", "1000"], |spec| {
        spec["linux"]["resources"]["cpu"] = json!({"idle": 1});
    });
    let idle = cgroup_value(pid, &id, "cpu", "cpu.idle", "cpu.idle");
    finish(t, &shim);
    assert_eq!(idle, "1");
}

fn cgroup2_files_by_name(t: &Test) {
    let id = t.id("a");
    let unified = |spec: &mut Value| {
        spec["linux"]["resources"]["unified"] = json!({"memory.high": "50331648"});
    };
    if is_cgroup2() {
        let (shim, pid) = start_with(t, &id, &["sleep", "1000"], unified);
        let high = cgroup_value(pid, &id, "memory", "", "memory.high");
        finish(t, &shim);
        assert_eq!(high, "50331648");
    } else {
        let refusal = t.run_spec(&id, &["true"], unified).expect_err("cgroup v1 has no such files");
        assert!(refusal.message.contains("linux.resources.unified"), "{}", refusal.message);
    }
}

fn limits_that_the_node_cannot_keep_are_refused(t: &Test) {
    for (name, resources, expected) in [
        ("cpus", json!({"cpu": {"cpus": "4000"}}), "cpuset.cpus"),
        (
            "disk",
            json!({"blockIO": {"throttleReadBpsDevice":
            [{"major": 4000, "minor": 1, "rate": 5}]}}),
            "4000:1 ",
        ),
        ("pages", json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 5}]}), "huge"),
    ] {
        let refusal = t
            .run_spec(&t.id(name), &["true"], |spec| {
                for (key, value) in resources.as_object().expect("an object") {
                    spec["linux"]["resources"][key] = value.clone();
                }
            })
            .expect_err(name);
        assert!(refusal.message.contains(expected), "{name}: {}", refusal.message);
    }
}

fn an_update_checks_what_is_in_use_if_asked(t: &Test) {
    let id = t.id("a");
    t.start(&["--memory-limit", &(64 * MIB).to_string()], &id, &["sh", "-c",
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=30 2>/dev/null; touch /dev/shm/done; sleep 1000"]);
    eventually("30 MiB are in use", Duration::from_secs(10), || {
        (t.exec_sh(&id, "ls /dev/shm").text().contains("done")).then_some(())
    });
    let limit = json!({"memory": {"limit": 10 * MIB, "checkBeforeUpdate": true}});
    let refusal = update(t, &id, &limit).expect_err("more is in use");
    assert!(refusal.contains("in use"), "{refusal}");
    assert_eq!(memory_limit(t, &id), (64 * MIB).to_string());
}

fn an_update_may_repeat_the_devices(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let info: Value = serde_json::from_str(&t.ctr(&["containers", "info", &id]).ok().text())
        .expect("ctr prints JSON");
    let rules = &info["Spec"]["linux"]["resources"]["devices"];
    assert!(rules.as_array().is_some_and(|rules| !rules.is_empty()), "{info}");
    let with = |rules: Value| json!({"devices": rules, "pids": {"limit": 50}});
    update(t, &id, &with(rules.clone())).expect("they are the container's");
}

fn cgroups_path_in_the_form_of_systemd(t: &Test) {
    let (id, name) = (t.id("a"), t.node.namespace.replace('-', "_") + "-pod");
    let slice = Slice::new(&name);
    let (shim, pid) = start_with(t, &id, &["sleep", "1000"], |spec| {
        spec["linux"]["cgroupsPath"] = json!(format!("{name}.slice:shim:{id}"));
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 * MIB});
    });
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let scope = format!("shim-{id}.scope");
    // systemd writes to the cgroups that it knows, those above the scope.
    if process::has_systemd() {
        process::run(Command::new("systemctl").arg("daemon-reload")).ok();
    }
    let limit = slice.read(&scope, ["memory.limit_in_bytes", "memory.max"]);
    let processes = slice.read("", ["pids.current", "pids.current"]);
    finish(t, &shim);
    let path = format!(":/{}/{scope}/ns", slice.path());
    assert!(groups.lines().any(|line| line.ends_with(&path)), "{path}: {groups}");
    assert_eq!(limit, Some((64 * MIB).to_string()));
    assert_eq!(processes.as_deref(), Some("1"), "the slice counts the container's");
    assert_eq!(slice.read(&scope, ["cgroup.procs", "cgroup.procs"]), None, "it is gone");
}

// A container's own init system divides its cgroup; on cgroup2 no process may be above the parts.
fn exec_follows_the_container_below_its_cgroup(t: &Test) {
    let id = t.id("a");
    let (place, divide) = if is_cgroup2() {
        ("/sys/fs/cgroup", "echo +pids > /sys/fs/cgroup/cgroup.subtree_control")
    } else {
        ("/sys/fs/cgroup/pids", "true")
    };
    let script = format!(
        "mkdir {place}/part && echo $$ > {place}/part/cgroup.procs && {divide} && \
         touch /tmp/divided; while :; do sleep 1000; done"
    );
    let driver = t.driver();
    let mut spec = driver.spec(&id, &["sh", "-c", &script]);
    spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "cgroup"}));
    spec["mounts"].as_array_mut().expect("a list").push(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"],
    }));
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).and_then(|_| shim.start("")).expect("start");
    eventually("it has divided its cgroup", Duration::from_secs(10), || {
        shim.bundle.join("rootfs/tmp/divided").exists().then_some(())
    });
    let mut exec = spec["process"].clone();
    exec["args"] = json!(["sh", "-c", "cat /proc/1/cgroup; echo; cat /proc/self/cgroup"]);
    let log = t.file("exec.out");
    let io = Stdio3 { stdout: format!("file://{log}"), ..Stdio3::default() };
    let outcome = shim
        .exec("e", &exec, &io)
        .and_then(|()| shim.start("e"))
        .and_then(|_| shim.wait("e"))
        .map(|reply| reply.exit_status);
    shim.finish();
    driver.remove_bundle(&id);
    assert_eq!(outcome.expect("exec"), 0);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let (of_init, of_exec) = text.trim().split_once("\n\n").expect("two lists");
    assert!(of_init.lines().any(|line| line.ends_with(":/part")), "{of_init}");
    assert_eq!(of_exec, of_init);
}
