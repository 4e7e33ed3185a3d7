//! Deletion, crashes, and what must not stay behind. Every test of every suite also ends with the
//! check that nothing is left.

use std::time::Duration;

use crate::harness::direct::{Driver, Stdio3, code};
use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("delete":
    a_running_task_is_not_deleted,
    force_deletes_a_running_task,
    a_second_delete_is_not_found,
    a_created_container_can_be_deleted,
    an_unknown_container_is_not_found,
    every_unknown_method_says_unimplemented_not_not_found,
    shutdown_with_a_task_is_ignored,
    a_killed_shim_is_cleaned_up,
    delete_after_a_crash_can_be_repeated,
    churn_leaves_nothing;
    proxmox:
    delete_after_a_crash_knows_the_true_status,
    checkpoint_is_unimplemented_and_says_so,
    a_killed_monitor_is_an_exit_and_the_next_start_works,
    a_killed_shim_of_an_exited_container_keeps_its_status,
    sigterm_ends_an_idle_shim,
    a_container_of_another_containerd_is_not_touched,
    processes_in_the_hosts_pid_namespace_do_not_outlive_a_crash,
    a_failed_poststart_hook_leaves_a_task_that_can_be_deleted,
);

fn a_running_task_is_not_deleted(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let out = t.ctr(&["tasks", "delete", &id]);
    assert_ne!(out.code, 0);
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("RUNNING"), "{}", out.stderr);
}

fn force_deletes_a_running_task(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    t.ctr(&["tasks", "delete", "--force", &id]);
    assert_eq!(t.task(&id), None);
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
}

fn a_second_delete_is_not_found(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["probe", "exit", "4"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    assert_eq!(shim.wait("").expect("wait").exit_status, 4);
    assert_eq!(shim.wait("").expect("wait again").exit_status, 4);
    assert_eq!(shim.delete("").expect("delete").exit_status, 4);
    assert_eq!(shim.delete("").map(|_| ()).map_err(|e| e.code), Err(code("NotFound")));
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_created_container_can_be_deleted(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["true"]));
    shim.create(&Stdio3::default()).expect("create");
    // containerd kills before it deletes what was created but never started.
    let _ = shim.kill("", 9, true);
    eventually("the created container is deleted", Duration::from_secs(10), || {
        shim.delete("").ok()
    });
    shim.finish();
    driver.remove_bundle(&id);
}

fn an_unknown_container_is_not_found(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["true"]));
    let not_found = Err(code("NotFound"));
    assert_eq!(shim.state("").map(|_| ()).map_err(|e| e.code), not_found);
    assert_eq!(shim.kill("", 15, false).map_err(|e| e.code), not_found);
    shim.finish();
    driver.remove_bundle(&id);
}

fn every_unknown_method_says_unimplemented_not_not_found(t: &Test) {
    use containerd_shim_protos::api::{Empty, StateRequest};
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["true"]));
    let mut request = StateRequest::new();
    request.id.clone_from(&id);
    let refusal = shim.call::<_, Empty>("NoSuchMethod", &request).expect_err("refused");
    assert!(
        [code("Unimplemented"), code("InvalidArgument")].contains(&refusal.code),
        "{refusal:?}"
    );
    shim.finish();
    driver.remove_bundle(&id);
}

