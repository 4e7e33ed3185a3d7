//! A shim that nobody calls. On a node of its own: `ctr tasks ls` calls all shims.

use std::fs;
use std::time::Duration;

use crate::harness::process::eventually;
use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("idle": a_shim_without_work_gives_its_memory_back);

fn a_shim_without_work_gives_its_memory_back(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let shim = t.node.shims(&id)[0];
    // In kB. `status` has the figure too, but not exactly.
    let mapped = || {
        let text = fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).expect("its memory");
        let figure = |name| text.lines().find_map(|line| line.strip_prefix(name));
        let [all, anonymous] = ["Rss:", "Anonymous:"].map(|name| {
            let figure = figure(name).expect("a figure").trim().trim_end_matches(" kB");
            figure.parse::<u64>().expect("a number")
        });
        all - anonymous
    };
    for _ in 0..2 {
        t.exec(&[], &id, &["true"]).ok();
        let used = mapped();
        eventually("it lets go of its code", Duration::from_secs(30), || {
            (mapped() < used / 2).then_some(())
        });
    }
    t.exec(&[], &id, &["probe", "exit", "7"]).expect(7);
}
