//! Drives a shim's binary the way containerd does, without a containerd: for bundles that `ctr`
//! cannot describe, for an event server that fails on purpose, and for exact times.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use containerd_shim_protos::api;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Enum, Message as _, MessageField};
use containerd_shim_protos::ttrpc::{self, Client, Request, Response};
use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};

use super::grpc::{RuncOptions, RuntimeOptions};
use super::node::Node;
use super::process::{self, Running, eventually};
use super::sys;

/// One forwarded event.
#[derive(Debug, Clone)]
pub struct Forwarded {
    pub topic: String,
    pub namespace: String,
    pub event: Any,
    pub at: Instant,
}

impl Forwarded {
    /// `(container id, id, exit status)` of a TaskExit.
    pub fn exit(&self) -> Option<TaskExit> {
        (self.topic == "/tasks/exit")
            .then(|| TaskExit::parse_from_bytes(&self.event.value).ok())
            .flatten()
    }
}

#[derive(Default)]
struct Received {
    events: Mutex<Vec<Forwarded>>,
    arrived: Condvar,
}

/// containerd's event service. It can be stopped and started again on the same path, as a restart
/// of containerd would.
pub struct EventServer {
    path: PathBuf,
    received: Arc<Received>,
    listener: Option<Listener>,
}

/// The accepting thread's side: told to stop, and which connections to break.
#[derive(Default, Clone)]
struct Listener {
    stop: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<UnixStream>>>,
}

impl EventServer {
    pub fn start(path: &Path) -> EventServer {
        let mut server =
            EventServer { path: path.to_owned(), received: Arc::default(), listener: None };
        server.resume();
        server
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses connections and breaks those that exist.
    pub fn pause(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener.stop.store(true, Ordering::SeqCst);
            // Wakes the accepting thread.
            let _ = UnixStream::connect(&self.path);
            let _ = fs::remove_file(&self.path);
            let mut connections = listener.connections.lock().expect("no panic under this lock");
            for connection in connections.drain(..) {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
    }

    pub fn resume(&mut self) {
        let _ = fs::remove_file(&self.path);
        let socket = UnixListener::bind(&self.path).expect("bind the event socket");
        let listener = Listener::default();
        self.listener = Some(listener.clone());
        let received = self.received.clone();
        std::thread::spawn(move || {
            for connection in socket.incoming().map_while(Result::ok) {
                if listener.stop.load(Ordering::SeqCst) {
                    return;
                }
                let copy = connection.try_clone().expect("clone the connection");
                listener.connections.lock().expect("no panic under this lock").push(copy);
                let received = received.clone();
                std::thread::spawn(move || while serve_one(&connection, &received).is_some() {});
            }
        });
    }

    pub fn all(&self) -> Vec<Forwarded> {
        self.received.events.lock().expect("no panic under this lock").clone()
    }

    /// Waits for an event that `matches`.
    #[track_caller]
    pub fn wait(&self, what: &str, matches: impl Fn(&Forwarded) -> bool) -> Forwarded {
        let end = process::deadline(Duration::from_secs(30));
        let mut events = self.received.events.lock().expect("no panic under this lock");
        loop {
            if let Some(event) = events.iter().find(|event| matches(event)) {
                return event.clone();
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                let topics: Vec<_> = events.iter().map(|e| e.topic.clone()).collect();
                panic!("no event: {what}; there were {topics:?}");
            };
            events = self.received.arrived.wait_timeout(events, left).expect("not poisoned").0;
        }
    }

    /// Waits for the exit event of a process: the container's own has the container's id.
    #[track_caller]
    pub fn wait_exit(&self, container: &str, id: &str) -> (TaskExit, Instant) {
        let matches = |event: &Forwarded| {
            event.exit().is_some_and(|exit| exit.container_id == container && exit.id == id)
        };
        let event = self.wait(&format!("exit of {container}/{id}"), matches);
        (event.exit().expect("it is an exit"), event.at)
    }
}

impl Drop for EventServer {
    fn drop(&mut self) {
        self.pause();
    }
}

/// Reads one request frame, answers, records the event. `None` at the end of the connection.
fn serve_one(mut connection: &UnixStream, received: &Received) -> Option<()> {
    let mut header = [0u8; 10];
    connection.read_exact(&mut header).ok()?;
    let length = u32::from_be_bytes(header[..4].try_into().ok()?) as usize;
    let mut body = vec![0; length];
    connection.read_exact(&mut body).ok()?;
    let request = Request::parse_from_bytes(&body).ok()?;
    let reply = Response::new().write_to_bytes().ok()?;
    let mut frame = (reply.len() as u32).to_be_bytes().to_vec();
    frame.extend_from_slice(&header[4..8]);
    frame.extend_from_slice(&[2, 0]);
    frame.extend_from_slice(&reply);
    // Answered first: who sees the event may pause the server at once, and an event that was taken
    // but not answered is sent again.
    connection.write_all(&frame).ok()?;
    if request.method == "Forward" {
        use containerd_shim_protos::shim::events::ForwardRequest;
        let forward = ForwardRequest::parse_from_bytes(&request.payload).ok()?;
        let envelope = forward.envelope.unwrap_or_default();
        received.events.lock().expect("no panic under this lock").push(Forwarded {
            topic: envelope.topic.clone(),
            namespace: envelope.namespace.clone(),
            event: envelope.event.clone().unwrap_or_default(),
            at: Instant::now(),
        });
        received.arrived.notify_all();
    }
    Some(())
}

/// Which shim, and in which directories its bundles lie.
pub struct Driver<'a> {
    pub node: &'a Node,
    pub runtime: String,
    directory: PathBuf,
    pub events: EventServer,
    template: Value,
}

impl<'a> Driver<'a> {
    /// A driver for `runtime` with its files in `directory`.
    pub fn new(node: &'a Node, runtime: &str, directory: &Path) -> Driver<'a> {
        fs::create_dir_all(directory).expect("create the driver's directory");
        let spec = node.ctr(&["oci", "spec"]).ok().text();
        let mut template: Value = serde_json::from_str(&spec).expect("ctr oci spec prints JSON");
        template["root"] = json!({"path": "rootfs"});
        template["process"]["env"] = json!(["PATH=/bin"]);
        Driver {
            node,
            runtime: runtime.to_owned(),
            directory: directory.to_owned(),
            events: EventServer::start(&directory.join("events.sock")),
            template,
        }
    }

    /// containerd's default specification for a command; to be changed at will.
    pub fn spec(&self, id: &str, arguments: &[&str]) -> Value {
        let mut spec = self.template.clone();
        spec["process"]["args"] = json!(arguments);
        spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.node.namespace));
        spec
    }