fn shutdown_with_a_task_is_ignored(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    shim.shutdown();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(shim.state("").expect("the shim still answers").status.value(), 2);
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_killed_shim_is_cleaned_up(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let pid = t.pid(&id);
    t.kill_shim(&id);
    eventually("containerd has noticed", Duration::from_secs(15), || {
        let status = t.task(&id).map(|(_, status)| status);
        (status.is_none() || status.as_deref() == Some("STOPPED")).then_some(())
    });
    eventually("the workload is gone", Duration::from_secs(10), || {
        (!process::is_alive(pid)).then_some(())
    });
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
    // The id can be used again at once.
    t.remove(&id);
    assert_eq!(t.run(&[], &id, &["echo", "again"]).ok().text(), "again");
}

fn delete_after_a_crash_can_be_repeated(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    let pid = shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    let shim_pid = shim.connect().expect("connect").shim_pid;
    sys::kill(shim_pid, libc::SIGKILL);
    eventually("the shim is gone", Duration::from_secs(5), || {
        (!process::is_alive(shim_pid)).then_some(())
    });
    let started = std::time::Instant::now();
    let reply = driver.delete_after_crash(&id);
    assert!(started.elapsed() < process::scaled(Duration::from_secs(5)), "containerd waits 5 s");
    assert_eq!(reply.exit_status, 137);
    assert!(!process::is_alive(pid));
    driver.delete_after_crash(&id);
    driver.remove_bundle(&id);
}

fn churn_leaves_nothing(t: &Test) {
    for round in 0..15 {
        let id = t.id("a");
        t.run(&[], &id, &["probe", "exit", &(round % 3).to_string()]).expect(round % 3);
    }
    let before = t.node.shims(&t.id("a"));
    assert!(before.len() <= 1, "shims pile up: {before:?}");
}

/// A container that ends with `status`, whose shim is killed after or before that.
fn crashed(t: &Test, id: &str, status: &str, shim_first: bool) -> u32 {
    let driver = t.driver();
    let command = ["sh", "-c", &format!("sleep 1; exit {status}")];
    let shim = driver.start(id, &driver.spec(id, &command));
    let pid = shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    let shim_pid = shim.connect().expect("connect").shim_pid;
    if !shim_first {
        shim.wait("").expect("wait");
    }
    sys::kill(shim_pid, libc::SIGKILL);
    eventually("the workload ends", Duration::from_secs(10), || {
        (!process::is_alive(pid) && !process::is_alive(shim_pid)).then_some(())
    });
    // The stop hook writes its record at about the same time.
    std::thread::sleep(Duration::from_millis(300));
    let reply = driver.delete_after_crash(id);
    driver.remove_bundle(id);
    reply.exit_status
}

fn delete_after_a_crash_knows_the_true_status(t: &Test) {
    assert_eq!(crashed(t, &t.id("a"), "9", true), 9);
}

fn a_killed_shim_of_an_exited_container_keeps_its_status(t: &Test) {
    assert_eq!(crashed(t, &t.id("a"), "23", false), 23);
}

fn checkpoint_is_unimplemented_and_says_so(t: &Test) {
    use containerd_shim_protos::api::{CheckpointTaskRequest, Empty};
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    let mut request = CheckpointTaskRequest::new();
    request.id.clone_from(&id);
    let refusal = shim.call::<_, Empty>("Checkpoint", &request).expect_err("refused");
    assert_eq!(refusal.code, code("Unimplemented"));
    assert!(refusal.message.to_lowercase().contains("checkpoint"), "{}", refusal.message);
    shim.finish();
    driver.remove_bundle(&id);
}

fn a_killed_monitor_is_an_exit_and_the_next_start_works(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let pid = t.pid(&id);
    let monitor: u32 =
        process::status_field(pid, "PPid").and_then(|p| p.parse().ok()).expect("PPid");
    let line = std::fs::read_to_string(format!("/proc/{monitor}/cmdline")).unwrap_or_default();
    assert!(line.contains("lxc-start"), "the parent of a container is its monitor, not {line:?}");
    assert!(sys::kill(monitor, libc::SIGKILL));
    // Otherwise only the killed monitor could have known.
    let status = if shim_proxmox::sys::pidfd::keeps_exit_status() { 137 } else { 255 };
    assert_eq!(t.wait_exit(&id).exit_status(), status);
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
    // Also with the same VMID, whose cgroups the monitor could not remove.
    assert_eq!(t.run(&[], &id, &["echo", "again"]).ok().text(), "again");
}

fn sigterm_ends_an_idle_shim(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["true"]));
    let pid = t.node.shims(&id).into_iter().chain(shim.connect().map(|c| c.shim_pid)).next();
    let pid = pid.expect("the shim runs");
    assert!(sys::kill(pid, libc::SIGTERM));
    eventually("the shim ends", Duration::from_secs(5), || (!process::is_alive(pid)).then_some(()));
    driver.delete_after_crash(&id);
    driver.remove_bundle(&id);
}

fn a_container_of_another_containerd_is_not_touched(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let other = Driver::new(&t.node, &t.node.setting.runtime, &t.directory().join("other"));
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    let second = other.start(&id, &other.spec(&id, &["true"]));
    let refusal = second.create(&Stdio3::default()).expect_err("the name is taken on this node");
    assert_eq!(refusal.code, code("AlreadyExists"), "{}", refusal.message);
    second.finish();
    // containerd calls it after each failed Create.
    other.delete_after_crash(&id);
    other.remove_bundle(&id);
    assert_eq!(shim.state("").expect("state").status.value(), 2, "it does not run any more");
    shim.finish();
    driver.remove_bundle(&id);
}

fn processes_in_the_hosts_pid_namespace_do_not_outlive_a_crash(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let mut spec = driver.spec(&id, &["sh", "-c", "sleep 1000 & echo $! > /pid; wait"]);
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "pid");
    }
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    let child: u32 = eventually("the child runs", Duration::from_secs(5), || {
        std::fs::read_to_string(shim.bundle.join("rootfs/pid")).ok()?.trim().parse().ok()
    });
    shim.crash();
    assert_eq!(driver.delete_after_crash(&id).exit_status, 137);
    assert!(!process::is_alive(child), "a process of the container is left");
    driver.remove_bundle(&id);
}

fn a_failed_poststart_hook_leaves_a_task_that_can_be_deleted(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let mut spec = driver.spec(&id, &["sleep", "1000"]);
    spec["hooks"]["poststart"] = serde_json::json!([{"path": "/bin/false"}]);
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).expect("create");
    let refusal = shim.start("").expect_err("the hook fails");
    assert!(refusal.message.contains("poststart hook /bin/false failed"), "{}", refusal.message);
    assert_eq!(shim.delete("").expect("delete at once").exit_status, 137);
    shim.finish();
    driver.remove_bundle(&id);
}
