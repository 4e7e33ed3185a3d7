//! The six kinds of OCI hooks: order, what they see, and what their failure does.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::direct::Stdio3;
use crate::harness::process;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("hooks": ; proxmox:
    run_in_order_with_their_state,
    create_container_sees_the_host_and_the_containers_mounts,
    create_container_mounts_stay_and_nothing_of_the_host_does,
    failing_hooks_before_the_start_fail_it,
    failing_poststop_hook_does_not_keep_the_task,
    hanging_hooks_are_ended_at_their_timeout,
    environment_is_exact,
);

const KINDS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// A hook that runs a script of the host's shell, or of the container's for startContainer.
fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], "timeout": 10})
}

/// The test's directory in the container, as `/shared`.
fn share(t: &Test, spec: &mut Value) {
    spec["mounts"].as_array_mut().expect("a list").push(json!({
        "destination": "/shared", "type": "bind", "source": t.file(""), "options": ["rbind", "rw"],
    }));
}

fn run_in_order_with_their_state(t: &Test) {
    let id = t.id("a");
    let (status, _) = t
        .run_spec(&id, &["sh", "-c", "echo process >> /shared/order; sleep 0.3"], |spec| {
            share(t, spec);
            spec["annotations"] = json!({"a": "b"});
            spec["hooks"] = json!({});
            for kind in KINDS {
                let shared =
                    if kind == "startContainer" { "/shared".to_owned() } else { t.file("") };
                // Two of each: they run in the order of the list.
                let script = |number: u32| {
                    format!("echo {kind}{number} >> {shared}/order; cat > {shared}/{kind}.json")
                };
                spec["hooks"][kind] = json!([hook(&script(1)), hook(&script(2))]);
            }
        })
        .expect("runs");
    assert_eq!(status, 0);
    let order = fs::read_to_string(t.file("order")).expect("the hooks ran");
    let mut order: Vec<&str> = order.lines().collect();
    // The process and the poststart hooks run at the same time.
    let process = order.iter().position(|line| *line == "process").expect("it ran");
    assert!(process > 7, "{order:?}");
    order.remove(process);
    let wanted: Vec<String> =
        KINDS.iter().flat_map(|kind| [format!("{kind}1"), format!("{kind}2")]).collect();
    assert_eq!(order, wanted);

    for (kind, status) in
        KINDS.iter().zip(["creating", "creating", "creating", "created", "running", "stopped"])
    {
        let text = fs::read_to_string(t.file(&format!("{kind}.json"))).expect("its state");
        let state: Value = serde_json::from_str(&text).expect("the state is JSON");
        assert_eq!(state["status"], status, "{kind}");
        assert_eq!(state["id"], id.as_str(), "{kind}");
        assert_eq!(state["annotations"]["a"], "b", "{kind}");
        assert!(state["bundle"].as_str().is_some_and(|path| path.ends_with(&id)), "{kind}");
        match *kind {
            // As the container sees it.
            "createContainer" | "startContainer" => assert_eq!(state["pid"], 1, "{kind}"),
            "poststop" => assert_eq!(state["pid"], Value::Null),
            _ => assert!(state["pid"].as_u64().is_some_and(|pid| pid > 1), "{kind}: {state}"),
        }
    }
}

fn create_container_sees_the_host_and_the_containers_mounts(t: &Test) {
    fs::write(t.file("only-on-the-host"), "host").expect("write");
    let report = t.file("report");
    let directory = t.file("");
    // The working directory is the container's root.
    let script = format!(
        "{{ cat {directory}/only-on-the-host; echo; cat shared/only-on-the-host; echo; \
         test -c dev/null && echo device; readlink /proc/self/ns/net; readlink /proc/self/ns/mnt; \
         pwd; }} > {report} 2>&1; echo made by the hook > etc/made; mkdir -p etc/deep"
    );
    let id = t.id("a");
    let (status, text) = t
        .run_spec(&id, &["sh", "-c", "cat /etc/made; readlink /proc/self/ns/net"], |spec| {
            share(t, spec);
            // It is made read-only only afterwards.
            spec["root"]["readonly"] = json!(true);
            spec["hooks"] = json!({"createContainer": [hook(&script)]});
        })
        .expect("runs");
    let report = fs::read_to_string(report).expect("the hook ran");
    let lines: Vec<&str> = report.lines().collect();
    assert_eq!(lines[..3], ["host", "host", "device"], "{report}");
    let own = fs::read_link("/proc/self/ns/mnt").expect("ns").display().to_string();
    assert_ne!(lines[4], own, "it ran in the host's mount namespace");
    assert!(lines[5].ends_with(&format!("{id}/rootfs")), "{report}");
    assert_eq!((status, text), (0, format!("made by the hook\n{}", lines[3])));
}

