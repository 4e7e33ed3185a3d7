//! `pve-sim`: starts the simulated nodes and serves them over HTTPS.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pve_sim::cluster::{Cluster, Options};
use pve_sim::control;
use pve_sim::http;
use pve_sim::node::{Node, write_file};
use pve_sim::profile::{Kind, Profile};
use pve_sim::unit::Supervisor;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;

const HELP: &str = "\
pve-sim - Proxmox VE nodes in one process, with real LXC containers

Usage: pve-sim --root DIR [OPTIONS]

Serves the part of the Proxmox VE 9 API that manages containers over HTTPS, with the answers,
error texts and permissions of a real node, and runs the containers with lxc-start. Needs root
and the package lxc. No part of the host is changed but cgroups of running containers.

Options:
  --root DIR         directory for everything (made if missing; at most 70 characters)
  --listen ADDR      address and port to listen on [127.0.0.1:0; port 0: any free one]
  --nodes NAME,...   the nodes of the cluster [pve1]; each listens on a port of its own, the
                     next one if --listen names one
  --profile PROFILE  instant: answer at once; node: take as long as a real node [instant]
  --units WHO        who runs the containers: simulator, or systemd, in transient units with the
                     settings of pve-container@.service [simulator]
  --time-scale F     factor for the delays of the profile and for time-outs [1.0]
  --help             show this
  --version          show the version

When it listens, it prints one line of JSON and writes the same to DIR/ready.json: endpoint,
node, endpoints (of all nodes), fingerprint, ca_file, token_file, admin_token_file,
password_file, control, pmxcfs, lxc_path, pid. Endpoint, fingerprint and token also go to
standard error.

  DIR/pve            stands for /etc/pve: put a container's configuration into
                     DIR/pve/lxc/VMID.conf, and it is there
  DIR/lxc            stands for /var/lib/lxc
  DIR/vz             stands for /var/lib/vz, the storage local; with several nodes DIR/shared
                     is a storage of all of them
  DIR/log            messages of lxc-start and of the simulator
  DIR/shim-token     API token containerd@pve!shim with few rights, for the shim
  DIR/admin-token    API token root@pam!admin with all rights
  DIR/root-password  root@pam=PASSWORD, for a login
  DIR/control        Unix socket to make things go wrong (see the README)
  DIR/n1, DIR/n2     lxc, vz and log of the second node, the third, and so on

Example:
  pve-sim --root /tmp/pve &
  curl --cacert /tmp/pve/ca.pem -H \"Authorization: PVEAPIToken=$(cat /tmp/pve/admin-token)\" \\
       \"$(jq -r .endpoint /tmp/pve/ready.json)/api2/json/nodes\"

SIGTERM or SIGINT kill the containers, remove their cgroups and end the simulator.
";

struct Args {
    options: Options,
    listen: SocketAddr,
}

enum Parsed {
    Run(Args),
    Print(String),
}

fn parse_args(mut args: impl Iterator<Item = OsString>) -> Result<Parsed, String> {
    let mut root = None;
    let mut listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut nodes = vec!["pve1".to_owned()];
    let mut profile = Profile { kind: Kind::Instant, scale: 1.0 };
    let mut supervisor = Supervisor::Simulator;
    while let Some(arg) = args.next() {
        let arg = arg.into_string().map_err(|a| format!("cannot read the argument {a:?}"))?;
        let (option, inline) = match arg.split_once('=') {
            Some((option, value)) => (option.to_owned(), Some(OsString::from(value))),
            None => (arg.clone(), None),
        };
        if matches!(option.as_str(), "--help" | "-h") {
            return Ok(Parsed::Print(HELP.to_owned()));
        }
        if matches!(option.as_str(), "--version" | "-V") {
            return Ok(Parsed::Print(format!("pve-sim {}\n", env!("CARGO_PKG_VERSION"))));
        }
        let known =
            ["--root", "--listen", "--node", "--nodes", "--profile", "--units", "--time-scale"];
        if !known.contains(&option.as_str()) {
            return Err(format!("unknown argument {arg}"));
        }
        let value = inline.or_else(|| args.next()).ok_or(format!("{option} needs a value"))?;
        let text = || value.to_str().unwrap_or_default().to_owned();
        let bad = |what: &str| format!("{option} {}: {what}", text());
        match option.as_str() {
            "--root" => root = Some(PathBuf::from(&value)),
            "--listen" => {
                listen = text().parse().map_err(|_| bad("expected ADDRESS:PORT"))?;
            }
            "--node" | "--nodes" => nodes = text().split(',').map(str::to_owned).collect(),
            "--profile" => {
                profile.kind = match text().as_str() {
                    "instant" => Kind::Instant,
                    "node" => Kind::Node,
                    _ => return Err(bad("expected instant or node")),
                }
            }
            "--units" => {
                supervisor = match text().as_str() {
                    "simulator" => Supervisor::Simulator,
                    "systemd" => Supervisor::Systemd,
                    _ => return Err(bad("expected simulator or systemd")),
                }
            }
            _ => {
                profile.scale = text()
                    .parse()
                    .ok()
                    .filter(|f: &f64| (0.0..=1000.0).contains(f))
                    .ok_or_else(|| bad("expected a number from 0 to 1000"))?;
            }
        }
    }
    let root = root.ok_or("--root DIR is required; --help explains it")?;
    let addresses = vec![listen.ip().to_string()];
    let options = Options { root, nodes, addresses, profile, supervisor };
    Ok(Parsed::Run(Args { options, listen }))
}

