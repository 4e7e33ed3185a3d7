//! Resource limits: in the cgroup, in what Proxmox shows, and in effect.

use serde_json::json;

use crate::harness::grpc::Message;
use crate::harness::process::{cgroup_value, eventually};
use crate::harness::test::Test;
use crate::suites::cases;
use std::time::Duration;

cases!("limits":
    memory_limit_is_in_the_cgroup,
    cpu_limit_is_in_the_cgroup,
    cpu_shares_are_in_the_cgroup,
    pids_limit_stops_a_fork_bomb,
    without_a_limit_there_is_none,
    update_changes_a_running_container,
    update_of_an_exited_container_is_refused,
    updates_at_once_do_not_refuse_each_other,
    metrics_tell_usage_and_limit,
    processes_of_the_container_are_listed,
    pause_stops_and_resume_continues,
    exec_in_a_paused_container_is_refused;
    proxmox:
    proxmox_shows_the_limits,
    proxmox_shows_an_update,
    proxmox_does_not_show_an_update_that_failed,
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

/// containerd's Tasks.Update with the JSON of OCI LinuxResources.
#[track_caller]
fn update(t: &Test, id: &str, resources: &serde_json::Value) -> Result<(), String> {
    let url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
    let message = Message::new().bytes(1, id).any(2, url, resources.to_string());
    t.node
        .grpc("containerd.services.tasks.v1.Tasks/Update", &message)
        .map(|_| ())
        .map_err(|failure| failure.message)
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
