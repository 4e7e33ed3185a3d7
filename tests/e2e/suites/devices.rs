//! Which devices a container may use, and how that changes while it runs.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::direct::{Driver, Shim, Stdio3};
use crate::harness::test::Test;
use crate::suites::cases;

cases!("devices": ;
    proxmox:
    an_update_replaces_the_rules,
    an_update_that_is_refused_changes_no_device,
    what_is_allowed_by_default_stays_so,
    access_for_reading_and_writing_in_two_rules,
);

/// Of no driver: what is allowed fails for another reason than what is denied.
const DEVICE: &str = "c 240 7";

/// A running container with that device, and execs in it.
struct Container<'a> {
    t: &'a Test,
    driver: Driver<'a>,
    shim: Shim,
    process: Value,
    execs: usize,
}

impl Container<'_> {
    #[track_caller]
    fn start<'a>(t: &'a Test, rules: Value) -> Container<'a> {
        let driver = t.driver();
        let script = format!("mknod /tmp/x {DEVICE}; while :; do sleep 1000; done");
        let mut spec = driver.spec(&t.id("a"), &["sh", "-c", &script]);
        spec["linux"]["resources"] = json!({ "devices": rules });
        let shim = driver.start(&t.id("a"), &spec);
        let started = shim.create(&Stdio3::default()).and_then(|_| shim.start(""));
        let container = Container { t, driver, shim, process: spec["process"].clone(), execs: 0 };
        started.expect("start");
        container
    }

    /// How a script in the container ends, and its words.
    fn run(&mut self, script: &str) -> String {
        self.execs += 1;
        let exec = format!("e{}", self.execs);
        let log = self.t.file(&exec);
        let uri = format!("file://{log}");
        let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
        self.process["args"] = json!(["sh", "-c", script]);
        self.shim
            .exec(&exec, &self.process, &io)
            .and_then(|()| self.shim.start(&exec))
            .and_then(|_| self.shim.wait(&exec))
            .expect("exec");
        std::fs::read_to_string(&log).expect("read the output")
    }

    /// Which of `r`, `w` and both at once (`b`) are allowed.
    #[track_caller]
    fn access(&mut self) -> String {
        // The node has to be there.
        let text = self.run(
            "while ! [ -c /tmp/x ]; do sleep 0.05; done; (: < /tmp/x); (: >> /tmp/x); (: <> /tmp/x)",
        );
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        let allowed = lines.iter().map(|line| {
            let denied = line.ends_with("Operation not permitted");
            assert!(denied || line.contains("No such device"), "{text}");
            !denied
        });
        allowed.zip(["r", "w", "b"]).filter(|(allowed, _)| *allowed).map(|(_, c)| c).collect()
    }

    fn update(&self, rules: Value) -> Result<(), String> {
        let update = self.shim.update(&json!({ "devices": rules }));
        update.map_err(|refusal| refusal.message)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.shim.finish();
        self.driver.remove_bundle(&self.shim.id);
    }
}

fn is_cgroup2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn all(allow: bool) -> Value {
    json!({"allow": allow, "access": "rwm"})
}

fn rule(allow: bool, access: &str) -> Value {
    json!({"allow": allow, "type": "c", "major": 240, "minor": 7, "access": access})
}

fn an_update_replaces_the_rules(t: &Test) {
    let mut container = Container::start(t, json!([all(false)]));
    assert_eq!(container.access(), "");
    for (rules, expected) in [
        (json!([all(false), rule(true, "w")]), "w"),
        (json!([]), "w"),
        (json!([all(false), rule(true, "w")]), "w"),
        (json!([all(false), rule(true, "mr")]), "r"),
        (json!([all(false), rule(true, "rwm")]), "rwb"),
        (json!([all(false), rule(true, "rw"), rule(false, "w")]), "r"),
        (json!([all(true)]), "rwb"),
        (json!([all(false)]), ""),
        (json!([{"allow": true, "type": "c", "major": 240, "access": "rw"}]), "rwb"),
        (json!([all(false), rule(true, "w")]), "w"),
    ] {
        container.update(rules.clone()).expect("update");
        assert_eq!(container.access(), expected, "{rules}");
    }
    // What a container always may is not lost on the way.
    let text = container.run("head -c 4 /dev/zero | wc -c; : > /dev/null; mknod /tmp/y b 1 2");
    assert_eq!(text, "4\n");
    let other = container.run(": < /tmp/y");
    assert!(other.contains("Operation not permitted"), "{other}");
}

fn an_update_that_is_refused_changes_no_device(t: &Test) {
    let mut container = Container::start(t, json!([all(false), rule(true, "r")]));
    assert_eq!(container.access(), "r");
    let hole = json!([
        all(false), {"allow": true, "type": "c", "major": 240, "access": "rw"}, rule(false, "w"),
    ]);
    let refusal = container.update(hole).expect_err("no such rule can be kept");
    assert!(refusal.contains("linux.resources.devices: the rule for c 240:7"), "{refusal}");
    assert_eq!(container.access(), "r");
    let default = container.update(json!([all(true), rule(false, "rw")]));
    let refusal = default.expect_err("the default cannot change");
    assert!(refusal.contains("linux.resources.devices in an update"), "{refusal}");
    assert_eq!(container.access(), "r");
    let with_limit = json!({"devices": [all(false), rule(true, "w")], "cpu": {"cpus": "4000"}});
    let refusal = container.shim.update(&with_limit).expect_err("no node has that CPU");
    assert!(refusal.message.contains("cpuset"), "{refusal:?}");
    assert_eq!(container.access(), "r");
    container.update(json!([all(false), rule(true, "w")])).expect("update");
    assert_eq!(container.access(), "w");
}

fn what_is_allowed_by_default_stays_so(t: &Test) {
    let mut container = Container::start(t, json!([all(true)]));
    assert_eq!(container.access(), "rwb");
    let refusal = container.update(json!([all(false)])).expect_err("the default cannot change");
    assert!(refusal.contains("create the container again"), "{refusal}");
    for (access, expected) in [("w", "r"), ("r", "w")] {
        let half = container.update(json!([all(true), rule(false, access)]));
        if is_cgroup2() {
            // Who opens for both would get what is denied.
            assert!(half.expect_err("refused").contains("c 240:7"), "{access}");
            assert_eq!(container.access(), "rwb");
        } else {
            half.expect("update");
            assert_eq!(container.access(), expected);
        }
    }
    for (rules, expected) in [
        (json!([all(true), rule(false, "rwm")]), ""),
        (json!([all(true), rule(false, "m")]), "rwb"),
        (json!([all(true), rule(false, "rw")]), ""),
        (json!([all(true)]), "rwb"),
    ] {
        container.update(rules.clone()).expect("update");
        assert_eq!(container.access(), expected, "{rules}");
    }
}

fn access_for_reading_and_writing_in_two_rules(t: &Test) {
    let rules = json!([all(false), rule(true, "r"), rule(true, "w")]);
    assert_eq!(Container::start(t, rules).access(), "rwb");
}
