//! containerd restarts and crashes while containers run. Each test has a node of its own.

use std::fs;
use std::time::Duration;

use containerd_client::services::v1::DeleteTaskRequest;

use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("restart":
    a_running_container_survives_restart_and_crash,
    an_exit_during_the_downtime_is_seen,
    output_during_the_downtime_is_not_lost,
    deletion_works_after_a_restart,
);

fn a_running_container_survives_restart_and_crash(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let pid = t.pid(&id);
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        t.node.stop_containerd(signal);
        assert!(process::is_alive(pid), "the workload died with containerd");
        t.node.start_containerd();
        assert_eq!(t.task(&id), Some((pid, "RUNNING".to_owned())));
        t.exec(&[], &id, &["probe", "exit", "6"]).expect(6);
    }
    t.kill(&id, "SIGTERM").ok();
    assert_eq!(t.wait_exit(&id).exit_status(), 0);
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
}

/// From 1.7 on, containerd takes a shim that lists no process for a leaked one when it starts, and
/// removes its task with the status. runc's shim lists none for an ended container; ours keeps the
/// task until it is deleted.
fn stopped_or_swept(t: &Test, id: &str) -> bool {
    eventually(&format!("{id} is stopped"), Duration::from_secs(20), || match t.task(id) {
        Some((_, status)) => (status == "STOPPED").then_some(true),
        None if t.node.has_pve() => panic!("containerd has lost the ended container {id}"),
        None => Some(false),
    })
}

fn an_exit_during_the_downtime_is_seen(t: &Test) {
    let (id, go) = (t.id("a"), t.file("go"));
    let mount = format!("type=bind,src={},dst=/host,options=rbind:rw", t.directory().display());
    let script = "while ! test -e /host/go; do sleep 0.05; done; exit 33";
    t.start(&["--mount", &mount], &id, &["sh", "-c", script]);
    let pid = t.pid(&id);
    t.node.stop_containerd(libc::SIGKILL);
    fs::write(&go, "").expect("write");
    eventually("the workload ends", Duration::from_secs(10), || {
        (!process::is_alive(pid)).then_some(())
    });
    std::thread::sleep(Duration::from_millis(300));
    t.node.start_containerd();
    if !stopped_or_swept(t, &id) {
        return;
    }
    let request = DeleteTaskRequest { container_id: id };
    let deleted = t.node.tasks(request, async |mut tasks, request| tasks.delete(request).await);
    assert_eq!(deleted.expect("delete").exit_status, 33);
}

fn output_during_the_downtime_is_not_lost(t: &Test) {
    let (id, log) = (t.id("a"), t.file("log"));
    let script = "n=0; while [ $n -lt 60 ]; do n=$((n+1)); echo line $n; sleep 0.05; done; exit 2";
    t.start(&["--log-uri", &format!("file://{log}")], &id, &["sh", "-c", script]);
    let pid = t.pid(&id);
    t.node.stop_containerd(libc::SIGKILL);
    std::thread::sleep(Duration::from_millis(500));
    t.node.start_containerd();
    eventually("the workload ends", Duration::from_secs(20), || {
        (!process::is_alive(pid)).then_some(())
    });
    t.wait_status(&id, "STOPPED");
    let expected: String = (1..=60).map(|n| format!("line {n}\n")).collect();
    eventually("the whole log", Duration::from_secs(5), || {
        (fs::read_to_string(&log).ok()? == expected).then_some(())
    });
}

fn deletion_works_after_a_restart(t: &Test) {
    let (running, ended) = (t.id("running"), t.id("ended"));
    t.start_idle(&[], &running);
    t.start(&[], &ended, &["probe", "exit", "3"]);
    t.wait_exit(&ended);
    t.node.stop_containerd(libc::SIGTERM);
    t.node.start_containerd();
    if stopped_or_swept(t, &ended) {
        t.delete(&ended);
    }
    assert!(sys::kill(t.pid(&running), libc::SIGKILL));
    assert_eq!(t.wait_exit(&running).exit_status(), 137);
    t.wait_status(&running, "STOPPED");
    t.delete(&running);
}
