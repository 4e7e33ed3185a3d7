//! From a request of the Sandbox service to the specification of the pause container that containerd
//! would have written for the same pod, so that a pod means the same whichever way it is asked for.

use std::path::Path;

use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, UnknownValueRef};
use serde_json::{Map, Value, json};

use crate::sandbox::names::Names;

/// The options of a sandbox, if containerd's CRI plugin asks for it.
const POD_SANDBOX_CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// Of `NamespaceMode`.
const POD: u64 = 0;
const NODE: u64 = 2;

/// Why a request can't be translated.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The options claim to be of a known type.
    #[error("options: the bytes are not a {POD_SANDBOX_CONFIG} message")]
    Malformed,
    /// The bundle's specification is not an object.
    #[error("config.json of the sandbox: {reason}")]
    Bundle { reason: String },
    /// The pod would silently be on the node's network.
    #[error(
        "netns_path: is empty, but linux.security_context.namespace_options.network is not NODE"
    )]
    NoNetwork,
    /// Something that can't be had.
    #[error(
        "linux.security_context.namespace_options.userns_options.mode: {0} is neither POD nor NODE"
    )]
    UserNamespace(u64),
}

/// A field's value in an encoded message.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

/// The fields of a message of which no definition is at hand. The CRI API has no published crate
/// without a gRPC stack; the numbers are those of its `runtime/v1/api.proto`.
struct Fields(Vec<(u32, Field)>);

impl Fields {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let message = Empty::parse_from_bytes(bytes).map_err(|_| Error::Malformed)?;
        let fields =
            message.special_fields.unknown_fields().iter().filter_map(|(number, value)| {
                Some(match value {
                    UnknownValueRef::Varint(value) => (number, Field::Number(value)),
                    UnknownValueRef::LengthDelimited(bytes) => {
                        (number, Field::Bytes(bytes.to_vec()))
                    }
                    UnknownValueRef::Fixed32(_) | UnknownValueRef::Fixed64(_) => return None,
                })
            });
        Ok(Self(fields.collect()))
    }

    /// Protobuf's default is 0.
    fn number(&self, field: u32) -> u64 {
        let numbers = self.0.iter().rev().filter(|(number, _)| *number == field);
        let mut last_first = numbers.filter_map(|(_, value)| match value {
            Field::Number(value) => Some(*value),
            Field::Bytes(_) => None,
        });
        last_first.next().unwrap_or(0)
    }

    fn all(&self, field: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter(move |(number, _)| *number == field).filter_map(|(_, value)| {
            match value {
                Field::Bytes(bytes) => Some(bytes.as_slice()),
                Field::Number(_) => None,
            }
        })
    }

    fn text(&self, field: u32) -> Result<Option<String>, Error> {
        let Some(bytes) = self.all(field).last() else { return Ok(None) };
        let text = std::str::from_utf8(bytes).map_err(|_| Error::Malformed)?;
        Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
    }

    /// Absent is empty.
    fn message(&self, field: u32) -> Result<Self, Error> {
        Self::parse(self.all(field).last().unwrap_or_default())
    }

    /// Of `IDMapping`, as the specification has them.
    fn id_mappings(&self, field: u32) -> Result<Vec<Value>, Error> {
        let mapping = |bytes| {
            let mapping = Self::parse(bytes)?;
            let [host, container, size] = [1, 2, 3].map(|field| mapping.number(field));
            Ok(json!({"hostID": host, "containerID": container, "size": size}))
        };
        self.all(field).map(mapping).collect()
    }

    /// A `map<string, string>`.
    fn map(&self, field: u32) -> Result<Map<String, Value>, Error> {
        let mut map = Map::new();
        for entry in self.all(field) {
            let entry = Self::parse(entry)?;
            let value = entry.text(2)?.unwrap_or_default();
            map.insert(entry.text(1)?.unwrap_or_default(), value.into());
        }
        Ok(map)
    }
}

