//! The pod sandbox: the namespaces that the containers of a Kubernetes pod share.
//!
//! It is not a CT. A CT starts an operating system's or an application's process; the sandbox only has
//! to outlive the pod's containers, so that they can end and be replaced. [`holder`] is the process
//! that does it, [`pod`] everything on the node that exists because of one pod, [`namespace`] what
//! containers join.
//!
//! containerd asks for a sandbox in one of two ways: as the task of a pause container (see
//! [`crate::task::sandbox`]), or through its Sandbox service, which is [`service`], with [`actor`]
//! behind it, [`spec`] for the translation of its requests, [`names`] for the files that CRI then leaves to us,
//! and [`member`] for what containers get.

pub mod actor;
pub mod holder;
pub mod member;
pub mod names;
pub mod namespace;
pub mod pod;
pub mod service;
pub mod spec;
