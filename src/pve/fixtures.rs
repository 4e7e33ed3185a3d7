//! Recorded answers of a real API, for tests. They are kept with the simulator, whose contract
//! they are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pve-sim/fixtures")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// One request and its answer.
pub(super) struct Recorded(Value);

pub(super) fn recorded(name: &str) -> Recorded {
    let text = read(&dir().join(format!("transcripts/{name}.json")));
    Recorded(serde_json::from_str(&text).unwrap())
}

/// The names of all recordings, sorted.
pub(super) fn names() -> Vec<String> {
    let entries = std::fs::read_dir(dir().join("transcripts")).unwrap();
    let mut names: Vec<_> = entries
        .filter_map(|e| Some(e.unwrap().file_name().to_str()?.strip_suffix(".json")?.to_owned()))
        .collect();
    names.sort();
    names
}

impl Recorded {
    pub(super) fn status(&self) -> u16 {
        self.0["response"]["status"].as_u64().unwrap() as u16
    }

    pub(super) fn reason(&self) -> &str {
        self.0["response"]["reason"].as_str().unwrap()
    }

    /// The bytes of the body; a recorded empty string is an empty body.
    pub(super) fn body(&self) -> Vec<u8> {
        match &self.0["response"]["body"] {
            Value::String(s) => s.clone().into_bytes(),
            other => serde_json::to_vec(other).unwrap(),
        }
    }

    pub(super) fn headers(&self) -> Vec<(String, String)> {
        let headers = self.0["response"]["headers"].as_object().unwrap();
        let mut out = Vec::new();
        for (name, value) in headers {
            let value = value.as_str().unwrap();
            // Two header lines, recorded as one text.
            match name.as_str() {
                "Connection" => out.extend(value.split(", ").map(|v| (name.clone(), v.to_owned()))),
                _ => out.push((name.clone(), value.to_owned())),
            }
        }
        out
    }

    pub(super) fn data(&self) -> &Value {
        &self.0["response"]["body"]["data"]
    }

    pub(super) fn method(&self) -> &str {
        self.0["request"]["method"].as_str().unwrap()
    }

    /// Without the `/api2/json` before it.
    pub(super) fn path(&self) -> &str {
        self.0["request"]["path"].as_str().unwrap().strip_prefix("/api2/json").unwrap()
    }

    /// What the request carried, in its body or query, as text.
    pub(super) fn form(&self) -> BTreeMap<String, String> {
        let fields = self.0["request"]["form"].as_object().into_iter().flatten();
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        fields.map(|(name, value)| (name.clone(), text(value))).collect()
    }

    pub(super) fn task_exitstatus(&self) -> &str {
        self.0["task"]["status"]["exitstatus"].as_str().unwrap()
    }

    /// Whether the request was answered with a task, and that failed.
    pub(super) fn task_failed(&self) -> bool {
        let status = self.0["task"]["status"]["exitstatus"].as_str();
        self.data().is_string() && status.is_some_and(|status| status != "OK")
    }

    pub(super) fn task_status(&self) -> &Value {
        &self.0["task"]["status"]
    }

    pub(super) fn task_log(&self) -> Vec<String> {
        let lines = self.0["task"]["log"].as_array().unwrap();
        lines.iter().map(|line| line.as_str().unwrap().to_owned()).collect()
    }
}

/// A file of the golden configurations as text.
pub(super) fn golden_text(name: &str) -> String {
    read(&dir().join("lxc-config").join(name))
}

/// A JSON file of the golden configurations.
pub(super) fn golden(name: &str) -> Value {
    serde_json::from_str(&golden_text(name)).unwrap()
}
