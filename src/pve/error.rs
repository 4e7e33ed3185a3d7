//! What can go wrong with Proxmox, told apart by evidence.
//!
//! The evidence is the status code, the text (in the JSON body's `message`, or only in the reason
//! phrase, as with every 401) and, for tasks, the exit status. All patterns stand here, in
//! [`Failure::recognise`], and each has a test from a recording where one exists.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::http::Broken;
use super::identity::NotOurs;
use super::types::Loose;
use super::upid::Upid;
use crate::config::{Fingerprint, SecretFileError, Vmid};

/// A call as messages name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The HTTP method.
    pub method: &'static str,
    /// The path below `/api2/json`, with its query.
    pub path: String,
    /// The CT it is about.
    pub vmid: Option<Vmid>,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

/// An error of the Proxmox client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The API answered, or a task ended, with this.
    #[error("{call}: {failure}")]
    Api {
        /// The call.
        call: Box<Call>,
        /// What was understood of the answer.
        failure: Failure,
    },
    /// A task ended with an error that has no variant of its own.
    #[error("Proxmox task {upid} failed: {text}{}", log_suffix(log))]
    TaskFailed {
        /// The task.
        upid: Box<Upid>,
        /// Its exit status: the error's first line.
        text: String,
        /// The last lines of its log, without the closing `TASK ERROR` line.
        log: Vec<String>,
    },
    /// A task was still running at the deadline.
    #[error(
        "Proxmox task {upid} has not ended after {} ms{}; see it in the node's task list",
        waited.as_millis(), if *stopped { " and was stopped" } else { "" }
    )]
    TaskTimeout {
        /// The task.
        upid: Box<Upid>,
        /// How long it was waited for.
        waited: Duration,
        /// Whether it was ended because of that.
        stopped: bool,
    },
    /// The token or password was refused.
    #[error("Proxmox refused {} of {}: {text}; {}", named(who), file.display(), secret_remedy(who))]
    Authentication {
        /// `USER@REALM!TOKENID` or `USER@REALM`
        who: String,
        /// Where its secret was read.
        file: PathBuf,
        /// Proxmox's words.
        text: String,
    },
    /// The token or user lacks a privilege.
    #[error(
        "{call}: {} may not do this: {}; grant a role with it by 'pveum acl modify'",
        named(who), permission(path.as_deref(), privilege.as_deref(), text)
    )]
    Permission {
        /// The call.
        call: Box<Call>,
        /// `USER@REALM!TOKENID` or `USER@REALM`
        who: String,
        /// The ACL path, such as `/vms/100`, if Proxmox said it.
        path: Option<String>,
        /// The privilege, such as `VM.Audit`, if Proxmox said it.
        privilege: Option<String>,
        /// Proxmox's words.
        text: String,
    },
    /// The node is not in the cluster.
    #[error(
        "Proxmox at {endpoint} has no node '{node}'{}; set proxmox.node to a name from \
         'ls /etc/pve/nodes'",
        known_nodes(known)
    )]
    NodeUnknown {
        /// The API's base URL.
        endpoint: String,
        /// The configured name.
        node: String,
        /// The names Proxmox knows; empty if it did not say.
        known: Vec<String>,
    },
    /// No connection, or it broke.
    #[error(
        "cannot reach Proxmox at {endpoint}: {cause}; check proxmox.endpoint and \
         'systemctl status pveproxy'"
    )]
    Unreachable {
        /// The API's base URL.
        endpoint: String,
        /// Whether the request may have been received.
        sent: bool,
        /// Why.
        cause: String,
    },
    /// No answer in time.
    #[error("Proxmox at {endpoint} did not answer {call} within {} ms", after.as_millis())]
    Timeout {
        /// The API's base URL.
        endpoint: String,
        /// The call.
        call: Box<Call>,
        /// Whether the request may have been received.
        sent: bool,
        /// How long it was waited for.
        after: Duration,
    },
    /// The certificate is not the pinned one.
    #[error(
        "the certificate of {endpoint} has the fingerprint {presented}, but proxmox.fingerprint is \
         {}; if the certificate was renewed, compare with 'pvenode cert info' on the node \
         and set the new one",
        list(configured)
    )]
    FingerprintMismatch {
        /// The API's base URL.
        endpoint: String,
        /// Of the certificate that the server showed.
        presented: Fingerprint,
        /// As configured.
        configured: Vec<Fingerprint>,
    },
    /// The certificate is not trusted.
    #[error("the certificate of {endpoint} is not trusted: {reason}; {remedy}")]
    Untrusted {
        /// The API's base URL.
        endpoint: String,
        /// Why.
        reason: String,
        /// What to configure.
        remedy: String,
    },
    /// TLS failed otherwise.
    #[error(
        "TLS with {endpoint} failed: {reason}; check that proxmox.endpoint is a Proxmox VE API"
    )]
    Tls {
        /// The API's base URL.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// Something answered that is not the Proxmox API, or one that this client does not understand.
    #[error(
        "{call}: {endpoint} did not answer as the Proxmox VE API: {reason}; check proxmox.endpoint"
    )]
    Protocol {
        /// The API's base URL.
        endpoint: String,
        /// The call.
        call: Box<Call>,
        /// The status code; 0 if there is none.
        status: u16,
        /// What was wrong.
        reason: String,
    },
    /// The request was not sent, because it cannot be made.
    #[error("{call}: not sent: {reason}")]
    Unsendable {
        /// The call.
        call: Box<Call>,
        /// Why.
        reason: String,
    },
    /// The token's or password's file cannot be used.
    #[error(transparent)]
    SecretFile(#[from] SecretFileError),
    /// The CA file, or the system's roots, cannot be used.
    #[error("proxmox.ca_file {}: {reason}; use /etc/pve/pve-root-ca.pem, or set proxmox.fingerprint", path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The HTTP client cannot be made.
    #[error("cannot set up the HTTPS client: {reason}")]
    Setup {
        /// Why.
        reason: String,
    },
    /// The CT is not the one it was taken for. Nothing was done to it.
    #[error("CT {vmid} was left alone: {reason}")]
    NotOurs {
        /// The CT.
        vmid: Vmid,
        /// What differs.
        reason: NotOurs,
    },
}

