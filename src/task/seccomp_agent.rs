//! The agent that answers for system calls with the action `SCMP_ACT_NOTIFY`.
//!
//! Source: OCI runtime specification, "Container Process State" (config-linux.md).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::oci::plan::SeccompAgent;
use crate::sys::socket;
use crate::task::hooks::State;

/// An agent answers at once or not at all: the process waits for it.
const LIMIT: Duration = Duration::from_secs(10);
/// The name of the one descriptor, as the specification has it.
const LISTENER: &str = "seccompFd";

/// Why the agent does not have the listener.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be reached.
    #[error("send the seccomp listener to the agent at linux.seccomp.listenerPath {}", path.display())]
    Agent { path: PathBuf, source: io::Error },
    /// It does not read.
    #[error(
        "the agent at linux.seccomp.listenerPath {} did not take the seccomp listener within {} s",
        path.display(), LIMIT.as_secs()
    )]
    Silent { path: PathBuf },
}

/// What the agent learns, beside the listener.
#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct ProcessState<'a> {
    oci_version: &'a str,
    fds: [&'a str; 1],
    pid: i32,
    #[serde(skip_serializing_if = "str::is_empty")]
    metadata: &'a str,
    state: State<'a>,
}

/// Gives the agent the listener of a process (`pid` on the host) that is about to execute its
/// program. `state` is the container's.
///
/// # Errors
/// [`Error`].
pub async fn introduce(
    agent: &SeccompAgent,
    listener: OwnedFd,
    pid: i32,
    state: State<'_>,
) -> Result<(), Error> {
    let failed = |source| Error::Agent { path: agent.socket.clone(), source };
    let process = ProcessState {
        oci_version: state.oci_version,
        fds: [LISTENER],
        pid,
        metadata: &agent.metadata,
        state,
    };
    let json = serde_json::to_vec(&process).map_err(|error| failed(error.into()))?;
    match tokio::time::timeout(LIMIT, send(agent, &json, listener)).await {
        Err(_) => Err(Error::Silent { path: agent.socket.clone() }),
        Ok(sent) => sent.map_err(failed),
    }
}

async fn send(agent: &SeccompAgent, json: &[u8], listener: OwnedFd) -> io::Result<()> {
    let mut stream = UnixStream::connect(&agent.socket).await?;
    // The descriptor comes with the first bytes; agents expect all in one piece where it fits.
    let sent = stream
        .async_io(Interest::WRITABLE, || socket::send(stream.as_fd(), json, &[listener.as_fd()]))
        .await?;
    stream.write_all(&json[sent..]).await?;
    stream.shutdown().await
}
