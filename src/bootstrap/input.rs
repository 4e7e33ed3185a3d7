//! What containerd writes to `start`'s stdin, in both of its forms, and the reply each form reads.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use log::LevelFilter;
use serde::{Deserialize, Serialize};

use super::{Error, Target};

/// More than any message of containerd, whose own limit for messages is the same.
const MAX_INPUT: u64 = 4 << 20;

/// The runtime's options as containerd passes them: a type and a message of that type. Their
/// meaning is `config`'s business.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeOptions {
    /// Name of the message, perhaps with a host before it.
    pub type_url: String,
    /// The encoded message.
    pub value: Vec<u8>,
}

/// Which bootstrap protocol containerd speaks, and so which reply it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// Before 2.3: an `Any` of options or nothing; the reply is the bare address. That is the only
    /// form that 1.6 understands, and nothing tells it from 2.0 to 2.2.
    Legacy,
    /// From 2.3 on: `BootstrapParams`, answered with `BootstrapResult`.
    Bootstrap,
}

/// What `start` was asked for, whichever way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) protocol: Protocol,
    /// containerd's gRPC socket.
    pub(super) address: String,
    /// Where events go.
    pub(super) ttrpc_address: Option<String>,
    /// Where the shim's socket is to be, if containerd cares.
    pub(super) socket_dir: Option<PathBuf>,
    /// If containerd wants more in the log than usual.
    pub(super) level: Option<LevelFilter>,
    pub(super) options: Option<RuntimeOptions>,
}

/// Reads stdin to its end. A person's terminal is not read.
pub(super) fn read() -> Result<Vec<u8>, Error> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(Vec::new());
    }
    let mut input = Vec::new();
    stdin.lock().take(MAX_INPUT + 1).read_to_end(&mut input).map_err(Error::Stdin)?;
    if input.len() as u64 > MAX_INPUT {
        return Err(Error::StdinTooLong { limit: MAX_INPUT });
    }
    Ok(input)
}

/// `variable` looks up the environment.
pub(super) fn decode(
    input: &[u8],
    target: &Target,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Request {
    let text = |name| variable(name)?.into_string().ok().filter(|value| !value.is_empty());
    let debug = target.debug.then_some(LevelFilter::Debug);
    let legacy = Request {
        protocol: Protocol::Legacy,
        address: target.address.clone(),
        ttrpc_address: text("TTRPC_ADDRESS"),
        socket_dir: text("SHIM_SOCKET_DIR").map(PathBuf::from),
        level: debug,
        options: None,
    };
    let Some(params) = bootstrap_params(input, target) else {
        return Request { options: runtime_options(input), ..legacy };
    };
    let non_empty = |value: String| Some(value).filter(|value| !value.is_empty());
    let level = match params.log_level.value() {
        // More critical levels than info are left to the configuration.
        0.. => None,
        -6..0 => Some(LevelFilter::Debug),
        _ => Some(LevelFilter::Trace),
    };
    Request {
        protocol: Protocol::Bootstrap,
        address: non_empty(params.containerd_grpc_address).unwrap_or(legacy.address),
        ttrpc_address: non_empty(params.containerd_ttrpc_address).or(legacy.ttrpc_address),
        socket_dir: params.socket_dir.and_then(non_empty).map(PathBuf::from).or(legacy.socket_dir),
        level: level.max(debug),
        options: options_extension(
            params.extensions.into_iter().filter_map(|extension| extension.value.into_option()),
        ),
    }
}

/// The options of the legacy form.
pub(super) fn runtime_options(input: &[u8]) -> Option<RuntimeOptions> {
    let any = Any::parse_from_bytes(input).ok()?;
    (!any.type_url.is_empty())
        .then_some(RuntimeOptions { type_url: any.type_url, value: any.value })
}

/// The two forms overlap on the wire: any `Any` parses as `BootstrapParams` with its type in the
/// place of the id. So it is one only if it is about the container of the command line.
fn bootstrap_params(input: &[u8], target: &Target) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let same =
        params.instance_id == target.id.as_str() && params.namespace == target.namespace.as_str();
    same.then_some(params)
}

/// The runtime's options among the extensions: those of the generic type, or else of another
/// runtime's, about which the configuration can warn.
fn options_extension(extensions: impl Iterator<Item = Any>) -> Option<RuntimeOptions> {
    let name = |any: &Any| any.type_url.rsplit('/').next().unwrap_or_default().to_string();
    let mut options: Vec<Any> = extensions.filter(|any| name(any).ends_with(".Options")).collect();
    options.sort_by_key(|any| name(any) != "runtimeoptions.v1.Options");
    let first = options.into_iter().next()?;
    Some(RuntimeOptions { type_url: first.type_url, value: first.value })
}

