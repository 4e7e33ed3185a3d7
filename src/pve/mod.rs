//! The Proxmox VE side.
pub mod conf;
mod error;
#[cfg(test)]
mod fixtures;
pub mod identity;
mod types;
mod upid;
