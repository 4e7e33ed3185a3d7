//! The API: which call a request is, who may make it, and one module per kind of resource.

use std::sync::Arc;

use serde_json::{Value as Json, json};
use tokio::time::sleep;

use crate::acl::Identity;
use crate::error::ApiError;
use crate::http::Request;
use crate::node::Node;
use crate::params::{self, Kind, Params, Spec, VMID, opt};
use crate::profile::Call;

mod access;
mod cluster;
mod config;
mod lxc;
mod nodes;
mod status;
mod tasks;

/// A successful answer.
#[derive(Debug)]
pub struct Answer {
    /// The `data` of the body.
    pub data: Json,
    /// The `total` beside it, in paged lists.
    pub total: Option<usize>,
    /// Whether the privileged daemon answers on a real node, which changes the headers.
    pub protected: bool,
    /// How long it takes.
    pub call: Call,
}

impl Answer {
    /// An answer of the front end.
    fn plain(data: Json) -> Self {
        Self { data, total: None, protected: false, call: Call::Plain }
    }

    /// An answer of the privileged daemon.
    fn protected(data: Json, call: Call) -> Self {
        Self { data, total: None, protected: true, call }
    }

    fn with_total(mut self, total: usize) -> Self {
        self.total = Some(total);
        self
    }
}

/// What a call works with.
struct Context<'a> {
    node: &'a Arc<Node>,
    who: &'a Identity,
    request: &'a Request,
}

impl Context<'_> {
    fn params(&self) -> &Params {
        &self.request.params
    }

    /// Requires a privilege.
    fn require(&self, path: &str, privilege: &str) -> Result<(), ApiError> {
        self.node.acl().require(self.who, path, privilege)
    }

    fn may(&self, path: &str, privilege: &str) -> bool {
        self.node.acl().may(self.who, path, privilege)
    }

    /// Checks the parameters of a call without a VMID.
    fn verify(&self, specs: &[Spec]) -> Result<(), ApiError> {
        params::verify(&[specs], self.params())
    }

    /// Checks the parameters of a call about a CT, the VMID of the path among them.
    fn verify_ct(&self, vmid: &str, specs: &[&[Spec]]) -> Result<u32, ApiError> {
        let mut all = self.params().clone();
        all.0.insert("vmid".into(), vmid.to_owned());
        let mut list = vec![&[VMID][..]];
        list.extend(specs);
        params::verify(&list, &all)?;
        all.number("vmid").ok_or_else(|| ApiError::param("vmid", "value is not a number"))
    }
}

/// Parameters that only the user root@pam may use, so no token at all.
const SKIPLOCK: Spec = opt("skiplock", Kind::Bool);

/// Answers an authenticated request.
pub async fn handle(
    node: &Arc<Node>,
    who: &Identity,
    request: &Request,
) -> Result<Answer, ApiError> {
    let unknown = || ApiError::NotImplemented {
        method: request.method.clone(),
        path: request.path.strip_prefix("/api2/json").unwrap_or(&request.path).to_owned(),
    };
    let path = request.path.strip_prefix("/api2/json").ok_or_else(unknown)?;
    let segments: Vec<String> =
        path.split('/').filter(|s| !s.is_empty()).map(percent_decode).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let cx = Context { node, who, request };
    let method = request.method.as_str();
    match (method, segments.as_slice()) {
        ("GET", ["version"]) => cluster::version(&cx),
        ("GET", ["access", "permissions"]) => access::permissions(&cx),
        ("GET", ["cluster", "nextid"]) => cluster::nextid(&cx),
        ("GET", ["cluster", "resources"]) => cluster::resources(&cx).await,
        ("GET", ["nodes"]) => nodes::list(&cx),
        ("GET", ["pools"]) => cluster::pools(&cx),
        (_, ["nodes", name, rest @ ..]) if is_node_call(method, rest) => {
            if *name != node.name {
                sleep(node.profile.unknown_node()).await;
                return Err(ApiError::Failed(format!(
                    "hostname lookup '{name}' failed - failed to get address info for: {name}: \
                     Temporary failure in name resolution"
                )));
            }
            match node_call(&cx, method, rest).await {
                Some(result) => result,
                None => Err(unknown()),
            }
        }
        _ => Err(unknown()),
    }
}

/// Whether there is such a call at all, on whatever node.
fn is_node_call(method: &str, rest: &[&str]) -> bool {
    match (method, rest) {
        ("GET", ["status" | "storage" | "tasks" | "lxc"])
        | ("GET", ["tasks", _, "status" | "log"])
        | ("DELETE", ["tasks", _])
        | ("GET" | "DELETE", ["lxc", _])
        | ("GET" | "PUT", ["lxc", _, "config"])
        | ("GET", ["lxc", _, "pending" | "status"])
        | ("GET", ["lxc", _, "status", "current"]) => true,
        ("POST", ["lxc", _, "status", action]) => status::Action::parse(action).is_some(),
        _ => false,
    }
}

async fn node_call(
    cx: &Context<'_>,
    method: &str,
    rest: &[&str],
) -> Option<Result<Answer, ApiError>> {
    Some(match (method, rest) {
        ("GET", ["status"]) => nodes::status(cx),
        ("GET", ["storage"]) => nodes::storage(cx),
        ("GET", ["tasks"]) => tasks::list(cx),
        ("GET", ["tasks", upid, "status"]) => tasks::status(cx, upid),
        ("GET", ["tasks", upid, "log"]) => tasks::log(cx, upid),
        ("DELETE", ["tasks", upid]) => tasks::stop(cx, upid).await,
        ("GET", ["lxc"]) => lxc::list(cx).await,
        ("GET", ["lxc", vmid]) => lxc::index(cx, vmid),
        ("DELETE", ["lxc", vmid]) => lxc::destroy(cx, vmid),
        ("GET", ["lxc", vmid, "config"]) => config::get(cx, vmid),
        ("PUT", ["lxc", vmid, "config"]) => config::put(cx, vmid).await,
        ("GET", ["lxc", vmid, "pending"]) => config::pending(cx, vmid),
        ("GET", ["lxc", vmid, "status"]) => status::index(cx, vmid),
        ("GET", ["lxc", vmid, "status", "current"]) => status::current(cx, vmid).await,
        ("POST", ["lxc", vmid, "status", action]) => {
            status::act(cx, vmid, status::Action::parse(action)?)
        }
        _ => return None,
    })
}

/// Decodes a path segment. What is no escape stays as it is.
fn percent_decode(segment: &str) -> String {
    // The decoder of forms would turn `+` into a space.
    let escaped = segment.replace('+', "%2B").replace(['&', '='], "%26");
    if segment.contains(['&', '=']) || !segment.contains('%') {
        return segment.to_owned();
    }
    form_urlencoded::parse(escaped.as_bytes()).next().map_or(String::new(), |(k, _)| k.into_owned())
}

/// A list of `{key: name}` objects.
fn names(key: &str, names: &[&str]) -> Json {
    names.iter().map(|n| json!({key: n})).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_segments_are_decoded_once() {
        assert_eq!(percent_decode("UPID%3Apve1%3Aroot%40pam%21x%3A"), "UPID:pve1:root@pam!x:");
        assert_eq!(percent_decode("a+b"), "a+b");
        assert_eq!(percent_decode("%2541"), "%41");
        assert_eq!(percent_decode("%zz"), "%zz");
        assert_eq!(percent_decode("a=b&c"), "a=b&c");
    }
}
