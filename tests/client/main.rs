//! The Proxmox client against the simulator, with real CTs: its calls one after the other, and what
//! becomes of them when requests and answers are lost, tasks fail, locks are held, nodes go away,
//! and an administrator is at work at the same time. Needs root and LXC.
//!
//! The rules under test: no change is sent twice, nobody else's CT is touched, and what is reported
//! is what happened.

mod calls;
mod cluster;
mod faults;
#[path = "../simulator/mod.rs"]
mod simulator;
mod world;
