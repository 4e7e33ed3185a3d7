//! What may be asked of a container at any time, without waiting for anybody.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::lxc::cgroup::Cgroup;
use crate::lxc::exit::Exit;
use crate::task::phase::Phase;
use crate::task::stdio::StdioRequest;

/// The name of the init process among [`View::processes`]; execs have ids that are not empty.
pub const INIT: &str = "";

/// A container as its actor last described it.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub processes: BTreeMap<String, ProcessView>,
    pub paused: bool,
    /// It is being removed, or its creation is being undone.
    pub leaving: bool,
    /// Once the CT runs.
    pub cgroup: Option<Arc<Cgroup>>,
}

/// One process of the container.
#[derive(Debug, Clone)]
pub struct ProcessView {
    pub phase: Phase,
    /// The host's pid; 0 before it exists.
    pub pid: u32,
    pub stdio: StdioRequest,
    /// Set once its output has been delivered.
    pub exit: Option<Exit>,
}

impl View {
    /// A process by its exec id.
    #[must_use]
    pub fn process(&self, exec_id: &str) -> Option<&ProcessView> {
        self.processes.get(exec_id)
    }
}