/// What Proxmox's words mean.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The CT does not exist on the node.
    #[error("the CT does not exist")]
    NotFound,
    /// A guest with this VMID exists.
    #[error("a guest with this VMID exists already")]
    Exists,
    /// The CT runs, so it cannot be started.
    #[error("the CT is running already")]
    AlreadyRunning,
    /// The CT does not run.
    #[error("the CT is not running")]
    NotRunning,
    /// The CT runs, so it cannot be destroyed.
    #[error("the CT is running; stop it first")]
    Running,
    /// The CT's protection flag forbids it.
    #[error("the CT is protected; remove its protection flag first")]
    Protected,
    /// The configuration has a `lock`.
    #[error("the CT is locked ({by}); wait for that operation, or 'pct unlock' if it is dead")]
    Locked {
        /// Such as `backup`.
        by: String,
    },
    /// Another operation held the CT's lock file for too long.
    #[error("another operation on the CT held its lock for too long")]
    LockTimeout,
    /// The configuration was changed in between.
    #[error("the CT's configuration was changed by somebody else")]
    DigestMismatch,
    /// The cluster is not quorate, so nothing can be written.
    #[error("the cluster has no quorum ({text}); see 'pvecm status'")]
    NoQuorum {
        /// Proxmox's words.
        text: String,
    },
    /// The storage is not there, or not to be used.
    #[error("Proxmox cannot use the storage '{storage}' ({text}); see 'pvesm status' on the node")]
    StorageUnusable {
        /// The storage.
        storage: String,
        /// Proxmox's words.
        text: String,
    },
    /// The storage has no space left.
    #[error("the storage is full ({text}); see 'pvesm status' on the node")]
    StorageFull {
        /// Proxmox's words, or those of the program that met it.
        text: String,
    },
    /// A template or another volume is not in its storage.
    #[error("the volume '{volume}' does not exist; see 'pvesm list' on the node")]
    VolumeMissing {
        /// `STORAGE:KIND/NAME`
        volume: String,
    },
    /// The CT has no such snapshot.
    #[error("the CT has no snapshot '{snapshot}'")]
    SnapshotMissing {
        /// Its name.
        snapshot: String,
    },
    /// There is no such task (any more).
    #[error("there is no such task")]
    NoSuchTask,
    /// Parameters were refused.
    #[error("Proxmox refused the parameters: {}", parameters(errors))]
    BadParameter {
        /// Parameter and complaint.
        errors: BTreeMap<String, String>,
    },
    /// Anything else that Proxmox said.
    #[error("{text}")]
    Other {
        /// The status code; 0 in a task.
        status: u16,
        /// Proxmox's words.
        text: String,
    },
}