    fn options(&self) -> Any {
        let mut any = Any::new();
        if self.runtime.contains("runc") {
            any.type_url = "containerd.runc.v1.Options".to_owned();
            let root = self.node.root.join("runc").display().to_string();
            any.value = prost::Message::encode_to_vec(&RuncOptions { root });
        } else {
            any.type_url = "runtimeoptions.v1.Options".to_owned();
            let config_path = self.node.shim_config().display().to_string();
            let options = RuntimeOptions { config_path, ..RuntimeOptions::default() };
            any.value = prost::Message::encode_to_vec(&options);
        }
        any
    }

    /// Writes a bundle as containerd would.
    pub fn write_bundle(&self, id: &str, spec: &Value) -> PathBuf {
        let bundle = self.directory.join(id);
        for name in ["rootfs", "upper", "work"] {
            fs::create_dir_all(bundle.join(name)).expect("create the bundle");
        }
        fs::write(bundle.join("config.json"), spec.to_string()).expect("write config.json");
        bundle
    }

    /// A container in a shim that runs already and has not been told of it by a start, as containerd
    /// adds one to a pod from version 3 of the protocol on.
    pub fn join(&self, id: &str, spec: &Value, shim: &Shim) -> Shim {
        Shim { id: id.to_owned(), bundle: self.write_bundle(id, spec), ..shim.clone() }
    }

