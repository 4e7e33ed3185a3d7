//! The shim's modules, in the order data flows.

pub mod config;
pub mod ledger;
pub mod log_fifo;
pub mod sys;

pub mod bootstrap;
pub mod events;
pub mod idle;
pub mod images;
pub mod lxc;
pub mod oci;
pub mod pve;
pub mod sandbox;
pub mod task;