/// What was asked for.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    pub id: &'a str,
    /// The bundle's `config.json`; it need not hold more than a version and annotations.
    pub config: Option<Value>,
    /// Type and value.
    pub options: Option<(&'a str, &'a [u8])>,
    /// The network namespace; `None` for that of the node.
    pub network: Option<Network<'a>>,
}

/// Where the pod's network comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network<'a> {
    /// Prepared by CNI.
    Path(&'a Path),
    /// A new one.
    New,
}

/// The pause container's specification as JSON.
///
/// # Errors
/// [`Error`]. What the result asks for is checked where all specifications are.
pub fn of_pause_container(request: &Request<'_>) -> Result<Value, Error> {
    let mut spec = match &request.config {
        None => Map::new(),
        Some(Value::Object(spec)) => spec.clone(),
        Some(_) => return Err(Error::Bundle { reason: "is not an object".to_owned() }),
    };
    let config = pod_sandbox_config(request.options)?;
    // Who says nothing of the pod says so by the empty path.
    let names_the_network = config.is_some();
    let config = config.unwrap_or(Fields(Vec::new()));
    let linux = config.message(8)?;
    let security = linux.message(2)?;
    let modes = security.message(1)?;
    let users = match modes.all(5).next() {
        Some(_) => Some(modes.message(5)?),
        None => None,
    };
    let users = match users.as_ref().map(|users| users.number(1)) {
        None | Some(NODE) => None,
        Some(POD) => users,
        Some(mode) => return Err(Error::UserNamespace(mode)),
    };

    let mut namespaces = vec![json!({"type": "mount"})];
    namespaces.extend(users.is_some().then(|| json!({"type": "user"})));
    match request.network {
        Some(Network::Path(path)) => namespaces.push(json!({"type": "network", "path": path})),
        Some(Network::New) => namespaces.push(json!({"type": "network"})),
        None => {}
    }
    // As CRI does: a pod on the node's network has the node's name.
    let host_network = modes.number(1) == NODE;
    if names_the_network && !host_network && request.network.is_none() {
        return Err(Error::NoNetwork);
    }
    if !host_network {
        namespaces.push(json!({"type": "uts"}));
        if let Some(hostname) = config.text(2)? {
            spec.insert("hostname".to_owned(), hostname.into());
        }
    }
    for (kind, field) in [("pid", 2), ("ipc", 3)] {
        if modes.number(field) != NODE {
            namespaces.push(json!({ "type": kind }));
        }
    }
    let mut annotations = match spec.remove("annotations") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(annotations)) => annotations,
        Some(_) => return Err(Error::Bundle { reason: "annotations: not an object".to_owned() }),
    };
    annotations.extend(config.map(7)?);
    let mut fields = match spec.remove("linux") {
        Some(Value::Object(linux)) => linux,
        _ => Map::new(),
    };
    fields.insert("namespaces".to_owned(), namespaces.into());
    if let Some(users) = users {
        for (name, field) in [("uidMappings", 2), ("gidMappings", 3)] {
            fields.insert(name.to_owned(), users.id_mappings(field)?.into());
        }
    }
    let sysctls = linux.map(3)?;
    if !sysctls.is_empty() {
        fields.insert("sysctl".to_owned(), sysctls.into());
    }
    if let Some(parent) = linux.text(1)? {
        fields.insert("cgroupsPath".to_owned(), cgroups_path(&parent, request.id).into());
    }
    spec.insert("annotations".to_owned(), annotations.into());
    spec.insert("linux".to_owned(), fields.into());
    spec.entry("ociVersion").or_insert_with(|| "1.0.2".into());
    spec.insert("root".to_owned(), json!({"path": "rootfs"}));
    // The user that CRI gives a pause container of an image without one.
    spec.insert(
        "process".to_owned(),
        json!({"args": ["/pause"], "cwd": "/", "user": {"uid": 65535, "gid": 65535}}),
    );
    Ok(spec.into())
}

