//! containerd's side of the binary: the actions `start`, `delete` and `-info`, and the server that
//! `start` leaves behind. `explain` is the one action for people.
//!
//! containerd reads stdout and stderr of an action as one stream and takes it for the reply (or, if
//! the exit status is not 0, for the error message). So an action here returns its reply or its
//! error, and only [`main`] writes.
//!
//! Sources: containerd's `docs/runtime-v2.md`, `pkg/shim`, and `api/runtime/bootstrap/v1`.

mod args;
mod delete;
mod explain;
mod handover;
mod info;
mod input;
mod serve;
mod socket;
mod start;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

pub use args::{Identifier, Target};
pub use input::RuntimeOptions;

use args::Invocation;

/// The binary's name, which containerd derives from `io.containerd.proxmox.v2`.
const NAME: &str = "containerd-shim-proxmox-v2";

/// The runtime's name in containerd.
const RUNTIME: &str = "io.containerd.proxmox.v2";

/// Why an action failed. The message is all that an administrator sees, in the client's output.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is not one of containerd's.
    #[error("{0}")]
    Args(#[from] args::Error),
    /// containerd's message on stdin could not be read.
    #[error("cannot read containerd's message on stdin: {0}")]
    Stdin(io::Error),
    /// More than any message of containerd.
    #[error("containerd's message on stdin is longer than {limit} bytes")]
    StdinTooLong {
        /// Bytes.
        limit: u64,
    },
    /// The bundle is not usable.
    #[error("cannot {verb} {path} of the bundle: {source}")]
    Bundle {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The specification's annotations decide where the shim listens.
    #[error("cannot read the annotations in {path}: {source}")]
    Spec {
        /// `config.json`.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The shim's socket.
    #[error("{0}")]
    Socket(#[from] socket::Error),
    /// containerd does not read.
    #[error("cannot write the reply to containerd: {0}")]
    Reply(io::Error),
    /// The server process could not be started.
    #[error("cannot start the shim's server process: {0}")]
    Spawn(io::Error),
    /// The server process said why it cannot serve.
    #[error("{0}")]
    Server(String),
    /// The server process died before it could say anything.
    #[error("the shim's server process ended before it was ready ({status})")]
    ServerDied {
        /// Exit status or signal.
        status: String,
    },
    /// The server process says nothing.
    #[error("the shim's server process was not ready within {} s", .limit.as_secs())]
    ServerSilent {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The configuration is missing or wrong.
    #[error("{0}")]
    Config(String),
    /// What is left of the container could not be removed.
    #[error("cannot clean up container {id}: {reason}")]
    Reclaim {
        /// The container.
        id: String,
        /// Why.
        reason: String,
    },
    /// containerd's patience is limited.
    #[error("cleaning up container {id} took longer than {} s; the next shim on this node tries again", .limit.as_secs())]
    ReclaimSlow {
        /// The container.
        id: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// `explain`: the bundle is none, or nobody could say.
    #[error("{0}")]
    Explain(#[from] crate::oci::Error),
    /// `explain`: the container would be refused.
    #[error("Create would refuse this bundle: {0}")]
    Refused(String),
    /// A message to containerd could not be encoded.
    #[error("cannot encode the reply to containerd: {0}")]
    Encode(#[from] protobuf::Error),
    /// The asynchronous runtime could not be started.
    #[error("cannot start the asynchronous runtime: {0}")]
    Runtime(io::Error),
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let invocation = match args::parse(std::env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => return fail(&error.into()),
    };
    let replied = match invocation {
        Invocation::Help => reply(args::HELP.as_bytes()),
        Invocation::Version => reply(info::version().as_bytes()),
        Invocation::Info => info::run().and_then(|bytes| reply(&bytes)),
        Invocation::Explain(bundle) => explain::run(&bundle).and_then(|explained| {
            reply(explained.text.as_bytes())?;
            explained.refusal.map_or(Ok(()), |reason| Err(Error::Refused(reason)))
        }),
        Invocation::Start(target) => start::run(&target).and_then(|started| {
            reply(&started.reply)?;
            started.commit();
            Ok(())
        }),
        Invocation::Delete(target) => delete::run(&target).and_then(|deleted| {
            // Of this action alone containerd reads the two streams apart, and logs this one.
            if let Some(left) = &deleted.left {
                let _ = io::stderr().lock().write_all(sentence(left).as_bytes());
            }
            reply(&deleted.reply)
        }),
        // Has no reply and nobody who reads its stderr.
        Invocation::Serve(target) => return serve::run(&target),
    };
    match replied {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn reply(bytes: &[u8]) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(Error::Reply)
}

/// One sentence on stderr. containerd puts its own words after it, so it ends with a line break
/// only for a person.
fn fail(error: &Error) -> ExitCode {
    let mut stderr = io::stderr().lock();
    let end = if stderr.is_terminal() { "\n" } else { "" };
    let _ = write!(stderr, "{}{end}", sentence(error));
    ExitCode::FAILURE
}

/// An error's text on one line.
fn sentence(error: &impl std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The file in the bundle in which `start` keeps the runtime's options: `delete` runs in a new
/// process, perhaps after a crash, and containerd does not give it the options again.
fn options_file(bundle: &Path) -> PathBuf {
    bundle.join("runtime-options.pb")
}

/// The file in the bundle that holds the shim's address. containerd before 2.0 finds the shim
/// by it after a restart, and newer ones migrate from it.
fn address_file(bundle: &Path) -> PathBuf {
    bundle.join("address")
}

/// Writes a file of the bundle so that a reader sees all of it or nothing.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(hidden);
    let written = (|| {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    written.map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        Error::Bundle { verb: "write", path: path.to_path_buf(), source }
    })
}

/// The bundle: containerd makes it the working directory of every action.
fn bundle(target: &Target) -> Result<PathBuf, Error> {
    match &target.bundle {
        Some(bundle) => Ok(bundle.clone()),
        None => std::env::current_dir().map_err(|source| Error::Bundle {
            verb: "read",
            path: PathBuf::from("."),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_sentence_on_one_line() {
        let error = Error::Server("first\n  second\tthird ".into());
        assert_eq!(sentence(&error), "first second third");
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = address_file(dir.path());
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = write_file(&dir.path().join("no/address"), b"x").unwrap_err();
        assert!(sentence(&error).contains("no/address"), "{error}");
    }
}
