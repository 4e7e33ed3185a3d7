//! Files that hold a secret: an API token or a password.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use secrecy::zeroize::Zeroizing;

/// What a file is expected to hold; for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Such as `token file`.
    pub(super) what: &'static str,
    /// The line it must hold.
    pub(super) line: &'static str,
    /// How to get one.
    pub(super) remedy: &'static str,
}

/// Why such a file cannot be used. Never holds any of the file's content.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// There is no such file.
    #[error(
        "{} {}: does not exist; {} and write {} into it with mode 0600",
        kind.what, path.display(), kind.remedy, kind.line
    )]
    Missing {
        /// What it should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
    },
    /// It exists but cannot be read.
    #[error("{} {}: cannot be read: {source}", kind.what, path.display())]
    Unreadable {
        /// What it should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a FIFO or a device.
    #[error(
        "{} {}: is not a regular file; write {} into a file",
        kind.what, path.display(), kind.line
    )]
    NotAFile {
        /// What it should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
    },
    /// Group or others can read or write it.
    #[error(
        "{} {}: mode {mode:04o} lets others than its owner use it; run 'chmod 0600 {}'",
        kind.what, path.display(), path.display()
    )]
    Mode {
        /// What it should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to another user.
    #[error(
        "{} {}: belongs to uid {owner}; run 'chown root:root {}'",
        kind.what, path.display(), path.display()
    )]
    Owner {
        /// What it should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
        /// The owner's uid.
        owner: u32,
    },
    /// The content is something else.
    #[error(
        "{} {}: {problem}; it must hold the one line {} ({})",
        kind.what, path.display(), kind.line, kind.remedy
    )]
    Syntax {
        /// What it should hold.
        kind: Kind,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Longer than any secret; a wrong path to a large file is noticed without reading it all.
const MAX_SIZE: u64 = 4096;

/// Reads a file and checks who else could have read or written it.
///
/// A symbolic link is followed, because secret managers place files that way; what counts is
/// the file that was opened: a regular one, owned by root (or the user the shim runs as), with
/// no permission for group and others.
pub(super) fn read(kind: Kind, path: &Path) -> Result<Zeroizing<String>, SecretFileError> {
    let path_buf = || path.to_owned();
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => SecretFileError::Missing { kind, path: path_buf() },
        _ => SecretFileError::Unreadable { kind, path: path_buf(), source },
    };
    // O_NONBLOCK: opening a FIFO must not hang `start`.
    let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_NOCTTY;
    let file =
        OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(unreadable)?;
    // Checked on the open file: nothing can be exchanged between check and use.
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(SecretFileError::NotAFile { kind, path: path_buf() });
    }
    let owner = meta.uid();
    if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
        return Err(SecretFileError::Owner { kind, path: path_buf(), owner });
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SecretFileError::Mode { kind, path: path_buf(), mode });
    }
    // Allocated once at full size, so that no copy is left behind by a growing buffer.
    let mut text = Zeroizing::new(String::with_capacity(MAX_SIZE as usize + 1));
    match file.take(MAX_SIZE + 1).read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            Err(SecretFileError::Syntax { kind, path: path_buf(), problem: "is not text" })
        }
        Err(e) => Err(unreadable(e)),
    }
}

/// The file's one line.
pub(super) fn one_line<'a>(
    kind: Kind,
    text: &'a str,
    path: &Path,
) -> Result<&'a str, SecretFileError> {
    let syntax = |problem| SecretFileError::Syntax { kind, path: path.to_owned(), problem };
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(syntax("is empty"));
    }
    if text.len() as u64 > MAX_SIZE || text.contains('\n') {
        return Err(syntax("has more than one line"));
    }
    Ok(text)
}

/// Proxmox's syntax of a user's name before the `@`.
pub(super) fn is_user(s: &str) -> bool {
    !s.is_empty() && s.chars().all(|c| c.is_ascii_graphic() && !":/!".contains(c))
}

/// The pattern of realms and token ids: `[A-Za-z][A-Za-z0-9.\-_]+`.
pub(super) fn is_name(s: &str) -> bool {
    s.len() > 1
        && s.starts_with(|c: char| c.is_ascii_alphabetic())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}