impl Failure {
    /// The meaning of an error text, or `None`. The texts are the same in answers and in tasks.
    ///
    /// Anchored at the beginning: a hook's output that happens to contain such words comes later.
    fn recognise(text: &str) -> Option<Failure> {
        let after = |prefix: &str| text.strip_prefix(prefix);
        // "CT 100 …" or "VM 100 …" (the API's own mix-up in some calls).
        let of_guest = || {
            let rest = after("CT ").or_else(|| after("VM "))?;
            Some(rest.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start())
        };
        if after("Configuration file '").is_some_and(|rest| rest.contains(".conf' does not exist"))
        {
            return Some(Failure::NotFound);
        }
        if let Some(rest) = of_guest() {
            if rest.starts_with("already running") {
                return Some(Failure::AlreadyRunning);
            } else if rest.starts_with("not running") {
                return Some(Failure::NotRunning);
            } else if rest.starts_with("already exists") {
                return Some(Failure::Exists);
            }
        }
        if let Some(rest) = after("CT is locked (") {
            let by = rest.split(')').next().unwrap_or_default().to_owned();
            return Some(Failure::Locked { by });
        }
        if after("can't lock file '").is_some_and(|rest| rest.contains("got timeout")) {
            return Some(Failure::LockTimeout);
        }
        if after("unable to destroy CT ")
            .is_some_and(|rest| rest.contains(" - container is running"))
        {
            return Some(Failure::Running);
        }
        if after("can't remove CT ").is_some_and(|rest| rest.contains(" - protection mode enabled"))
        {
            return Some(Failure::Protected);
        }
        // The reason follows, in the words that another call would have had for it.
        if let Some((_, reason)) =
            after("unable to create CT ").and_then(|rest| rest.split_once(" - "))
        {
            return Failure::recognise(reason);
        }
        let quoted = |what: &str| text.strip_prefix(what)?.strip_prefix(" '")?.split_once("' ");
        if let Some((storage, words)) = quoted("storage")
            && ["does not exist", "is not available", "is not online", "is disabled"]
                .iter()
                .any(|end| words.starts_with(end))
        {
            let (storage, text) = (storage.to_owned(), text.to_owned());
            return Some(Failure::StorageUnusable { storage, text });
        }
        if let Some((volume, "does not exist")) = quoted("volume") {
            return Some(Failure::VolumeMissing { volume: volume.to_owned() });
        }
        if let Some((snapshot, "does not exist")) = quoted("snapshot") {
            return Some(Failure::SnapshotMissing { snapshot: snapshot.to_owned() });
        }
        if is_full(text) {
            return Some(Failure::StorageFull { text: text.to_owned() });
        }
        if text.starts_with("detected modified configuration") {
            return Some(Failure::DigestMismatch);
        }
        // pmxcfs without quorum refuses root's writes with EACCES.
        let unwritable = after("unable to open file '").is_some_and(|rest| {
            rest.ends_with("Permission denied")
                && rest.split('\'').next().is_some_and(|path| path.contains("/pve/nodes/"))
        });
        if unwritable
            || text.starts_with("cluster not ready - no quorum")
            || text.ends_with("no quorum!")
        {
            return Some(Failure::NoQuorum { text: text.to_owned() });
        }
        None
    }

    fn parameters(errors: &Value) -> Option<Failure> {
        let errors: BTreeMap<String, String> = errors
            .as_object()?
            .iter()
            .map(|(name, text)| {
                (one_line(name), one_line(&Loose(text).as_text().unwrap_or_default()))
            })
            .collect();
        if errors.get("upid").is_some_and(|text| text == "no such task") {
            Some(Failure::NoSuchTask)
        } else if errors.get("vmid").is_some_and(|text| text.ends_with(" already exists")) {
            Some(Failure::Exists)
        } else {
            Some(Failure::BadParameter { errors })
        }
    }
}

