//! `annotations`.

use std::collections::BTreeMap;

use super::Error;
use super::document::Document;
use super::plan::Pod;

/// Where containerd's clients write the image's name. Shown to people only: nothing is decided by
/// it, because an image's author must not steer the node.
const IMAGE_NAMES: [&str; 2] =
    ["io.kubernetes.cri.image-name", "io.kubernetes.cri.podsandbox.image-name"];

/// Where nerdctl writes what its user calls a container; the id is a random number there.
const NAME: &str = "nerdctl/name";

/// What a container is to Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A pod's sandbox.
    Sandbox,
    /// One of a pod's containers.
    Member,
    /// Of no pod.
    Alone,
}

pub(super) fn read(spec: &Document) -> Result<BTreeMap<String, String>, Error> {
    Ok(spec.read("annotations")?.unwrap_or_default())
}

/// The names of a container of a Kubernetes pod, if it is one.
pub(super) fn pod(spec: &Document) -> Result<Option<Pod>, Error> {
    let mut annotations = read(spec)?;
    let mut name = |key: &str| annotations.remove(&format!("io.kubernetes.cri.{key}"));
    let Some(pod) = name("sandbox-name") else { return Ok(None) };
    Ok(Some(Pod {
        name: pod,
        namespace: name("sandbox-namespace").unwrap_or_default(),
        uid: name("sandbox-uid").unwrap_or_default(),
        container: name("container-name").unwrap_or_default(),
    }))
}

/// By the annotation that CRI implementations write for runtimes that must tell them apart.
pub(super) fn role(spec: &Document) -> Result<Role, Error> {
    let annotations = read(spec)?;
    let role = annotations.get("io.kubernetes.cri.container-type").map(String::as_str);
    Ok(match role {
        Some("sandbox") => Role::Sandbox,
        Some("container") => Role::Member,
        _ => Role::Alone,
    })
}

pub(super) fn image(spec: &Document) -> Result<Option<String>, Error> {
    let annotations = read(spec)?;
    Ok(IMAGE_NAMES
        .iter()
        .find_map(|name| annotations.get(*name))
        .filter(|image| !image.is_empty())
        .cloned())
}

/// The name that a person gave the container, where that is not its id. For people, too.
pub(super) fn name(spec: &Document) -> Result<Option<String>, Error> {
    Ok(read(spec)?.remove(NAME).filter(|name| !name.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_name_of_kubernetes() {
        let spec = |json: &str| Document::parse(json.as_bytes()).unwrap();
        let named = spec(r#"{"annotations":{"io.kubernetes.cri.image-name":"busybox:1"}}"#);
        assert_eq!(image(&named).unwrap().as_deref(), Some("busybox:1"));
        assert_eq!(image(&spec(r#"{"annotations":{"other":"x"}}"#)).unwrap(), None);
        assert_eq!(image(&spec("{}")).unwrap(), None);
    }

    #[test]
    fn name_of_nerdctl() {
        let read = |json: &str| name(&Document::parse(json.as_bytes()).unwrap()).unwrap();
        assert_eq!(read(r#"{"annotations":{"nerdctl/name":"web"}}"#).as_deref(), Some("web"));
        assert_eq!(read(r#"{"annotations":{"nerdctl/name":""}}"#), None);
        assert_eq!(read("{}"), None);
    }

    #[test]
    fn names_of_a_pod() {
        let read = |json: &str| pod(&Document::parse(json.as_bytes()).unwrap()).unwrap();
        let container = include_str!("fixtures/kubernetes-container.json");
        let expected = Pod {
            name: "web-0".to_owned(),
            namespace: "default".to_owned(),
            uid: "p".to_owned(),
            container: "web".to_owned(),
        };
        assert_eq!(read(container), Some(expected));
        assert_eq!(read(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s"}}"#), None);
    }

    #[test]
    fn only_the_annotation_makes_a_pod_sandbox() {
        let read = |json: &str| role(&Document::parse(json.as_bytes()).unwrap()).unwrap();
        assert_eq!(read(include_str!("fixtures/kubernetes-sandbox.json")), Role::Sandbox);
        assert_eq!(read(include_str!("fixtures/kubernetes-container.json")), Role::Member);
        assert_eq!(read("{}"), Role::Alone);
    }

    #[test]
    fn annotations_stay_verbatim() {
        let spec = Document::parse(br#"{"annotations":{"a":"x\ny","b":""}}"#).unwrap();
        let expected = [("a", "x\ny"), ("b", "")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(read(&spec).unwrap(), BTreeMap::from(expected));
    }
}
