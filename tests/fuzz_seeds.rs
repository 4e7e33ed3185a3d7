//! The inputs in `fuzz/seeds`, recorded ones and those that once broke something, and random ones: for
//! each of them must hold what `make fuzz` looks for.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use proptest::prelude::*;

#[path = "../fuzz/invariants.rs"]
mod invariants;

fn all_of(directory: &str, invariant: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut seen = 0;
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        let data = fs::read(&path).unwrap();
        assert!(catch_unwind(|| invariant(&data)).is_ok(), "{}", path.display());
        seen += 1;
    }
    assert!(seen > 0, "{} is empty", directory.display());
}

#[test]
fn descriptions_of_cts() {
    all_of("fuzz/seeds/ct_description", invariants::ct_description);
}

#[test]
fn configurations_of_cts() {
    all_of("tests/pve-sim/fixtures/lxc-config", invariants::ct_configuration);
    all_of("fuzz/seeds/ct_configuration", invariants::ct_configuration);
}

#[test]
fn upids() {
    all_of("fuzz/seeds/upid", invariants::upid);
}

fn hostile() -> impl Strategy<Value = String> {
    prop_oneof![
        "(\\PC|[\n\r\t\0:=#%\\[\\]]|lxc\\.|\nlxc\\.hook\\.pre-start=/x|\n\\[a\\]|%0A){0,12}",
        proptest::collection::vec(any::<char>(), 0..30)
            .prop_map(|chars| chars.into_iter().collect()),
    ]
}

proptest! {
    #[test]
    fn one_hostile_value_or_all(
        id in hostile(), tag in hostile(), notes in hostile(), rootfs in hostile(), include in hostile(),
        memory in 0u64..1 << 40, cpus in 0.0f64..9000.0, cpuunits in 0u32..=600_000,
    ) {
        let numbers = format!("{memory} 7 {cpus} {cpuunits} 100000");
        let (rootfs, include) = (format!("/{rootfs}"), format!("/{include}"));
        let all = [&id, &tag, &notes, &rootfs, &include, &numbers].map(String::as_str);
        let tame = ["web", "containerd", "a note", "/rootfs", "/run/lxc.conf", "512 512"];
        let input = |fields: [&str; 6]| fields.map(|field| field.as_bytes().to_vec()).join(&0xff);
        invariants::ct_description(&input(all));
        // Each alone, so that one refusal does not hide the others.
        for n in 0..6 {
            let mut fields = tame;
            fields[n] = all[n];
            invariants::ct_description(&input(fields));
        }
    }

    #[test]
    fn any_text_as_a_configuration_or_upid(text in hostile()) {
        invariants::ct_configuration(text.as_bytes());
        invariants::upid(text.as_bytes());
    }
}
