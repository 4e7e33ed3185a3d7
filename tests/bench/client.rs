//! `make bench`: what a call of the Proxmox client costs, and what the simulator can take.
//!
//! The client's own cost is the difference to the same exchange without it: the same bytes over one
//! TLS connection, written and read by hand. The same calls are made with reqwest, which pools
//! connections as its defaults say: it is what the client would otherwise be made of.
//!
//! Environment: `BENCH_CALLS` (2000).

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls_pki_types::ServerName;
use shim_proxmox::config::{Config, Vmid};
use shim_proxmox::pve::Client;
use simulator::{Simulator, own_vmid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

#[path = "../simulator/mod.rs"]
mod simulator;
#[path = "../simulator/trust.rs"]
mod trust;

/// CTs for the list.
const CTS: u32 = 1000;
/// CTs that run.
const RUNNING: u32 = 200;
/// How many of them are started, stopped or destroyed at a time.
const AT_A_TIME: usize = 8;

/// What the exchanges by hand need.
struct Hand {
    address: String,
    token: String,
    connector: TlsConnector,
}

impl Hand {
    fn new(simulator: &Simulator) -> Hand {
        let address = simulator.get("endpoint").trim_start_matches("https://").to_owned();
        let token = fs::read_to_string(simulator.get("admin_token_file")).expect("the token");
        let config = trust::authority(Path::new(simulator.get("ca_file")));
        let connector = TlsConnector::from(Arc::new(config));
        Hand { address, token: token.trim().to_owned(), connector }
    }

    async fn connect(&self) -> TlsStream<TcpStream> {
        let socket = TcpStream::connect(&self.address).await.expect("a connection");
        socket.set_nodelay(true).expect("an option");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        self.connector.connect(name, socket).await.expect("TLS")
    }

    fn request(&self, call: Call) -> Vec<u8> {
        let (method, path) = call.line();
        let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
        format!(
            "{method} /api2/json{path} HTTP/1.1\r\nHost: {}\r\nAuthorization: PVEAPIToken={}\r\n{length}\r\n",
            self.address, self.token
        )
        .into_bytes()
    }
}

/// A call that is measured.
#[derive(Clone, Copy)]
enum Call {
    /// Which pveproxy answers itself.
    Version,
    /// Which the privileged daemon answers, with contradictory `Connection` lines.
    Status,
    /// A change: it starts a task, which fails as there is no such CT.
    Start,
    Config,
}

impl Call {
    fn line(self) -> (&'static str, &'static str) {
        match self {
            Call::Version => ("GET", "/version"),
            Call::Status => ("GET", "/nodes/pve1/lxc/10000/status/current"),
            Call::Start => ("POST", "/nodes/pve1/lxc/9999/status/start"),
            Call::Config => ("GET", "/nodes/pve1/lxc/10000/config"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Call::Version => "GET version",
            Call::Status => "GET status/current",
            Call::Start => "POST status/start",
            Call::Config => "GET config",
        }
    }

    async fn by_client(self, client: &Client) {
        match self {
            Call::Version => drop(client.version().await.expect("a version")),
            Call::Status => drop(client.status(vmid(10_000)).await.expect("a state")),
            Call::Start => drop(client.start(vmid(9999)).await.expect("a task")),
            Call::Config => drop(client.config(vmid(10_000)).await.expect("a configuration")),
        }
    }
}

fn vmid(n: u32) -> Vmid {
    Vmid::new(n).expect("a VMID")
}

/// The same calls with reqwest.
struct Reqwest {
    client: reqwest::Client,
    endpoint: String,
    authorization: String,
}

impl Reqwest {
    fn new(simulator: &Simulator, hand: &Hand) -> Reqwest {
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(trust::authority(Path::new(simulator.get("ca_file"))))
            .no_proxy()
            .build();
        Reqwest {
            client: client.expect("a client"),
            endpoint: simulator.get("endpoint").to_owned(),
            authorization: format!("PVEAPIToken={}", hand.token),
        }
    }

    async fn call(&self, call: Call) {
        let (method, path) = call.line();
        let url = format!("{}/api2/json{path}", self.endpoint);
        let request = if method == "POST" { self.client.post(url) } else { self.client.get(url) };
        let request = request.header("Authorization", &self.authorization);
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
        let body: serde_json::Value = answer.json().await.expect("JSON");
        assert!(!body["data"].is_null());
    }
}

/// One exchange by hand; answers with the length of the body.
async fn exchange(
    stream: &mut TlsStream<TcpStream>,
    request: &[u8],
    buffer: &mut Vec<u8>,
) -> usize {
    stream.write_all(request).await.expect("written");
    stream.flush().await.expect("flushed");
    buffer.clear();
    loop {
        let n = stream.read_buf(buffer).await.expect("an answer");
        assert!(n > 0, "the server closed");
        let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
            continue;
        };
        let head = std::str::from_utf8(&buffer[..end]).expect("text");
        let length = head.split("Content-Length: ").nth(1).expect("a length");
        let length: usize =
            length.split("\r\n").next().unwrap_or(length).parse().expect("a number");
        if buffer.len() >= end + 4 + length {
            return length;
        }
    }
}

/// Time and processor time of this thread.
struct Measured {
    wall: Vec<Duration>,
    processor: Duration,
}

impl Measured {
    async fn of(calls: usize, mut call: impl AsyncFnMut(usize)) -> Measured {
        for n in 0..calls / 10 + 1 {
            call(n).await;
        }
        let (mut wall, before) = (Vec::with_capacity(calls), processor_time());
        for n in 0..calls {
            let begun = Instant::now();
            call(n).await;
            wall.push(begun.elapsed());
        }
        let processor = (processor_time() - before) / u32::try_from(calls).unwrap_or(u32::MAX);
        wall.sort();
        Measured { wall, processor }
    }

    fn median(&self) -> f64 {
        micros(self.wall[self.wall.len() / 2])
    }

    /// With the ratio to the same bytes by hand.
    fn print(&self, what: &str, bare: Option<&Measured>) {
        let late = micros(self.wall[self.wall.len() * 99 / 100]);
        let ratio = bare.map(|bare| format!("{:.2}", self.median() / bare.median()));
        println!(
            "| {what:<50} | {:>6.0} | {late:>6.0} | {:>6.0} | {:>5} |",
            self.median(),
            micros(self.processor),
            ratio.unwrap_or_default()
        );
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// This thread's, from `proc(5)`: the first figure of schedstat, in nanoseconds.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    Duration::from_nanos(text.split(' ').next().unwrap_or_default().parse().expect("a number"))
}

/// Requests per second over some connections.
async fn throughput(hand: &Arc<Hand>, call: Call, connections: usize, time: Duration) -> f64 {
    let mut tasks = tokio::task::JoinSet::new();
    let end = Instant::now() + time;
    for _ in 0..connections {
        let (hand, request) = (hand.clone(), hand.request(call));
        tasks.spawn(async move {
            let (mut done, mut buffer) = (0_u32, Vec::new());
            while Instant::now() < end {
                let mut stream = hand.connect().await;
                // The server closes after a hundred.
                for _ in 0..99 {
                    exchange(&mut stream, &request, &mut buffer).await;
                    done += 1;
                    if Instant::now() >= end {
                        break;
                    }
                }
            }
            done
        });
    }
    let done: u32 = tasks.join_all().await.into_iter().sum();
    f64::from(done) / time.as_secs_f64()
}

/// A call by hand, by the client and by reqwest; answers with the first two.
async fn compare(
    call: Call,
    calls: usize,
    hand: &Hand,
    client: &Client,
    other: &Reqwest,
) -> (Measured, Measured) {
    let name = call.name();
    let request = hand.request(call);
    let (mut stream, mut buffer, mut uses) = (hand.connect().await, Vec::new(), 0);
    let bare = Measured::of(calls, async |_| {
        if uses == 90 {
            (stream, uses) = (hand.connect().await, 0);
        }
        exchange(&mut stream, &request, &mut buffer).await;
        uses += 1;
    })
    .await;
    bare.print(&format!("{name}, by hand over one connection"), Some(&bare));
    let ours = Measured::of(calls, async |_| call.by_client(client).await).await;
    ours.print(&format!("{name}, by the client"), Some(&bare));
    let theirs = Measured::of(calls, async |_| other.call(call).await).await;
    theirs.print(&format!("{name}, by reqwest"), Some(&bare));
    (bare, ours)
}

/// Lists many CTs, first of all without anything that the simulator remembers.
async fn list(client: &Client) {
    client.version().await.expect("a connection");
    let begun = Instant::now();
    assert_eq!(client.list().await.expect("a list").len(), CTS as usize);
    let cold = begun.elapsed();
    let warm = Measured::of(20, async |_| {
        assert_eq!(client.list().await.expect("a list").len(), CTS as usize);
    })
    .await;
    println!(
        "list of {CTS} CTs by the client: {:.1} ms the first time, then {:.1} ms (median)",
        cold.as_secs_f64() * 1e3,
        warm.median() / 1e3
    );
}

/// What is done to each of many CTs.
#[derive(Debug, Clone, Copy)]
enum Step {
    Start,
    Stop,
    Destroy,
}

/// Many real CTs, by the client, some at a time. In the end nothing of them is left.
async fn run_many(simulator: &Simulator, client: &Client) {
    let include = simulator.dir.path().join("many/lxc.conf");
    simulator.write_include(&include);
    let text = format!(
        "arch: amd64\nconsole: 0\nhostname: many\nmemory: 64\nostype: unmanaged\nrootfs: {}\n\
         tty: 0\nlxc.apparmor.profile: unconfined\nlxc.include: {}\n",
        simulator.rootfs().display(),
        include.display()
    );
    let vmids: Vec<Vmid> = (0..RUNNING).map(|n| vmid(own_vmid(n))).collect();
    for vmid in &vmids {
        fs::write(simulator.confs().join(format!("{vmid}.conf")), &text).expect("a CT");
    }
    let running =
        async || client.list().await.expect("a list").iter().filter(|ct| ct.running).count();
    println!();
    for step in [Step::Start, Step::Stop, Step::Destroy] {
        let begun = Instant::now();
        let places = Arc::new(Semaphore::new(AT_A_TIME));
        let mut tasks = tokio::task::JoinSet::new();
        for vmid in vmids.clone() {
            let (client, places) = (client.clone(), places.clone());
            tasks.spawn(async move {
                let _place = places.acquire().await.expect("a place");
                let upid = match step {
                    Step::Start => client.start(vmid).await,
                    Step::Stop => client.stop(vmid).await,
                    Step::Destroy => client.destroy(vmid).await,
                };
                let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
                client.wait(&upid.expect("a task"), deadline).await.expect("its success");
            });
        }
        tasks.join_all().await;
        let took = begun.elapsed().as_secs_f64();
        println!("{step:?} of {RUNNING} real CTs, {AT_A_TIME} at a time: {took:.1} s");
        let expected = if matches!(step, Step::Start) { RUNNING as usize } else { 0 };
        assert_eq!(running().await, expected, "after {step:?}");
        if let Step::Start = step {
            let list = Measured::of(20, async |_| assert_eq!(running().await, expected)).await;
            let (all, took) = (CTS + RUNNING, list.median() / 1e3);
            println!("list of {all} CTs, {RUNNING} of which run: {took:.1} ms (median)");
        }
    }
    let left: Vec<_> = vmids.iter().flat_map(|vmid| simulator.left_of(vmid.get())).collect();
    assert!(left.is_empty(), "left: {left:?}");
    println!("nothing of them is left");
}

fn main() {
    let calls = std::env::var("BENCH_CALLS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let simulator = Simulator::start(&[]);
    for vmid in 10_000..10_000 + CTS {
        let conf = format!("arch: amd64\nhostname: ct{vmid}\nostype: unmanaged\nrootfs: /x\n");
        fs::write(simulator.confs().join(format!("{vmid}.conf")), conf).expect("a CT");
    }
    let hand = Arc::new(Hand::new(&simulator));
    let config = Config::from_toml(&simulator.configuration(), "bench").expect("a configuration");
    // As the shim: one thread.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = Client::new(&config).expect("a client");
        list(&client).await;
        println!();
        println!("One call after the other, in microseconds");
        println!();
        let (what, ratio) = ("", "ratio");
        println!("| {what:<50} | median |   99 % |    CPU | {ratio} |");
        println!("| {:-<50} | -----: | -----: | -----: | ----: |", "");
        let other = Reqwest::new(&simulator, &hand);
        let (bare, ours) = compare(Call::Version, calls, &hand, &client, &other).await;
        compare(Call::Status, calls, &hand, &client, &other).await;
        compare(Call::Start, calls / 4, &hand, &client, &other).await;
        let request = hand.request(Call::Version);
        let mut buffer = Vec::new();
        let fresh = Measured::of(calls / 10, async |_| {
            let mut stream = hand.connect().await;
            exchange(&mut stream, &request, &mut buffer).await;
        })
        .await;
        fresh.print("GET version, by hand, a resumed TLS session each", Some(&bare));
        Measured::of(calls / 10, async |_| {
            let client = Client::new(&config).expect("a client");
            client.version().await.expect("a version");
        })
        .await
        .print("GET version, by a new client as in each new shim", Some(&bare));
        println!();
        println!(
            "The client's own cost is {:.0} us of CPU per call; a connection that is kept saves {:.0} us.",
            micros(ours.processor.saturating_sub(bare.processor)),
            fresh.median() - bare.median(),
        );
        println!();
        for (call, connections) in [(Call::Version, 1), (Call::Version, 8), (Call::Config, 8)] {
            let rate = throughput(&hand, call, connections, Duration::from_secs(2)).await;
            let name = call.name();
            println!("simulator: {rate:.0} requests/s of {name} over {connections} connections");
        }
        run_many(&simulator, &client).await;
    });
}
