//! End-to-end suites: a real containerd, the real shim, real LXC containers, and a simulator only
//! in place of Proxmox's own daemons. See `harness::node::Setting` for the environment variables.

mod harness;
mod suites;

use std::process::ExitCode;
use std::sync::Arc;

use harness::node::{Node, Options, Setting};
use harness::test::Test;
use libtest_mimic::{Arguments, Trial};
use suites::Needs;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let setting = Setting::from_environment();
    let cases = suites::shared();
    if arguments.list {
        let trials = cases.iter().map(|c| Trial::test(format!("{}::{}", c.suite, c.name), || Ok(())));
        return libtest_mimic::run(&arguments, trials.collect()).exit_code();
    }
    // The message and its place; a backtrace through the harness says nothing more.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let node = Arc::new(Node::start(&setting, Options::default()));
    let on_signal = node.clone();
    harness::sys::on_termination(move |signal| {
        eprintln!("signal {signal}: cleaning up");
        on_signal.tear_down(false);
        std::process::exit(128 + signal);
    });
    let trials = cases
        .into_iter()
        .enumerate()
        .map(|(number, case)| {
            let node = node.clone();
            let missing = case.needs == Needs::Proxmox && !node.has_pve();
            Trial::test(format!("{}::{}", case.suite, case.name), move || {
                Test::execute(node, number, case.suite, case.body);
                Ok(())
            })
            .with_ignored_flag(missing)
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut failed = conclusion.has_failed();
    let remains = node.remains("", &[]);
    if !remains.is_empty() && !failed {
        eprintln!("left behind by the whole run: {remains:#?}");
        failed = true;
    }
    node.tear_down(failed);
    if failed { ExitCode::from(101) } else { ExitCode::SUCCESS }
}
