//! The exit status on a kernel without `PIDFD_GET_INFO`: everything below containerd and the
//! simulator runs under a filter that makes it fail.

use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("fallback", crate::harness::node::Options { without_pidfd_info: true, ..Default::default() };
    statuses_are_exact_without_pidfd_info,
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
