//! What holds for any input. Each function panics if it does not: the fuzz targets look for such
//! inputs, and `cargo test` asks for all that are in `fuzz/seeds`.

// Each fuzz target is one of them.
#![allow(dead_code)]

use pve_sim::conf::{Config, Section, Value};
use shim_proxmox::pve::Upid;
use shim_proxmox::pve::conf::{
    CpuLimit, CtDescription, Hostname, IdKind, IdRange, ParsedConf, Tag,
};

/// The fields of an input end with a byte that is in no text.
const END: u8 = 0xff;
/// The largest limit that an OCI specification can hold, in MiB.
const MEMORY_MAX: u64 = i64::MAX.unsigned_abs() >> 20;

/// A CT's file as the shim writes it: what is read is what was written and no key more, by both
/// readers; and Proxmox would write it in the same way.
///
/// The input: container id, tag, notes, rootfs, include, numbers.
pub fn ct_description(data: &[u8]) {
    let mut fields = data.split(|byte| *byte == END).map(String::from_utf8_lossy);
    let mut field = || fields.next().unwrap_or_default().into_owned();
    let (id, tag, notes, rootfs, include, numbers) =
        (field(), field(), field(), field(), field(), field());
    let mut numbers = numbers.split_ascii_whitespace();
    let mut number = || numbers.next().and_then(|n| n.parse::<f64>().ok());
    let ct = CtDescription {
        hostname: Hostname::from_name(&id),
        memory_mib: (number().unwrap_or(512.0) as u64).min(MEMORY_MAX),
        swap_mib: (number().unwrap_or(0.0) as u64).min(MEMORY_MAX),
        cpulimit: number().and_then(CpuLimit::new),
        cpuunits: number().map(|units| units as u32),
        tags: Tag::sanitised(&tag).into_iter().chain(Tag::new(&tag)).collect(),
        id_map: number()
            .map(|host| IdRange { kind: IdKind::Group, container: 5, host: host as u32, size: 7 })
            .into_iter()
            .collect(),
        notes,
        rootfs: rootfs.into(),
        include: include.into(),
    };
    // What does not fit is refused, and nothing of it written.
    let Ok(text) = ct.render() else { return };
    let conf = ParsedConf::parse(&text);
    let text_of = |path: &std::path::Path| path.to_str().expect("made of text").to_owned();

    let mut values = vec![
        ("console", "0".to_owned()),
        ("hostname", ct.hostname.to_string()),
        ("memory", ct.memory_mib.to_string()),
        ("onboot", "0".to_owned()),
        ("ostype", "unmanaged".to_owned()),
        ("rootfs", text_of(&ct.rootfs)),
        ("swap", ct.swap_mib.to_string()),
        ("tty", "0".to_owned()),
    ];
    values.extend(
        conf.values.iter().find(|(key, _)| key == "arch").map(|(_, v)| ("arch", v.clone())),
    );
    values.extend(ct.cpulimit.map(|limit| ("cpulimit", limit.to_string())));
    values.extend(ct.cpuunits.map(|units| ("cpuunits", units.to_string())));
    if !ct.tags.is_empty() {
        let tags: Vec<_> = ct.tags.iter().map(Tag::as_str).collect();
        values.push(("tags", tags.join(";")));
    }
    let mut raw = vec![("lxc.apparmor.profile", "unconfined".to_owned())];
    for range in &ct.id_map {
        values.push(("unprivileged", "1".to_owned()));
        raw.push(("lxc.idmap", range.to_string()));
    }
    raw.push(("lxc.include", text_of(&ct.include)));
    values.sort();
    let owned = |(key, value): &(&str, String)| ((*key).to_owned(), value.clone());
    let values: Vec<_> = values.iter().map(owned).collect();
    let raw: Vec<_> = raw.iter().map(owned).collect();
    assert_eq!(conf.values, values);
    assert_eq!(conf.lxc, raw);
    let notes: String = ct.notes.lines().map(|line| format!("{line}\n")).collect();
    assert_eq!(conf.description, notes);

    let (read, warnings) = pve_sim::conf::parse(&text, 100);
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(read.current.description.clone().unwrap_or_default(), notes);
    let plain: Vec<_> =
        read.current.values.iter().map(|(key, value)| (key.clone(), value.to_text())).collect();
    assert_eq!(plain, values);
    assert_eq!(read.current.raw, raw);
    assert_eq!(read.pending, Section::default());
    assert!(read.snapshots.is_empty());
    // Empty lines at the end of notes are lost.
    let blank = |line: &&str| *line == "#";
    let first = read.render();
    let written =
        |text: &str| text.lines().filter(|l| !blank(l)).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(written(&first), written(&text));
}

