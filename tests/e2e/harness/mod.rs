//! The harness of the end-to-end suites and of the benchmark: a private containerd with a private
//! Proxmox VE simulator, and the tools to look at both from outside. Nothing in here knows how the
//! shim works inside.

// Each of the two programs that include this module uses its own part of it.
#![allow(dead_code)]

pub mod cri;
pub mod direct;
pub mod events;
pub mod grpc;
pub mod image;
pub mod node;
pub mod process;
pub mod pve;
pub mod sys;
pub mod terminal;
pub mod test;
pub mod websocket;
