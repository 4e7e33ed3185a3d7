//! The suites, one file per capability that a user can name.

use crate::harness::node::{Node, Options};
use crate::harness::test::Test;

mod exec;
mod exit;
mod run;
mod stdio;

/// What a test needs beyond the shared node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Any runtime will do.
    Nothing,
    /// Things that only this project's shim and the simulator have.
    Proxmox,
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

/// All cases that run on the shared node, in parallel.
pub fn shared() -> Vec<Case> {
    [run::cases, exit::cases, stdio::cases, exec::cases].iter().flat_map(|suite| suite()).collect()
}

#[allow(dead_code)]
fn unused(_: &Node, _: Options) {}
