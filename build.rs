//! Tells the shim which compiler built it, for `-v`, and the linker how.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // 7000 relocations of 24 bytes that every start would read, in 4 kB. Needs glibc 2.36, that of Debian 12.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // Set by packaging; a revision read from a work tree would be wrong as often as right.
    println!("cargo:rerun-if-env-changed=SHIM_REVISION");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_string());
    if let Ok(output) = Command::new(rustc).arg("--version").output() {
        let text = String::from_utf8_lossy(&output.stdout);
        if let Some(version) = text.split_whitespace().nth(1) {
            println!("cargo:rustc-env=SHIM_RUSTC_VERSION={version}");
        }
    }
}
