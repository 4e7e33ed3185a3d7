//! The suites, one file per capability that a user can name.

use crate::harness::node::{Options, Setting};
use crate::harness::test::Test;

mod apparmor;
mod config;
mod crash;
mod cri;
mod delete;
mod devices;
mod events;
mod exec;
mod exit;
mod explain;
mod fallback;
mod hang;
mod hooks;
mod hostile;
mod idle;
mod limits;
mod namespaces;
mod oci;
mod parallel;
mod pods;
mod process;
mod proxmox;
mod restart;
mod rootfs;
mod run;
mod sandbox;
mod seccomp;
mod secrets;
mod signals;
mod stdio;
mod tty;
mod userns;
mod workloads;

/// What a test needs beyond the shared node.
#[derive(Debug, Clone, Copy)]
pub enum Needs {
    /// Any runtime will do.
    Nothing,
    /// Things that only this project's shim and the simulator have.
    Proxmox,
    /// A containerd that nobody else uses.
    OwnNode(fn() -> Options),
}

/// One test of a suite.
pub struct Case {
    pub suite: &'static str,
    pub name: &'static str,
    pub needs: Needs,
    pub body: fn(&Test),
}

/// The cases of a suite from the names of its functions; those after `proxmox:` need the shim of
/// this project.
macro_rules! cases {
    ($suite:literal: $($any:ident),* $(,)? $(; proxmox: $($ours:ident),* $(,)?)?) => {
        pub fn cases() -> Vec<$crate::suites::Case> {
            use $crate::suites::{Case, Needs};
            vec![
                $(Case { suite: $suite, name: stringify!($any), needs: Needs::Nothing, body: $any },)*
                $($(Case { suite: $suite, name: stringify!($ours), needs: Needs::Proxmox, body: $ours },)*)?
            ]
        }
    };
}
pub(crate) use cases;

/// Like [`cases`], for tests that restart or cripple their containerd: each gets a node of its
/// own, started with the given options.
macro_rules! own_node {
    ($suite:literal: $($body:ident),* $(,)?) => {
        own_node!($suite, $crate::harness::node::Options::default(); $($body),*);
    };
    ($suite:literal, $options:expr; $($body:ident),* $(,)?) => {
        pub fn cases() -> Vec<$crate::suites::Case> {
            use $crate::suites::{Case, Needs};
            vec![$(Case {
                suite: $suite,
                name: stringify!($body),
                needs: Needs::OwnNode(|| $options),
                body: $body,
            },)*]
        }
    };
}
pub(crate) use own_node;

/// All cases, or those that the setting asks for. Those with a node of their own come first: they take longest.
pub fn all(setting: &Setting) -> Vec<Case> {
    let suites = [
        cri::cases,
        cri::feature_cases,
        workloads::cases,
        restart::cases,
        crash::cases,
        fallback::cases,
        hang::cases,
        run::cases,
        exit::cases,
        stdio::cases,
        tty::cases,
        exec::cases,
        signals::cases,
        limits::cases,
        devices::cases,
        oci::cases,
        process::cases,
        apparmor::cases,
        hostile::cases,
        namespaces::cases,
        seccomp::cases,
        hooks::cases,
        idle::cases,
        explain::cases,
        rootfs::cases,
        userns::cases,
        events::cases,
        delete::cases,
        config::cases,
        proxmox::cases,
        pods::cases,
        sandbox::cases,
        parallel::cases,
        secrets::cases,
    ];
    let mut all: Vec<_> = suites.iter().flat_map(|suite| suite()).collect();
    if setting.version() >= (2, 0) {
        all.extend(cri::shim_sandboxer_cases());
    }
    let only = &setting.only;
    all.retain(|case| {
        let name = format!("{}::{}", case.suite, case.name);
        only.is_empty() || only.iter().any(|word| name.contains(word))
    });
    all
}
