//! Several nodes, quorum and certificates.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use shim_proxmox::pve::conf::{ClaimError, claim};
use shim_proxmox::pve::{Error, Failure};
use tokio::time::sleep;

use crate::world::{World, client, soon, vmid};

/// A client of pve1's CTs that knows two endpoints, pve2's first.
fn of_two(w: &World) -> shim_proxmox::pve::Client {
    let (one, two) = (w.simulator.endpoint_of("pve1"), w.simulator.endpoint_of("pve2"));
    let configuration = w.simulator.configuration();
    client(&configuration.replace(&format!("\"{one}\""), &format!("[\"{two}\", \"{one}\"]")))
}

#[tokio::test]
async fn any_node_answers_for_all() {
    let w = World::of(&["--nodes", "pve1,pve2"]);
    let c = of_two(&w);
    c.check().await.unwrap();
    let upid = c.start(w.vmid()).await.unwrap();
    c.wait(&upid, soon()).await.unwrap();
    assert_eq!(upid.node(), "pve1");
    assert!(c.status(w.vmid()).await.unwrap().running);
    c.stop_ours(&w.ours, soon()).await.unwrap();
    c.destroy_ours(&w.ours, soon()).await.unwrap();
    assert!(!w.conf().exists());
}

#[tokio::test]
async fn a_node_that_goes_away_is_done_without_and_found_again() {
    let w = World::of(&["--nodes", "pve1,pve2"]);
    let c = of_two(&w);
    c.check().await.unwrap();
    w.control(json!({"node": {"node": "pve2", "online": false}})).await;
    let upid = c.start(w.vmid()).await.unwrap();
    c.wait(&upid, soon()).await.unwrap();
    assert!(c.status(w.vmid()).await.unwrap().running);
    w.control(json!({"node": {"node": "pve2", "online": true}})).await;
    c.stop_ours(&w.ours, soon()).await.unwrap();
}

#[tokio::test]
async fn without_quorum_nothing_changes_and_the_reason_is_told() {
    let w = World::new().await;
    let config = w.client.config(w.vmid()).await.unwrap();
    w.control(json!({"quorum": {"quorate": false}})).await;
    let put = w.client.put_config(w.vmid(), &[("tags", "a")], None).await;
    let mut errors = vec![put.unwrap_err()];
    errors.push(match w.client.destroy(w.vmid()).await {
        Ok(upid) => w.client.wait(&upid, soon()).await.unwrap_err(),
        Err(error) => error,
    });
    for error in errors {
        assert!(matches!(error.failure(), Some(Failure::NoQuorum { .. })), "{error:?}");
        assert!(error.is_transient());
    }
    // Nor does anybody who writes the file by hand.
    let error = claim(Path::new(w.simulator.get("pmxcfs")), vmid(), "memory: 16\n").unwrap_err();
    assert!(matches!(error, ClaimError::NoQuorum { .. }), "{error:?}");
    // Reading goes on.
    assert!(w.conf().exists());
    assert_eq!(w.client.config(w.vmid()).await.unwrap(), config);
    w.control(json!({"quorum": {"quorate": true}})).await;
    w.client.put_config(w.vmid(), &[("tags", "a")], None).await.unwrap();
}

#[tokio::test]
async fn a_renewed_certificate_needs_its_new_fingerprint_but_no_new_authority() {
    let w = World::new().await;
    let by_authority = {
        let lines = w.simulator.configuration();
        let lines = lines.lines().filter(|line| !line.starts_with("fingerprint"));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        client(&format!("{text}ca_file = \"{}\"\n", w.simulator.get("ca_file")))
    };
    w.client.check().await.unwrap();
    by_authority.check().await.unwrap();
    w.control(json!({"rotate-certificate": {}})).await;
    // A connection that is open stays trusted; an idle one is left after 3 s.
    sleep(Duration::from_millis(3500)).await;
    by_authority.check().await.unwrap();
    let error = w.client.start(w.vmid()).await.unwrap_err();
    assert!(matches!(error, Error::FingerprintMismatch { .. }), "{error:?}");
    assert!(!by_authority.status(w.vmid()).await.unwrap().running);
}
