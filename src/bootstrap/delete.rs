//! `delete`: containerd's way to clean up after a shim that is not there any more.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use ttrpc::asynchronous::Client;

use super::{Error, RuntimeOptions, Target, input, socket};
use crate::lxc::exit::Exit;
use crate::sys::pidfd::ExitStatus;
use crate::task::container::Ended;
use crate::task::teardown;
use crate::{config, events};

/// containerd waits 5 s in all and then publishes an exit status of 255.
const LIMIT: Duration = Duration::from_secs(4);
/// For a shim that still lives to end its pod sandbox.
const SANDBOX_LIMIT: Duration = Duration::from_secs(2);

/// What became of a container.
#[derive(Debug)]
pub(super) struct Deleted {
    /// The encoded `DeleteResponse`.
    pub(super) reply: Vec<u8>,
    /// What could not be removed now. The next shim on the node tries again: containerd does not
    /// if it has a reply, and without one the status would be lost.
    pub(super) left: Option<Error>,
}

/// May be repeated, also after a regular Delete.
pub(super) fn run(target: &Target) -> Result<Deleted, Error> {
    let bundle = super::bundle(target)?;
    let socket = socket_path(target, &bundle);
    let reclaimed = within(LIMIT, target, bundle, socket.clone());
    // Also after a failure: nobody else removes a shim's socket. But never that of a living shim,
    // which may serve the other containers of a pod.
    socket::remove_dead(&socket);
    let (ended, left) = reclaimed?;
    let mut response = DeleteResponse::new();
    response.pid = ended.pid;
    response.exit_status = ended.exit.status.0;
    response.exited_at = MessageField::some(events::timestamp(ended.exit.at));
    Ok(Deleted { reply: response.write_to_bytes()?, left })
}

/// Reclaims in a thread of its own, so that not even a system call that hangs (on a dead storage,
/// say) keeps containerd waiting. What it has done by then stays done.
fn within(
    limit: Duration,
    target: &Target,
    bundle: PathBuf,
    socket: PathBuf,
) -> Result<(Ended, Option<Error>), Error> {
    let until = Instant::now() + limit;
    let (done, wait) = mpsc::channel();
    let (known, status) = mpsc::channel();
    let (namespace, id) = (target.namespace.to_string(), target.id.to_string());
    let options = kept_options(&bundle)?;
    let work = move || {
        let known = |ended| {
            let _ = known.send(ended);
        };
        let _ = done.send(reclaim(options, &namespace, &id, &bundle, &socket, known));
    };
    thread::Builder::new().spawn(work).map_err(Error::Runtime)?;
    let left = wait
        .recv_timeout(until.saturating_duration_since(Instant::now()))
        .unwrap_or_else(|_| Err(Error::ReclaimSlow { id: target.id.to_string(), limit }))
        .err();
    match (status.try_recv(), left) {
        (Ok(ended), left) => Ok((ended, left)),
        (Err(_), Some(error)) => Err(error),
        (Err(_), None) => Err(Error::ReclaimSlow { id: target.id.to_string(), limit }),
    }
}

fn reclaim(
    options: Option<RuntimeOptions>,
    namespace: &str,
    id: &str,
    bundle: &Path,
    socket: &Path,
    known: impl FnOnce(Ended),
) -> Result<(), Error> {
    let options = options.as_ref().map(|o| (o.type_url.as_str(), o.value.as_slice()));
    let config = config::Config::for_options(options).map_err(|e| Error::Config(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let reclaimed = runtime.block_on(async {
        let own = match end_pod_sandbox(socket, id).await {
            None => teardown::reclaim(&config, namespace, id, bundle, known).await,
            Some(ended) => {
                known(ended);
                teardown::reclaim(&config, namespace, id, bundle, |_| ()).await
            }
        };
        let was_started = |bundle: &Path| super::address_file(bundle).exists();
        let members = teardown::reclaim_members(&config, namespace, id, was_started).await;
        own.and(members)
    });
    runtime.shutdown_background();
    reclaimed.map_err(|e| Error::Reclaim { id: id.to_string(), reason: crate::task::sentence(&e) })
}

/// Has a shim that lives end the pod sandbox of this id that it holds for the Sandbox service, and so
/// itself: it would wait for somebody to shut a sandbox down that is not there any more. `None` if
/// there is no such shim or sandbox, or if it does not end in time.
async fn end_pod_sandbox(socket: &Path, id: &str) -> Option<Ended> {
    let ended = async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await?;
        let sandbox = SandboxClient::new(client);
        let id = id.to_owned();
        let limit = || ttrpc::context::with_duration(SANDBOX_LIMIT);
        let request = api::SandboxStatusRequest { sandbox_id: id.clone(), ..Default::default() };
        let pid = sandbox.sandbox_status(limit(), &request).await?.pid;
        let request = api::StopSandboxRequest { sandbox_id: id.clone(), ..Default::default() };
        sandbox.stop_sandbox(limit(), &request).await?;
        let request = api::WaitSandboxRequest { sandbox_id: id.clone(), ..Default::default() };
        let exit = sandbox.wait_sandbox(limit(), &request).await?;
        let request = api::ShutdownSandboxRequest { sandbox_id: id, ..Default::default() };
        sandbox.shutdown_sandbox(limit(), &request).await?;
        let since_epoch = exit.exited_at.as_ref().and_then(|at| {
            let (seconds, nanos) = (u64::try_from(at.seconds).ok()?, u32::try_from(at.nanos).ok()?);
            UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
        });
        let at = since_epoch.unwrap_or_else(SystemTime::now);
        let exit = Exit { status: ExitStatus(exit.exit_status), at };
        ttrpc::Result::Ok(Ended { pid, exit })
    };
    tokio::time::timeout(SANDBOX_LIMIT, ended).await.ok()?.ok()
}

/// What `start` kept, if there were options and the bundle is still there.
fn kept_options(bundle: &Path) -> Result<Option<RuntimeOptions>, Error> {
    let path = super::options_file(bundle);
    match fs::read(&path) {
        Ok(bytes) => Ok(input::runtime_options(&bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Bundle { verb: "read", path, source }),
    }
}

/// The socket named in the bundle, or else where it would be.
fn socket_path(target: &Target, bundle: &Path) -> PathBuf {
    let named = fs::read_to_string(super::address_file(bundle)).ok();
    let named = named.as_deref().and_then(|text| text.trim().strip_prefix("unix://"));
    named.map_or_else(
        || {
            let (namespace, id) = (target.namespace.as_str(), target.id.as_str());
            socket::path(Path::new(socket::DEFAULT_DIR), &target.address, namespace, id)
        },
        PathBuf::from,
    )
}
