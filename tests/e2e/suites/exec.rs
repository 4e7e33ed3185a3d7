//! Additional processes in a running container.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::direct::Stdio3;
use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("exec":
    prints_on_both_streams_and_returns_the_status,
    sees_the_containers_namespaces,
    enters_a_cgroup_namespace_of_its_own,
    gets_the_containers_environment,
    takes_a_working_directory,
    takes_a_user,
    inherits_no_limit_on_descriptors_of_the_shim,
    has_the_containers_capabilities_and_no_more,
    missing_executable_is_named_and_nothing_stays,
    reads_stdin_to_its_end,
    detached_exec_runs_on,
    is_killed_by_its_id,
    has_its_own_events,
    sixteen_at_once,
    is_refused_after_the_container_ended,
    dies_with_the_container,
    working_directory_on_the_host_is_refused,
);

fn prints_on_both_streams_and_returns_the_status(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let out = t.exec_sh(&id, "echo out; echo err >&2; exit 9").expect(9);
    assert_eq!(out.text(), "out");
    assert_eq!(out.stderr.trim(), "err");
}

fn sees_the_containers_namespaces(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let script = "for n in mnt pid net ipc uts cgroup; do readlink /proc/self/ns/$n; done";
    let of_exec = t.exec_sh(&id, script).ok().text();
    let of_init = t.exec_sh(&id, &script.replace("self", "1")).ok().text();
    assert_eq!(of_exec, of_init);
}

// Where cgroup2 is mounted with nsdelegate, the kernel has rules of its own for this.
fn enters_a_cgroup_namespace_of_its_own(t: &Test) {
    let id = t.id("a");
    let driver = t.driver();
    let mut spec = driver.spec(&id, &["sleep", "1000"]);
    let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    namespaces.push(json!({"type": "cgroup"}));
    let mut process = spec["process"].clone();
    let script = "readlink /proc/self/ns/cgroup; readlink /proc/1/ns/cgroup";
    process["args"] = json!(["sh", "-c", script]);
    let log = t.file("exec.out");
    let io = Stdio3 { stdout: format!("file://{log}"), ..Stdio3::default() };
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).and_then(|_| shim.start("")).expect("start");
    let outcome = shim
        .exec("e", &process, &io)
        .and_then(|()| shim.start("e"))
        .and_then(|_| shim.wait("e"))
        .map(|reply| reply.exit_status);
    shim.finish();
    driver.remove_bundle(&id);
    assert_eq!(outcome.expect("exec"), 0);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(lines[0], lines[1]);
    let host = std::fs::read_link("/proc/self/ns/cgroup").expect("the host's");
    assert_ne!(lines[0], host.display().to_string());
}

fn gets_the_containers_environment(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--env", "A=b"], &id);
    let env = t.exec(&[], &id, &["env"]).ok().text();
    for wanted in ["A=b", "FROM_IMAGE=yes", "PATH=/bin"] {
        assert!(env.lines().any(|line| line == wanted), "{wanted}: {env}");
    }
    assert!(!env.contains("container="), "{env}");
}

fn takes_a_working_directory(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    assert_eq!(t.exec(&["--cwd", "/tmp"], &id, &["pwd"]).ok().text(), "/tmp");
}

/// The shim raises its own.
fn inherits_no_limit_on_descriptors_of_the_shim(t: &Test) {
    let unlimited = |process: &mut Value| process["rlimits"] = json!([]);
    let command = ["sh", "-c", "ulimit -Sn; ulimit -Hn"];
    let outcome =
        t.exec_spec(&t.id("a"), &command, |spec| unlimited(&mut spec["process"]), unlimited);
    let (_, text) = outcome.expect("runs");
    let (soft, hard) = text.split_once('\n').expect("two numbers");
    assert_eq!(soft, sys::SERVICE_DESCRIPTORS.to_string());
    assert_ne!(hard, soft);
}

fn takes_a_user(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let out = t.exec(&["--user", "user"], &id, &["id"]).ok().text();
    assert!(out.starts_with("uid=1000(user) gid=1000(user)"), "{out}");
    let out = t.exec(&["--user", "5:6"], &id, &["id"]).ok().text();
    assert!(out.starts_with("uid=5 gid=6"), "{out}");
}

fn has_the_containers_capabilities_and_no_more(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--cap-drop", "CAP_CHOWN"], &id);
    let script = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status";
    let of_exec = t.exec_sh(&id, script).ok().text();
    let of_init = t.exec_sh(&id, &script.replace("self", "1")).ok().text();
    assert_eq!(of_exec, of_init);
}

