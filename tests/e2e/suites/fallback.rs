//! The exit status on a kernel without `PIDFD_GET_INFO`: everything below containerd and the
//! simulator runs under a filter that makes it fail. What tells the status then depends on the LXC:
//! the log of LXC 5, the watcher beside LXC 6.

use std::fs;
use std::time::Duration;

use crate::harness::process::{self, eventually};
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("fallback", crate::harness::node::Options { without_pidfd_info: true, ..Default::default() };
    statuses_are_exact_without_pidfd_info,
    the_status_is_told_without_a_shim,
    a_killed_monitor_is_an_exit_of_unknown_status,
);

fn statuses_are_exact_without_pidfd_info(t: &Test) {
    // The filter is inherited by shim and monitor, and it is the only thing that differs.
    let probe = t.id("probe");
    t.start_idle(&[], &probe);
    let inherited = t.exec_sh(&probe, "sed -n 's/^Seccomp:[[:space:]]*//p' /proc/self/status").ok();
    assert_eq!(inherited.text(), "2");
    for status in [0, 1, 42, 127, 128, 137, 255] {
        t.run(&[], &t.id(&format!("s{status}")), &["probe", "exit", &status.to_string()])
            .expect(status);
        t.exec(&[], &probe, &["probe", "exit", &status.to_string()]).expect(status);
    }
    let killed = t.id("killed");
    t.start(&[], &killed, &["sleep", "1000"]);
    t.kill(&killed, "SIGKILL").ok();
    assert_eq!(t.wait_exit(&killed).exit_status(), 137);
    t.run(&[], &t.id("threads"), &["probe", "threaded-exit", "42"]).expect(42);
    t.run(&["--memory-limit", "33554432"], &t.id("oom"), &["probe", "eat-memory", "4096"])
        .expect(137);
    t.run(&["--privileged"], &t.id("reboot"), &["probe", "reboot"]).expect(129);
}

fn the_status_is_told_without_a_shim(t: &Test) {
    let id = t.id("a");
    t.start_with_trap(&[], &id, "trap 'exit 42' TERM; sleep 1000 & wait");
    let pid = t.pid(&id);
    let run_dir = t.node.run_dir().join(&t.node.namespace).join(&id);
    // It would have the shim's remains removed.
    t.node.stop_containerd(libc::SIGKILL);
    t.kill_shim(&id);
    // Stopped, it cannot see the zombie, only be told.
    let watcher = process::processes().into_iter().find_map(|(pid, line)| {
        line.ends_with(&format!(" hook start-host {}", run_dir.display())).then_some(pid)
    });
    let has_log = fs::metadata(run_dir.join("lxc.log")).is_ok_and(|log| log.len() > 0);
    assert_ne!(has_log, watcher.is_some(), "one source, and only one");
    watcher.inspect(|pid| assert!(sys::kill(*pid, libc::SIGSTOP)));
    sys::kill(pid, libc::SIGTERM);
    eventually("PID 1 is reaped", Duration::from_secs(10), || {
        (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    });
    watcher.inspect(|pid| assert!(sys::kill(*pid, libc::SIGCONT)));
    let record = eventually("the record is there", Duration::from_secs(10), || {
        fs::read_to_string(run_dir.join("exit.json")).ok()
    });
    let source = if has_log { "log" } else { "monitor" };
    assert!(record.contains("\"status\":42,"), "{record}");
    assert!(record.contains(&format!("\"source\":\"{source}\"")), "{record}");
    t.node.start_containerd();
    // What could not be removed in the seconds that containerd gives, the next shim removes.
    t.run(&[], &t.id("next"), &["true"]).ok();
}

// Nobody is left who could know: the kernel has told lxc-start only.
fn a_killed_monitor_is_an_exit_of_unknown_status(t: &Test) {
    let id = t.id("a");
    t.start(&[], &id, &["sleep", "1000"]);
    let monitor = process::status_field(t.pid(&id), "PPid").expect("a parent");
    sys::kill(monitor.parse().expect("a pid"), libc::SIGKILL);
    assert_eq!(t.wait_exit(&id).exit_status(), 255);
    t.wait_status(&id, "STOPPED");
    t.delete(&id);
    // The watcher gives up as well: the check that nothing is left finds it otherwise.
}
