//! The specification as parsed JSON, read piece by piece.
//!
//! The OCI crate's types reject a whole document for one unknown enum value, and its errors do not
//! say where. Reading one object at a time keeps both under control: each piece is converted into
//! the crate's type at a known path.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Error;

/// A JSON object and the path of its fields.
pub(super) struct Document {
    value: Value,
}

/// An element of a list, with the path to name in an error.
pub(super) struct Item<T> {
    pub field: String,
    pub value: T,
}

impl Document {
    /// # Errors
    /// Not JSON, not an object, or a string with a NUL byte in a place that reaches a system call.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let object: serde_json::Map<String, Value> =
            serde_json::from_slice(json).map_err(|source| Error::Json { source })?;
        let document = Self { value: Value::Object(object) };
        refuse_nul("", &document.value)?;
        Ok(document)
    }

    /// The same document below `process`, so that a process alone (exec) is read like a whole
    /// specification.
    pub fn parse_process(json: &[u8]) -> Result<Self, Error> {
        let mut document = Self::parse(json)?;
        document.value = serde_json::json!({ "process": document.value });
        Ok(document)
    }

    /// Likewise for the resources of an update.
    pub fn parse_resources(json: &[u8]) -> Result<Self, Error> {
        let mut document = Self::parse(json)?;
        document.value = serde_json::json!({ "linux": { "resources": document.value } });
        Ok(document)
    }

    pub fn root(&self) -> &Value {
        &self.value
    }

    /// The value at a dotted path; JSON null counts as absent.
    pub fn get(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(&self.value, |value, key| value.get(key)).filter(|v| !v.is_null())
    }

    pub fn read<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, Error> {
        self.get(path).map(|value| convert(path, value)).transpose()
    }

    /// The elements of a list, each with its own path; absent is empty.
    pub fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<Item<T>>, Error> {
        match self.get(path) {
            None => Ok(Vec::new()),
            Some(Value::Array(elements)) => elements
                .iter()
                .enumerate()
                .map(|(index, element)| {
                    let field = format!("{path}[{index}]");
                    let value = convert(&field, element)?;
                    Ok(Item { field, value })
                })
                .collect(),
            Some(_) => Err(Error::invalid(path, "must be a list")),
        }
    }

    /// A string; an empty one counts as absent, as for every reader written in Go.
    pub fn string(&self, path: &str) -> Result<Option<String>, Error> {
        Ok(self.read::<String>(path)?.filter(|s| !s.is_empty()))
    }

    pub fn flag(&self, path: &str) -> Result<bool, Error> {
        Ok(self.read::<bool>(path)?.unwrap_or(false))
    }
}

fn convert<T: DeserializeOwned>(field: &str, value: &Value) -> Result<T, Error> {
    T::deserialize(value).map_err(|source| Error::Type { field: field.to_owned(), source })
}

/// A NUL would silently cut a string short in a system call. Annotations are exempt: they only
/// travel in JSON.
fn refuse_nul(path: &str, value: &Value) -> Result<(), Error> {
    match value {
        Value::String(text) if text.contains('\0') => {
            Err(Error::invalid(path, "contains a NUL character"))
        }
        Value::Array(elements) => elements
            .iter()
            .enumerate()
            .try_for_each(|(index, element)| refuse_nul(&format!("{path}[{index}]"), element)),
        Value::Object(members) => members.iter().try_for_each(|(key, member)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            match path.as_str() {
                "annotations" => Ok(()),
                _ if key.contains('\0') => {
                    Err(Error::invalid(path.replace('\0', "\\0"), "contains a NUL character"))
                }
                _ => refuse_nul(&path, member),
            }
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_the_element_of_a_list() {
        let spec = Document::parse(br#"{"a":{"b":[1,"x"]}}"#).unwrap();
        let error = spec.list::<u32>("a.b").err().unwrap().to_string();
        assert!(error.starts_with("a.b[1]: invalid type"), "{error}");
    }

    #[test]
    fn null_and_empty_string_are_absent() {
        let spec = Document::parse(br#"{"a":null,"b":"","l":null}"#).unwrap();
        assert!(spec.get("a").is_none());
        assert_eq!(spec.string("b").unwrap(), None);
        assert!(spec.list::<u32>("l").unwrap().is_empty());
    }

    #[test]
    fn nul_is_refused_except_in_annotations() {
        assert!(Document::parse(br#"{"annotations":{"a":"x\u0000"}}"#).is_ok());
        let error = Document::parse(br#"{"process":{"args":["a","b\u0000c"]}}"#).err().unwrap();
        assert_eq!(error.to_string(), "process.args[1] contains a NUL character");
        assert!(Document::parse(br#"{"linux":{"sysctl":{"a\u0000":"1"}}}"#).is_err());
    }

    #[test]
    fn only_an_object_is_a_document() {
        for json in [&b"[]"[..], b"null", b"", b"{", b"\"x\""] {
            assert!(matches!(Document::parse(json), Err(Error::Json { .. })));
        }
    }
}