/// Any file: what the simulator has read it writes so that it reads the same again, and the shim finds
/// the same notes as Proxmox.
pub fn ct_configuration(data: &[u8]) {
    // Proxmox separates variables by it; a file with one reads differently the second time.
    if data.contains(&0) {
        return;
    }
    let text = String::from_utf8_lossy(data);
    let (before, _) = pve_sim::conf::parse(&text, 100);
    let written = before.render();
    let (after, _) = pve_sim::conf::parse(&written, 100);
    assert_eq!(comparable(&before), comparable(&after), "{written}");
    assert_eq!(after.render(), written);

    let ours = ParsedConf::parse(&text);
    assert_eq!(ours.description, before.current.description.clone().unwrap_or_default());
    // Proxmox drops raw keys that it does not know; what it keeps we have seen, and in this order.
    let mut raw = ours.lxc.iter();
    for pair in &before.current.raw {
        assert!(raw.any(|ours| ours == pair), "{pair:?} was not read");
    }
    for (key, value) in before.current.values.iter().filter(|(key, _)| *key != "env") {
        let last = ours.values.iter().rfind(|(name, _)| name == key);
        let last = last.unwrap_or_else(|| panic!("{key} was not read"));
        // A truth has several spellings.
        if let Value::Text(text) = value {
            assert_eq!(last.1, *text, "{key}");
        }
    }
}

/// Without the digest, and the empty lines at the end of notes, which a write drops.
fn comparable(config: &Config) -> Config {
    let mut config = Config { digest: String::new(), ..config.clone() };
    let sections = [&mut config.current, &mut config.pending];
    for section in sections.into_iter().chain(config.snapshots.values_mut()) {
        let notes = section.description.take();
        section.description = notes.map(|text| text.trim_end_matches('\n').to_owned());
    }
    config
}

/// A UPID is displayed as it was read, is made of what its parts say, has nothing that would mean
/// something in a path, and is one for the simulator too.
pub fn upid(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let simulated = text.parse::<pve_sim::task::Upid>();
    if let Ok(upid) = &simulated {
        assert_eq!(upid.to_string().parse().as_ref(), Ok(upid));
    }
    let Ok(upid) = text.parse::<Upid>() else { return };
    assert_eq!(upid.to_string(), text);
    assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && !b"/?#%\\".contains(&byte)));
    // It may have a ninth digit, which may be zero.
    let pstart = text.split(':').nth(3).expect("it has all parts");
    assert_eq!(u64::from_str_radix(pstart, 16).ok(), Some(upid.pstart()), "{text}");
    let parts = format!(
        "UPID:{}:{:08X}:{pstart}:{:08X}:{}:{}:{}:",
        upid.node(),
        upid.pid(),
        upid.starttime(),
        upid.kind(),
        upid.id(),
        upid.user()
    );
    assert!(parts.eq_ignore_ascii_case(&text), "{parts} of {text}");
    let simulated = simulated.expect("the simulator reads it too");
    assert_eq!(simulated.node, upid.node());
    assert_eq!(simulated.pid, upid.pid());
    assert_eq!((simulated.pstart, simulated.starttime), (upid.pstart(), upid.starttime()));
    assert_eq!((simulated.kind.as_str(), simulated.id.as_str()), (upid.kind(), upid.id()));
    assert_eq!(simulated.user, upid.user());
}