fn main() -> ExitCode {
    let args = match parse_args(std::env::args_os().skip(1)) {
        Ok(Parsed::Run(args)) => args,
        Ok(Parsed::Print(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(text) => {
            eprintln!("pve-sim: {text}");
            return ExitCode::from(2);
        }
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(args)),
        Err(e) => Err(e.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pve-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    // Before the first container, so that none is left behind.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let cluster = Cluster::open(&args.options)?;
    // Containers inherit it, and nobody should have a directory kept busy by them.
    std::env::set_current_dir("/")?;
    let root = &cluster.dc.root;
    let ca_file = root.join("ca.pem");
    write_file(&ca_file, &cluster.certificate.ca_pem(), 0o644)?;
    let control_path = root.join("control");
    let control_socket = control::listen(&control_path)?;

    let mut endpoints = serde_json::Map::new();
    for (n, node) in cluster.nodes().iter().enumerate() {
        let mut address = args.listen;
        if address.port() != 0 {
            let n = u16::try_from(n)?;
            address.set_port(address.port().checked_add(n).ok_or("no port left for each node")?);
        }
        let listener = TcpListener::bind(address).await?;
        let endpoint = format!("https://{}", listener.local_addr()?);
        endpoints.insert(node.name.clone(), serde_json::json!(endpoint));
        tokio::spawn(accept(listener, cluster.clone(), node.clone()));
    }
    let first = cluster.first();
    let ready = serde_json::json!({
        "endpoint": endpoints[&first.name],
        "node": first.name,
        "endpoints": endpoints,
        "fingerprint": cluster.certificate.fingerprint(),
        "ca_file": ca_file,
        "token_file": root.join("shim-token"),
        "admin_token_file": root.join("admin-token"),
        "password_file": root.join("root-password"),
        "control": control_path,
        "pmxcfs": cluster.dc.pve,
        "lxc_path": first.paths.lxc,
        "pid": std::process::id(),
    });
    tokio::spawn(control::serve(cluster.clone(), control_socket));
    cluster.announce(&format!("{ready}\n"))?;
    println!("{ready}");
    eprintln!("{}", greeting(&cluster, &ready));

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    for file in ["ready.json", "control"] {
        let _ = std::fs::remove_file(root.join(file));
    }
    cluster.shut_down().await;
    Ok(())
}

/// What somebody who starts it by hand needs first.
fn greeting(cluster: &Cluster, ready: &serde_json::Value) -> String {
    let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
    let token = std::fs::read_to_string(text("admin_token_file")).unwrap_or_default();
    format!(
        "pve-sim: {} at {}\n\
         pve-sim: fingerprint {}\n\
         pve-sim: token PVEAPIToken={}",
        cluster.nodes().iter().map(|n| n.name.as_str()).collect::<Vec<_>>().join(", "),
        text("endpoint"),
        text("fingerprint"),
        token.trim(),
    )
}

async fn accept(listener: TcpListener, cluster: Arc<Cluster>, node: Arc<Node>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others may be closed soon.
                node.note(&format!("accept: {error}"));
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if !node.is_online() {
            continue;
        }
        let _ = stream.set_nodelay(true);
        let acceptor = TlsAcceptor::from(cluster.certificate.config());
        let (cluster, node) = (cluster.clone(), node.clone());
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream));
            if let Ok(Ok(stream)) = handshake.await {
                http::serve(cluster, node, stream).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Parsed, String> {
        parse_args(args.iter().map(OsString::from))
    }

    #[test]
    fn arguments_are_read_in_both_forms() {
        let Ok(Parsed::Run(args)) = parse(&[
            "--root=/x",
            "--nodes=a,b",
            "--listen",
            "127.0.0.1:8006",
            "--profile",
            "node",
            "--time-scale=0.1",
            "--units=systemd",
        ]) else {
            panic!("refused");
        };
        assert_eq!(args.options.root, PathBuf::from("/x"));
        assert_eq!(args.options.nodes, ["a", "b"]);
        assert_eq!(args.listen.port(), 8006);
        assert_eq!(args.options.profile.kind, Kind::Node);
        assert_eq!(args.options.profile.scale, 0.1);
        assert_eq!(args.options.supervisor, Supervisor::Systemd);
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (args, text) in [
            (&["--root"][..], "--root needs a value"),
            (&[], "--root DIR is required"),
            (&["--nope"], "unknown argument --nope"),
            (&["--profile", "x"], "--profile x: expected"),
            (&["--units", "x"], "--units x: expected"),
            (&["--time-scale", "NaN"], "--time-scale NaN"),
        ] {
            let Err(error) = parse(args) else { panic!("{args:?} accepted") };
            assert!(error.contains(text), "{error}");
        }
    }
}
