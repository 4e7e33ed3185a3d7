//! A client that sees every byte of an answer.
// Each suite uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use pve_sim::cluster::Cluster;
use pve_sim::http;
use pve_sim::node::Node;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Sends a request to the first node, as [`exchange_with`] does.
pub async fn exchange(cluster: &Arc<Cluster>, request: impl AsRef<[u8]>) -> Vec<u8> {
    exchange_with(cluster, cluster.first(), request).await
}

/// Sends a request to a node over a connection of its own, and reads until the answer is complete
/// or the connection ends.
pub async fn exchange_with(
    cluster: &Arc<Cluster>,
    node: &Arc<Node>,
    request: impl AsRef<[u8]>,
) -> Vec<u8> {
    let (mut client, server) = tokio::io::duplex(1 << 20);
    let serving = tokio::spawn(http::serve(cluster.clone(), node.clone(), server));
    // It may be refused before all of it is sent.
    let _ = client.write_all(request.as_ref()).await;
    // Nobody has to wait for the rest of a request that is not complete.
    let _ = client.shutdown().await;
    let mut bytes = Vec::new();
    let mut chunk = [0u8; 65536];
    loop {
        let n = client.read(&mut chunk).await.expect("a connection");
        bytes.extend_from_slice(&chunk[..n]);
        if n == 0 || Answer::parse(&String::from_utf8_lossy(&bytes)).is_some() {
            break;
        }
    }
    drop(client);
    serving.await.expect("the server must not panic");
    bytes
}

/// A parsed answer.
pub struct Answer {
    pub status: u16,
    pub reason: String,
    /// By lower-case name; repeated lines joined as in the recordings.
    pub headers: BTreeMap<String, String>,
    pub body: Json,
}

impl Answer {
    /// Sends a request over a connection of its own and reads the answer, which must be complete.
    pub async fn read(cluster: &Arc<Cluster>, request: impl AsRef<[u8]>) -> Self {
        let bytes = exchange(cluster, request).await;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Self::parse(&text).unwrap_or_else(|| panic!("the answer ends early: {text:?}"))
    }

    /// Parses an answer; `None` if it is not complete.
    pub fn parse(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut lines = head.split("\r\n");
        let status_line = lines.next()?.strip_prefix("HTTP/1.1 ")?;
        let (status, reason) = status_line.split_once(' ')?;
        let mut headers: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in lines.filter_map(|l| l.split_once(": ")) {
            let entry = headers.entry(name.to_ascii_lowercase()).or_default();
            if !entry.is_empty() {
                entry.push_str(", ");
            }
            entry.push_str(value);
        }
        let length: usize = headers.get("content-length")?.parse().ok()?;
        if body.len() < length {
            return None;
        }
        let body = if body.is_empty() { json!("") } else { serde_json::from_str(body).ok()? };
        Some(Self { status: status.parse().ok()?, reason: reason.to_owned(), headers, body })
    }
}
