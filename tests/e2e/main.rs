//! End-to-end suites: a real containerd, the real shim, real LXC containers, and a simulator only
//! in place of Proxmox's own daemons. See `harness::node::Setting` for the environment variables.

mod harness;
mod suites;
#[path = "../simulator/trust.rs"]
mod trust;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::ExitCode;

use harness::node::{self, Node, Options, Setting};
use harness::test::Test;
use libtest_mimic::{Arguments, Trial};
use suites::Needs;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let setting = Setting::from_environment();
    let cases = suites::all(&setting);
    if arguments.list {
        let name = |case: &suites::Case| format!("{}::{}", case.suite, case.name);
        let trials = cases.iter().map(|case| Trial::test(name(case), || Ok(())));
        return libtest_mimic::run(&arguments, trials.collect()).exit_code();
    }
    // Before any thread exists, as each has the namespaces of the one that made it. What systemd runs
    // is in the machine's own, which then serves these tests alone.
    if setting.units != "systemd" {
        harness::sys::give_root_subordinate_ids(&setting.root);
        harness::sys::enter_own_network();
    }
    // The message and its place; a backtrace through the harness says nothing more.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    harness::sys::on_termination(move |signal| {
        eprintln!("signal {signal}: cleaning up");
        node::tear_down_all();
        std::process::exit(128 + signal);
    });
    let shared =
        catch_unwind(|| Node::start(&setting, Options::default())).unwrap_or_else(|panic| {
            leave_to_the_signal();
            resume_unwind(panic)
        });
    // For clients that name no configuration. The real /etc is covered, unless the machine is ours.
    if shared.has_pve() {
        let directory = std::path::Path::new("/etc/containerd-shim-proxmox");
        std::fs::create_dir_all(directory).expect("make the directory of the configuration");
        std::fs::write(directory.join("config.toml"), shared.shim_config_text())
            .expect("write the default configuration");
    }
    let trials = cases
        .into_iter()
        .enumerate()
        .map(|(number, case)| {
            let (shared, setting) = (shared.clone(), setting.clone());
            let missing = matches!(case.needs, Needs::Proxmox) && !shared.has_pve();
            Trial::test(format!("{}::{}", case.suite, case.name), move || {
                match case.needs {
                    Needs::OwnNode(options) => on_own_node(&setting, options(), number, &case),
                    _ => Test::execute(shared, number, case.suite, case.body),
                }
                Ok(())
            })
            .with_ignored_flag(missing)
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    leave_to_the_signal();
    let mut failed = conclusion.has_failed();
    if !failed {
        let remains = shared.remains("", &[]);
        if !remains.is_empty() {
            eprintln!("left behind by the whole run: {remains:#?}");
            failed = true;
        }
    }
    shared.tear_down(failed);
    if failed { ExitCode::from(101) } else { ExitCode::SUCCESS }
}

fn on_own_node(setting: &Setting, options: Options, number: usize, case: &suites::Case) {
    let own = Node::start(setting, options);
    let (node, suite, body) = (own.clone(), case.suite, case.body);
    let outcome = catch_unwind(AssertUnwindSafe(|| Test::execute(node, number, suite, body)));
    own.tear_down(outcome.is_err());
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// After a signal, the thread that handles it ends the process when all is cleaned up.
fn leave_to_the_signal() {
    while harness::process::is_ending() {
        std::thread::park();
    }
}
