//! kill -9 of the shim at many moments of a container's life, on a node as slow as a real one.

use std::time::Duration;

use crate::harness::direct::Stdio3;
use crate::harness::node::Options;
use crate::harness::process;
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("crash", Options { profile: "node".to_owned(), ..Options::default() };
    a_crash_at_any_moment_of_a_life_leaves_nothing);

/// `delete` gives up after this time, and what is left the next shim on the node removes.
const DELETE_LIMIT: Duration = Duration::from_secs(4);
/// All moments together are a little longer than the life.
const STEP_MS: u64 = 50;

fn a_crash_at_any_moment_of_a_life_leaves_nothing(t: &Test) {
    let driver = t.driver();
    for step in 0..24u64 {
        let id = t.id(&format!("s{step}"));
        let shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
        let pid = shim.connect().expect("connect").shim_pid;
        let mut life = shim.clone();
        life.patience = process::scaled(Duration::from_secs(5));
        let client = std::thread::spawn(move || {
            let _ = life.create(&Stdio3::default());
            let _ = life.start("");
            let _ = life.kill("", 9, true);
            let _ = life.wait("");
            let _ = life.delete("");
        });
        std::thread::sleep(Duration::from_millis(step * STEP_MS));
        sys::kill(pid, libc::SIGKILL);
        client.join().expect("the client ends");
        let began = std::time::Instant::now();
        driver.delete_after_crash(&id);
        // On a very slow machine it stops half way, as containerd would not wait any longer.
        if began.elapsed() >= DELETE_LIMIT {
            driver.delete_after_crash(&id);
        }
        let left: Vec<_> = t.node.remains(&id, std::slice::from_ref(&id));
        assert!(left.is_empty(), "killed after {} ms: {left:#?}", step * STEP_MS);
        assert!(
            !std::fs::read_to_string("/proc/self/mountinfo")
                .is_ok_and(|table| table.contains(&shim.bundle.display().to_string()))
        );
        driver.remove_bundle(&id);
    }
}
