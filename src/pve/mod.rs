//! The Proxmox VE side: what the shim asks of a node, and the file by which it describes a CT.
//!
//! - [`Client`]: the REST API over HTTPS, with deadlines, and retries where they are safe.
//! - [`Error`]: what went wrong, told apart by evidence.
//! - [`conf`]: the text of `/etc/pve/lxc/<vmid>.conf`, and the claim of a VMID by creating it.
//! - [`identity`]: the marker in a CT's notes by which it is ours.
//!
//! HTTP, JSON and Proxmox's loose types stop here. Nothing here knows of OCI, nor whether the API
//! is that of a real node.

mod client;
pub mod conf;
mod credentials;
mod error;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod fixtures;
mod http;
pub mod identity;
mod tls;
mod types;
mod upid;

pub use client::{Client, CloneOptions, Outcome, TaskFilter, Terminal, Upload};
pub use error::{Call, Error, Failure};
pub use types::{
    ClusterStatus, CtConfig, CtStatus, Interface, Member, NodeStatus, NodeSummary, PendingValue,
    Pool, Resource, Snapshot, Storage, Task, TaskStatus, Version, Volume,
};
pub use upid::{InvalidUpid, Upid};
