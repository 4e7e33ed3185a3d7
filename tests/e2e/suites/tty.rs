//! Containers and execs on a terminal.

use serde_json::json;

use crate::harness::direct::Stdio3;
use crate::harness::terminal::Terminal;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("tty":
    container_has_a_terminal_of_its_own,
    keyboard_and_screen_work,
    starts_with_the_clients_window_size,
    follows_a_resize,
    control_c_interrupts_the_workload,
    exec_has_a_terminal_too,
    exec_follows_a_resize,
    terminal_belongs_to_the_user,
    status_comes_back_from_a_terminal,
    last_output_before_the_end_is_shown;
    proxmox:
    exec_may_be_resized_before_its_start,
);

fn on_terminal(t: &Test, id: &str, script: &str) -> Terminal {
    Terminal::spawn(t.run_command(&["--rm", "--tty"], id, &["sh", "-c", script]), 33, 101)
}

fn container_has_a_terminal_of_its_own(t: &Test) {
    let script = "tty; test -c /dev/console && echo has-console; echo direct > /dev/tty; \
                  readlink /proc/self/fd/0; sleep 0.3";
    let terminal = on_terminal(t, &t.id("a"), script);
    terminal.expect("/dev/pts/");
    terminal.expect("has-console");
    terminal.expect("direct");
    assert_eq!(terminal.wait(), 0);
}

fn keyboard_and_screen_work(t: &Test) {
    let mut terminal =
        on_terminal(t, &t.id("a"), "read line; echo \"<$line>\"; echo err >&2; sleep 0.3");
    terminal.send("typed text\n");
    terminal.expect("<typed text>\n");
    // One stream, as on any terminal.
    terminal.expect("err\n");
    assert_eq!(terminal.wait(), 0);
}

fn starts_with_the_clients_window_size(t: &Test) {
    let script = "for n in 1 2 3 4 5 6 7 8 9 10; do stty size; sleep 0.1; done";
    let terminal = on_terminal(t, &t.id("a"), script);
    terminal.expect("33 101");
    assert_eq!(terminal.wait(), 0);
}

/// Says when the window changes and ends with `status` once it has the given size. The first
/// change is ctr's own, from nothing to the real size.
fn until_resized(rows: u16, columns: u16, status: i32) -> String {
    format!(
        "trap 'echo changed' WINCH; sleep 0.5; echo ready; \
         while [ \"$(stty size)\" != '{rows} {columns}' ]; do sleep 0.1; done; \
         echo done; sleep 0.3; exit {status}"
    )
}

#[track_caller]
fn resize(terminal: Terminal, rows: u16, columns: u16, status: i32) {
    terminal.expect("ready");
    terminal.resize(rows, columns);
    terminal.expect("done");
    let screen = terminal.screen();
    let after = screen.split_once("ready").map_or("", |(_, after)| after);
    assert!(after.contains("changed"), "no SIGWINCH: {screen:?}");
    assert_eq!(terminal.wait(), status);
}

fn follows_a_resize(t: &Test) {
    resize(on_terminal(t, &t.id("a"), &until_resized(44, 111, 4)), 44, 111, 4);
}

fn control_c_interrupts_the_workload(t: &Test) {
    let script =
        "trap 'echo interrupted; sleep 0.3; exit 3' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = on_terminal(t, &t.id("a"), script);
    terminal.expect("ready");
    terminal.send("\x03");
    terminal.expect("interrupted");
    assert_eq!(terminal.wait(), 3);
}

fn exec_has_a_terminal_too(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let command = t.exec_command(
        &["--tty"],
        &id,
        &["sh", "-c", "tty; read x; echo \"<$x>\"; sleep 0.3; exit 5"],
    );
    let mut terminal = Terminal::spawn(command, 33, 101);
    terminal.expect("/dev/pts/");
    terminal.send("abc\n");
    terminal.expect("<abc>");
    assert_eq!(terminal.wait(), 5);
}

// As nerdctl does, which complains of an error.
fn exec_may_be_resized_before_its_start(t: &Test) {
    let id = t.id("a");
    let driver = t.driver();
    let spec = driver.spec(&id, &["sleep", "1000"]);
    let shim = driver.start(&id, &spec);
    shim.create(&Stdio3::default()).and_then(|_| shim.start("")).expect("start");
    let mut process = spec["process"].clone();
    process["terminal"] = json!(true);
    process["args"] = json!(["stty", "size"]);
    let log = t.file("exec.out");
    let io = Stdio3 { stdout: format!("file://{log}"), terminal: true, ..Stdio3::default() };
    let outcome = shim
        .exec("e", &process, &io)
        .and_then(|()| shim.resize("e", 101, 33))
        .and_then(|()| shim.start("e"))
        .and_then(|_| shim.wait("e"))
        .map(|reply| reply.exit_status);
    shim.finish();
    driver.remove_bundle(&id);
    assert_eq!(outcome.expect("exec"), 0);
    assert_eq!(std::fs::read_to_string(&log).expect("its output").trim(), "33 101");
}

fn exec_follows_a_resize(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let command = t.exec_command(&["--tty"], &id, &["sh", "-c", &until_resized(50, 60, 6)]);
    resize(Terminal::spawn(command, 33, 101), 50, 60, 6);
}

fn terminal_belongs_to_the_user(t: &Test) {
    let id = t.id("a");
    t.start_idle(&[], &id);
    let script = "stat -c 'owner %u' $(tty); sleep 0.3";
    let flags = ["--tty", "--user", "user"];
    let terminal = Terminal::spawn(t.exec_command(&flags, &id, &["sh", "-c", script]), 24, 80);
    terminal.expect("owner 1000");
    assert_eq!(terminal.wait(), 0);
}

fn status_comes_back_from_a_terminal(t: &Test) {
    assert_eq!(on_terminal(t, &t.id("a"), "sleep 0.3; exit 77").wait(), 77);
}

fn last_output_before_the_end_is_shown(t: &Test) {
    for round in 0..5 {
        let id = t.id(&format!("r{round}"));
        let terminal = on_terminal(t, &id, "sleep 0.2; seq 1 2000; echo the-end");
        terminal.expect("the-end");
        let screen = terminal.screen();
        assert!(screen.contains("\n1999\n2000\nthe-end"), "round {round}: lines are missing");
        assert_eq!(terminal.wait(), 0);
    }
}
