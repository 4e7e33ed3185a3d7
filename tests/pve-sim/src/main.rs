//! `pve-sim`: starts the simulated node and serves it over HTTPS.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pve_sim::control;
use pve_sim::http;
use pve_sim::node::{Node, Options, write_file};
use pve_sim::profile::{Kind, Profile};
use pve_sim::tls;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;

const HELP: &str = "\
pve-sim - a Proxmox VE node in one process, with real LXC containers

Usage: pve-sim --root DIR [OPTIONS]

Serves the part of the Proxmox VE 9 API that manages containers over HTTPS, with the answers,
error texts and permissions of a real node, and runs the containers with lxc-start. Needs root
and the package lxc. No part of the host is changed but cgroups of running containers.

Options:
  --root DIR         directory for everything (made if missing; at most 70 characters)
  --listen ADDR      address and port to listen on [127.0.0.1:0; port 0: any free one]
  --node NAME        the node's name [pve1]
  --profile PROFILE  instant: answer at once; node: take as long as a real node [instant]
  --time-scale F     factor for the delays of the profile and for time-outs [1.0]
  --help             show this
  --version          show the version

When it listens, it prints one line of JSON and writes the same to DIR/ready.json: endpoint,
node, fingerprint, ca_file, token_file, admin_token_file, control, pmxcfs, lxc_path, pid.

  DIR/pve            stands for /etc/pve: put a container's configuration into
                     DIR/pve/lxc/VMID.conf, and it is there
  DIR/lxc            stands for /var/lib/lxc
  DIR/log            messages of lxc-start and of the simulator
  DIR/control        Unix socket to make things go wrong (see the README)
  DIR/shim-token     API token containerd@pve!shim with few rights, for the shim
  DIR/admin-token    API token root@pam!admin with all rights

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
    let mut name = "pve1".to_owned();
    let mut profile = Profile { kind: Kind::Instant, scale: 1.0 };
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
        let known = ["--root", "--listen", "--node", "--profile", "--time-scale"];
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
            "--node" => name = text(),
            "--profile" => {
                profile.kind = match text().as_str() {
                    "instant" => Kind::Instant,
                    "node" => Kind::Node,
                    _ => return Err(bad("expected instant or node")),
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
    Ok(Parsed::Run(Args { options: Options { root, name, profile }, listen }))
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

    let ip = args.listen.ip().to_string();
    let identity = tls::identity(&["127.0.0.1", "localhost", &args.options.name, &ip])?;
    let node = Node::open(&args.options, identity.fingerprint.clone())?;
    // Containers inherit it, and nobody should have a directory kept busy by them.
    std::env::set_current_dir("/")?;
    let ca_file = node.paths.root.join("ca.pem");
    write_file(&ca_file, &identity.ca_pem, 0o644)?;

    let control_path = node.paths.root.join("control");
    let control_socket = control::listen(&control_path)?;
    let listener = TcpListener::bind(args.listen).await?;
    let ready = serde_json::json!({
        "endpoint": format!("https://{}", listener.local_addr()?),
        "node": node.name,
        "fingerprint": identity.fingerprint,
        "ca_file": ca_file,
        "token_file": node.paths.root.join("shim-token"),
        "admin_token_file": node.paths.root.join("admin-token"),
        "control": control_path,
        "pmxcfs": node.paths.pve,
        "lxc_path": node.paths.lxc,
        "pid": std::process::id(),
    });
    node.announce(&format!("{ready}\n"))?;
    println!("{ready}");

    tokio::spawn(control::serve(node.clone(), control_socket));
    let acceptor = TlsAcceptor::from(identity.config);
    tokio::select! {
        () = accept(listener, acceptor, node.clone()) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    for file in ["ready.json", "control"] {
        let _ = std::fs::remove_file(node.paths.root.join(file));
    }
    node.shut_down().await;
    Ok(())
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, node: Arc<Node>) {
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
        let _ = stream.set_nodelay(true);
        let (acceptor, node) = (acceptor.clone(), node.clone());
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream));
            if let Ok(Ok(stream)) = handshake.await {
                http::serve(node, stream).await;
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
            "--listen",
            "127.0.0.1:8006",
            "--profile",
            "node",
            "--time-scale=0.1",
        ]) else {
            panic!("refused");
        };
        assert_eq!(args.options.root, PathBuf::from("/x"));
        assert_eq!(args.listen.port(), 8006);
        assert_eq!(args.options.profile.kind, Kind::Node);
        assert_eq!(args.options.profile.scale, 0.1);
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (args, text) in [
            (&["--root"][..], "--root needs a value"),
            (&[], "--root DIR is required"),
            (&["--nope"], "unknown argument --nope"),
            (&["--profile", "x"], "--profile x: expected"),
            (&["--time-scale", "NaN"], "--time-scale NaN"),
        ] {
            let Err(error) = parse(args) else { panic!("{args:?} accepted") };
            assert!(error.contains(text), "{error}");
        }
    }
}
