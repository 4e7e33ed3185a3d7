//! Every kind of mount that a client can ask for as the container's root.

use std::fs;
use std::path::Path;

use containerd_shim_protos::types::mount::Mount;

use crate::harness::direct::{Stdio3, mount};
use crate::harness::image;
use crate::harness::sys;
use crate::harness::test::Test;
use crate::suites::cases;

cases!("rootfs":;
    proxmox:
    overlay_with_options_beyond_a_page,
    bind_mount,
    image_in_a_file,
    images_below_an_overlay,
    failed_create_frees_the_images,
    crash_frees_the_images,
    unknown_transformer_is_named,
);

/// Runs `script` on a rootfs of `mounts`: its output.
#[track_caller]
fn run(t: &Test, id: &str, mounts: Vec<Mount>, script: &str) -> String {
    let driver = t.driver();
    let log = t.file(&format!("{id}.out"));
    let io = Stdio3 {
        stdout: format!("file://{log}"),
        stderr: format!("file://{log}"),
        ..Stdio3::default()
    };
    let mut shim = driver.start(id, &driver.spec(id, &["sh", "-c", script]));
    shim.rootfs = mounts;
    let run = shim.create(&io).and_then(|_| shim.start("")).and_then(|_| shim.wait(""));
    shim.finish();
    driver.remove_bundle(id);
    let text = fs::read_to_string(&log).unwrap_or_default().trim_end().to_owned();
    assert_eq!(run.expect("it runs").exit_status, 0, "{text}");
    text
}

fn lower(t: &Test) -> String {
    t.node.root.join("rootfs").display().to_string()
}

fn directory(t: &Test, name: &str) -> String {
    let path = t.file(name);
    fs::create_dir_all(&path).expect("create a directory");
    path
}

fn overlay_with_options_beyond_a_page(t: &Test) {
    let layers: Vec<_> =
        (0..60).map(|n| directory(t, &format!("{}-{n}", "layer".repeat(20)))).collect();
    for layer in [&layers[0], &layers[59]] {
        fs::write(Path::new(layer).join("which"), layer).expect("write");
    }
    fs::write(Path::new(&layers[59]).join("deep"), "x").expect("write");
    let options = [
        format!("workdir={}", directory(t, "work")),
        format!("upperdir={}", directory(t, "upper")),
        format!("lowerdir={}:{}", layers.join(":"), lower(t)),
    ];
    assert!(options[2].len() > 4096);
    let mounts = vec![mount("overlay", "overlay", &options)];
    let text = run(t, &t.id("a"), mounts, "cat /which; ls /deep; echo new > /new");
    assert_eq!(text, format!("{}/deep", layers[0]));
    assert_eq!(fs::read_to_string(t.file("upper/new")).expect("written"), "new\n");
}

fn bind_mount(t: &Test) {
    let copy = t.file("copy");
    crate::harness::process::run(std::process::Command::new("cp").args(["-a", &lower(t), &copy]))
        .ok();
    let native = |flag: &str| vec![mount("bind", &copy, &["rbind", flag])];
    run(t, &t.id("rw"), native("rw"), "echo new > /new");
    assert!(Path::new(&copy).join("new").exists());
    run(t, &t.id("ro"), native("ro"), "! touch /other 2>/dev/null");
}

fn image_in_a_file(t: &Test) {
    let image = t.file("image");
    image::ext4(Path::new(&image), 64, &t.node.root.join("rootfs"));
    let mounts = |option: &str| vec![mount("ext4", &image, &["rw", option])];
    run(t, &t.id("a"), mounts("loop"), "echo kept > /kept");
    image::loop_devices_are_freed(&[&image]);
    assert_eq!(run(t, &t.id("b"), mounts("relatime"), "cat /kept"), "kept");
    image::loop_devices_are_freed(&[&image]);
}

/// What containerd's erofs snapshotter asks for: a writable image, read-only ones, and an overlay of
/// them.
fn images(t: &Test) -> (Vec<Mount>, [String; 2]) {
    let (upper, layer) = (t.file("upper.img"), t.file("layer.erofs"));
    image::ext4(Path::new(&upper), 16, Path::new(&directory(t, "empty")));
    image::erofs(Path::new(&layer), "from-erofs", b"immutable\n");
    let overlay = [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work",
        "upperdir={{ mount 0 }}/upper",
        "lowerdir={{ overlay 1 2 }}",
    ];
    let mounts = vec![
        mount("ext4", &upper, &["rw", "loop"]),
        mount("erofs", &layer, &["ro", "loop"]),
        mount("bind", &lower(t), &["ro", "rbind"]),
        mount("format/mkdir/overlay", "overlay", &overlay),
    ];
    (mounts, [upper, layer])
}

fn images_below_an_overlay(t: &Test) {
    let (mounts, files) = images(t);
    let text = run(t, &t.id("a"), mounts.clone(), "cat /from-erofs; echo 1 > /new; stat -c %a /");
    assert_eq!(text, "immutable\n755");
    let text = run(t, &t.id("b"), mounts, "cat /new; echo 2 >> /from-erofs; cat /from-erofs");
    assert_eq!(text, "1\nimmutable\n2");
    image::loop_devices_are_freed(&files.each_ref().map(String::as_str));
}

fn failed_create_frees_the_images(t: &Test) {
    let driver = t.driver();
    let (mounts, files) = images(t);
    let id = t.id("a");
    let mut spec = driver.spec(&id, &["true"]);
    spec["mounts"].as_array_mut().expect("a list").push(serde_json::json!(
        {"destination": "/x", "type": "bind", "source": "/does/not/exist", "options": ["bind"]}
    ));
    let mut shim = driver.start(&id, &spec);
    shim.rootfs = mounts;
    let refusal = shim.create(&Stdio3::default()).expect_err("the source is missing");
    assert!(refusal.message.contains("/does/not/exist"), "{}", refusal.message);
    image::loop_devices_are_freed(&files.each_ref().map(String::as_str));
    shim.finish();
    driver.remove_bundle(&id);
}

fn crash_frees_the_images(t: &Test) {
    let driver = t.driver();
    let (mounts, files) = images(t);
    let id = t.id("a");
    let mut shim = driver.start(&id, &driver.spec(&id, &["sleep", "1000"]));
    shim.rootfs = mounts;
    shim.create(&Stdio3::default()).and_then(|_| shim.start("")).expect("it runs");
    assert_eq!(files.each_ref().map(|file| image::loop_devices(file)), [1, 1]);
    let pid = shim.connect().expect("connect").shim_pid;
    sys::kill(pid, libc::SIGKILL);
    driver.delete_after_crash(&id);
    image::loop_devices_are_freed(&files.each_ref().map(String::as_str));
    driver.remove_bundle(&id);
}

fn unknown_transformer_is_named(t: &Test) {
    let driver = t.driver();
    let id = t.id("a");
    let mut shim = driver.start(&id, &driver.spec(&id, &["true"]));
    shim.rootfs = vec![mount("mkfs/ext4", &t.file("image"), &["X-containerd.mkfs.size=1000000"])];
    let refusal = shim.create(&Stdio3::default()).expect_err("refused");
    assert!(refusal.message.contains("mkfs/ext4"), "{}", refusal.message);
    shim.finish();
    driver.remove_bundle(&id);
}
