//! What a Task call can fail with, and the one mapping to ttrpc's codes.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use ttrpc::Code;

use crate::pve::conf::ClaimError;
use crate::sandbox::{member, namespace, pod, spec};
use crate::task::phase::Illegal;
use crate::{config, ledger, lxc, oci, pve};

/// The result of the task module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a Task call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container.
    #[error("container {id} not found")]
    NotFound { id: String },
    /// No such exec.
    #[error("exec {exec_id} of container {id} not found")]
    ExecNotFound { id: String, exec_id: String },
    /// The process has ended. containerd needs "not found" to finish a stop.
    #[error("process already finished")]
    Finished,
    /// A container or exec of this id exists.
    #[error("{what} {id} already exists")]
    Exists { what: &'static str, id: String },
    /// The state does not allow it.
    #[error("container {id}: {source}")]
    Phase { id: String, source: Illegal },
    /// The state does not allow it, for a reason that is not a phase.
    #[error("container {id} {reason}")]
    Precondition { id: String, reason: &'static str },
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    Argument { field: &'static str, reason: String },
    /// The method can't be had.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// The client gave up while the container was being created.
    #[error("creating container {id} was given up")]
    Cancelled { id: String },
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The OCI specification can't be honoured.
    #[error(transparent)]
    Oci(#[from] oci::Error),
    /// Proxmox refused or could not be reached.
    #[error(transparent)]
    Pve(#[from] pve::Error),
    /// No VMID could be claimed.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The installation's or boot's id is not there.
    #[error(transparent)]
    Id(#[from] pve::identity::IdError),
    /// The run directory failed.
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    /// The included LXC configuration could not be written.
    #[error(transparent)]
    LxcConfig(#[from] lxc::config::Error),
    /// Init could not set the container up or execute the program.
    #[error(transparent)]
    Init(#[from] lxc::init::Error),
    /// An exec could not be started.
    #[error(transparent)]
    Exec(#[from] lxc::exec::Error),
    /// A cgroup could not be read or written.
    #[error(transparent)]
    Cgroup(#[from] lxc::cgroup::Error),
    /// The rootfs could not be mounted or unmounted.
    #[error(transparent)]
    Rootfs(#[from] lxc::rootfs::Error),
    /// A bind mount's source could not be opened.
    #[error(transparent)]
    Detached(#[from] lxc::detached::Error),
    /// The process's stdio could not be opened.
    #[error(transparent)]
    Stdio(#[from] crate::task::stdio::Error),
    /// A pod sandbox could not be made, or its namespaces can't be joined.
    #[error(transparent)]
    Sandbox(#[from] pod::Error),
    /// No such pod sandbox.
    #[error("pod sandbox {id} not found")]
    SandboxNotFound { id: String },
    /// The pod sandbox's state does not allow it.
    #[error("pod sandbox {id} {reason}")]
    SandboxPrecondition { id: String, reason: &'static str },
    /// The request for a pod sandbox can't be understood.
    #[error(transparent)]
    SandboxSpec(#[from] spec::Error),
    /// The container can't share what it asks for.
    #[error(transparent)]
    Member(#[from] member::Error),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] crate::task::hooks::Error),
    /// The CT was started, but its init did not report.
    #[error(
        "CT {vmid}: init did not connect within {seconds} s; see {log} on the node, or raise \
         ct.start_timeout"
    )]
    StartTimeout { vmid: u32, seconds: u64, log: PathBuf },
    /// A system call that should not fail did.
    #[error("{action}")]
    Io { action: &'static str, source: io::Error },
    /// Undoing a failed create failed as well.
    #[error("{} (cleaning up failed too: {})", sentence(.first), sentence(.cleanup))]
    Both { first: Box<Error>, cleanup: Box<Error> },
    /// A part of the shim has ended that should live as long as it.
    #[error("the shim is shutting down")]
    ShuttingDown,
}

impl Error {
    /// The code containerd acts upon.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound { .. }
            | Self::ExecNotFound { .. }
            | Self::SandboxNotFound { .. }
            | Self::Finished => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::Phase { .. }
            | Self::Precondition { .. }
            | Self::SandboxPrecondition { .. }
            | Self::Member(member::Error::NoSandbox { .. }) => Code::FAILED_PRECONDITION,
            Self::Argument { .. }
            | Self::Config(_)
            | Self::Oci(_)
            | Self::SandboxSpec(_)
            | Self::Member(member::Error::OfTheNode { .. }) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Cancelled { .. } => Code::CANCELLED,
            Self::Pve(error) => pve_code(error),
            Self::Claim(error) => match error {
                ClaimError::Exists { .. } | ClaimError::RangeFull { .. } => {
                    Code::RESOURCE_EXHAUSTED
                }
                ClaimError::NoQuorum { .. } | ClaimError::NotMounted { .. } => Code::UNAVAILABLE,
                ClaimError::Render(_) => Code::INVALID_ARGUMENT,
                ClaimError::Write { .. } | ClaimError::Counter { .. } => Code::UNKNOWN,
            },
            Self::Ledger(ledger::Error::Exists { .. }) => Code::ALREADY_EXISTS,
            Self::StartTimeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::Sandbox(error) => sandbox_code(error),
            Self::ShuttingDown => Code::UNAVAILABLE,
            Self::Ledger(_)
            | Self::LxcConfig(_)
            | Self::Init(_)
            | Self::Exec(_)
            | Self::Cgroup(_)
            | Self::Rootfs(_)
            | Self::Detached(_)
            | Self::Stdio(_)
            | Self::Hook(_)
            | Self::Id(_)
            | Self::Io { .. } => Code::UNKNOWN,
            Self::Both { first, .. } => first.code(),
        }
    }

    /// Attaches the failure of the clean-up, if there was one.
    #[must_use]
    pub fn and_cleanup(self, cleanup: Result<()>) -> Self {
        match cleanup {
            Ok(()) => self,
            Err(cleanup) => Self::Both { first: Box::new(self), cleanup: Box::new(cleanup) },
        }
    }
}

fn sandbox_code(error: &pod::Error) -> Code {
    match error {
        pod::Error::Namespace(error) => match error {
            namespace::Error::Gone { .. } | namespace::Error::Changed { .. } => {
                Code::FAILED_PRECONDITION
            }
            namespace::Error::Other { .. } => Code::INVALID_ARGUMENT,
            namespace::Error::Open { .. } => Code::UNKNOWN,
        },
        pod::Error::ShuttingDown => Code::UNAVAILABLE,
        pod::Error::Holder(_)
        | pod::Error::Cgroup(_)
        | pod::Error::Ledger(_)
        | pod::Error::SharedMemory { .. } => Code::UNKNOWN,
    }
}

fn pve_code(error: &pve::Error) -> Code {
    use pve::{Error as E, Failure as F};
    match error {
        E::Api { failure, .. } => match failure {
            // Not found here means the CT, which containerd would take for the task.
            F::NotFound
            | F::Exists
            | F::AlreadyRunning
            | F::NotRunning
            | F::Running
            | F::Protected
            | F::DigestMismatch => Code::FAILED_PRECONDITION,
            F::Locked { .. } | F::LockTimeout | F::NoQuorum { .. } => Code::UNAVAILABLE,
            F::BadParameter { .. } => Code::INVALID_ARGUMENT,
            F::NoSuchTask | F::Other { .. } => Code::UNKNOWN,
        },
        E::TaskTimeout { .. } | E::Timeout { .. } => Code::DEADLINE_EXCEEDED,
        E::Authentication { .. } => Code::UNAUTHENTICATED,
        E::Permission { .. } => Code::PERMISSION_DENIED,
        E::Unreachable { .. }
        | E::FingerprintMismatch { .. }
        | E::Untrusted { .. }
        | E::Tls { .. }
        | E::Protocol { .. } => Code::UNAVAILABLE,
        E::NodeUnknown { .. } | E::Token(_) | E::CaFile { .. } | E::Setup { .. } => {
            Code::INVALID_ARGUMENT
        }
        E::NotOurs { .. } => Code::FAILED_PRECONDITION,
        E::TaskFailed { .. } => Code::UNKNOWN,
    }
}

/// An error and its causes in one line. A cause that the text already tells is not repeated.
#[must_use]
pub fn sentence(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        // Some texts have the system's words in lower case and without the number.
        let plain = words.split(" (os error ").next().unwrap_or_default();
        if !text.to_lowercase().contains(&plain.to_lowercase()) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let denied = || io::Error::from_raw_os_error(nix::libc::EACCES);
        let path = PathBuf::from("/p");
        let read_only = Error::from(ClaimError::NoQuorum { path: path.clone(), source: denied() });
        let stdio = Error::from(crate::task::stdio::Error::Open {
            stream: "stdout",
            path: path.clone(),
            source: denied(),
        });
        for error in [read_only, stdio] {
            let text = sentence(&error);
            assert_eq!(text.to_lowercase().matches("permission denied").count(), 1, "{text}");
        }
        let plain = Error::from(ledger::Error::Io { action: "read", path, source: denied() });
        assert_eq!(sentence(&plain), "read /p: Permission denied (os error 13)");
    }
}
