//! The server: the process that stays.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use log::LevelFilter;
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, Service};

use super::Target;
use super::handover::{self, COMMITTED, Handover, Readiness};
use super::socket::Owned;
use crate::events::{Outbox, Settings};
use crate::sys::limits;
use crate::{config, log_fifo, sandbox, task};

/// How long `start` may be kept waiting for the configuration's and the node's check.
const PREPARE_LIMIT: Duration = Duration::from_secs(10);
/// How long events may still be delivered at the end; containerd counts a shim as leaked 3 s after
/// its Shutdown.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// How long connections may take to end. Replies that are being written are; a client's call that
/// waits for something that will never come is cut off.
const CLOSE_LIMIT: Duration = Duration::from_millis(250);
/// How long the last log lines may take.
const LOG_LIMIT: Duration = Duration::from_millis(50);

/// Serves until Shutdown was accepted or a signal came. Does not return errors: they go to `start`
/// over the channel, and later to the log.
pub(super) fn run(target: &Target) -> ExitCode {
    let Ok(inherited) = Inherited::take() else {
        eprintln!(
            "{name} without an action is started by \"{name} start\", which containerd calls; \
             see {name} -help",
            name = super::NAME
        );
        return ExitCode::FAILURE;
    };
    let Inherited { listener, channel } = inherited;
    let socket = Owned::new(socket_path(&listener));
    let ready = channel.try_clone();
    let outcome = set_up(target, &channel).and_then(|(runtime, prepared)| {
        let served = runtime.block_on(serve(listener, channel, prepared, &socket));
        // Blocking work that hangs must not keep the process.
        runtime.shutdown_background();
        served
    });
    match outcome {
        Ok(()) => {
            log_fifo::flush(LOG_LIMIT);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            socket.remove();
            log::error!("{}", super::sentence(&failure));
            if let Ok(ready) = ready {
                let _ = handover::send(&ready, &Readiness::Err(super::sentence(&failure)));
            }
            log_fifo::flush(LOG_LIMIT);
            ExitCode::FAILURE
        }
    }
}

