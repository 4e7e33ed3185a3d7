//! The pod sandbox: the namespaces that the containers of a Kubernetes pod share.
//!
//! It is not a CT. A CT starts an operating system's or an application's process; the sandbox only has
//! to outlive the pod's containers, so that they can end and be replaced. [`holder`] is the process
//! that does it, [`pod`] everything on the node that exists because of one pod, [`namespace`] what
//! containers join.

pub mod holder;
pub mod namespace;
pub mod pod;