/// The reply to `start`.
pub(super) fn encode(protocol: Protocol, address: &str) -> Result<Vec<u8>, Error> {
    match protocol {
        Protocol::Legacy => Ok(address.as_bytes().to_vec()),
        Protocol::Bootstrap => {
            let mut result = BootstrapResult::new();
            // The task API's version, and from which on containerd asks for pod sandboxes.
            result.version = 3;
            result.address = address.to_string();
            result.protocol = "ttrpc".to_string();
            Ok(result.write_to_bytes()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Identifier;
    use super::*;
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};
    use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
    use proptest::proptest;

    fn target() -> Target {
        Target {
            namespace: Identifier::new("k8s.io").unwrap(),
            id: Identifier::new("c1").unwrap(),
            address: "/run/c.sock".into(),
            bundle: None,
            debug: false,
        }
    }

    fn environment(name: &str) -> Option<OsString> {
        match name {
            "TTRPC_ADDRESS" => Some("/run/c.sock.ttrpc".into()),
            "SHIM_SOCKET_DIR" => Some("/run/env".into()),
            _ => None,
        }
    }

    fn any(type_url: &str, value: &[u8]) -> Any {
        let mut any = Any::new();
        any.type_url = type_url.into();
        any.value = value.into();
        any
    }

    fn params() -> BootstrapParams {
        let mut params = BootstrapParams::new();
        params.instance_id = "c1".into();
        params.namespace = "k8s.io".into();
        params.containerd_grpc_address = "/run/new.sock".into();
        params.containerd_ttrpc_address = "unix:///run/new.sock.ttrpc".into();
        params.socket_dir = Some("/run/new".into());
        params
    }

    fn extension(value: Any) -> Extension {
        let mut extension = Extension::new();
        extension.value = MessageField::some(value);
        extension
    }

    #[test]
    fn empty_input_is_a_legacy_containerd_without_options() {
        assert_eq!(
            decode(b"", &target(), environment),
            Request {
                protocol: Protocol::Legacy,
                address: "/run/c.sock".into(),
                ttrpc_address: Some("/run/c.sock.ttrpc".into()),
                socket_dir: Some("/run/env".into()),
                level: None,
                options: None,
            }
        );
        let bare = decode(b"", &target(), |_| None);
        assert_eq!((bare.ttrpc_address, bare.socket_dir), (None, None));
    }

    #[test]
    fn an_any_is_a_legacy_containerds_options() {
        let input = any("runtimeoptions.v1.Options", b"x").write_to_bytes().unwrap();
        let request = decode(&input, &Target { debug: true, ..target() }, environment);
        assert_eq!(request.protocol, Protocol::Legacy);
        let type_url = "runtimeoptions.v1.Options".to_string();
        assert_eq!(request.options, Some(RuntimeOptions { type_url, value: b"x".to_vec() }));
        assert_eq!(request.level, Some(LevelFilter::Debug));
    }

    #[test]
    fn bootstrap_parameters_win_over_flags_and_environment() {
        let mut params = params();
        params.log_level = EnumOrUnknown::new(LogLevel::LOG_LEVEL_TRACE);
        params.extensions = vec![
            extension(any("containerd.io/cri.v1.PodSandboxConfig", b"p")),
            extension(any("containerd.runc.v1.Options", b"r")),
            extension(any("types.example/runtimeoptions.v1.Options", b"o")),
        ];
        let request = decode(&params.write_to_bytes().unwrap(), &target(), environment);
        assert_eq!(
            request,
            Request {
                protocol: Protocol::Bootstrap,
                address: "/run/new.sock".into(),
                ttrpc_address: Some("unix:///run/new.sock.ttrpc".into()),
                socket_dir: Some("/run/new".into()),
                level: Some(LevelFilter::Trace),
                options: Some(RuntimeOptions {
                    type_url: "types.example/runtimeoptions.v1.Options".into(),
                    value: b"o".to_vec(),
                }),
            }
        );
    }

    #[test]
    fn sparse_bootstrap_parameters_are_completed() {
        let mut sparse = BootstrapParams::new();
        sparse.instance_id = "c1".into();
        sparse.namespace = "k8s.io".into();
        let request = decode(&sparse.write_to_bytes().unwrap(), &target(), environment);
        assert_eq!(request.protocol, Protocol::Bootstrap);
        assert_eq!(request.address, "/run/c.sock");
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
        assert_eq!(request.level, None);
        let target = Target { debug: true, ..target() };
        let request = decode(&sparse.write_to_bytes().unwrap(), &target, environment);
        assert_eq!(request.level, Some(LevelFilter::Debug));
    }

    #[test]
    fn parameters_about_another_container_are_not_taken() {
        let mut params = params();
        params.instance_id = "c2".into();
        let request = decode(&params.write_to_bytes().unwrap(), &target(), environment);
        assert_eq!(request.protocol, Protocol::Legacy);
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/c.sock.ttrpc"));
    }

    #[test]
    fn each_protocol_gets_its_reply() {
        assert_eq!(encode(Protocol::Legacy, "unix:///s").unwrap(), b"unix:///s");
        let reply = encode(Protocol::Bootstrap, "unix:///s").unwrap();
        let result = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
        assert_eq!(result.protocol, "ttrpc");
    }

    proptest! {
        #[test]
        fn no_input_panics(input in proptest::collection::vec(0u8.., 0..200)) {
            let _ = decode(&input, &target(), environment);
        }
    }
}