fn create_container_mounts_stay_and_nothing_of_the_host_does(t: &Test) {
    let list = ["sh", "-c", "cut -d' ' -f5 /proc/self/mountinfo; cat /mnt/file; ls /"];
    let plain = t.run_spec(&t.id("a"), &list, |_| ()).expect("runs");
    let script = "mount -t tmpfs hook mnt && echo mounted by the hook > mnt/file";
    let with_hook = t
        .run_spec(&t.id("b"), &list, |spec| {
            spec["hooks"] = json!({"createContainer": [hook(script)]});
        })
        .expect("runs");
    assert_eq!(with_hook.0, 0);
    assert!(with_hook.1.contains("mounted by the hook"), "{}", with_hook.1);
    let lines = |text: &str| -> Vec<String> {
        let mut lines: Vec<_> = text
            .lines()
            .filter(|line| {
                !matches!(*line, "/mnt" | "mounted by the hook") && !line.contains("No such file")
            })
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&plain.1), lines(&with_hook.1));
    let host = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!host.lines().any(|line| line.contains(" - tmpfs hook ")), "it reached the host");
}

fn failing_hooks_before_the_start_fail_it(t: &Test) {
    for (number, kind) in KINDS[..5].iter().enumerate() {
        let marker = t.file(&format!("{kind}.second"));
        let refusal = t
            .run_spec(&t.id(&format!("a{number}")), &["sleep", "1000"], |spec| {
                spec["hooks"] = json!({});
                spec["hooks"][kind] =
                    json!([hook("echo the reason; exit 3"), hook(&format!("touch {marker}")),]);
            })
            .expect_err(kind);
        assert!(refusal.message.contains("the reason"), "{kind}: {}", refusal.message);
        assert!(refusal.message.contains(kind), "{kind}: {}", refusal.message);
        assert!(!fs::exists(&marker).expect("stat"), "{kind}: the next one ran");
    }
}

fn failing_poststop_hook_does_not_keep_the_task(t: &Test) {
    let marker = t.file("second");
    let (status, _) = t
        .run_spec(&t.id("a"), &["true"], |spec| {
            spec["hooks"] = json!({"poststop": [
                hook("echo the reason; exit 3"),
                {"path": "/no/such/program"},
                hook(&format!("touch {marker}")),
            ]});
        })
        .expect("runs");
    assert_eq!(status, 0);
    assert!(fs::exists(&marker).expect("stat"), "the hooks after it ran");
    let log = t.shim_log(&t.id("a"));
    assert!(log.contains("the reason") && log.contains("/no/such/program"), "{log}");
}

fn hanging_hooks_are_ended_at_their_timeout(t: &Test) {
    for (number, kind) in ["createRuntime", "createContainer", "startContainer"].iter().enumerate()
    {
        let begin = Instant::now();
        let refusal = t
            .run_spec(&t.id(&format!("a{number}")), &["true"], |spec| {
                let mut hanging = hook("exec sleep 1000");
                hanging["timeout"] = json!(1);
                spec["hooks"] = json!({});
                spec["hooks"][kind] = json!([hanging]);
            })
            .expect_err(kind);
        assert!(refusal.message.contains(kind), "{kind}: {}", refusal.message);
        assert!(
            begin.elapsed() < process::scaled(Duration::from_secs(20)),
            "{kind}: {:?}",
            begin.elapsed()
        );
    }
}

fn environment_is_exact(t: &Test) {
    let id = t.id("a");
    let driver = t.driver();
    let mut spec = driver.spec(&id, &["true"]);
    share(t, &mut spec);
    spec["hooks"] = json!({});
    for kind in KINDS {
        let shared = if kind == "startContainer" { "/shared".to_owned() } else { t.file("") };
        let script = format!("env > {shared}/{kind}.env");
        spec["hooks"][kind] = json!([
            {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin", "A=b=c d"]},
        ]);
    }
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    shim.finish();
    driver.remove_bundle(&id);
    for kind in KINDS {
        let text = fs::read_to_string(t.file(&format!("{kind}.env"))).expect(kind);
        // What the shell itself sets is no variable of the hook.
        let mut lines: Vec<&str> = text
            .lines()
            .filter(|line| {
                !["PWD=", "OLDPWD=", "SHLVL=", "_="].iter().any(|own| line.starts_with(own))
            })
            .collect();
        lines.sort_unstable();
        assert_eq!(lines, ["A=b=c d", "PATH=/bin:/usr/bin"], "{kind}");
    }
}