impl Error {
    /// What the API or a task said, for callers that treat some of it as success.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Error::Api { failure, .. } => Some(failure),
            _ => None,
        }
    }

    /// The request may have been carried out, or not: only reading the state back tells.
    pub fn is_unclear(&self) -> bool {
        match self {
            Error::Timeout { sent, .. } => *sent,
            error => error.is_broken(),
        }
    }

    /// The request may have been carried out, and the way there or back broke: it pays to send it
    /// again, if that is safe.
    pub(super) fn is_broken(&self) -> bool {
        match self {
            Error::Unreachable { sent, .. } => *sent,
            // It said yes, and the rest was lost; or it was somebody else on the way who spoke.
            Error::Protocol { status, .. } => {
                (200..300).contains(status) || (*status >= 500 && *status != 501)
            }
            _ => false,
        }
    }

    /// Another endpoint of the cluster may do better.
    pub(super) fn is_of_endpoint(&self) -> bool {
        match self {
            Error::Unreachable { .. }
            | Error::Timeout { .. }
            | Error::FingerprintMismatch { .. }
            | Error::Untrusted { .. }
            | Error::Tls { .. } => true,
            error => error.is_broken(),
        }
    }

    /// The error of something that came before the request itself.
    pub(super) fn unsent(self) -> Error {
        match self {
            Error::Unreachable { endpoint, cause, .. } => {
                Error::Unreachable { endpoint, cause, sent: false }
            }
            Error::Timeout { endpoint, call, after, .. } => {
                Error::Timeout { endpoint, call, after, sent: false }
            }
            Error::Protocol { endpoint, call, reason, .. } => {
                Error::Protocol { endpoint, call, reason, status: 0 }
            }
            other => other,
        }
    }

    /// Trying again later may work without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable { .. } | Error::Timeout { .. } | Error::TaskTimeout { .. } => true,
            Error::Api { failure, .. } => {
                matches!(
                    failure,
                    Failure::Locked { .. } | Failure::LockTimeout | Failure::NoQuorum { .. }
                )
            }
            _ => false,
        }
    }
}

/// Where an answer came from, for [`from_answer`].
pub(super) struct Context<'a> {
    pub(super) endpoint: &'a str,
    pub(super) node: &'a str,
    pub(super) who: &'a str,
    pub(super) file: &'a std::path::Path,
}

/// The error of an answer whose status is not a success.
pub(super) fn from_answer(
    context: &Context<'_>,
    call: Call,
    status: u16,
    reason: &str,
    body: &[u8],
) -> Error {
    let call = Box::new(call);
    let json: Option<Value> = serde_json::from_slice(body).ok().filter(Value::is_object);
    let message =
        json.as_ref().and_then(|json| Loose(json).text("message")).map(|text| one_line(&text));
    let text = message.filter(|text| !text.is_empty()).unwrap_or_else(|| one_line(reason));
    let protocol = |call, reason| Error::Protocol {
        endpoint: context.endpoint.to_owned(),
        call,
        status,
        reason,
    };
    match status {
        401 => Error::Authentication {
            who: context.who.to_owned(),
            file: context.file.to_owned(),
            text,
        },
        // What is below carries JSON in every case but those made by the front end.
        595..=599 => Error::Unreachable {
            endpoint: context.endpoint.to_owned(),
            sent: true,
            cause: format!("its front end answered {status} {text}"),
        },
        _ if json.is_none() => {
            protocol(call, format!("status {status} {text} without Proxmox's JSON"))
        }
        403 => {
            let (path, privilege) = lacking(&text);
            Error::Permission { call, who: context.who.to_owned(), path, privilege, text }
        }
        501 => protocol(call, text),
        300..=399 => protocol(call, format!("status {status}, a redirection")),
        _ => {
            let named =
                json.as_ref().and_then(|json| json.get("errors")).and_then(Failure::parameters);
            if named.is_none() && is_unknown_node(&text) {
                return Error::NodeUnknown {
                    endpoint: context.endpoint.to_owned(),
                    node: context.node.to_owned(),
                    known: Vec::new(),
                };
            }
            let failure = named.or_else(|| Failure::recognise(&text));
            Error::Api { call, failure: failure.unwrap_or(Failure::Other { status, text }) }
        }
    }
}

/// The error of a task that ended with `exitstatus`.
pub(super) fn from_task(upid: &Upid, exitstatus: &str, log: Vec<String>) -> Error {
    let text = one_line(exitstatus);
    // The exit status of a command that failed is all that Proxmox repeats of it.
    let full = || log.iter().find(|line| is_full(line)).map(|line| one_line(line));
    let failure =
        Failure::recognise(&text).or_else(|| full().map(|text| Failure::StorageFull { text }));
    match failure {
        Some(failure) => {
            let call =
                Call { method: "task", path: upid.to_string(), vmid: upid.id().parse().ok() };
            Error::Api { call: Box::new(call), failure }
        }
        None => Error::TaskFailed { upid: Box::new(upid.clone()), text, log },
    }
}

