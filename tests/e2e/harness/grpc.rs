//! Calls of containerd's gRPC services, for what `ctr` has no command for.

use std::path::Path;
use std::time::Duration;

use containerd_client::{connect, tonic};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// Longer than any call of a test takes.
const LIMIT: Duration = Duration::from_secs(170);

/// `runtimeoptions.v1.Options`, which no crate has: names the shim's configuration.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuntimeOptions {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(string, tag = "2")]
    pub config_path: String,
}

/// What is needed of `containerd.runc.v1.Options`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RuncOptions {
    #[prost(string, tag = "7")]
    pub root: String,
}

/// The status of a failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure { code: status.code(), message: status.message().to_owned() }
    }
}

/// One call over a connection of its own: containerd may have been restarted since the last one.
pub fn call<T>(
    socket: &Path,
    call: impl AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.expect("a runtime for one call").block_on(async {
        let connected = connect(socket).await;
        let channel = connected.map_err(|error| Status::unavailable(error.to_string()))?;
        let answer = tokio::time::timeout(LIMIT, call(channel)).await;
        answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer from containerd")))
    });
    Ok(answer?.into_inner())
}
