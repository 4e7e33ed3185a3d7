//! The exit status is the true one, whatever ended the process.

use std::time::Duration;

use containerd_client::services::v1::KillRequest;
use containerd_client::tonic::Code;

use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("exit":
    run_returns_the_status,
    detached_run_reports_the_status,
    exec_returns_every_status_from_0_to_255,
    death_by_each_signal_is_128_plus_n,
    sigkill_from_outside_is_137,
    sigkill_from_inside_the_host_is_137,
    oom_kill_is_137,
    oom_kill_of_a_child_gives_an_event,
    threaded_leader_that_ends_first_does_not_end_the_task,
    threaded_leader_in_an_exec_does_not_end_it,
    reboot_is_an_exit_not_a_restart,
    exit_within_the_first_milliseconds,
    a_daemonised_child_ends_with_the_container,
    kill_after_exit_is_not_found;
    proxmox:
    oom_kill_of_the_first_process_gives_an_event_before_the_exit,
);

fn run_returns_the_status(t: &Test) {
    for status in [0, 1, 2, 42, 125, 126, 127, 128, 137, 143, 255] {
        let id = t.id(&format!("s{status}"));
        t.run(&[], &id, &["probe", "exit", &status.to_string()]).expect(status);
    }
}

fn detached_run_reports_the_status(t: &Test) {
    for status in [0, 7, 255] {
        let id = t.id(&format!("s{status}"));
        t.start(&[], &id, &["sh", "-c", &format!("sleep 0.1; exit {status}")]);
        assert_eq!(t.wait_exit(&id).exit_status(), status);
        t.wait_status(&id, "STOPPED");
        t.delete(&id);
    }
}

fn exec_returns_every_status_from_0_to_255(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let wrong: Vec<(i32, i32)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let id = &id;
                scope.spawn(move || {
                    (worker..256)
                        .step_by(4)
                        .map(|status| {
                            let command = ["probe", "exit", &status.to_string()];
                            (status, t.exec(&[], id, &command).code)
                        })
                        .filter(|(wanted, got)| wanted != got)
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker failed")).collect()
    });
    assert!(wrong.is_empty(), "(wanted, got): {wrong:?}");
}

fn death_by_each_signal_is_128_plus_n(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    // Ignored or stopping by default: CHLD CONT STOP TSTP TTIN TTOU URG WINCH.
    let lives = [17, 18, 19, 20, 21, 22, 23, 28];
    let wrong: Vec<(i32, i32)> = (1..=64)
        .filter(|signal| !lives.contains(signal) && !(32..34).contains(signal))
        .map(|signal| (signal, t.exec(&[], &id, &["probe", "raise", &signal.to_string()]).code))
        .filter(|(signal, code)| 128 + signal != *code)
        .collect();
    assert!(wrong.is_empty(), "(signal, status): {wrong:?}");
}

fn sigkill_from_outside_is_137(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sleep", "1000"]);
    t.kill(&id, "SIGKILL").ok();
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
}

fn sigkill_from_inside_the_host_is_137(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sleep", "1000"]);
    assert!(sys::kill(t.pid(&id), libc::SIGKILL));
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
}

fn oom_kill_is_137(t: &Test) {
    let id = t.id("a");
    // Swap may take what memory may not: the probe asks for far more than both.
    t.start(&["--memory-limit", "33554432"], &id, &["probe", "eat-memory", "4096"]);
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
}

fn oom_kill_of_a_child_gives_an_event(t: &Test) {
    let id = t.id("a");
    t.start_idle(&["--memory-limit", "33554432"], &id);
    t.exec(&[], &id, &["probe", "eat-memory", "4096"]).expect(137);
    t.node.events.wait(&id, "oom", "");
    assert_eq!(t.task(&id).map(|(_, status)| status).as_deref(), Some("RUNNING"));
}

// runc's shim can lose this event: it watches a cgroup that is already gone.
fn oom_kill_of_the_first_process_gives_an_event_before_the_exit(t: &Test) {
    let id = t.id("a");
    t.start(&["--memory-limit", "33554432"], &id, &["probe", "eat-memory", "4096"]);
    assert_eq!(t.wait_exit(&id).exit_status(), 137);
    assert_eq!(t.node.events.topics(&id), ["create", "start", "oom", "exit"]);
}

fn threaded_leader_that_ends_first_does_not_end_the_task(t: &Test) {
    let id = t.id("a");
    let started = std::time::Instant::now();
    t.run(&[], &id, &["probe", "threaded-exit", "42"]).expect(42);
    assert!(started.elapsed() >= Duration::from_millis(200), "ended with the leader");
}

fn threaded_leader_in_an_exec_does_not_end_it(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    t.exec(&[], &id, &["probe", "threaded-exit", "43"]).expect(43);
}

fn reboot_is_an_exit_not_a_restart(t: &Test) {
    let id = t.id("a");
    // reboot(2) in a pid namespace kills its init by SIGHUP (restart) or SIGINT (halt).
    t.run(&["--privileged"], &id, &["probe", "reboot"]).expect(129);
    assert!(t.task(&id).is_none());
}

fn exit_within_the_first_milliseconds(t: &Test) {
    for round in 0..5 {
        let id = t.id(&format!("r{round}"));
        t.start(&[], &id, &["probe", "exit", "3"]);
        assert_eq!(t.wait_exit(&id).exit_status(), 3);
        let topics = t.node.events.topics(&id);
        assert_eq!(topics[..3], ["create", "start", "exit"]);
    }
}

fn a_daemonised_child_ends_with_the_container(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sh", "-c", "setsid sleep 4242 & sleep 0.3; exit 5"]);
    assert_eq!(t.wait_exit(&id).exit_status(), 5);
    let orphans = || process::processes().into_iter().any(|(_, line)| line == "sleep 4242");
    eventually("the child is gone", Duration::from_secs(5), || (!orphans()).then_some(()));
}

fn kill_after_exit_is_not_found(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["true"]);
    t.wait_exit(&id);
    t.wait_status(&id, "STOPPED");
    // Without this code containerd cannot finish stopping a container that has ended by itself.
    let request = KillRequest { container_id: id, signal: 15, ..KillRequest::default() };
    let refusal = t.node.tasks(request, async |mut tasks, request| tasks.kill(request).await);
    assert_eq!(refusal.map_err(|failure| failure.code), Err(Code::NotFound));
}
