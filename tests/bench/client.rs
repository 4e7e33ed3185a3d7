//! `make bench`: what a call of the Proxmox client costs, and what the simulator can take.
//!
//! The client's own cost is the difference to the same exchange without it: the same bytes over one
//! TLS connection, written and read by hand.
//!
//! Environment: `BENCH_CALLS` (2000).

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use shim_proxmox::config::Config;
use shim_proxmox::pve::Client;
use simulator::Simulator;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

#[path = "../simulator/mod.rs"]
mod simulator;

/// CTs for the list.
const CTS: u32 = 1000;

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
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(Path::new(simulator.get("ca_file")));
        roots.add(ca.expect("a certificate")).expect("a root");
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("TLS")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(config));
        Hand { address, token: token.trim().to_owned(), connector }
    }

    async fn connect(&self) -> TlsStream<TcpStream> {
        let socket = TcpStream::connect(&self.address).await.expect("a connection");
        socket.set_nodelay(true).expect("an option");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        self.connector.connect(name, socket).await.expect("TLS")
    }

    fn request(&self, path: &str) -> Vec<u8> {
        format!(
            "GET /api2/json{path} HTTP/1.1\r\nHost: {}\r\nAuthorization: PVEAPIToken={}\r\n\r\n",
            self.address, self.token
        )
        .into_bytes()
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

    fn print(&self, what: &str) {
        let micros = |d: Duration| d.as_secs_f64() * 1e6;
        let at = |part: usize| micros(self.wall[self.wall.len() * part / 100]);
        println!(
            "| {what:<58} | {:>6.0} | {:>6.0} | {:>6.0} |",
            at(50),
            at(99),
            micros(self.processor)
        );
    }
}

/// This thread's, from `proc(5)`: the first figure of schedstat, in nanoseconds.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    Duration::from_nanos(text.split(' ').next().unwrap_or_default().parse().expect("a number"))
}

/// Requests per second over some connections.
async fn throughput(hand: &Arc<Hand>, path: &str, connections: usize, time: Duration) -> f64 {
    let mut tasks = tokio::task::JoinSet::new();
    let end = Instant::now() + time;
    for _ in 0..connections {
        let (hand, request) = (hand.clone(), hand.request(path));
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
        println!("One call after the other, in microseconds");
        println!();
        println!("| {:<58} | {:>6} | {:>6} | {:>6} |", "", "median", "99 %", "CPU");
        println!("| {:-<58} | -----: | -----: | -----: |", "");
        let request = hand.request("/version");
        let (mut stream, mut buffer) = (hand.connect().await, Vec::new());
        let bare = Measured::of(calls, async |n| {
            if n % 90 == 0 {
                stream = hand.connect().await;
            }
            exchange(&mut stream, &request, &mut buffer).await;
        })
        .await;
        bare.print("GET /version by hand, one connection");
        let ours = Measured::of(calls, async |_| {
            client.version().await.expect("a version");
        })
        .await;
        ours.print("GET /version by the client");
        let own = ours.processor.saturating_sub(bare.processor);
        let fresh = Measured::of(calls / 10, async |_| {
            let mut stream = hand.connect().await;
            exchange(&mut stream, &request, &mut buffer).await;
        })
        .await;
        fresh.print("the same by hand, a resumed TLS session each");
        Measured::of(calls / 10, async |_| {
            let client = Client::new(&config).expect("a client");
            client.version().await.expect("a version");
        })
        .await
        .print("GET /version by a new client, as in each new shim");
        let list = Measured::of(10, async |_| {
            assert_eq!(client.list().await.expect("a list").len(), CTS as usize);
        })
        .await;
        list.print(&format!("list of {CTS} CTs by the client"));
        println!();
        println!(
            "The client's own cost is {:.0} us of CPU per call; a connection that is kept saves {:.0} us.",
            own.as_secs_f64() * 1e6,
            fresh.wall[fresh.wall.len() / 2].saturating_sub(bare.wall[bare.wall.len() / 2]).as_secs_f64() * 1e6,
        );
        println!();
        for (path, connections) in [("/version", 1), ("/version", 8), ("/nodes/pve1/lxc/10000/config", 8)] {
            let rate = throughput(&hand, path, connections, Duration::from_secs(2)).await;
            println!("simulator: {rate:.0} requests/s of GET {path} over {connections} connections");
        }
    });
}