/// What the files of a pod are to tell its containers; `None` if it is not CRI that asks, which expects
/// them of the shim.
///
/// # Errors
/// [`Error::Malformed`].
pub fn names(options: Option<(&str, &[u8])>) -> Result<Option<Names>, Error> {
    let Some(config) = pod_sandbox_config(options)? else { return Ok(None) };
    // As CRI does: one that says nothing is not the node's.
    let resolver = config.all(4).last().map(|dns| resolver(&Fields::parse(dns)?)).transpose()?;
    Ok(Some(Names { hostname: config.text(2)?, resolver }))
}

/// The `resolv.conf` of a `DNSConfig`.
fn resolver(dns: &Fields) -> Result<String, Error> {
    let texts = |field| -> Result<Vec<&str>, Error> {
        dns.all(field).map(|text| std::str::from_utf8(text).map_err(|_| Error::Malformed)).collect()
    };
    let [servers, searches, options] = [texts(1)?, texts(2)?, texts(3)?];
    let mut lines = Vec::new();
    if !searches.is_empty() {
        lines.push(format!("search {}\n", searches.join(" ")));
    }
    lines.extend(servers.into_iter().map(|server| format!("nameserver {server}\n")));
    if !options.is_empty() {
        lines.push(format!("options {}\n", options.join(" ")));
    }
    Ok(lines.concat())
}

fn pod_sandbox_config(options: Option<(&str, &[u8])>) -> Result<Option<Fields>, Error> {
    match options {
        Some((kind, value)) if kind.rsplit('/').next() == Some(POD_SANDBOX_CONFIG) => {
            Fields::parse(value).map(Some)
        }
        _ => Ok(None),
    }
}

