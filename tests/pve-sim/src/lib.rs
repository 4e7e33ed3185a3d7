//! A Proxmox VE node in one process, with real LXC containers below it.
//!
//! For developing and testing clients of Proxmox VE's API: answers, error texts, tasks and their
//! timing are those recorded from a real node (see `fixtures`), and a CT that is started is a
//! real `lxc-start -F`, supervised as the node's systemd unit does it.
//!
//! What belongs here is the node's behaviour. Nothing here knows any client.

#![deny(missing_docs, unsafe_code, unsafe_op_in_unsafe_fn)]

pub mod acl;
pub mod api;
pub mod archive;
pub mod cgroup;
pub mod cluster;
pub mod conf;
pub mod console;
pub mod control;
pub mod create;
pub mod ct;
pub mod error;
pub mod fault;
pub mod generate;
#[cfg(test)]
mod golden;
pub mod http;
pub mod lxc;
pub mod monitord;
pub mod mounts;
pub mod node;
pub mod oci;
pub mod params;
pub mod proc;
pub mod profile;
pub mod roles;
pub mod share;
pub mod storage;
pub mod sys;
pub mod task;
pub mod ticket;
pub mod tls;
pub mod unit;
pub mod upload;
pub mod userns;
pub mod websocket;
