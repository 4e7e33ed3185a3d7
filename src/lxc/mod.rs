//! The LXC side of a container: its configuration, rootfs, init, cgroups and end.

pub mod cgroup;
pub mod command_socket;
pub mod config;
pub mod detached;
pub mod device_access;
pub mod device_control;
pub mod devices;
pub mod exec;
pub mod exit;
pub mod image;
pub mod init;
pub mod rootfs;
pub mod subordinate_ids;
pub mod workshop;