/// As CRI does for both drivers of the kubelet.
fn cgroups_path(parent: &str, id: &str) -> String {
    let base = parent.rsplit('/').next().unwrap_or_default();
    match base.ends_with(".slice") {
        true => format!("{base}:cri-containerd:{id}"),
        false => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
        let mut out = vec![field << 3 | 2, u8::try_from(value.len()).unwrap()];
        out.extend_from_slice(value);
        out
    }

    fn of(config: &[u8], network: Option<Network<'_>>) -> Value {
        let kind = "types.example/runtime.v1.PodSandboxConfig";
        let request = Request { id: "s", options: Some((kind, config)), network, config: None };
        of_pause_container(&request).unwrap()
    }

    fn kinds(spec: &Value) -> Vec<&str> {
        let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
        namespaces.iter().map(|namespace| namespace["type"].as_str().unwrap()).collect()
    }

    #[test]
    fn a_pod_of_cri_becomes_its_pause_container() {
        let sysctl = bytes(3, &[bytes(1, b"net.x"), bytes(2, b"1")].concat());
        let linux = bytes(8, &[bytes(1, b"/kubepods/pod1"), sysctl].concat());
        let annotation = bytes(7, &[bytes(1, b"a"), bytes(2, b"b")].concat());
        let config = [bytes(2, b"web-0"), linux, annotation].concat();
        let path = Path::new("/run/netns/cni-1");
        let spec = of(&config, Some(Network::Path(path)));
        assert_eq!(kinds(&spec), ["mount", "network", "uts", "pid", "ipc"]);
        assert_eq!(spec["linux"]["namespaces"][1]["path"], "/run/netns/cni-1");
        assert_eq!(spec["hostname"], "web-0");
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/pod1/s");
        assert_eq!(spec["linux"]["sysctl"], json!({"net.x": "1"}));
        assert_eq!(spec["annotations"], json!({"a": "b"}));
    }

    #[test]
    fn namespaces_of_the_node_are_left_out() {
        let modes = bytes(1, &[1 << 3, 2, 2 << 3, 2, 3 << 3, 2]);
        let config = [bytes(2, b"web-0"), bytes(8, &bytes(2, &modes))].concat();
        let spec = of(&config, None);
        assert_eq!(kinds(&spec), ["mount"]);
        assert!(spec.get("hostname").is_none());
    }

    /// The options of a pod with these options of its user namespace.
    fn with_users(options: &[u8]) -> Vec<u8> {
        bytes(8, &bytes(2, &bytes(1, &bytes(5, options))))
    }

    #[test]
    fn a_pod_may_have_its_own_ids() {
        let mapping = [1 << 3, 100, 2 << 3, 0, 3 << 3, 10];
        let users = with_users(&[bytes(2, &mapping), bytes(3, &mapping)].concat());
        let spec = of(&users, Some(Network::New));
        assert_eq!(kinds(&spec), ["mount", "user", "network", "uts", "pid", "ipc"]);
        let mapping = json!([{"hostID": 100, "containerID": 0, "size": 10}]);
        assert_eq!([&spec["linux"]["uidMappings"], &spec["linux"]["gidMappings"]], [&mapping; 2]);
        let node = of(&with_users(&[1 << 3, 2]), Some(Network::New));
        assert_eq!(kinds(&node), ["mount", "network", "uts", "pid", "ipc"]);
        assert!(node["linux"].get("uidMappings").is_none());
    }

    #[test]
    fn the_files_of_a_pod_tell_what_cri_says() {
        let dns = [
            bytes(1, b"10.0.0.1"),
            bytes(1, b"10.0.0.2"),
            bytes(2, b"a"),
            bytes(2, b"b"),
            bytes(3, b"ndots:5"),
        ];
        let config = [bytes(2, b"web-0"), bytes(4, &dns.concat())].concat();
        let named = names(Some((POD_SANDBOX_CONFIG, &config))).unwrap().unwrap();
        assert_eq!(named.hostname.as_deref(), Some("web-0"));
        let text = "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n";
        assert_eq!(named.resolver.as_deref(), Some(text));
        let of_node = names(Some((POD_SANDBOX_CONFIG, &[]))).unwrap();
        assert_eq!(of_node, Some(Names::default()));
        let nothing = names(Some((POD_SANDBOX_CONFIG, &bytes(4, &[])))).unwrap().unwrap();
        assert_eq!(nothing.resolver.as_deref(), Some(""));
        assert_eq!(names(Some(("x.Other", &[0xff]))), Ok(None));
        assert_eq!(names(None), Ok(None));
    }

    #[test]
    fn broken_options_are_refused() {
        let refused = |options: &[u8]| {
            let options = Some((POD_SANDBOX_CONFIG, options));
            of_pause_container(&Request { id: "s", options, ..Request::default() }).unwrap_err()
        };
        assert_eq!(refused(&[0xff]), Error::Malformed);
        assert_eq!(refused(&with_users(&[1 << 3, 1])), Error::UserNamespace(1));
        assert_eq!(refused(&bytes(2, b"web-0")), Error::NoNetwork);
    }

    #[test]
    fn a_bundle_may_hold_annotations_alone() {
        let config = Some(json!({"ociVersion": "1.0.2", "annotations": {"x": "y"}}));
        let spec = of_pause_container(&Request { id: "s", config, ..Request::default() }).unwrap();
        assert_eq!(spec["annotations"], json!({"x": "y"}));
        assert_eq!(kinds(&spec), ["mount", "uts", "pid", "ipc"]);
        let broken = Request { id: "s", config: Some(json!([])), ..Request::default() };
        assert!(of_pause_container(&broken).is_err());
    }

    #[test]
    fn cgroups_follow_the_kubelets_driver() {
        assert_eq!(cgroups_path("/kubepods/burstable/pod1", "s"), "/kubepods/burstable/pod1/s");
        let slice = "/kubepods.slice/kubepods-pod1.slice";
        assert_eq!(cgroups_path(slice, "s"), "kubepods-pod1.slice:cri-containerd:s");
    }
}
