use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;
use crate::pve::fixtures::{golden, golden_text};

fn shape() -> CtDescription {
    CtDescription {
        hostname: Hostname::from_name("ct500"),
        memory_mib: 512,
        swap_mib: 512,
        cpulimit: None,
        cpuunits: None,
        tags: vec![Tag::new("containerd").unwrap()],
        id_map: Vec::new(),
        notes: "containerd: default/web".into(),
        rootfs: "/run/bundle/rootfs".into(),
        include: "/run/containerd-shim-proxmox/default/web/lxc.conf".into(),
    }
}

#[test]
fn renders_the_golden_file() {
    if std::env::consts::ARCH != "x86_64" {
        return; // the golden file says amd64
    }
    let volume = "local:500/subvol-500-disk-0.subvol,size=0T";
    let expected = golden_text("shim-shape.conf").replace(volume, "/run/bundle/rootfs");
    assert_eq!(shape().render().unwrap(), expected);
}

#[test]
fn optional_keys_stand_where_proxmox_sorts_them() {
    let mut ct = shape();
    ct.cpulimit = CpuLimit::new(1.5);
    ct.cpuunits = Some(200);
    ct.tags.clear();
    ct.notes.clear();
    let text = ct.render().unwrap();
    let keys: Vec<_> = text.lines().map(|line| line.split(':').next().unwrap()).collect();
    let mut plain: Vec<_> = keys.iter().filter(|key| !key.starts_with("lxc.")).collect();
    let written = plain.clone();
    plain.sort();
    assert_eq!(plain, written);
    assert_eq!(keys.last(), Some(&"lxc.include"));
    assert!(text.contains("cpulimit: 1.5\ncpuunits: 200\n"), "{text}");
    assert!(!text.contains("tags") && !text.contains('#'), "{text}");
}

#[test]
fn parses_the_golden_files_as_proxmox_answers_them() {
    for name in [
        "shim-shape",
        "meta",
        "description-in-middle",
        "raw-order-and-separators",
        "pending",
        "snapshots",
    ] {
        let conf = ParsedConf::parse(&golden_text(&format!("{name}.conf")));
        if matches!(name, "pending" | "snapshots") {
            assert!(
                conf.values.iter().filter(|(key, _)| key == "memory").count() == 1,
                "{name}: {conf:?}"
            );
            continue;
        }
        let api = golden(&format!("{name}.api.json"));
        let data = api["data"].as_object().unwrap();
        let description = data.get("description").and_then(|d| d.as_str()).unwrap_or_default();
        assert_eq!(conf.description, description, "{name}");
        for (key, value) in &conf.values {
            let answered = match &data[key] {
                serde_json::Value::String(s) => s.clone(),
                other => other.to_string(),
            };
            assert_eq!(*value, answered, "{name}: {key}");
        }
        let lxc = data.get("lxc").and_then(|l| l.as_array()).cloned().unwrap_or_default();
        // The runtime environment is a key of its own in the answer.
        let raw = conf.lxc.iter().filter(|(key, _)| key != "lxc.environment.runtime");
        let raw: Vec<_> = raw.map(|(key, value)| serde_json::json!([key, value])).collect();
        assert_eq!(raw, lxc, "{name}");
    }
}

#[test]
fn hostnames_are_dns_labels_whatever_the_id() {
    let long = "a".repeat(62) + "-b" + &"c".repeat(20);
    let cases = [
        ("web", "web"),
        ("Web_1.x", "Web-1-x"),
        ("--a--", "a"),
        ("", "container"),
        ("---", "container"),
        ("ä\n", "container"),
        (long.as_str(), &"a".repeat(62)),
    ];
    for (id, expected) in cases {
        assert_eq!(Hostname::from_name(id).as_str(), expected, "{id}");
    }
    assert_eq!(Hostname::from_name(&"f".repeat(64)).as_str().len(), 63);
}

#[test]
fn hostnames_of_pods_are_labels_that_keep_both_names() {
    let long = "p".repeat(100);
    for (pod, container, expected) in [
        ("web-0", "nginx", "web-0-nginx".to_owned()),
        ("web-0", "", "web-0".to_owned()),
        ("", "nginx", "nginx".to_owned()),
        ("", "", "container".to_owned()),
        ("a\nlxc.x=1", "..", "a-lxc-x-1".to_owned()),
        (&long, "nginx", format!("{}-nginx", "p".repeat(57))),
        (&long, &long, format!("{}-{}", "p".repeat(31), "p".repeat(31))),
    ] {
        let hostname = Hostname::from_pod(pod, container);
        assert_eq!(hostname.as_str(), expected);
        assert!(hostname.as_str().len() <= 63);
    }
}

