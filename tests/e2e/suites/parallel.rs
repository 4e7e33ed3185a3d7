//! Many containers at once: no visible lock error, no crosstalk.

use std::collections::HashSet;

use crate::harness::test::Test;
use crate::suites::cases;

cases!("parallel":
    thirty_two_containers_at_once,
    thirty_two_short_runs_at_once,
    one_slow_container_does_not_delay_another,
);

fn thirty_two_containers_at_once(t: &Test) {
    let ids: Vec<String> = (0..32).map(|n| t.id(&format!("n{n}"))).collect();
    let starting: Vec<_> = ids
        .iter()
        .map(|id| t.spawn(t.run_command(&["--detach"], id, &["sleep", "1000"])))
        .collect();
    for start in starting {
        start.wait().ok();
    }
    let tasks: Vec<_> =
        ids.iter().map(|id| t.task(id).unwrap_or_else(|| panic!("{id} is missing"))).collect();
    assert!(tasks.iter().all(|(_, status)| status == "RUNNING"), "{tasks:?}");
    let pids: HashSet<u32> = tasks.iter().map(|(pid, _)| *pid).collect();
    assert_eq!(pids.len(), 32);
    assert_eq!(ids.iter().filter(|id| t.node.shims(id).len() == 1).count(), 32, "one shim each");
    if t.node.has_pve() {
        let pve = t.node.pve();
        let vmids: HashSet<u32> = ids.iter().filter_map(|id| pve.vmid_of(id)).collect();
        assert_eq!(vmids.len(), 32);
    }
    let killing: Vec<_> = ids
        .iter()
        .map(|id| {
            let mut ctr = t.node.ctr_command();
            ctr.args(["tasks", "delete", "--force", id]);
            t.spawn(ctr)
        })
        .collect();
    for kill in killing {
        kill.wait();
    }
    for id in &ids {
        assert_eq!(t.wait_exit(id).exit_status(), 137);
        assert_eq!(t.task(id), None, "{id}");
    }
}

fn thirty_two_short_runs_at_once(t: &Test) {
    let running: Vec<_> = (0..32)
        .map(|n| {
            let id = t.id(&format!("n{n}"));
            let script = format!("echo from {n}; exit {n}");
            t.spawn(t.run_command(&["--rm"], &id, &["sh", "-c", &script]))
        })
        .collect();
    for (number, run) in running.into_iter().enumerate() {
        let out = run.wait().expect(number as i32);
        assert_eq!(out.text(), format!("from {number}"));
    }
}

fn one_slow_container_does_not_delay_another(t: &Test) {
    use crate::harness::direct::Stdio3;
    use std::os::unix::fs::PermissionsExt;
    // A hook that waits for a file holds the first container's create only.
    let (hook, go) = (t.file("slow.sh"), t.file("go"));
    let script = format!("#!/bin/sh\nwhile ! test -e {go}; do sleep 0.05; done\n");
    std::fs::write(&hook, script).expect("write the hook");
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let (slow, quick) = (t.id("slow"), t.id("quick"));
    let driver = t.driver();
    let mut spec = driver.spec(&slow, &["true"]);
    spec["hooks"] = serde_json::json!({"createRuntime": [{"path": hook, "timeout": 60}]});
    let shim = driver.start(&slow, &spec);
    let other = shim.clone();
    let creating = std::thread::spawn(move || other.create(&Stdio3::default()));
    t.run(&[], &quick, &["echo", "quick"]).ok();
    if t.node.has_pve() {
        // Calls to the same shim are answered meanwhile, too.
        let _ = shim.state("");
    }
    assert!(!creating.is_finished(), "it has not waited for its hook");
    std::fs::write(&go, "").expect("let the hook end");
    creating.join().expect("no panic").expect("create");
    shim.finish();
    driver.remove_bundle(&slow);
}