/// Why the server never became one.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot {what}: {source}")]
    System { what: &'static str, source: io::Error },
    #[error("{0}")]
    Config(#[from] config::ConfigError),
    #[error("{0}")]
    Log(#[from] log_fifo::Error),
    #[error("{0}")]
    Prepare(String),
    #[error("the Proxmox VE node did not answer within {} s; check proxmox.endpoint in the configuration", PREPARE_LIMIT.as_secs())]
    PrepareSlow,
    #[error("cannot serve containerd's requests: {0}")]
    Ttrpc(#[from] ttrpc::Error),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::System { what, source }
}

/// The descriptors `start` passed as stdin and stdout.
struct Inherited {
    listener: UnixListener,
    channel: UnixStream,
}

impl Inherited {
    fn take() -> io::Result<Inherited> {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        if !getsockopt(&stdin, sockopt::AcceptConn)? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let stdout: OwnedFd = io::stdout().as_fd().try_clone_to_owned()?;
        // From here on a stray print goes nowhere, and the end of the channel is ours to make.
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;
        Ok(Inherited { listener: stdin.into(), channel: stdout.into() })
    }
}

/// Everything that needs no runtime, and the runtime.
fn set_up(
    target: &Target,
    channel: &UnixStream,
) -> Result<(tokio::runtime::Runtime, Prepared), Failure> {
    // A session of its own: signals to containerd's terminal or process group are not for us. The
    // process is no group leader, so this cannot fail.
    let _ = nix::unistd::setsid();
    let handover: Handover =
        handover::receive(channel).map_err(system("read what the start action hands over"))?;

    let bundle = std::env::current_dir().map_err(system("find the bundle"))?;
    let fields = [("namespace", target.namespace.as_str()), ("shim", target.id.as_str())];
    log_fifo::install(&bundle.join("log"), LevelFilter::Info, &fields)?;
    log_panics();
    let options = handover.options.as_ref();
    let config =
        config::Config::for_options(options.map(|o| (o.type_url.as_str(), o.value.as_slice())))?;
    let wanted = handover.level.as_deref().and_then(log_fifo::parse_level);
    log::set_max_level(wanted.map_or(config.log.level, |wanted| wanted.max(config.log.level)));

    limits::raise_descriptors().map_err(system("raise the limit on descriptors"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Each costs a stack; work that blocks is short, and more of it at once would not be faster.
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(system("start the asynchronous runtime"))?;
    let namespace = target.namespace.to_string();
    let events = {
        let _inside = runtime.enter();
        Outbox::new(Settings::new(handover.ttrpc_address, namespace.clone()))
    };
    let id = target.id.to_string();
    let containerd = PathBuf::from(&target.address);
    Ok((runtime, Prepared { config: Arc::new(config), containerd, namespace, id, events }))
}

/// What the service will be made of.
struct Prepared {
    config: Arc<config::Config>,
    containerd: PathBuf,
    namespace: String,
    id: String,
    events: Outbox,
}

/// The default hook writes to stderr, which nobody reads.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        log::error!("{}", super::sentence(&panic));
        log_fifo::flush(Duration::from_millis(200));
    }));
}

/// Why the server ends.
#[derive(Debug)]
enum End {
    /// The client asked for it and no task is left.
    Shutdown,
    /// SIGTERM.
    Terminated,
    /// SIGINT.
    Interrupted,
    /// `start` failed or was killed before containerd had the reply.
    Abandoned,
}

async fn serve(
    listener: UnixListener,
    channel: UnixStream,
    prepared: Prepared,
    socket: &Owned,
) -> Result<(), Failure> {
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let Prepared { config, containerd, namespace, id, events } = prepared;
    let environment = task::Environment::prepare(config, containerd, namespace, id, events.clone());
    let environment = timeout(PREPARE_LIMIT, environment)
        .await
        .map_err(|_| Failure::PrepareSlow)?
        .map_err(|error| Failure::Prepare(task::sentence(&error)))?;
    let service = task::Service::new(environment);

    let (environment, containers) = service.parts();
    let used = environment.clone();
    tokio::spawn(async move { used.idle.give_back().await });
    let sandbox = sandbox::service::Service::new(environment, containers);
    let listener = Listener::try_from(listener).map_err(system("listen on the shim's socket"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(both_versions(|| create_task(service.clone())))
        .register_service(create_sandbox(sandbox));
    server.start().await?;
    handover::send(&channel, &Readiness::Ok(()))
        .map_err(system("tell the start action that the shim is ready"))?;
    tokio::spawn(service.sweep());
    log::info!(version = env!("CARGO_PKG_VERSION"), pid = std::process::id(); "shim started");

    let end = tokio::select! {
        () = service.finished() => End::Shutdown,
        _ = terminate.recv() => End::Terminated,
        _ = interrupt.recv() => End::Interrupted,
        () = abandoned(channel) => End::Abandoned,
    };
    log::info!(reason:? = end; "shim stops");
    // First of all, so that no start for another container of the pod finds a server that ends.
    socket.remove();
    let lost = events.flush(FLUSH_LIMIT).await;
    if lost > 0 {
        log::error!(count = lost; "containerd did not take all events before the shim's end");
    }
    // The reply to Shutdown is still on its way: the server writes what it has before it closes.
    let _ = timeout(CLOSE_LIMIT, server.shutdown()).await;
    Ok(())
}

fn on(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(system("handle signals"))
}

/// Resolves if the channel ends without the word that containerd has the reply.
async fn abandoned(channel: UnixStream) {
    let waited = async {
        channel.set_nonblocking(true)?;
        let mut byte = [0];
        let read = tokio::net::UnixStream::from_std(channel)?.read(&mut byte).await?;
        io::Result::Ok(read == 1 && byte == [COMMITTED])
    };
    if waited.await.unwrap_or(false) {
        std::future::pending().await
    }
}

fn socket_path(listener: &UnixListener) -> PathBuf {
    let address = listener.local_addr().ok();
    address.and_then(|a| a.as_pathname().map(PathBuf::from)).unwrap_or_default()
}

/// The task service under the names of both of its versions, whose messages are the same byte for
/// byte: containerd before 2.0 knows only the older one.
fn both_versions(create: impl Fn() -> HashMap<String, Service>) -> HashMap<String, Service> {
    let mut services = create();
    let again = create().remove("containerd.task.v3.Task");
    services.extend(again.map(|service| ("containerd.task.v2.Task".to_string(), service)));
    services
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_of_the_task_service_have_the_same_methods() {
        struct Nothing;
        impl containerd_shim_protos::shim_async::Task for Nothing {}
        let services = both_versions(|| create_task(Arc::new(Nothing)));
        let methods = |name: &str| {
            let mut names: Vec<&String> = services[name].methods.keys().collect();
            names.sort();
            names
        };
        assert_eq!(services.len(), 2);
        assert_eq!(methods("containerd.task.v2.Task"), methods("containerd.task.v3.Task"));
        assert!(methods("containerd.task.v2.Task").len() >= 17);
    }

    #[tokio::test]
    async fn a_server_whose_start_failed_notices() {
        use std::io::Write;
        let short = Duration::from_millis(50);
        let (mut start, server) = UnixStream::pair().unwrap();
        start.write_all(&[COMMITTED]).unwrap();
        drop(start);
        assert!(timeout(short, abandoned(server)).await.is_err(), "committed: it stays");
        let (start, server) = UnixStream::pair().unwrap();
        drop(start);
        timeout(short, abandoned(server)).await.unwrap();
    }
}