#[test]
fn tags_follow_proxmox_syntax() {
    let tag = |text| Tag::sanitised(text).map(|tag| tag.0);
    assert_eq!(tag("K8s.io/app"), Some("k8s.io-app".into()));
    assert_eq!(tag("-x;y\n"), Some("x-y".into()));
    assert_eq!(tag("_a"), Some("_a".into()));
    assert_eq!(tag("-;-"), None);
    assert_eq!(tag(""), None);
    assert_eq!(Tag::new("a b"), None);
}

#[test]
fn cpu_limits_are_short_decimals() {
    let limit = |cpus| CpuLimit::new(cpus).map(|limit| limit.to_string());
    assert_eq!(limit(0.5).as_deref(), Some("0.5"));
    assert_eq!(limit(2.0).as_deref(), Some("2"));
    assert_eq!(limit(10.0).as_deref(), Some("10"));
    assert_eq!(limit(1.0 / 3.0).as_deref(), Some("0.333"));
    assert_eq!(limit(0.0001).as_deref(), Some("0.01"));
    assert_eq!(limit(1e9).as_deref(), Some("8192"));
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(limit(bad), None);
    }
}

#[test]
fn values_that_would_add_lines_are_refused() {
    let key = |change: &dyn Fn(&mut CtDescription)| {
        let mut ct = shape();
        change(&mut ct);
        ct.render().unwrap_err().key
    };
    assert_eq!(key(&|ct| ct.notes = "a\rlxc.hook.pre-start: x".into()), "notes");
    assert_eq!(key(&|ct| ct.notes = "a\0".into()), "notes");
    assert_eq!(key(&|ct| ct.rootfs = "/a\nlxc.hook.pre-start: x".into()), "rootfs");
    assert_eq!(key(&|ct| ct.rootfs = "/a,mp=/b".into()), "rootfs");
    assert_eq!(key(&|ct| ct.rootfs = "a".into()), "rootfs");
    assert_eq!(key(&|ct| ct.rootfs = "/a/../b".into()), "rootfs");
    assert_eq!(key(&|ct| ct.include = "/a\nlxc.hook.pre-start: x".into()), "lxc.include");
    assert_eq!(key(&|ct| ct.include = "/a b".into()), "lxc.include");
    assert_eq!(key(&|ct| ct.memory_mib = 8), "memory");
    assert_eq!(key(&|ct| ct.cpuunits = Some(500_001)), "cpuunits");
    // Line feeds in notes make further notes, never keys.
    let mut ct = shape();
    ct.notes = "a\nlxc.hook.pre-start: x\n\n[snap]".into();
    let conf = ParsedConf::parse(&ct.render().unwrap());
    assert_eq!(conf.lxc.len(), 2);
    assert_eq!(conf.description, "a\nlxc.hook.pre-start: x\n\n[snap]\n");
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
    fn no_text_makes_the_parser_panic(text in hostile()) {
        ParsedConf::parse(&text);
    }

    #[test]
    fn hostnames_and_tags_are_always_valid(text in hostile()) {
        let name = Hostname::from_name(&text);
        let name = name.as_str();
        prop_assert!((1..=63).contains(&name.len()));
        prop_assert!(!name.starts_with('-') && !name.ends_with('-'));
        prop_assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
        if let Some(tag) = Tag::sanitised(&text) {
            prop_assert!(is_tag(tag.as_str()));
        }
    }
}

fn id(n: u32) -> Vmid {
    Vmid::new(n).unwrap()
}

fn pmxcfs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("lxc")).unwrap();
    dir
}

#[test]
fn a_claim_is_exclusive_and_leaves_the_first_owner_alone() {
    let dir = pmxcfs();
    let path = claim(dir.path(), id(100), "one\n").unwrap();
    assert_eq!(path, dir.path().join("lxc/100.conf"));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777 & !0o640, 0);
    assert!(
        matches!(claim(dir.path(), id(100), "two\n"), Err(ClaimError::Exists { vmid }) if vmid == id(100))
    );
    assert_eq!(std::fs::read_to_string(path).unwrap(), "one\n");
}

