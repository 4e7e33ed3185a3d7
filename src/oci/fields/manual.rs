//! The manual page of the table: `UPDATE_SNAPSHOTS=1` writes it, otherwise it is compared.

use std::fmt::Write;
use std::path::Path;

use super::{FIELDS, Verdict};

const HEAD: &str = r#".\" Made of the table in src/oci/fields.rs; UPDATE_SNAPSHOTS=1 cargo test manual writes it.
.Dd January 1, 2026
.Dt CONTAINERD-SHIM-PROXMOX-OCI 7
.Os
.Sh NAME
.Nm containerd-shim-proxmox-oci
.Nd what becomes of each field of an OCI bundle
.Sh DESCRIPTION
.Xr containerd-shim-proxmox-v2 8
runs bundles of the OCI runtime specification, version 1.2 and the additions of version 1.3.
No field that a bundle sets is dropped silently: it is applied, translated, or the container is
refused with the field's name and what to do instead.
For one bundle,
.Dl containerd-shim-proxmox-v2 explain Ar bundle
prints the same, with its values looked at too.
.Pp
A field that has the zero value of its type (null, false, 0, an empty string, list or object)
counts as not set, because many clients write it for what they do not set.
.Pp
The verdicts are:
.Bl -tag -width Ds
.It applied
Honoured as it is, with the place where its effect can be seen.
A particular value can still be refused, for example an AppArmor profile on a node without
AppArmor.
.It translated
Honoured in the form that Proxmox VE has for it.
.It ignored
Without effect, as with other runtimes.
.It without effect, with a warning
The shim's log names the field.
.It refused
Create fails.
The text is the remedy.
.El
.Sh FIELDS
.Bl -tag -width Ds
"#;

const TAIL: &str = r#".El
.Sh SEE ALSO
.Xr lxc.container.conf 5 ,
.Xr containerd-shim-proxmox-v2 8 ,
.Xr proxmox-shim-init 8
.Pp
.Lk https://github.com/opencontainers/runtime-spec "Open Container Initiative Runtime Specification"
"#;

fn page() -> String {
    let mut page = HEAD.to_owned();
    for field in FIELDS.iter().filter(|field| field.verdict != Verdict::Section) {
        let verdict = field.verdict.to_string();
        // Text must not be taken for a request or an escape.
        assert!(!verdict.contains('\\') && !verdict.starts_with(['.', '\'']), "{verdict}");
        let (first, rest) = verdict.split_at(1);
        writeln!(page, ".It Va {}\n{}{rest}.", field.path, first.to_uppercase()).unwrap();
    }
    page + TAIL
}

#[test]
fn the_manual_page_is_up_to_date() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/man/containerd-shim-proxmox-oci.7");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, page()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written == page(), "{} is out of date: UPDATE_SNAPSHOTS=1 writes it", path.display());
}
