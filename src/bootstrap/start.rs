//! `start`: binds the socket, starts the server on it, waits until it serves, replies.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde::Deserialize;

use super::handover::{self, COMMITTED, Handover, Readiness};
use super::input::{self, Request};
use super::socket::{self, Bound};
use super::{Error, Target};

/// How long the server may take to be ready. It ends its own checks earlier, with a better message.
const READY_LIMIT: Duration = Duration::from_secs(15);

/// What the server keeps of containerd's environment, which may hold proxies, credentials or
/// library paths that are none of its business.
const KEPT_VARIABLES: [&str; 3] = ["PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// A reply for containerd and, if a server was started for it, the channel to that server.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) reply: Vec<u8>,
    channel: Option<UnixStream>,
}

impl Started {
    /// To be called when containerd has the reply; a server that does not hear it ends.
    pub(super) fn commit(self) {
        if let Some(mut channel) = self.channel {
            // Without it the server ends, and containerd finds out when it dials.
            let _ = channel.write_all(&[COMMITTED]);
        }
    }
}

pub(super) fn run(target: &Target) -> Result<Started, Error> {
    let request = input::decode(&input::read()?, target, |name| std::env::var_os(name));
    let bundle = super::bundle(target)?;
    let grouping = grouping(&bundle, target.id.as_str())?;
    let dir = request.socket_dir.clone().unwrap_or_else(|| PathBuf::from(socket::DEFAULT_DIR));
    let path = socket::path(&dir, &request.address, target.namespace.as_str(), &grouping);
    let address = socket::to_address(&path);
    let reply = input::encode(request.protocol, &address)?;

    keep_options(&bundle, &request)?;
    let channel = match socket::bind(&path)? {
        // The shim of this pod, or a start that is repeated.
        Bound::Served => None,
        Bound::Fresh(listener) => match launch(target, &bundle, listener, request) {
            Ok(channel) => Some(channel),
            Err(error) => {
                socket::remove_dead(&path);
                return Err(error);
            }
        },
    };
    // From here on an error drops the channel, and with it the server and its socket.
    super::write_file(&super::address_file(&bundle), address.as_bytes())?;
    Ok(Started { reply, channel })
}

/// Which shim a container belongs to: that of its pod, if the specification says so.
///
/// Source: `groupLabels` of containerd's runc shim.
fn grouping(bundle: &Path, id: &str) -> Result<String, Error> {
    const LABELS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
    #[derive(Deserialize)]
    struct Spec {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let path = bundle.join("config.json");
    let json = match fs::read(&path) {
        Ok(json) => json,
        // A pod sandbox's bundle need not have one.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(id.to_string()),
        Err(source) => return Err(Error::Bundle { verb: "read", path, source }),
    };
    let spec: Spec =
        serde_json::from_slice(&json).map_err(|source| Error::Spec { path, source })?;
    let mut annotations = spec.annotations.unwrap_or_default();
    let group = LABELS.iter().find_map(|label| annotations.remove(*label));
    Ok(group.unwrap_or_else(|| id.to_string()))
}

/// For `delete`, of each container of a pod.
fn keep_options(bundle: &Path, request: &Request) -> Result<(), Error> {
    let Some(options) = &request.options else { return Ok(()) };
    let mut any = Any::new();
    any.type_url = options.type_url.clone();
    any.value = options.value.clone();
    super::write_file(&super::options_file(bundle), &any.write_to_bytes()?)
}

/// Starts the server and waits until it is ready.
fn launch(
    target: &Target,
    bundle: &Path,
    listener: UnixListener,
    request: Request,
) -> Result<UnixStream, Error> {
    let (channel, theirs) = UnixStream::pair().map_err(Error::Spawn)?;
    let mut child =
        spawn(target, &request.address, bundle, listener, theirs).map_err(Error::Spawn)?;
    adjust_oom_score(child.id());
    let handover = Handover {
        ttrpc_address: request.ttrpc_address,
        options: request.options,
        level: request.level.map(|level| level.to_string()),
    };
    match converse(&channel, &handover) {
        Ok(Ok(())) => Ok(channel),
        Ok(Err(sentence)) => {
            end(&mut child);
            Err(Error::Server(sentence))
        }
        Err(e) => {
            let slow = matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            let status = end(&mut child);
            Err(if slow {
                Error::ServerSilent { limit: READY_LIMIT }
            } else {
                Error::ServerDied { status }
            })
        }
    }
}

fn converse(channel: &UnixStream, handover: &Handover) -> io::Result<Readiness> {
    channel.set_read_timeout(Some(READY_LIMIT))?;
    channel.set_write_timeout(Some(READY_LIMIT))?;
    handover::send(channel, handover)?;
    handover::receive(channel)
}

/// The server: this program without an action. It gets the listening socket as its stdin and the
/// channel as its stdout, which needs no code between fork and exec; it moves both away at once.
fn spawn(
    target: &Target,
    containerd: &str,
    bundle: &Path,
    listener: UnixListener,
    channel: UnixStream,
) -> io::Result<Child> {
    let environment: Vec<(&str, OsString)> =
        KEPT_VARIABLES.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))).collect();
    let mut command = Command::new(std::env::current_exe()?);
    // What `ps` shows: the same as for other shims.
    command.arg0(super::NAME).args(["-namespace", target.namespace.as_str()]);
    command.args(["-id", target.id.as_str(), "-address", containerd]);
    if target.debug {
        command.arg("-debug");
    }
    command
        .env_clear()
        .envs(environment)
        .current_dir(bundle)
        .stdin(OwnedFd::from(listener))
        .stdout(OwnedFd::from(channel))
        .stderr(Stdio::null())
        .spawn()
    // `command` is dropped here and closes our copies: the server's end shows as the channel's end.
}

/// Makes sure the server is gone and returns how it ended.
fn end(child: &mut Child) -> String {
    // One that has ended already keeps its own status.
    let ended = child.try_wait().ok().flatten();
    let status = ended.map_or_else(
        || {
            let _ = child.kill();
            child.wait().map(|status| status.to_string())
        },
        |status| Ok(status.to_string()),
    );
    status.unwrap_or_else(|e| e.to_string())
}

/// The kernel should kill a shim before containerd and a container before its shim. So the server
/// gets containerd's score plus one. Without the permission it keeps containerd's.
///
/// Source: `AdjustOOMScore` of containerd's `pkg/shim`.
fn adjust_oom_score(server: u32) {
    const MAX: i32 = 1000;
    let of = |pid: u32| format!("/proc/{pid}/oom_score_adj");
    let containerd = fs::read_to_string(of(std::os::unix::process::parent_id()));
    if let Some(score) = containerd.ok().and_then(|text| text.trim().parse::<i32>().ok()) {
        let _ = fs::write(of(server), (score + 1).min(MAX).to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_grouped_with_its_pod() {
        for (spec, group) in [
            (None, "c1"),
            (Some("{}"), "c1"),
            (Some(r#"{"annotations":null,"process":{"args":["x"]}}"#), "c1"),
            (Some(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#), "pod"),
            (
                Some(
                    r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod",
                        "io.containerd.runc.v2.group":"mine"}}"#,
                ),
                "mine",
            ),
        ] {
            let bundle = tempfile::tempdir().unwrap();
            if let Some(spec) = spec {
                fs::write(bundle.path().join("config.json"), spec).unwrap();
            }
            assert_eq!(grouping(bundle.path(), "c1").unwrap(), group, "{spec:?}");
        }
    }

    #[test]
    fn a_broken_specification_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), "{").unwrap();
        let error = grouping(bundle.path(), "c1").unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }
}
