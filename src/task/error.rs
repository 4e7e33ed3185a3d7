//! What a Task call can fail with, and the one mapping to ttrpc's codes.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use ttrpc::Code;

use crate::pve::conf::ClaimError;
use crate::sandbox::{member, namespace, pod, spec};
use crate::task::phase::Illegal;
use crate::{config, ledger, lxc, oci, pve};

/// Bytes of an error that a client is told; kubelets keep less.
const SENTENCE_LIMIT: usize = 4096;

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
    /// LXC cannot start a CT in this image.
    #[error(transparent)]
    Image(#[from] lxc::image::Error),
    /// A bind mount's source could not be opened.
    #[error(transparent)]
    Detached(#[from] lxc::detached::Error),
    /// The devices of a user namespace could not be made.
    #[error(transparent)]
    Devices(#[from] lxc::devices::Error),
    /// Which devices the container may use could not be changed.
    #[error(transparent)]
    DeviceControl(#[from] lxc::device_control::Error),
    /// LXC may not use the ids of a user namespace.
    #[error(transparent)]
    SubordinateIds(#[from] lxc::subordinate_ids::Error),
    /// LXC, as root of a user namespace, could not use a file.
    #[error(
        "LXC reaches {} as user {uid} of the node, who may not execute or pass {}: allow it (chmod o+x), \
         or put it in another place",
        path.display(), part.display()
    )]
    Unreachable { path: PathBuf, part: PathBuf, uid: u32 },
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
    /// The agent for the process's seccomp filter could not be introduced.
    #[error(transparent)]
    SeccompAgent(#[from] crate::task::seccomp_agent::Error),
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
            | Self::Member(member::Error::NoSandbox { .. } | member::Error::NotRunning) => {
                Code::FAILED_PRECONDITION
            }
            Self::Argument { .. }
            | Self::Config(_)
            | Self::Oci(_)
            | Self::SandboxSpec(_)
            | Self::DeviceControl(lxc::device_control::Error::Access(_))
            | Self::Member(
                member::Error::OfTheNode { .. } | member::Error::NoUserNamespace { .. },
            ) => Code::INVALID_ARGUMENT,
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
            Self::SubordinateIds(_) | Self::Unreachable { .. } => Code::FAILED_PRECONDITION,
            Self::StartTimeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::Sandbox(error) => sandbox_code(error),
            Self::ShuttingDown => Code::UNAVAILABLE,
            Self::Ledger(_)
            | Self::LxcConfig(_)
            | Self::Init(_)
            | Self::Exec(_)
            | Self::Cgroup(_)
            | Self::Rootfs(_)
            | Self::Image(_)
            | Self::Detached(_)
            | Self::Devices(_)
            | Self::DeviceControl(_)
            | Self::Stdio(_)
            | Self::Hook(_)
            | Self::SeccompAgent(_)
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
        pod::Error::Mappings => Code::INVALID_ARGUMENT,
        pod::Error::SubordinateIds(_) => Code::FAILED_PRECONDITION,
        pod::Error::ShuttingDown => Code::UNAVAILABLE,
        pod::Error::Holder(_)
        | pod::Error::Cgroup(_)
        | pod::Error::Ledger(_)
        | pod::Error::UserNamespace(_)
        | pod::Error::ExitRecord { .. }
        | pod::Error::SharedMemory { .. }
        | pod::Error::Names { .. } => Code::UNKNOWN,
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
            | F::DigestMismatch
            | F::StorageUnusable { .. }
            | F::VolumeMissing { .. }
            | F::SnapshotMissing { .. } => Code::FAILED_PRECONDITION,
            F::StorageFull { .. } => Code::RESOURCE_EXHAUSTED,
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
        E::NodeUnknown { .. }
        | E::SecretFile(_)
        | E::CaFile { .. }
        | E::Setup { .. }
        | E::Unsendable { .. } => Code::INVALID_ARGUMENT,
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
    bounded(text)
}

/// What names an object of any length keeps its beginning, and the cause at its end.
fn bounded(text: String) -> String {
    if text.len() <= SENTENCE_LIMIT {
        return text;
    }
    let half = SENTENCE_LIMIT / 2;
    let is_boundary = |at: &usize| text.is_char_boundary(*at);
    // Both ends of a text are boundaries.
    let head = (0..=half).rev().find(is_boundary).unwrap_or(0);
    let tail = (text.len() - half..=text.len()).find(is_boundary).unwrap_or(text.len());
    format!("{} … {}", &text[..head], &text[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_of_proxmox_has_its_code() {
        use pve::{Error as E, Failure as F};
        let text = || "x".to_owned();
        let vmid = config::Vmid::new(100).unwrap();
        let call = || Box::new(pve::Call { method: "POST", path: "/x".into(), vmid: None });
        let upid: pve::Upid =
            "UPID:pve1:00000500:000500F1:6B01F13F:vzstart:110:root@pam:".parse().unwrap();
        let upid = || Box::new(upid.clone());
        let short = std::time::Duration::from_secs(1);
        let pin = || config::Fingerprint([0; 32]);
        let failures = [
            (F::NotFound, Code::FAILED_PRECONDITION),
            (F::Exists, Code::FAILED_PRECONDITION),
            (F::AlreadyRunning, Code::FAILED_PRECONDITION),
            (F::NotRunning, Code::FAILED_PRECONDITION),
            (F::Running, Code::FAILED_PRECONDITION),
            (F::Protected, Code::FAILED_PRECONDITION),
            (F::DigestMismatch, Code::FAILED_PRECONDITION),
            (F::Locked { by: text() }, Code::UNAVAILABLE),
            (F::LockTimeout, Code::UNAVAILABLE),
            (F::NoQuorum { text: text() }, Code::UNAVAILABLE),
            (F::StorageUnusable { storage: text(), text: text() }, Code::FAILED_PRECONDITION),
            (F::StorageFull { text: text() }, Code::RESOURCE_EXHAUSTED),
            (F::VolumeMissing { volume: text() }, Code::FAILED_PRECONDITION),
            (F::SnapshotMissing { snapshot: text() }, Code::FAILED_PRECONDITION),
            (F::NoSuchTask, Code::UNKNOWN),
            (F::BadParameter { errors: Default::default() }, Code::INVALID_ARGUMENT),
            (F::Other { status: 500, text: text() }, Code::UNKNOWN),
        ];
        let failures =
            failures.map(|(failure, code)| (E::Api { call: call(), failure }, code)).into_iter();
        let endpoint = text;
        let others = [
            (E::TaskFailed { upid: upid(), text: text(), log: Vec::new() }, Code::UNKNOWN),
            (
                E::TaskTimeout { upid: upid(), waited: short, stopped: true },
                Code::DEADLINE_EXCEEDED,
            ),
            (
                E::Timeout { endpoint: endpoint(), call: call(), sent: true, after: short },
                Code::DEADLINE_EXCEEDED,
            ),
            (
                E::Authentication { who: text(), file: "/x".into(), text: text() },
                Code::UNAUTHENTICATED,
            ),
            (
                E::Permission {
                    call: call(),
                    who: text(),
                    path: None,
                    privilege: None,
                    text: text(),
                },
                Code::PERMISSION_DENIED,
            ),
            (
                E::NodeUnknown { endpoint: endpoint(), node: text(), known: Vec::new() },
                Code::INVALID_ARGUMENT,
            ),
            (
                E::Unreachable { endpoint: endpoint(), sent: false, cause: text() },
                Code::UNAVAILABLE,
            ),
            (
                E::FingerprintMismatch {
                    endpoint: endpoint(),
                    presented: pin(),
                    configured: vec![pin()],
                },
                Code::UNAVAILABLE,
            ),
            (
                E::Untrusted { endpoint: endpoint(), reason: text(), remedy: text() },
                Code::UNAVAILABLE,
            ),
            (E::Tls { endpoint: endpoint(), reason: text() }, Code::UNAVAILABLE),
            (
                E::Protocol { endpoint: endpoint(), call: call(), status: 200, reason: text() },
                Code::UNAVAILABLE,
            ),
            (E::Unsendable { call: call(), reason: text() }, Code::INVALID_ARGUMENT),
            (
                config::ApiToken::parse("", "/x".as_ref()).unwrap_err().into(),
                Code::INVALID_ARGUMENT,
            ),
            (E::CaFile { path: "/x".into(), reason: text() }, Code::INVALID_ARGUMENT),
            (E::Setup { reason: text() }, Code::INVALID_ARGUMENT),
            (
                E::NotOurs { vmid, reason: pve::identity::NotOurs::NoMarker },
                Code::FAILED_PRECONDITION,
            ),
        ];
        for (error, code) in failures.chain(others) {
            let words = error.to_string();
            assert!(!words.is_empty() && !words.contains('\n'), "{words}");
            assert_eq!(Error::from(error).code(), code, "{words}");
        }
    }

    #[test]
    fn a_long_object_hides_no_cause() {
        let source = io::Error::from_raw_os_error(nix::libc::EACCES);
        let path = PathBuf::from(format!("/{}", "é".repeat(40_000)));
        let text = sentence(&ledger::Error::Io { action: "read", path, source }.into());
        assert!(text.len() < SENTENCE_LIMIT + 10 && text.starts_with("read /é"));
        assert!(text.ends_with("é: Permission denied (os error 13)"));
    }

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
