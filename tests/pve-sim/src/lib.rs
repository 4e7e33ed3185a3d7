//! A Proxmox VE node in one process, with real LXC containers below it.
pub mod conf;
pub mod error;
pub mod generate;
pub mod params;
#[cfg(test)]
mod golden;
