//! The LXC side of a container: its configuration, rootfs, init, cgroups and end.

pub mod config;
pub mod exec;
pub mod exit;
pub mod init;