#[test]
fn a_failed_write_leaves_no_file() {
    let dir = pmxcfs();
    // A mount that is full: the creation succeeds, the write does not.
    let lxc = dir.path().join("lxc");
    let flags = nix::mount::MsFlags::empty();
    if nix::mount::mount(Some("t"), &lxc, Some("tmpfs"), flags, Some("size=4k,nr_inodes=8"))
        .is_err()
    {
        eprintln!("skipped: mounting a tmpfs needs root");
        return;
    }
    std::fs::write(lxc.join("filler"), [0; 4096]).unwrap();
    let error = claim(dir.path(), id(100), "text\n").unwrap_err();
    let gone = !lxc.join("100.conf").exists();
    nix::mount::umount(&lxc).unwrap();
    assert!(matches!(error, ClaimError::Write { removal: None, .. }), "{error}");
    assert!(gone);
}

#[test]
fn missing_quorum_and_missing_mount_are_told_apart() {
    let path = || PathBuf::from("/etc/pve/lxc/100.conf");
    let of = |errno: nix::errno::Errno| cannot_create(path(), id(100), errno.into());
    use nix::errno::Errno;
    for errno in [Errno::EACCES, Errno::EROFS, Errno::EPERM] {
        let error = of(errno);
        assert!(matches!(error, ClaimError::NoQuorum { .. }), "{error}");
        assert!(error.to_string().contains("pvecm status"), "{error}");
    }
    let error = of(Errno::ENOTCONN);
    assert!(matches!(error, ClaimError::NotMounted { .. }), "{error}");
    assert!(matches!(of(Errno::EIO), ClaimError::Write { .. }));
    let empty = tempfile::tempdir().unwrap();
    let error = claim(empty.path(), id(100), "x").unwrap_err();
    assert!(matches!(error, ClaimError::NotMounted { .. }), "{error}");
}

/// What a create does with the counter and the claim.
fn claim_next(
    pmxcfs: &Path,
    range: VmidRange,
    run_dir: &Path,
) -> Result<(Vmid, PathBuf), ClaimError> {
    for _ in 0..range.len() {
        let vmid = next_vmid(range, run_dir)?;
        match claim(pmxcfs, vmid, &format!("{vmid}\n")) {
            Err(ClaimError::Exists { .. }) => {}
            result => return Ok((vmid, result?)),
        }
    }
    Err(ClaimError::RangeFull { range })
}

#[test]
fn vmids_are_taken_in_turn_and_used_ones_skipped() {
    let (dir, run) = (pmxcfs(), tempfile::tempdir().unwrap());
    let run_dir = run.path().join("run");
    let range: VmidRange = "100-102".parse().unwrap();
    std::fs::write(conf_path(dir.path(), id(101)), "").unwrap();
    let next = || claim_next(dir.path(), range, &run_dir);
    let (first, path) = next().unwrap();
    assert_eq!((first, std::fs::read_to_string(path).unwrap().as_str()), (id(100), "100\n"));
    assert_eq!(next().unwrap().0, id(102));
    let error = next().unwrap_err();
    assert!(matches!(error, ClaimError::RangeFull { .. }), "{error}");
    assert!(error.to_string().contains("ct.vmid_range 100-102"), "{error}");
    // A freed VMID is found again.
    std::fs::remove_file(conf_path(dir.path(), id(100))).unwrap();
    assert_eq!(next().unwrap().0, id(100));
}

#[test]
fn a_corrupt_counter_starts_over() {
    let run = tempfile::tempdir().unwrap();
    let range: VmidRange = "100-200".parse().unwrap();
    for content in ["", "abc", "99", "5000", "\u{0}\u{0}", "99999999999999999999999", "101x"] {
        std::fs::write(run.path().join("vmid"), content).unwrap();
        assert_eq!(next_vmid(range, run.path()).unwrap(), id(100), "{content:?}");
    }
    std::fs::write(run.path().join("vmid"), "150\n").unwrap();
    assert_eq!(next_vmid(range, run.path()).unwrap(), id(151));
    std::fs::write(run.path().join("vmid"), "200").unwrap();
    assert_eq!(next_vmid(range, run.path()).unwrap(), id(100));
}

#[test]
fn parallel_claims_get_different_vmids() {
    let (dir, run) = (pmxcfs(), tempfile::tempdir().unwrap());
    let range: VmidRange = "1000-1999".parse().unwrap();
    let claim = || claim_next(dir.path(), range, run.path()).unwrap().0;
    let twenty = || (0..20).map(|_| claim()).collect::<Vec<_>>();
    let claims: Vec<Vmid> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(twenty)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let distinct: std::collections::BTreeSet<_> = claims.iter().collect();
    assert_eq!((claims.len(), distinct.len()), (160, 160));
    // The counter kept them from even trying the same one: no gap.
    assert_eq!(**distinct.last().unwrap(), id(1159));
}