    /// Writes the bundle, starts the shim and connects to it.
    pub fn start(&self, id: &str, spec: &Value) -> Shim {
        let bundle = self.write_bundle(id, spec);
        let log =
            self.drain_log(&bundle.join("log"), &self.node.root.join(format!("{id}.shim.log")));
        let namespace = &self.node.namespace;
        let address = self.directory.join("c.sock").display().to_string();
        let mut command = Command::new(self.node.setting.shim_binary(&self.runtime));
        command.args(["-namespace", namespace, "-id", id, "-address", &address, "start"]);
        command.current_dir(&bundle).env("PATH", self.node.setting.path());
        command.env("TTRPC_ADDRESS", self.events.path()).env("GOMAXPROCS", "4");
        command.stdin(Stdio::piped());
        sys::as_a_service(&mut command);
        let options = self.options().write_to_bytes().expect("encode the options");
        let output = Running::spawn(&mut command, Some(&options)).wait().ok();
        let reply = output.text();
        // containerd parses both streams as one.
        assert_eq!(output.stderr, "", "the shim wrote to stderr");
        let (address, version) = match serde_json::from_str::<Value>(&reply) {
            Ok(json) => {
                (json["address"].as_str().unwrap_or_default().to_owned(), json["version"].as_u64())
            }
            Err(_) => (reply.clone(), None),
        };
        assert!(address.starts_with("unix://"), "not a bootstrap reply: {reply:?}");
        let client = Client::connect(&address).expect("connect to the shim");
        let overlay = [
            "index=off".to_owned(),
            format!("workdir={}", bundle.join("work").display()),
            format!("upperdir={}", bundle.join("upper").display()),
            format!("lowerdir={}", self.node.root.join("rootfs").display()),
        ];
        Shim {
            id: id.to_owned(),
            bundle,
            address,
            patience: process::scaled(Duration::from_secs(60)),
            client,
            service: if version == Some(3) { V3 } else { V2 },
            options: self.options(),
            rootfs: vec![mount("overlay", "overlay", &overlay)],
            _log: log,
        }
    }

    /// Makes the log FIFO and copies what comes through it, until the returned end and the shim's
    /// are closed. Holding an end of our own keeps the reader from seeing an early end of file.
    fn drain_log(&self, fifo: &Path, copy: &Path) -> Arc<File> {
        use std::os::unix::fs::OpenOptionsExt;
        sys::mkfifo(fifo);
        // Without a writer yet, only a non-blocking open returns.
        let mut reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(fifo)
            .expect("open the log FIFO");
        let writer = File::options().write(true).open(fifo).expect("open the log FIFO");
        sys::set_blocking(&reader);
        let mut out = File::create(copy).expect("create the log's copy");
        std::thread::spawn(move || std::io::copy(&mut reader, &mut out));
        Arc::new(writer)
    }

    /// Runs `delete`, as containerd does when the shim is dead; its reply.
    pub fn delete_after_crash(&self, id: &str) -> api::DeleteResponse {
        let bundle = self.directory.join(id);
        let address = self.directory.join("c.sock").display().to_string();
        let mut command = Command::new(self.node.setting.shim_binary(&self.runtime));
        command.args(["-namespace", &self.node.namespace, "-id", id, "-address", &address]);
        command.arg("-bundle").arg(&bundle).arg("delete").current_dir(&bundle);
        command.env("PATH", self.node.setting.path()).env("TTRPC_ADDRESS", self.events.path());
        let output = Running::spawn(&mut command, None).wait().ok();
        api::DeleteResponse::parse_from_bytes(&output.stdout).expect("a DeleteResponse on stdout")
    }

    /// Removes the bundle's directory, which must hold no mount any more.
    pub fn remove_bundle(&self, id: &str) {
        let bundle = self.directory.join(id);
        let _ = fs::remove_dir_all(&bundle);
        assert!(!bundle.exists(), "{} cannot be removed", bundle.display());
    }
}

/// A mount as containerd asks for it.
pub fn mount(fstype: &str, source: &str, options: &[impl AsRef<str>]) -> Mount {
    let mut mount = Mount::new();
    mount.type_ = fstype.to_owned();
    mount.source = source.to_owned();
    mount.options = options.iter().map(|option| option.as_ref().to_owned()).collect();
    mount
}

