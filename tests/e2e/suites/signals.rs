//! Kill delivers the exact signal to the right processes.

use std::fs;
use std::time::Duration;

use crate::harness::direct::{Stdio3, code};
use crate::harness::process::{eventually, status_field};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("signals":
    every_signal_reaches_the_workload,
    kill_all_reaches_every_process,
    kill_without_all_reaches_the_first_process_only,
    names_and_numbers_mean_the_same,
    stop_and_continue,
    kill_of_an_unknown_exec_is_not_found,
);

/// Numbers in the lines `got N` of a file.
fn got(path: &str) -> Vec<u32> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| line.strip_prefix("got ")?.parse().ok()).collect()
}

fn wait_ready(path: &str) {
    eventually(&format!("{path} says ready"), Duration::from_secs(10), || {
        fs::read_to_string(path).ok()?.contains("ready").then_some(())
    });
}

// Realtime signals have no name that ctr accepts: hence without it.
fn every_signal_reaches_the_workload(t: &Test) {
    let (id, log) = (t.id("a"), t.file("log"));
    let driver = t.driver();
    let uri = format!("file://{log}");
    let shim = driver.start(&id, &driver.spec(&id, &["probe", "record-signals"]));
    shim.create(&Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() }).expect("create");
    shim.start("").expect("start");
    wait_ready(&log);
    let signals: Vec<u32> = (1..=64).filter(|s| ![9, 19].contains(s)).collect();
    for signal in &signals {
        shim.kill("", *signal, false).expect("kill");
        eventually(&format!("signal {signal} arrives"), Duration::from_secs(5), || {
            (got(&log).last() == Some(signal)).then_some(())
        });
    }
    assert_eq!(got(&log), signals);
    shim.kill("", 9, false).expect("SIGKILL");
    assert_eq!(shim.wait("").expect("wait").exit_status, 137);
    shim.finish();
    driver.remove_bundle(&id);
}

fn two_recorders(t: &Test) -> (String, String, String) {
    let (id, first, second) = (t.id("a"), t.file("first"), t.file("second"));
    t.start(&["--log-uri", &format!("file://{first}")], &id, &["probe", "record-signals"]);
    wait_ready(&first);
    let flags = ["--detach", "--exec-id", "second", "--log-uri", &format!("file://{second}")];
    t.exec(&flags, &id, &["probe", "record-signals"]).ok();
    wait_ready(&second);
    (id, first, second)
}

fn kill_all_reaches_every_process(t: &Test) {
    let (id, first, second) = two_recorders(t);
    t.ctr(&["tasks", "kill", "--all", "--signal", "SIGUSR1", &id]).ok();
    for log in [&first, &second] {
        eventually(&format!("SIGUSR1 in {log}"), Duration::from_secs(5), || {
            (got(log) == [10]).then_some(())
        });
    }
    t.ctr(&["tasks", "kill", "--all", "--signal", "SIGKILL", &id]).ok();
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
    assert_eq!(t.node.events.wait(&id, "exit", "second").exit_status(), 137);
}

fn kill_without_all_reaches_the_first_process_only(t: &Test) {
    let (id, first, second) = two_recorders(t);
    t.kill(&id, "SIGUSR2").ok();
    eventually("SIGUSR2 arrives", Duration::from_secs(5), || (got(&first) == [12]).then_some(()));
    t.ctr(&["tasks", "kill", "--exec-id", "second", "--signal", "SIGHUP", &id]).ok();
    eventually("SIGHUP arrives", Duration::from_secs(5), || (got(&second) == [1]).then_some(()));
    assert_eq!(got(&first), [12]);
}

fn names_and_numbers_mean_the_same(t: &Test) {
    let (id, log) = (t.id("a"), t.file("log"));
    t.start(&["--log-uri", &format!("file://{log}")], &id, &["probe", "record-signals"]);
    wait_ready(&log);
    for (position, (signal, number)) in [("SIGHUP", 1), ("15", 15), ("USR1", 10)].iter().enumerate()
    {
        t.kill(&id, signal).ok();
        eventually(signal, Duration::from_secs(5), || {
            (got(&log).get(position) == Some(number)).then_some(())
        });
    }
}

fn stop_and_continue(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sleep", "1000"]);
    let pid = t.pid(&id);
    let state = |letter: &str| {
        eventually(&format!("{pid} is {letter}"), Duration::from_secs(5), || {
            status_field(pid, "State").filter(|state| state.starts_with(letter))
        });
    };
    t.kill(&id, "SIGSTOP").ok();
    state("T");
    t.kill(&id, "SIGCONT").ok();
    state("S");
    assert!(sys::kill(pid, 0));
}

fn kill_of_an_unknown_exec_is_not_found(t: &Test) {
    let (id, driver) = (t.id("a"), t.driver());
    let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.create(&Stdio3::default()).expect("create");
    shim.start("").expect("start");
    assert_eq!(shim.kill("nobody", 15, false).map_err(|e| e.code), Err(code("NotFound")));
    shim.finish();
    driver.remove_bundle(&id);
}