fn missing_executable_is_named_and_nothing_stays(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let out = t.exec(&["--exec-id", "bad"], &id, &["/no/such"]).expect_error("/no/such");
    assert!(out.stderr.contains("no such file or directory"), "{}", out.stderr);
    // The id is free again: ctr deletes the exec that did not start.
    t.exec(&["--exec-id", "bad"], &id, &["true"]).ok();
}

fn reads_stdin_to_its_end(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let input = "line\n".repeat(10_000);
    let mut command = t.exec_command(&[], &id, &["wc", "-c"]);
    let running = crate::harness::process::Running::spawn(&mut command, Some(input.as_bytes()));
    assert_eq!(running.wait().ok().text(), "50000");
}

fn detached_exec_runs_on(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    t.exec(
        &["--detach", "--exec-id", "d"],
        &id,
        &["sh", "-c", "echo $$ > /tmp/pid; exec sleep 1000"],
    )
    .ok();
    let listed = eventually("the exec runs", Duration::from_secs(5), || {
        let list = t.exec_sh(&id, "cat /tmp/pid && cat /proc/$(cat /tmp/pid)/comm").text();
        list.contains("sleep").then_some(list)
    });
    assert!(listed.contains("sleep"));
    t.ctr(&["tasks", "kill", "--exec-id", "d", "--signal", "SIGKILL", &id]).ok();
    assert_eq!(t.node.events.wait(&id, "exit", "d").exit_status(), 137);
}

fn is_killed_by_its_id(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let running = t.spawn(t.exec_command(&["--exec-id", "k"], &id, &["sleep", "1000"]));
    t.node.events.wait(&id, "exec-started", "k");
    t.ctr(&["tasks", "kill", "--exec-id", "k", "--signal", "SIGTERM", &id]).ok();
    assert_eq!(running.wait().code, 143);
    assert_eq!(t.task(&id).map(|(_, s)| s).as_deref(), Some("RUNNING"), "only the exec is hit");
}

fn has_its_own_events(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    t.exec(&["--exec-id", "x"], &id, &["probe", "exit", "4"]).expect(4);
    let exit = t.node.events.wait(&id, "exit", "x");
    assert_eq!(exit.exit_status(), 4);
    let started = t.node.events.wait(&id, "exec-started", "x");
    assert_eq!(started.pid(), exit.pid());
    let order: Vec<_> =
        t.node.events.of(&id).into_iter().filter(|e| e.exec() == "x").map(|e| e.topic).collect();
    assert_eq!(order, ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]);
}

fn sixteen_at_once(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let running: Vec<_> = (0..16)
        .map(|n| t.spawn(t.exec_command(&[], &id, &["sh", "-c", &format!("echo {n}; exit {n}")])))
        .collect();
    for (number, exec) in running.into_iter().enumerate() {
        let out = exec.wait().expect(number as i32);
        assert_eq!(out.text(), number.to_string());
    }
    let left = t.exec_sh(&id, "ls -d /proc/[0-9]* | wc -l").ok().text();
    assert!(left.trim().parse::<u32>().is_ok_and(|count| count <= 5), "leaked processes: {left}");
}

fn is_refused_after_the_container_ended(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["true"]);
    t.wait_exit(&id);
    t.wait_status(&id, "STOPPED");
    let started = Instant::now();
    let out = t.exec(&[], &id, &["true"]);
    assert_ne!(out.code, 0);
    assert!(
        started.elapsed() < process::scaled(Duration::from_secs(5)),
        "took {:?}",
        started.elapsed()
    );
}

fn dies_with_the_container(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let running = t.spawn(t.exec_command(&["--exec-id", "x"], &id, &["sleep", "1000"]));
    t.node.events.wait(&id, "exec-started", "x");
    t.kill(&id, "SIGKILL").ok();
    assert_eq!(running.wait().code, 137);
    assert_eq!(t.node.events.wait(&id, "exit", "x").exit_status(), 137);
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
}

fn working_directory_on_the_host_is_refused(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    for number in (3..16).map(|n| n.to_string()) {
        let directory = format!("/proc/self/fd/{number}");
        let out = t.exec(&["--cwd", &directory], &id, &["ls", "/"]);
        assert_ne!(out.code, 0, "cwd {directory} was accepted: {}", out.text());
    }
}