/// The error of a request that got no whole answer.
pub(super) fn from_broken(endpoint: &str, call: &Call, after: Duration, broken: Broken) -> Error {
    let (endpoint, call) = (endpoint.to_owned(), Box::new(call.clone()));
    match broken {
        Broken::Connect(error) => match chain(&error).find_map(|error| error.downcast_ref()) {
            Some(tls) => tls_error(endpoint, tls),
            None => Error::Unreachable { endpoint, sent: false, cause: root_cause(&error) },
        },
        Broken::Unsendable(reason) => Error::Unsendable { call, reason: one_line(&reason) },
        Broken::Timeout { sent } => Error::Timeout { endpoint, call, sent, after },
        Broken::Lost(error) => {
            Error::Unreachable { endpoint, sent: true, cause: root_cause(&error) }
        }
        Broken::TooLong { status } => {
            Error::Protocol { endpoint, call, status, reason: "the answer is too long".into() }
        }
    }
}

/// Raised by the pinning verifier and found again in [`from_broken`].
#[derive(Debug, thiserror::Error)]
#[error("the certificate's fingerprint is {presented}")]
pub(super) struct PinMismatch {
    pub(super) presented: Fingerprint,
    pub(super) configured: Vec<Fingerprint>,
}

fn tls_error(endpoint: String, error: &rustls::Error) -> Error {
    use rustls::{CertificateError, Error as Tls};
    let Tls::InvalidCertificate(reason) = error else {
        return Error::Tls { endpoint, reason: one_line(&error.to_string()) };
    };
    let pin = "or pin it with proxmox.fingerprint ('pvenode cert info' prints it)";
    let (reason, remedy) = match reason {
        CertificateError::Other(other) => match other.0.downcast_ref::<PinMismatch>() {
            Some(PinMismatch { presented, configured }) => {
                let (presented, configured) = (*presented, configured.clone());
                return Error::FingerprintMismatch { endpoint, presented, configured };
            }
            None => (
                one_line(&other.to_string()),
                format!("set proxmox.ca_file to its authority, {pin}"),
            ),
        },
        // A bad signature is what an authority of the same name with another key looks like.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => (
            "it is not issued by the configured authority".to_owned(),
            format!(
                "set proxmox.ca_file to the file of its authority, such as /etc/pve/pve-root-ca.pem, {pin}"
            ),
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => (
            "it is not made out to that host".to_owned(),
            format!("use one of its names in proxmox.endpoint, {pin}"),
        ),
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            (one_line(&reason.to_string()), format!("renew it, correct the clock, {pin}"))
        }
        other => (
            one_line(&other.to_string()),
            format!("install a certificate that can be verified, {pin}"),
        ),
    };
    Error::Untrusted { endpoint, reason, remedy }
}

/// The innermost cause of `error`, each step into `io::Error` included: its `source` skips the
/// error it wraps.
fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| {
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        }
    })
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error).last().map(|error| one_line(&error.to_string())).unwrap_or_default()
}

/// `Permission check failed (/vms/100, VM.Audit)`; the parentheses may hold words or be missing.
fn lacking(text: &str) -> (Option<String>, Option<String>) {
    let inner =
        text.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map(|(inner, _)| inner);
    match inner.and_then(|inner| inner.split_once(", ")) {
        Some((path, privilege)) if path.starts_with('/') => {
            (Some(path.to_owned()), Some(privilege.to_owned()))
        }
        _ => (None, None),
    }
}

/// The kernel's words for ENOSPC and EDQUOT, at the end of a message.
fn is_full(text: &str) -> bool {
    let text = text.trim_end();
    text.ends_with("No space left on device") || text.ends_with("Disk quota exceeded")
}

fn is_unknown_node(text: &str) -> bool {
    text.starts_with("hostname lookup '") || text.starts_with("no such cluster node '")
}

/// One line without control characters, bounded: these texts end in a single sentence.
pub(super) fn one_line(text: &str) -> String {
    let clean = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    clean.take(512).collect()
}

fn log_suffix(log: &[String]) -> String {
    let lines: Vec<_> =
        log.iter().map(|line| one_line(line)).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { String::new() } else { format!(" (log: {})", lines.join(" | ")) }
}

fn named(who: &str) -> String {
    if who.contains('!') { format!("the API token {who}") } else { format!("the user {who}") }
}

fn secret_remedy(who: &str) -> String {
    match who.split_once('!') {
        Some((user, _)) => format!(
            "compare it with 'pveum user token list {user}' and write the secret shown at its \
             creation into the file"
        ),
        None => "write the user's password into the file".to_owned(),
    }
}

