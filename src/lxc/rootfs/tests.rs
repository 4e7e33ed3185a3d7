use super::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Instant;

/// Below a tmpfs that is not shared with any other mount namespace.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("rootfs")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn dir(&self, name: &str) -> String {
        fs::create_dir_all(self.path(name)).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    fn overlay(&self, layers: &[String], more: &[&str]) -> RootfsMount {
        let mut options = vec![
            format!("lowerdir={}", layers.join(":")),
            format!("upperdir={}", self.dir("upper")),
            format!("workdir={}", self.dir("work")),
        ];
        options.extend(more.iter().map(|o| (*o).to_owned()));
        RootfsMount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options,
        }
    }

    fn mounts(&self) -> usize {
        let real = self.0.path().canonicalize().unwrap();
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .filter(|l| l.split(' ').nth(4).unwrap().starts_with(real.to_str().unwrap()))
            .count()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = unmount(&self.path("rootfs"));
    }
}

fn bind(source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        fstype: "bind".into(),
        source: source.into(),
        target: String::new(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

fn root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn an_overlay_with_options_beyond_a_page_is_mounted_and_unmounted() {
    if !root() {
        return;
    }
    let place = Place::new();
    let layers: Vec<_> = (0..120).map(|n| place.dir(&format!("{}-{n}", "x".repeat(60)))).collect();
    fs::write(Path::new(&layers[119]).join("file"), "deep").unwrap();
    assert!(layers.join(":").len() > 5000);
    let start = Instant::now();
    let mounted =
        mount(&[place.overlay(&layers, &["index=off"])], &place.path("rootfs"), None).unwrap();
    eprintln!("120 layers: {:?}", start.elapsed());
    assert_eq!(fs::read_to_string(place.path("rootfs/file")).unwrap(), "deep");
    fs::write(place.path("rootfs/new"), "").unwrap();
    assert!(place.path("upper/new").exists());
    mounted.unmount().unwrap();
    assert_eq!(place.mounts(), 0);
    unmount(&place.path("rootfs")).unwrap();
}

#[test]
fn an_overlay_mounts_in_less_than_a_millisecond() {
    if !root() {
        return;
    }
    let place = Place::new();
    let layers: Vec<_> = (0..5).map(|n| place.dir(&format!("lower{n}"))).collect();
    let overlay = [place.overlay(&layers, &["index=off"])];
    let mut times: Vec<_> = (0..20)
        .map(|_| {
            let start = Instant::now();
            let mounted = mount(&overlay, &place.path("rootfs"), None).unwrap();
            let time = start.elapsed();
            mounted.unmount().unwrap();
            time
        })
        .collect();
    times.sort();
    eprintln!("5 layers: median {:?}, worst {:?}", times[10], times[19]);
    // Ample, for a busy machine; the median is some 100 µs.
    assert!(times[10] < Duration::from_millis(5));
}

#[test]
fn a_layer_with_a_very_long_path_or_special_characters_is_found() {
    if !root() {
        return;
    }
    let place = Place::new();
    let long = place.dir(&format!("{}/{}", "a".repeat(200), "b".repeat(200)));
    let odd = place.dir("with:colon,comma");
    fs::write(Path::new(&long).join("long"), "").unwrap();
    fs::write(Path::new(&odd).join("odd"), "").unwrap();
    let layers = [long, odd.replace(':', "\\:").replace(',', "\\,")];
    mount(&[place.overlay(&layers, &[])], &place.path("rootfs"), None).unwrap();
    assert!(place.path("rootfs/long").exists() && place.path("rootfs/odd").exists());
}

#[test]
fn older_kernels_get_the_same_by_mount_2() {
    if !root() {
        return;
    }
    let place = Place::new();
    let target = place.path("rootfs");
    let layers: Vec<_> = (0..100).map(|n| place.dir(&format!("{}-{n}", "x".repeat(60)))).collect();
    fs::write(Path::new(&layers[99]).join("file"), "deep").unwrap();
    let overlay = place.overlay(&layers, &["index=off"]);
    let tree = Workshop::run(&target, |workshop| classic_overlay(&overlay, workshop)).unwrap();
    attach(&overlay, &tree, &target).unwrap();
    assert_eq!(fs::read_to_string(place.path("rootfs/file")).unwrap(), "deep");
}

#[test]
fn a_read_only_view_cannot_be_written() {
    if !root() {
        return;
    }
    let place = Place::new();
    let view = RootfsMount {
        options: vec![format!("lowerdir={}:{}", place.dir("l1"), place.dir("l2")), "ro".into()],
        ..place.overlay(&[], &[])
    };
    mount(&[view], &place.path("rootfs"), None).unwrap();
    let error = fs::write(place.path("rootfs/x"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn bind_mounts_take_their_attributes() {
    if !root() {
        return;
    }
    let place = Place::new();
    let source = place.dir("source");
    fs::write(place.path("source/file"), "").unwrap();
    mount(&[bind(&source, &["rbind", "ro"])], &place.path("rootfs"), None).unwrap();
    assert!(place.path("rootfs/file").exists());
    let error = fs::write(place.path("rootfs/x"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    fs::write(place.path("source/x"), "").unwrap();
}

#[test]
fn a_link_in_place_of_the_rootfs_is_refused() {
    if !root() {
        return;
    }
    let place = Place::new();
    let source = place.dir("source");
    symlink(place.dir("elsewhere"), place.path("link")).unwrap();
    let error = mount(&[bind(&source, &["bind"])], &place.path("link"), None).unwrap_err();
    assert!(matches!(error, Error::Target { .. }), "{error}");
    assert_eq!(place.mounts(), 0);
}

#[test]
fn mounts_upon_and_below_each_other_are_all_removed() {
    if !root() {
        return;
    }
    let place = Place::new();
    let (a, b) = (place.dir("a"), place.dir("b"));
    fs::create_dir_all(place.path("b/sub")).unwrap();
    let rootfs = place.path("rootfs");
    mount(&[bind(&a, &["bind"]), bind(&b, &["bind"])], &rootfs, None).unwrap();
    let below = RootfsMount { target: "/sub".into(), ..bind(&a, &["bind"]) };
    mount(&[below], &rootfs, None).unwrap();
    assert_eq!(place.mounts(), 3);
    unmount(&rootfs).unwrap();
    assert_eq!(place.mounts(), 0);
}

#[test]
fn a_busy_mount_is_waited_for_and_then_detached() {
    if !root() {
        return;
    }
    let place = Place::new();
    let source = place.dir("source");
    fs::write(place.path("source/file"), "").unwrap();
    mount(&[bind(&source, &["bind"])], &place.path("rootfs"), None).unwrap();
    let user = fs::File::open(place.path("rootfs/file")).unwrap();
    let release = std::thread::spawn(move || {
        sleep(Duration::from_millis(60));
        drop(user);
    });
    unmount(&place.path("rootfs")).unwrap();
    assert_eq!(place.mounts(), 0);
    release.join().unwrap();
    mount(&[bind(&source, &["bind"])], &place.path("rootfs"), None).unwrap();
    let _user = fs::File::open(place.path("rootfs/file")).unwrap();
    unmount(&place.path("rootfs")).unwrap();
    assert_eq!(place.mounts(), 0);
}

#[test]
fn a_failure_leaves_nothing_mounted_and_says_what_failed() {
    if !root() {
        return;
    }
    let place = Place::new();
    let good = place.dir("good");
    let mounts = [bind(&good, &["bind"]), bind("/does/not/exist", &["bind"])];
    let text = mount(&mounts, &place.path("rootfs"), None).unwrap_err().to_string();
    assert!(text.contains("/does/not/exist") && text.contains("no such file"), "{text}");
    assert_eq!(place.mounts(), 0);
    let missing = place.overlay(&["/does/not/exist".into()], &[]);
    let text = mount(&[missing], &place.path("rootfs"), None).unwrap_err().to_string();
    assert!(text.contains("/does/not/exist"), "{text}");
    let unknown = place.overlay(std::slice::from_ref(&good), &["nonsense=1"]);
    let text = mount(&[unknown], &place.path("rootfs"), None).unwrap_err().to_string();
    assert!(text.contains("nonsense"), "{text}");
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let place = Place::new();
    let rootfs = place.path("rootfs");
    for (fstype, option, expected) in [
        ("mkfs/ext4", "", "type \"mkfs/ext4\" is not supported"),
        ("", "", "type \"\" is not supported"),
        ("erofs", "X-containerd.dmverity=/x", "\"X-containerd.dmverity=/x\" of type erofs"),
        ("mkdir/overlay", "X-containerd.mkdir.path=x", "\"X-containerd.mkdir.path=x\""),
        ("overlay", "X-containerd.mkdir.path=/x", "\"X-containerd.mkdir.path=/x\""),
        ("format/overlay", "lowerdir={{ mount 0 }}", "does not come before it"),
        ("ext4", "loop", "attach image /does/not/exist to a loop device: no such file"),
    ] {
        let mount_ = RootfsMount {
            fstype: fstype.into(),
            source: "/does/not/exist".into(),
            target: String::new(),
            options: vec![option.into()],
        };
        let text = mount(&[mount_], &rootfs, None).unwrap_err().to_string();
        assert!(text.contains(expected), "{fstype}: {text}");
    }
    let outside = RootfsMount { target: "a/../..".into(), ..bind("/tmp", &[]) };
    fs::create_dir(place.path("rootfs/a")).unwrap();
    assert!(matches!(mount(&[outside], &rootfs, None), Err(Error::Outside { .. })));
}

#[test]
fn layers_are_split_where_overlay_splits_them() {
    let some = |key: &str, value: &str| (key.to_owned(), Some(value.to_owned()));
    assert_eq!(
        lower_layers("/a:/b\\:c::/d"),
        [some("lowerdir+", "/a"), some("lowerdir+", "/b:c"), some("datadir+", "/d")]
    );
}

/// An ext4 image.
fn image(place: &Place, name: &str) -> String {
    let path = place.path(name);
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let made = std::process::Command::new("mkfs.ext4").arg("-q").arg(&path).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    path.to_str().unwrap().to_owned()
}

fn loop_devices(image: &str) -> usize {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let file = |d: fs::DirEntry| fs::read_to_string(d.path().join("loop/backing_file")).ok();
    devices.filter_map(file).filter(|f| f.trim_end() == image).count()
}

/// A mount namespace that another test has just made has copies of this one's mounts for a moment.
fn loop_devices_are_freed(images: &[&str]) -> bool {
    let freed = || images.iter().all(|image| loop_devices(image) == 0);
    (0..200).any(|_| {
        freed() || {
            sleep(Duration::from_millis(10));
            false
        }
    })
}

fn on_loop(image: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        fstype: "ext4".into(),
        source: image.into(),
        target: String::new(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

#[test]
fn an_image_is_mounted_and_its_loop_device_freed() {
    if !root() {
        return;
    }
    let place = Place::new();
    let (rootfs, image) = (place.path("rootfs"), image(&place, "image"));
    for options in [&["loop"][..], &["rw"]] {
        mount(&[on_loop(&image, options)], &rootfs, None).unwrap();
        assert_eq!(loop_devices(&image), 1);
        fs::write(rootfs.join("file"), "kept").unwrap();
        unmount(&rootfs).unwrap();
        assert!(loop_devices_are_freed(&[&image]));
    }
    mount(&[on_loop(&image, &["ro", "loop"])], &rootfs, None).unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("file")).unwrap(), "kept");
    let error = fs::write(rootfs.join("x"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    unmount(&rootfs).unwrap();
    let text =
        mount(&[on_loop(&image, &["loop", "nonsense=1"])], &rootfs, None).unwrap_err().to_string();
    assert!(text.contains("nonsense"), "{text}");
    assert_eq!(place.mounts(), 0);
    assert!(loop_devices_are_freed(&[&image]));
}

#[test]
fn an_overlay_of_images_leaves_nothing_but_itself() {
    if !root() {
        return;
    }
    let place = Place::new();
    let rootfs = place.path("rootfs");
    let (upper, lower) = (image(&place, "upper.img"), image(&place, "lower.img"));
    mount(&[on_loop(&lower, &["loop"])], &rootfs, None).unwrap();
    fs::write(rootfs.join("low"), "low").unwrap();
    unmount(&rootfs).unwrap();
    let plain = place.dir("plain");
    fs::write(place.path("plain/plain"), "").unwrap();
    let overlay = RootfsMount {
        fstype: "format/mkdir/overlay".into(),
        source: "overlay".into(),
        target: String::new(),
        options: [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ]
        .map(str::to_owned)
        .to_vec(),
    };
    let mounts = [
        on_loop(&upper, &["rw", "loop"]),
        on_loop(&lower, &["ro", "loop", "noload"]),
        bind(&plain, &["ro", "rbind"]),
        overlay,
    ];
    for written in [false, true] {
        mount(&mounts, &rootfs, None).unwrap();
        assert_eq!(place.mounts(), 1);
        assert!(rootfs.join("low").exists() && rootfs.join("plain").exists());
        assert_eq!(rootfs.join("new").exists(), written, "the upper directory is kept");
        fs::write(rootfs.join("new"), "").unwrap();
        unmount(&rootfs).unwrap();
        assert_eq!(place.mounts(), 0);
        assert!(loop_devices_are_freed(&[&upper, &lower]));
    }
    assert!(!place.path("plain/new").exists());
    // What comes before the failure goes as well.
    let mut broken = mounts.clone();
    broken[3].options.push("nonsense=1".into());
    let text = mount(&broken, &rootfs, None).unwrap_err().to_string();
    assert!(text.contains("nonsense"), "{text}");
    assert_eq!(place.mounts(), 0);
    assert!(loop_devices_are_freed(&[&upper, &lower]));
    // A bind mount of a part, as the native form of a snapshot with one layer.
    let part = RootfsMount {
        fstype: "format/bind".into(),
        source: "{{ mount 0 }}/upper".into(),
        target: String::new(),
        options: vec!["rbind".into(), "ro".into()],
    };
    mount(&[mounts[0].clone(), part], &rootfs, None).unwrap();
    assert!(rootfs.join("new").exists() && !rootfs.join("low").exists());
    unmount(&rootfs).unwrap();
    assert_eq!(place.mounts(), 0);
    assert!(loop_devices_are_freed(&[&upper]));
}

fn users() -> UserIds {
    let mapping = crate::oci::plan::IdMapping { container: 0, host: 100_000, size: 65_536 };
    let mappings = crate::oci::plan::IdMappings { uids: vec![mapping], gids: vec![mapping] };
    UserIds::new(mappings).unwrap()
}

/// As the root of [`users`], in a thread of its own.
fn as_mapped_root(work: impl FnOnce() + Send + 'static) {
    let run = move || {
        crate::sys::credentials::become_file_user(100_000, 100_000).unwrap();
        work();
    };
    std::thread::spawn(run).join().unwrap();
}

fn owner(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    path.symlink_metadata().unwrap().uid()
}

#[test]
fn an_overlay_for_a_user_namespace_keeps_the_ids_on_the_disk() {
    use std::os::unix::fs::chown;
    if !root() {
        return;
    }
    let place = Place::new();
    let rootfs = place.path("rootfs");
    let layers = [place.dir("one"), place.dir("two")];
    for (file, uid) in [("one/of-root", 0), ("two/of-1000", 1000), ("two/gone", 0)] {
        fs::write(place.path(file), "").unwrap();
        chown(place.path(file), Some(uid), Some(uid)).unwrap();
    }
    mount(&[place.overlay(&layers, &["index=off"])], &rootfs, Some(&users())).unwrap();
    assert_eq!(place.mounts(), 1);
    let seen = ["", "of-root", "of-1000"].map(|file| owner(&rootfs.join(file)));
    assert_eq!(seen, [100_000, 100_000, 101_000]);
    let below = rootfs.clone();
    as_mapped_root(move || {
        fs::write(below.join("new"), "").unwrap();
        fs::create_dir(below.join("directory")).unwrap();
        chown(below.join("new"), Some(101_000), None).unwrap();
        // Copied up.
        fs::write(below.join("of-1000"), "changed").unwrap();
        fs::remove_file(below.join("gone")).unwrap();
    });
    let stored =
        ["new", "directory", "of-1000", "gone"].map(|file| owner(&place.path("upper").join(file)));
    assert_eq!(stored, [1000, 0, 1000, 0]);
    assert_eq!([owner(&place.path("upper")), owner(&place.path("work"))], [0, 0]);
    let error = fs::write(rootfs.join("of-the-node"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EOVERFLOW));
    unmount(&rootfs).unwrap();
    assert_eq!(place.mounts(), 0);
}

#[test]
fn what_a_client_has_prepared_is_not_mapped_again() {
    use std::os::unix::fs::chown;
    if !root() {
        return;
    }
    let place = Place::new();
    let rootfs = place.path("rootfs");
    let (lower, upper) = (place.dir("lower"), place.dir("upper"));
    fs::write(place.path("lower/file"), "").unwrap();
    // Chowned as a whole.
    for path in [&lower, &upper, &format!("{lower}/file")] {
        chown(path, Some(100_000), Some(100_000)).unwrap();
    }
    let overlay = place.overlay(std::slice::from_ref(&lower), &[]);
    mount(std::slice::from_ref(&overlay), &rootfs, Some(&users())).unwrap();
    assert_eq!(owner(&rootfs.join("file")), 100_000);
    unmount(&rootfs).unwrap();
    mount(&[bind(&lower, &["rbind"])], &rootfs, Some(&users())).unwrap();
    assert_eq!(owner(&rootfs.join("file")), 100_000);
    unmount(&rootfs).unwrap();
    // Lower layers as they are, to be mapped by the client's options.
    chown(place.path("lower/file"), Some(7), Some(7)).unwrap();
    let mut overlay = overlay;
    overlay.options.extend(["uidmap=0:100000:65536".into(), "gidmap=0:100000:65536".into()]);
    for ids in [Some(users()), None] {
        mount(std::slice::from_ref(&overlay), &rootfs, ids.as_ref()).unwrap();
        assert_eq!(owner(&rootfs.join("file")), 100_007);
        let below = rootfs.clone();
        as_mapped_root(move || fs::write(below.join("new"), "").unwrap());
        assert_eq!(owner(&place.path("upper/new")), 100_000);
        unmount(&rootfs).unwrap();
    }
    overlay.options.pop();
    let text = mount(&[overlay], &rootfs, None).unwrap_err().to_string();
    assert!(text.contains("uidmap="), "{text}");
}

#[test]
fn images_and_directories_are_mapped_as_a_whole() {
    if !root() {
        return;
    }
    let place = Place::new();
    let (rootfs, image, directory) =
        (place.path("rootfs"), image(&place, "image"), place.dir("directory"));
    fs::write(place.path("directory/file"), "").unwrap();
    for mount_ in [on_loop(&image, &["loop"]), bind(&directory, &["rbind"])] {
        mount(&[mount_], &rootfs, Some(&users())).unwrap();
        assert_eq!(owner(&rootfs), 100_000);
        unmount(&rootfs).unwrap();
    }
    mount(&[bind("/proc", &["bind"])], &rootfs, None).unwrap();
    let error = mount(&[bind("/proc", &["bind"])], &rootfs, Some(&users())).unwrap_err();
    assert!(error.to_string().contains("can its file system be id-mapped?"), "{error}");
    unmount(&rootfs).unwrap();
}
