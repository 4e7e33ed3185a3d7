//! Terminals of CTs, as a client of the websocket sees them. Needs root and LXC.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pve_sim::acl::Identity;
use pve_sim::cluster::{Cluster, Options};
use pve_sim::http;
use pve_sim::profile::{Kind, Profile};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{sleep, timeout};

mod client;
use client::Answer;

struct World {
    cluster: Arc<Cluster>,
    token: String,
    vmid: u32,
    _dir: tempfile::TempDir,
}

impl World {
    /// A cluster with a running CT whose terminal is a shell.
    async fn new(n: u32) -> Self {
        assert!(
            Path::new("/usr/bin/lxc-start").exists() && Path::new("/bin/busybox").exists(),
            "needs lxc and busybox: `make test` installs them"
        );
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            supervisor: pve_sim::unit::Supervisor::Simulator,
            root: dir.path().join("node"),
            nodes: vec!["pve1".into()],
            addresses: Vec::new(),
            profile: Profile { kind: Kind::Instant, scale: 0.1 },
        };
        let cluster = Cluster::open(&options).unwrap();
        let token = std::fs::read_to_string(cluster.dc.root.join("admin-token")).unwrap();
        let rootfs = dir.path().join("rootfs");
        for name in ["bin", "dev", "etc", "proc", "sys"] {
            std::fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
        std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for name in ["sh", "sleep", "stty"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name)).unwrap();
        }
        // A VMID of this process's own, as all CTs of a host share the cgroup tree.
        let vmid = 700_000_000 + std::process::id() % 100_000 * 1000 + n;
        let conf = format!(
            "arch: amd64\ncmode: shell\nconsole: 0\nentrypoint: /bin/sleep 1000\nhostname: ct\n\
             memory: 256\nostype: unmanaged\nrootfs: {}\ntty: 0\n\
             lxc.apparmor.profile: unconfined\n",
            rootfs.display()
        );
        let node = cluster.first().clone();
        std::fs::write(node.paths.confs.join(format!("{vmid}.conf")), conf).unwrap();
        let this = node.clone();
        let who = Identity::administrator();
        let upid = node.tasks.spawn("pve1", "vzstart", &vmid.to_string(), &who, |task| {
            this.start_ct(task, vmid, false, Instant::now())
        });
        let world = Self { cluster, token: token.trim().to_owned(), vmid, _dir: dir };
        assert_eq!(world.task_end(&upid).await, "OK");
        world
    }

    async fn task_end(&self, upid: &str) -> String {
        let task = self.cluster.task(upid).unwrap();
        for _ in 0..1000 {
            if task.ended() {
                return task.status()["exitstatus"].as_str().unwrap().to_owned();
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{upid} does not end");
    }

    async fn proxy(&self) -> Terminal {
        let request = format!(
            "POST /api2/json/nodes/pve1/lxc/{}/termproxy HTTP/1.1\r\nContent-Length: 0\r\n\
             Authorization: PVEAPIToken={}\r\n\r\n",
            self.vmid, self.token
        );
        let data = Answer::read(&self.cluster, request).await.body["data"].clone();
        let text = |key: &str| data[key].as_str().unwrap().to_owned();
        Terminal {
            port: text("port"),
            ticket: text("ticket"),
            upid: text("upid"),
            user: text("user"),
        }
    }

    fn upgrade(&self, terminal: &Terminal, ticket: &str) -> String {
        let ticket: String = form_urlencoded::byte_serialize(ticket.as_bytes()).collect();
        format!(
            "GET /api2/json/nodes/pve1/lxc/{}/vncwebsocket?port={}&vncticket={ticket} HTTP/1.1\r\n\
             Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: binary\r\n\
             Authorization: PVEAPIToken={}\r\n\r\n",
            self.vmid, terminal.port, self.token
        )
    }

    /// Connects to a new terminal and logs in.
    async fn connect(&self) -> (Terminal, Socket) {
        let terminal = self.proxy().await;
        let (client, server) = tokio::io::duplex(1 << 16);
        let (cluster, node) = (self.cluster.clone(), self.cluster.first().clone());
        tokio::spawn(http::serve(cluster, node, server));
        let mut socket = Socket { stream: client, text: Vec::new() };
        let request = self.upgrade(&terminal, &terminal.ticket);
        socket.stream.write_all(request.as_bytes()).await.unwrap();
        let head = socket.head().await;
        assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{head}");
        assert!(head.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{head}");
        assert!(head.contains("Sec-WebSocket-Protocol: binary\r\n"), "{head}");
        socket.send(format!("{}:{}\n", terminal.user, terminal.ticket).as_bytes()).await;
        socket.until("OK\x1b[H\x1b[J").await;
        (terminal, socket)
    }
}

struct Terminal {
    port: String,
    ticket: String,
    upid: String,
    user: String,
}

struct Socket {
    stream: DuplexStream,
    text: Vec<u8>,
}

impl Socket {
    async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.stream.read_u8().await.unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    /// Sends a masked frame.
    async fn send(&mut self, data: &[u8]) {
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        let mut frame = vec![0x82];
        match data.len() {
            n if n < 126 => frame.push(0x80 | n as u8),
            n => {
                frame.push(0x80 | 126);
                frame.extend((n as u16).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(data.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
        self.stream.write_all(&frame).await.unwrap();
    }

    async fn type_line(&mut self, line: &str) {
        self.send(format!("0:{}:{line}\n", line.len() + 1).as_bytes()).await;
    }

    /// The payload of the next frame; `None` when the connection has ended.
    async fn frame(&mut self) -> Option<Vec<u8>> {
        let first = self.stream.read_u8().await.ok()?;
        let mut length = u64::from(self.stream.read_u8().await.unwrap());
        if length == 126 {
            length = u64::from(self.stream.read_u16().await.unwrap());
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).await.unwrap();
        if first == 0x8a {
            data = format!("<pong {length}>").into_bytes();
        } else {
            assert_eq!(first, 0x82);
        }
        Some(data)
    }

    /// Reads until the output contains a text, and drops all up to there.
    async fn until(&mut self, wanted: &str) {
        let read = async {
            loop {
                let at = self.text.windows(wanted.len()).position(|w| w == wanted.as_bytes());
                if let Some(at) = at {
                    self.text.drain(..at + wanted.len());
                    return;
                }
                let data = self.frame().await.expect("the connection ended");
                self.text.extend(data);
            }
        };
        if timeout(Duration::from_secs(10), read).await.is_err() {
            panic!("no {wanted:?} in {:?}", String::from_utf8_lossy(&self.text));
        }
    }

    async fn ended(&mut self) {
        let end = async { while self.frame().await.is_some() {} };
        timeout(Duration::from_secs(10), end).await.expect("the connection does not end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_is_a_shell_in_the_ct_and_survives_its_client() {
    let world = World::new(1).await;
    let (terminal, mut socket) = world.connect().await;
    // The shell discards what was typed before it has begun.
    socket.until("# ").await;
    socket.send(b"1:81:25:").await;
    socket.type_line("stty size; echo $((40+2))").await;
    socket.until("25 81\r").await;
    socket.until("42\r").await;
    socket.send(b"2").await;
    socket.stream.write_all(&[0x89, 0x80, 0x37, 0xfa, 0x21, 0x3d]).await.unwrap();
    socket.until("<pong 0>").await;
    socket.type_line("x=kept").await;
    socket.type_line("echo $((1+1))-ready").await;
    socket.until("2-ready\r").await;
    drop(socket);
    assert_eq!(world.task_end(&terminal.upid).await, "OK");

    let (terminal, mut socket) = world.connect().await;
    let (_, mut other) = world.connect().await;
    socket.type_line("echo =$x=").await;
    socket.until("=kept=\r").await;
    other.until("=kept=\r").await;
    socket.type_line("exit").await;
    socket.ended().await;
    other.ended().await;
    assert_eq!(world.task_end(&terminal.upid).await, "OK");
    world.cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_right_ticket_opens_a_terminal() {
    let world = World::new(2).await;
    let terminal = world.proxy().await;
    assert_eq!(terminal.port, "5900");
    let other = world.proxy().await;
    assert_eq!(other.port, "5901");
    let answer = Answer::read(&world.cluster, world.upgrade(&terminal, "PVEVNC:0::AA")).await;
    assert_eq!(
        (answer.status, answer.reason.as_str()),
        (401, "permission denied - invalid PVEVNC ticket")
    );
    assert!(answer.body["data"].is_null() && answer.body["message"].is_string());
    // The wrong login of a client that was let in.
    let (client, server) = tokio::io::duplex(1 << 16);
    let node = world.cluster.first().clone();
    tokio::spawn(http::serve(world.cluster.clone(), node, server));
    let mut socket = Socket { stream: client, text: Vec::new() };
    let request = world.upgrade(&terminal, &terminal.ticket);
    socket.stream.write_all(request.as_bytes()).await.unwrap();
    socket.head().await;
    socket.send(b"root@pam!admin:nothing\n").await;
    assert_eq!(socket.frame().await, None);
    // A terminal without a client fails, and its port is free again.
    let status = world.task_end(&other.upid).await;
    assert!(status.ends_with("-n {} failed: exit code 1") || status.contains("termproxy 5901"));
    assert_eq!(world.proxy().await.port, "5900");
    world.cluster.shut_down().await;
}