pub const V2: &str = "containerd.task.v2.Task";
pub const V3: &str = "containerd.task.v3.Task";

/// The three standard streams of a process: paths or URIs, empty for none.
#[derive(Debug, Clone, Default)]
pub struct Stdio3 {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// A connection to one shim that serves one container.
#[derive(Clone)]
pub struct Shim {
    pub id: String,
    pub bundle: PathBuf,
    pub address: String,
    pub service: &'static str,
    /// The deadline of each call.
    pub patience: Duration,
    client: Client,
    options: Any,
    /// What Create asks for: by default the overlay of containerd's snapshotter.
    pub rootfs: Vec<Mount>,
    _log: Arc<File>,
}

/// The gRPC code and message of a refused call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub code: i32,
    pub message: String,
}

impl Shim {
    /// One call of the Task service.
    pub fn call<Req, Res>(&self, method: &str, message: &Req) -> Result<Res, Refusal>
    where
        Req: containerd_shim_protos::protobuf::Message,
        Res: containerd_shim_protos::protobuf::Message,
    {
        self.call_service(self.service, method, message)
    }

    /// One call of any service of the shim.
    pub fn call_service<Req, Res>(
        &self,
        service: &str,
        method: &str,
        message: &Req,
    ) -> Result<Res, Refusal>
    where
        Req: containerd_shim_protos::protobuf::Message,
        Res: containerd_shim_protos::protobuf::Message,
    {
        let mut request = Request::new();
        request.service = service.to_owned();
        request.method = method.to_owned();
        request.payload = message.write_to_bytes().expect("encode the request");
        request.timeout_nano = self.patience.as_nanos().try_into().unwrap_or(i64::MAX);
        match self.client.request(request) {
            Ok(response) => Ok(Res::parse_from_bytes(&response.payload).expect("decode the reply")),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Err(Refusal { code: status.code().value(), message: status.message().to_owned() })
            }
            Err(other) => Err(Refusal { code: -1, message: other.to_string() }),
        }
    }

    /// Puts one more lower directory on top of those of the overlay.
    pub fn add_layer(&mut self, layer: &Path) {
        let options = self.rootfs.iter_mut().flat_map(|mount| &mut mount.options);
        for option in options.filter(|option| option.starts_with("lowerdir=")) {
            *option = option.replacen('=', &format!("={}:", layer.display()), 1);
        }
    }

    pub fn create(&self, io: &Stdio3) -> Result<u32, Refusal> {
        let mut request = api::CreateTaskRequest::new();
        request.id.clone_from(&self.id);
        request.bundle = self.bundle.display().to_string();
        request.rootfs.clone_from(&self.rootfs);
        request.terminal = io.terminal;
        request.stdin.clone_from(&io.stdin);
        request.stdout.clone_from(&io.stdout);
        request.stderr.clone_from(&io.stderr);
        request.options = MessageField::some(self.options.clone());
        self.call::<_, api::CreateTaskResponse>("Create", &request).map(|reply| reply.pid)
    }

    /// Starts the container's process, or an exec.
    pub fn start(&self, exec: &str) -> Result<u32, Refusal> {
        let mut request = api::StartRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        self.call::<_, api::StartResponse>("Start", &request).map(|reply| reply.pid)
    }

    /// Adds an exec; `process` is an OCI Process.
    pub fn exec(&self, exec: &str, process: &Value, io: &Stdio3) -> Result<(), Refusal> {
        let mut request = api::ExecProcessRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        request.terminal = io.terminal;
        request.stdin.clone_from(&io.stdin);
        request.stdout.clone_from(&io.stdout);
        request.stderr.clone_from(&io.stderr);
        let mut spec = Any::new();
        spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
        spec.value = process.to_string().into_bytes();
        request.spec = MessageField::some(spec);
        self.call::<_, api::Empty>("Exec", &request).map(|_| ())
    }

    pub fn kill(&self, exec: &str, signal: u32, all: bool) -> Result<(), Refusal> {
        let mut request = api::KillRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        request.signal = signal;
        request.all = all;
        self.call::<_, api::Empty>("Kill", &request).map(|_| ())
    }

    pub fn wait(&self, exec: &str) -> Result<api::WaitResponse, Refusal> {
        let mut request = api::WaitRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        self.call("Wait", &request)
    }

    pub fn state(&self, exec: &str) -> Result<api::StateResponse, Refusal> {
        let mut request = api::StateRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        self.call("State", &request)
    }

    pub fn delete(&self, exec: &str) -> Result<api::DeleteResponse, Refusal> {
        let mut request = api::DeleteRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        self.call("Delete", &request)
    }

    /// The processes of the container, ascending.
    pub fn pids(&self) -> Result<Vec<u32>, Refusal> {
        let mut request = api::PidsRequest::new();
        request.id.clone_from(&self.id);
        let reply = self.call::<_, api::PidsResponse>("Pids", &request)?;
        let mut pids: Vec<u32> = reply.processes.iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        Ok(pids)
    }

    pub fn stats(&self) -> Result<Any, Refusal> {
        let mut request = api::StatsRequest::new();
        request.id.clone_from(&self.id);
        let reply = self.call::<_, api::StatsResponse>("Stats", &request)?;
        Ok(reply.stats.into_option().unwrap_or_default())
    }

    /// `resources` are those of an OCI specification.
    pub fn update(&self, resources: &Value) -> Result<(), Refusal> {
        let mut request = api::UpdateTaskRequest::new();
        request.id.clone_from(&self.id);
        let mut any = Any::new();
        any.type_url =
            "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
        any.value = resources.to_string().into_bytes();
        request.resources = MessageField::some(any);
        self.call::<_, api::Empty>("Update", &request).map(|_| ())
    }

    /// Kill, wait, delete, without an end of the shim.
    pub fn remove(&self) {
        let _ = self.kill("", 9, true);
        let _ = self.wait("");
        let _ = self.delete("");
    }

    pub fn resize(&self, exec: &str, width: u32, height: u32) -> Result<(), Refusal> {
        let request = api::ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            width,
            height,
            ..Default::default()
        };
        self.call::<_, api::Empty>("ResizePty", &request).map(|_| ())
    }

    pub fn close_stdin(&self, exec: &str) -> Result<(), Refusal> {
        let mut request = api::CloseIORequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        request.stdin = true;
        self.call::<_, api::Empty>("CloseIO", &request).map(|_| ())
    }

    /// Kills the shim's process.
    #[track_caller]
    pub fn crash(&self) {
        let pid = self.connect().expect("connect").shim_pid;
        sys::kill(pid, libc::SIGKILL);
        eventually("the shim is gone", Duration::from_secs(5), || {
            (!process::is_alive(pid)).then_some(())
        });
    }

    /// Pid of the shim itself.
    pub fn connect(&self) -> Result<api::ConnectResponse, Refusal> {
        let mut request = api::ConnectRequest::new();
        request.id.clone_from(&self.id);
        self.call("Connect", &request)
    }

    pub fn shutdown(&self) {
        let mut request = api::ShutdownRequest::new();
        request.id.clone_from(&self.id);
        // The reply may be lost with the process.
        let _ = self.call::<_, api::Empty>("Shutdown", &request);
    }

    /// Kill, wait, delete, shutdown: the whole end of a container.
    pub fn finish(&self) {
        let pid = self.connect().map(|reply| reply.shim_pid).unwrap_or(0);
        let _ = self.kill("", 9, true);
        let _ = self.wait("");
        let _ = self.delete("");
        self.shutdown();
        process::eventually("the shim ends after Shutdown", Duration::from_secs(5), || {
            (pid == 0 || !process::is_alive(pid)).then_some(())
        });
        let socket = self.address.trim_start_matches("unix://");
        assert!(!Path::new(socket).exists(), "the shim left its socket {socket}");
    }
}

/// The well-known codes by name, for readable assertions.
pub fn code(name: &str) -> i32 {
    let table: HashMap<&str, i32> = HashMap::from([
        ("InvalidArgument", 3),
        ("NotFound", 5),
        ("AlreadyExists", 6),
        ("FailedPrecondition", 9),
        ("Unimplemented", 12),
        ("Unavailable", 14),
    ]);
    table[name]
}
