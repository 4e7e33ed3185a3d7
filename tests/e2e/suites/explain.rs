//! `explain` tells beforehand what Create does.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use shim_proxmox::oci::{FIELDS, Verdict};

use crate::harness::process::{self, Output};
use crate::harness::test::Test;
use crate::suites::cases;

cases!("explain": ; proxmox:
    every_refused_field_is_refused_by_create_too,
    what_is_accepted_runs,
);

fn explain(t: &Test, bundle: &Path) -> Output {
    let shim = t.node.setting.shim_binary(&t.node.setting.runtime);
    process::run(Command::new(shim).arg("explain").arg(bundle))
}

/// Sets a field of the table, below the first element of each list of its path.
fn set(spec: &mut Value, path: &str, value: Value) {
    let mut at = spec;
    for key in path.split('.') {
        at = match key.strip_suffix("[]") {
            Some(key) => &mut at[key][0],
            None => &mut at[key],
        };
    }
    *at = value;
}

fn every_refused_field_is_refused_by_create_too(t: &Test) {
    let refused: Vec<_> =
        FIELDS.iter().filter(|field| matches!(field.verdict, Verdict::Refused(_))).collect();
    assert!(refused.len() > 5);
    for (number, field) in refused.into_iter().enumerate() {
        let id = t.id(&format!("r{number}"));
        let change = |spec: &mut Value| set(spec, field.path, json!("x"));
        let driver = t.driver();
        let mut spec = driver.spec(&id, &["true"]);
        change(&mut spec);
        let bundle = t.directory().join("explained");
        fs::create_dir_all(&bundle).expect("create the bundle");
        fs::write(bundle.join("config.json"), spec.to_string()).expect("write config.json");
        let explained = explain(t, &bundle);
        let path = field.path.replace("[]", "[0]");
        let Verdict::Refused(remedy) = field.verdict else { unreachable!("filtered") };
        let reason = format!("{path} is not supported: {remedy}");
        assert_ne!(explained.code, 0, "{path}");
        assert!(explained.stderr.contains(&reason), "{path}: {}", explained.stderr);
        let line = explained.text();
        let line = line.lines().find(|line| line.starts_with(&format!("{path} ")));
        assert!(line.is_some_and(|line| line.contains("refused: ")), "{path}: {line:?}");

        let refusal = t.run_spec(&id, &["true"], change).expect_err(&path);
        assert!(refusal.message.contains(&reason), "{path}: {}", refusal.message);
    }
}

fn what_is_accepted_runs(t: &Test) {
    let id = t.id("a");
    let driver = t.driver();
    let bundle = t.directory().join("explained");
    fs::create_dir_all(&bundle).expect("create the bundle");
    let spec = driver.spec(&id, &["true"]);
    fs::write(bundle.join("config.json"), spec.to_string()).expect("write config.json");
    let explained = explain(t, &bundle).ok().text();
    assert!(explained.contains("applied by init, in the container"), "{explained}");
    assert!(!explained.contains("refused:"), "{explained}");
    assert_eq!(t.run_spec(&id, &["true"], |_| ()).expect("runs").0, 0);
}
