//! Test support: the recorded pairs of configuration and generated LXC configuration.

use std::path::{Path, PathBuf};

/// One recorded configuration.
pub struct Case {
    /// File name without its ending.
    pub name: String,
    /// The input file.
    pub conf: String,
}

/// The directory of the recordings.
fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/lxc-config")
}

/// All recorded configurations, sorted by name.
pub fn cases() -> Vec<Case> {
    let mut names: Vec<String> = std::fs::read_dir(dir())
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().into_string().ok())
        .filter_map(|n| n.strip_suffix(".conf").map(str::to_owned))
        .filter(|n| !n.ends_with(".rewritten"))
        .collect();
    names.sort();
    assert!(names.len() > 50, "the recordings are missing");
    names.iter().map(|n| case(n)).collect()
}

/// One recorded configuration by name.
pub fn case(name: &str) -> Case {
    let conf = std::fs::read_to_string(dir().join(format!("{name}.conf"))).unwrap();
    Case { name: name.to_owned(), conf }
}

impl Case {
    /// A file of this recording, if there is one.
    pub fn text(&self, ending: &str) -> Option<String> {
        std::fs::read_to_string(dir().join(format!("{}.{ending}", self.name))).ok()
    }

    /// The same, as JSON.
    pub fn json(&self, ending: &str) -> Option<serde_json::Value> {
        self.text(ending).map(|t| serde_json::from_str(&t).unwrap())
    }
}
