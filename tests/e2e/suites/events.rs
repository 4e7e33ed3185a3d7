//! The event stream: complete, in order, once.

use std::time::Duration;

use crate::harness::direct::{Shim, Stdio3};
use crate::harness::process::{self, eventually};
use crate::harness::test::Test;
use crate::suites::cases;

cases!("events":
    a_lifecycle_is_told_in_order,
    exit_is_told_once_with_the_true_pid_and_status,
    nothing_follows_delete,
    the_namespace_is_in_the_envelope;
    proxmox:
    an_outage_of_containerd_loses_repeats_and_reorders_nothing,
    an_outage_does_not_block_calls,
);

fn a_lifecycle_is_told_in_order(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    t.exec(&["--exec-id", "one"], &id, &["true"]).ok();
    t.ctr(&["tasks", "pause", &id]).ok();
    t.ctr(&["tasks", "resume", &id]).ok();
    t.kill(&id, "SIGTERM").ok();
    t.wait_exit(&id);
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
    t.node.events.wait(&id, "delete", "");
    assert_eq!(
        t.node.events.topics(&id),
        [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "paused",
            "resumed",
            "exit",
            "delete"
        ]
    );
}

fn exit_is_told_once_with_the_true_pid_and_status(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sh", "-c", "sleep 0.2; exit 19"]);
    let pid = t.pid(&id);
    let exit = t.wait_exit(&id);
    assert_eq!((exit.pid(), exit.exit_status()), (pid, 19));
    assert!(
        exit.body["exited_at"].is_string() || exit.body["exited_at"].is_object(),
        "{}",
        exit.body
    );
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
    let delete = t.node.events.wait(&id, "delete", "");
    assert_eq!((delete.pid(), delete.exit_status()), (pid, 19));
    let exits = t.node.events.of(&id).into_iter().filter(|e| e.topic == "/tasks/exit").count();
    assert_eq!(exits, 1);
}

fn nothing_follows_delete(t: &Test) {
    let id = t.id("a");
    t.run(&[], &id, &["true"]).ok();
    t.node.events.wait(&id, "delete", "");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(t.node.events.topics(&id), ["create", "start", "exit", "delete"]);
}

fn the_namespace_is_in_the_envelope(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["true"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    driver.events.wait_exit(&id, &id);
    shim.finish();
    for event in driver.events.all() {
        assert_eq!(event.namespace, t.node.namespace, "{}", event.topic);
        // Bare names, as containerd's own marshaller writes them.
        assert!(
            event.event.type_url.starts_with("containerd.events.Task"),
            "{}",
            event.event.type_url
        );
    }
    driver.remove_bundle(&id);
}

fn pause_and_resume(shim: &Shim) {
    use containerd_shim_protos::api::{Empty, PauseRequest, ResumeRequest};
    let mut pause = PauseRequest::new();
    pause.id.clone_from(&shim.id);
    shim.call::<_, Empty>("Pause", &pause).expect("pause");
    let mut resume = ResumeRequest::new();
    resume.id.clone_from(&shim.id);
    shim.call::<_, Empty>("Resume", &resume).expect("resume");
}

fn an_outage_of_containerd_loses_repeats_and_reorders_nothing(t: &Test) {
    let id = t.id("a");
    let mut driver = t.driver();
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    driver.events.wait("start", |event| event.topic == "/tasks/start");
    let process = serde_json::json!({"args": ["probe", "exit", "5"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
    // Longer than any retry scheme that gives up after a few tries.
    for (outage, seconds) in [2, 12].into_iter().enumerate() {
        driver.events.pause();
        let exec = format!("e{outage}");
        shim.exec(&exec, &process, &Stdio3::default()).expect("exec");
        shim.start(&exec).expect("start of the exec");
        assert_eq!(shim.wait(&exec).expect("wait").exit_status, 5);
        pause_and_resume(&shim);
        std::thread::sleep(Duration::from_secs(seconds));
        driver.events.resume();
        shim.delete(&exec).expect("delete of the exec");
        eventually("events after the outage", Duration::from_secs(30), || {
            let resumed =
                driver.events.all().iter().filter(|e| e.topic == "/tasks/resumed").count();
            (resumed == outage + 1).then_some(())
        });
    }
    driver.events.pause();
    shim.kill("", 9, false).expect("kill");
    assert_eq!(shim.wait("").expect("wait").exit_status, 137);
    shim.delete("").expect("delete");
    driver.events.resume();
    driver.events.wait("delete", |event| event.topic == "/tasks/delete");
    let topics: Vec<_> =
        driver.events.all().iter().map(|event| event.topic.replace("/tasks/", "")).collect();
    let one = ["exec-added", "exec-started", "exit", "paused", "resumed"];
    let wanted = [&["create", "start"][..], &one, &one, &["exit", "delete"]].concat();
    assert_eq!(topics, wanted);
    shim.finish();
    driver.remove_bundle(&id);
}

fn an_outage_does_not_block_calls(t: &Test) {
    let id = t.id("a");
    let mut driver = t.driver();
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    driver.events.pause();
    let started = std::time::Instant::now();
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    shim.kill("", 9, false).expect("kill");
    shim.wait("").expect("wait");
    assert!(
        started.elapsed() < process::scaled(Duration::from_secs(5)),
        "took {:?}",
        started.elapsed()
    );
    driver.events.resume();
    shim.finish();
    driver.remove_bundle(&id);
}