fn list(fingerprints: &[Fingerprint]) -> String {
    fingerprints.iter().map(Fingerprint::to_string).collect::<Vec<_>>().join(" or ")
}

fn known_nodes(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!(" (it has {})", known.join(", ")) }
}

fn parameters(errors: &BTreeMap<String, String>) -> String {
    errors.iter().map(|(name, text)| format!("{name}: {text}")).collect::<Vec<_>>().join("; ")
}

fn permission(path: Option<&str>, privilege: Option<&str>, text: &str) -> String {
    match (path, privilege) {
        (Some(path), Some(privilege)) => format!("it lacks {privilege} on {path}"),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::pve::fixtures::{self, recorded};

    fn context() -> Context<'static> {
        let file = Path::new("/etc/token");
        Context { endpoint: "https://x:8006", node: "nope", who: "shim@pve!t1", file }
    }

    fn answer(name: &str) -> Error {
        let r = recorded(name);
        let call = Call { method: "CALL", path: r.path().to_owned(), vmid: None };
        from_answer(&context(), call, r.status(), r.reason(), &r.body())
    }

    fn task(name: &str) -> Error {
        let r = recorded(name);
        let upid = r.data().as_str().unwrap().parse().unwrap();
        from_task(&upid, r.task_exitstatus(), r.task_log())
    }

    #[test]
    fn each_recorded_domain_error_has_its_variant() {
        let locked = || Failure::Locked { by: "backup".into() };
        let table = [
            ("err-ct-missing-config", Failure::NotFound),
            ("err-ct-missing-status", Failure::NotFound),
            ("err-ct-missing-delete", Failure::NotFound),
            ("err-vmid-in-use", Failure::Exists),
            ("cluster-nextid-used", Failure::Exists),
            ("err-start-running", Failure::AlreadyRunning),
            ("err-stop-stopped", Failure::NotRunning),
            ("err-reboot-stopped", Failure::NotRunning),
            ("err-delete-running", Failure::Running),
            ("err-delete-protected", Failure::Protected),
            ("err-locked-delete", locked()),
            ("err-locked-config", locked()),
            ("err-digest-mismatch", Failure::DigestMismatch),
            ("err-task-missing", Failure::NoSuchTask),
            (
                "err-create-storage-unknown",
                Failure::StorageUnusable {
                    storage: "nope".into(),
                    text: "storage 'nope' does not exist".into(),
                },
            ),
            ("err-put-empty", Failure::Other { status: 500, text: "no options specified".into() }),
        ];
        for (name, expected) in table {
            assert_eq!(answer(name).failure(), Some(&expected), "{name}");
        }
    }

    #[test]
    fn each_recorded_task_error_has_its_variant() {
        let table = [
            ("err-ct-missing-start", Failure::NotFound),
            ("err-locked-stop", Failure::Locked { by: "backup".into() }),
            ("err-locked-start-stopped", Failure::Locked { by: "create".into() }),
            ("lxc-rollback-missing", Failure::SnapshotMissing { snapshot: "s1".into() }),
            (
                "err-create-template-missing",
                Failure::VolumeMissing { volume: "local:vztmpl/nope.tar.gz".into() },
            ),
        ];
        for (name, expected) in table {
            let error = task(name);
            assert_eq!(error.failure(), Some(&expected), "{name}");
            let Error::Api { call, .. } = error else { panic!() };
            assert!(call.vmid.is_some());
        }
        let error = task("err-start-short-lived");
        let Error::TaskFailed { upid, text, log } = &error else { panic!("{error:?}") };
        assert_eq!(
            (upid.kind(), text.as_str()),
            ("vzstart", "unable to get PID for CT 500 (not running?)")
        );
        assert_eq!(log.len(), 3);
        assert!(error.to_string().contains("Connection reset by peer"), "{error}");
    }

    /// The others have a meaning: a recording that is new, or a pattern that is lost, shows.
    #[test]
    fn of_all_recorded_errors_only_these_are_mere_words() {
        let mut words = Vec::new();
        for name in fixtures::names() {
            let recorded = recorded(&name);
            let error = if recorded.status() >= 400 {
                answer(&name)
            } else if recorded.task_failed() {
                task(&name)
            } else {
                continue;
            };
            match error {
                Error::TaskFailed { .. } | Error::Api { failure: Failure::Other { .. }, .. } => {
                    words.push(name);
                }
                Error::Api { .. }
                | Error::Authentication { .. }
                | Error::Permission { .. }
                | Error::NodeUnknown { .. }
                | Error::Protocol { status: 501, .. } => {}
                error => panic!("{name}: {error:?}"),
            }
        }
        let expected = [
            "err-put-bridge-missing",
            "err-put-delete-required",
            "err-put-empty",
            "err-resize-subvol-dir",
            "err-start-bridge-missing",
            "err-start-during-poststop",
            "err-start-missing-entrypoint",
            "err-start-short-lived",
            "lxc-resume-stopped",
            "lxc-shutdown-timeout",
            "lxc-snapshot-dir",
            "lxc-suspend",
            "oci-registry-pull-refused",
            "oci-registry-pull-unreachable",
            "perm-create-rootfs-bind-ticket",
            "perm-put-unprivileged-full",
            "perm-put-unprivileged-user",
            "query-oci-repo-tags",
            "storage-download-url",
            "vncproxy-no-server",
            "vzdump-ct",
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn refused_parameters_are_named() {
        for (name, key) in [
            ("err-bad-param", "memory"),
            ("err-bad-vmid", "vmid"),
            ("err-skiplock-stop-token", "skiplock"),
            ("err-put-hotplug-failed", "memory"),
            ("err-task-bad-upid", "upid"),
        ] {
            let error = answer(name);
            let Some(Failure::BadParameter { errors }) = error.failure() else {
                panic!("{name}: {error:?}")
            };
            assert!(errors.contains_key(key), "{name}: {errors:?}");
            assert!(error.to_string().contains(&format!("{key}: ")), "{error}");
        }
    }

    #[test]
    fn a_401_gives_token_file_and_the_reason_phrase_but_no_secret() {
        for (name, words) in [
            ("err-bad-token", "Authentication failed!"),
            ("err-unknown-token", "Authentication failed!"),
            ("err-no-auth", "No ticket"),
            ("err-csrf-missing", "invalid csrf token"),
        ] {
            let error = answer(name);
            assert!(matches!(error, Error::Authentication { .. }), "{name}: {error:?}");
            let text = error.to_string();
            for part in [words, "shim@pve!t1", "/etc/token", "pveum user token list shim@pve'"] {
                assert!(text.contains(part), "{text} lacks {part}");
            }
        }
    }

    #[test]
    fn a_403_gives_path_and_privilege_where_proxmox_does() {
        let of = |name| match answer(name) {
            Error::Permission { path, privilege, .. } => (path, privilege),
            other => panic!("{name}: {other:?}"),
        };
        let both = |a: &str, b: &str| (Some(a.to_owned()), Some(b.to_owned()));
        assert_eq!(of("err-no-permission-config"), both("/vms/100", "VM.Audit"));
        assert_eq!(of("perm-create-priv-user"), both("/", "Sys.Modify"));
        assert_eq!(of("err-no-permission-create"), (None, None));
        assert_eq!(of("perm-create-mp0-bind-full"), (None, None));
        let text = answer("perm-create-mp0-bind-full").to_string();
        assert!(text.contains("mount point type bind"), "{text}");
    }

    #[test]
    fn unknown_nodes_and_unknown_paths_are_told_apart() {
        for name in ["err-node-unknown", "err-migrate-unknown"] {
            let error = answer(name);
            assert!(matches!(error, Error::NodeUnknown { .. }), "{error:?}");
            assert!(error.to_string().contains("no node 'nope'"), "{error}");
        }
        for name in ["err-path-unknown", "err-method-not-implemented"] {
            let error = answer(name);
            assert!(matches!(error, Error::Protocol { status: 501, .. }), "{error:?}");
            assert!(!error.is_unclear());
        }
    }

    #[test]
    fn what_is_not_proxmox_is_a_protocol_error() {
        let call = || Call { method: "GET", path: "/nodes".into(), vmid: None };
        for (status, body) in
            [(404, "<html>nope</html>"), (500, ""), (403, "x"), (302, ""), (500, "[]")]
        {
            let error = from_answer(&context(), call(), status, "Reason", body.as_bytes());
            assert!(matches!(error, Error::Protocol { .. }), "{status}: {error:?}");
            assert!(error.to_string().contains("proxmox.endpoint"), "{error}");
        }
    }

    /// Not recorded: these need a cluster, or a lock held for 10 s. The texts are from the facts
    /// about Proxmox's daemons.
    #[test]
    fn unrecorded_texts_have_their_variant_too() {
        let call = || Call { method: "POST", path: "/x".into(), vmid: None };
        let of = |text: &str| {
            let body =
                serde_json::json!({"data": null, "message": format!("{text}\n")}).to_string();
            from_answer(&context(), call(), 500, text, body.as_bytes())
        };
        let timeout = of("can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout");
        assert_eq!(timeout.failure(), Some(&Failure::LockTimeout));
        assert!(timeout.is_transient());
        let quorum = of("cluster not ready - no quorum?");
        assert!(matches!(quorum.failure(), Some(Failure::NoQuorum { .. })), "{quorum:?}");
        let path = "/etc/pve/nodes/pve1/lxc/300.conf.tmp.1234";
        let write = of(&format!("unable to open file '{path}' - Permission denied"));
        assert!(matches!(write.failure(), Some(Failure::NoQuorum { .. })), "{write:?}");
        let other = of("unable to open file '/etc/hosts' - Permission denied");
        assert!(matches!(other.failure(), Some(Failure::Other { .. })), "{other:?}");
        let create = of("unable to create CT 300 - CT 300 already exists on node 'pve1'");
        assert_eq!(create.failure(), Some(&Failure::Exists));
        for text in [
            "storage 'x' is not available on node 'pve1'",
            "storage 'x' is not online",
            "storage 'x' is disabled",
            "unable to create CT 300 - storage 'x' does not exist",
        ] {
            let Some(Failure::StorageUnusable { storage, .. }) = Failure::recognise(text) else {
                panic!("{text}")
            };
            assert_eq!(storage, "x");
        }
        for text in ["write failed: No space left on device", "x: Disk quota exceeded"] {
            let full = of(text);
            assert!(matches!(full.failure(), Some(Failure::StorageFull { .. })), "{full:?}");
        }
        for status in [595, 596, 599] {
            let error = from_answer(&context(), call(), status, "Connection timed out", b"");
            assert!(error.is_unclear() && error.is_transient(), "{error:?}");
        }
    }

    /// Proxmox repeats only the exit code of the program that met it.
    #[test]
    fn a_full_storage_is_recognised_in_the_log_of_a_task() {
        let upid: Upid =
            "UPID:pve1:00000500:000500F1:6B01F13F:vzcreate:110:root@pam:".parse().unwrap();
        let text = "unable to create CT 110 - command 'tar xpf -' failed: exit code 2";
        let line = "tar: ./bin/busybox: Cannot write: No space left on device";
        let error =
            from_task(&upid, text, vec!["extracting archive".into(), line.into(), "x".into()]);
        assert_eq!(error.failure(), Some(&Failure::StorageFull { text: line.into() }));
        let error = from_task(&upid, text, vec!["No space left on device, says my hook".into()]);
        assert!(matches!(error, Error::TaskFailed { .. }), "{error:?}");
    }

    #[test]
    fn an_unclear_answer_is_told_from_a_refusal() {
        let call = || Call { method: "POST", path: "/x".into(), vmid: None };
        let refusal = br#"{"data":null,"message":"no"}"#;
        for (status, body, unclear) in [
            (500, &refusal[..], false),
            (400, refusal, false),
            (403, refusal, false),
            (501, refusal, false),
            // Half of Proxmox's error, or a gateway's: who knows what happened behind it.
            (500, b"{\"data\":null,\"mess", true),
            (502, b"<html>", true),
            (504, b"", true),
            (596, b"", true),
            (404, b"<html>", false),
        ] {
            let error = from_answer(&context(), call(), status, "Reason", body);
            assert_eq!(error.is_unclear(), unclear, "{status}: {error:?}");
        }
    }

    #[test]
    fn words_in_the_middle_of_a_text_prove_nothing() {
        for text in [
            "hook said: CT 100 not running",
            "x CT is locked (backup)",
            "CT 100 says not running",
            "my storage 'x' does not exist",
            "storage 'x' sings",
            "No space left on device, or is there",
        ] {
            assert_eq!(Failure::recognise(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic_or_speak_two_lines(
            status in 100u16..1000, reason in "(\\PC|\n){0,40}",
            body in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..80),
                "(\\PC|\n){0,60}".prop_map(|m| serde_json::json!({"message": m, "errors": {"a\nb": m}}).to_string().into_bytes()),
            ],
        ) {
            let call = Call { method: "GET", path: "/x".into(), vmid: None };
            let error = from_answer(&context(), call, status, &reason, &body);
            prop_assert!(!error.to_string().contains('\n'), "{}", error);
        }
    }
}
