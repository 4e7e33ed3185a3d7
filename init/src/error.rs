//! What can go wrong, in the words the user reads.
//!
//! Where runc has a sentence for a failure, it is the same sentence, because tools match on it.

use std::fmt;
use std::io;

/// A failure of init; [`fmt::Display`] is the message that containerd shows.
#[derive(Debug)]
pub enum Error {
    /// A system call failed while doing `action`.
    System {
        /// What was attempted, naming the object.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The workload's file cannot be executed (the texts of Go's `os/exec`).
    Lookup {
        /// `args[0]`.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `execve(2)` refused.
    Execute {
        /// The path after the lookup.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The specification asks for something that is not done for safety.
    Refused {
        /// What was asked for.
        object: String,
        /// Why it is not done.
        reason: &'static str,
    },
    /// A mount failed.
    Mount {
        /// As in the specification.
        source_name: String,
        /// As in the specification.
        destination: String,
        /// Why.
        reason: Box<Error>,
    },
    /// A cgroup hierarchy could not be mounted.
    Hierarchy {
        /// Its directory's name.
        name: String,
        /// Why.
        reason: Box<Error>,
    },
    /// An OCI hook failed.
    Hook {
        /// `createContainer` or `startContainer`.
        kind: &'static str,
        /// Its position in the specification.
        index: usize,
        /// How it ended, and what it printed.
        reason: String,
    },
    /// The other side sent something unexpected.
    Protocol(&'static str),
    /// The other side is of another release.
    Version {
        /// The protocol version of the shim.
        shim: u32,
    },
    /// The other side closed the connection: the shim is gone.
    Disconnected,
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System { action, source } => write!(f, "{action}: {}", errno_text(source)),
            Self::Lookup { file, reason } => write!(f, "exec: {}: {reason}", quote(file)),
            Self::Execute { path, source } => write!(f, "exec {path}: {}", errno_text(source)),
            Self::Refused { object, reason } => write!(f, "{object} {reason}"),
            Self::Mount { source_name, destination, reason } => write!(
                f,
                "error mounting {} to rootfs at {}: {reason}",
                quote(source_name),
                quote(destination)
            ),
            Self::Hierarchy { name, reason } => {
                write!(f, "cgroup hierarchy {}: {reason}", quote(name))
            }
            Self::Hook { kind, index, reason } => {
                write!(f, "error running {kind} hook #{index}: {reason}")
            }
            Self::Protocol(what) => write!(f, "protocol error between shim and init: {what}"),
            Self::Version { shim } => write!(
                f,
                "the shim speaks init protocol {shim}, proxmox-shim-init {}: install both from \
                 the same release",
                crate::protocol::VERSION
            ),
            Self::Disconnected => f.write_str("the shim closed the connection"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::System { source, .. } | Self::Execute { source, .. } => Some(source),
            Self::Mount { reason, .. } | Self::Hierarchy { reason, .. } => Some(reason),
            Self::Lookup { .. }
            | Self::Refused { .. }
            | Self::Hook { .. }
            | Self::Protocol(_)
            | Self::Version { .. }
            | Self::Disconnected => None,
        }
    }
}

/// Says what was attempted when a system call fails.
pub trait Attempt<T> {
    /// Adds `action` to the error. It is built only in case of failure.
    fn attempt<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Attempt<T> for io::Result<T> {
    fn attempt<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::System { action: action().into(), source })
    }
}

/// The kernel's error in Go's (and so runc's) words: the C library's text with a small first
/// letter and without a number.
pub fn errno_text(error: &io::Error) -> String {
    let mut text = error.to_string();
    if let Some(end) = text.rfind(" (os error ") {
        text.truncate(end);
    }
    let mut chars = text.chars();
    match chars.next() {
        // "RFS specific error" stays as it is.
        Some(first) if !chars.clone().next().is_some_and(char::is_uppercase) => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text,
    }
}

/// As Go's `%q`: in double quotes, control characters escaped.
pub fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_is_said_as_go_says_it() {
        for (errno, text) in [
            (libc::ENOENT, "no such file or directory"),
            (libc::EACCES, "permission denied"),
            (libc::ENOEXEC, "exec format error"),
            (libc::EISDIR, "is a directory"),
            (libc::E2BIG, "argument list too long"),
            (libc::EIO, "input/output error"),
        ] {
            assert_eq!(errno_text(&io::Error::from_raw_os_error(errno)), text);
        }
    }

    #[test]
    fn quoting_escapes_what_would_break_a_log_line() {
        assert_eq!(quote("a\"b\\c\nd\u{1b}"), r#""a\"b\\c\nd\x1b""#);
    }
}
