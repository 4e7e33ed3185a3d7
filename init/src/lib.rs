//! `proxmox-shim-init`: the static helper that becomes a CT's workload.
//!
//! Data flows down this list. [`protocol`] is the only module the shim uses; the rest is what the
//! binary is made of and is public for its integration tests.
#![deny(unsafe_code, unsafe_op_in_unsafe_fn, missing_docs)]

#[allow(missing_docs)]
pub mod protocol;

pub mod container;
pub mod error;
pub mod exec;
pub mod holder;
pub mod hook;
pub mod mounts;
pub mod process;
pub mod rootfs;
pub mod socket;
#[allow(unsafe_code)]
pub mod sys;
pub mod terminal;
