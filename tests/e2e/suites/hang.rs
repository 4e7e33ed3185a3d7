//! A Proxmox that accepts connections and never answers. Each test has a node of its own, as nobody
//! else's calls would be answered either.

use std::time::Duration;

use crate::harness::direct::{Driver, Stdio3};
use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("hang":
    a_delete_that_proxmox_holds_up_tells_the_status_and_is_made_up_for,
    what_was_left_behind_does_not_block_the_id,
    poststop_hooks_of_what_was_left_behind_run_without_its_bundle,
    a_client_that_gives_up_leaves_nothing,
);

/// Runs `work` while Proxmox accepts connections and never answers.
fn while_proxmox_hangs<T>(t: &Test, work: impl FnOnce() -> T) -> T {
    let sim = t.node.pve().pid();
    sys::kill(sim, libc::SIGSTOP);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    sys::kill(sim, libc::SIGCONT);
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A container that ended with status 7, whose shim crashed, and which `delete` could not remove.
fn left_behind(t: &Test, driver: &Driver<'_>, id: &str, spec: &serde_json::Value) {
    let shim = driver.start(id, spec);
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    assert_eq!(shim.wait("").expect("wait").exit_status, 7);
    shim.crash();
    while_proxmox_hangs(t, || {
        let started = std::time::Instant::now();
        assert_eq!(driver.delete_after_crash(id).exit_status, 7);
        assert!(
            started.elapsed() < process::scaled(Duration::from_secs(5)),
            "containerd waits 5 s"
        );
    });
    assert!(t.node.pve().vmid_of(id).is_some());
    sys::detach(&shim.bundle.join("rootfs"));
    driver.remove_bundle(id);
}

/// Waits until the next shim has removed what the one before had to leave.
fn removed(t: &Test, id: &str) {
    eventually("the next shim removes it", Duration::from_secs(10), || {
        let gone = t.node.pve().vmid_of(id).is_none();
        (gone && !t.node.run_dir().join(&t.node.namespace).join(id).exists()).then_some(())
    });
}

fn a_delete_that_proxmox_holds_up_tells_the_status_and_is_made_up_for(t: &Test) {
    let (id, next, driver) = (t.id("a"), t.id("b"), t.driver());
    left_behind(t, &driver, &id, &driver.spec(&id, &["probe", "exit", "7"]));
    let shim = driver.start(&next, &driver.spec(&next, &["true"]));
    removed(t, &id);
    shim.finish();
    driver.remove_bundle(&next);
}

fn what_was_left_behind_does_not_block_the_id(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    left_behind(t, &driver, &id, &driver.spec(&id, &["probe", "exit", "7"]));
    let shim = driver.start(&id, &driver.spec(&id, &["probe", "exit", "3"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    assert_eq!(shim.wait("").expect("wait").exit_status, 3);
    shim.finish();
    driver.remove_bundle(&id);
}

fn poststop_hooks_of_what_was_left_behind_run_without_its_bundle(t: &Test) {
    let (id, next, driver) = (t.id("a"), t.id("b"), t.driver());
    let file = t.file("state");
    let mut spec = driver.spec(&id, &["probe", "exit", "7"]);
    let script = format!("cat >> {file}");
    spec["hooks"] = serde_json::json!({"poststop": [
        // One that fails does not keep the others from running.
        {"path": "/bin/false"},
        {"path": "/bin/sh", "args": ["sh", "-c", script]},
    ]});
    spec["annotations"] = serde_json::json!({"network": "is mine"});
    left_behind(t, &driver, &id, &spec);
    let shim = driver.start(&next, &driver.spec(&next, &["true"]));
    let state = eventually("the next shim runs the hook", Duration::from_secs(10), || {
        std::fs::read_to_string(&file).ok().filter(|state| !state.is_empty())
    });
    let state: serde_json::Value = serde_json::from_str(&state).expect("one state, as JSON");
    assert_eq!(state["status"], "stopped");
    assert_eq!(state["annotations"]["network"], "is mine");
    assert_eq!(state["id"], id);
    removed(t, &id);
    shim.finish();
    driver.remove_bundle(&next);
}

fn a_client_that_gives_up_leaves_nothing(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    let pid = shim.connect().expect("connect").shim_pid;
    let mut hasty = shim.clone();
    hasty.patience = Duration::from_millis(700);
    while_proxmox_hangs(t, || {
        hasty.create(&Stdio3::default()).expect_err("no answer in time");
        hasty.delete("").expect_err("no answer in time");
        hasty.shutdown();
    });
    eventually("the shim has undone it and ends", Duration::from_secs(20), || {
        (!process::is_alive(pid)).then_some(())
    });
    assert_eq!(t.node.pve().vmid_of(&id), None);
    driver.delete_after_crash(&id);
    driver.remove_bundle(&id);
}
