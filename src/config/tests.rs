use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

const MINIMAL: &str = "[proxmox]\nendpoint = \"https://127.0.0.1:8006\"\nnode = \"pve1\"\n";
const PAIRS: &str = "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:\
                     00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff";

fn error(text: &str) -> String {
    let error = Config::from_toml(text, "/etc/x.toml").expect_err(text).to_string();
    assert!(error.starts_with("/etc/x.toml: "), "{error}");
    assert!(!error.contains('\n'), "not one line: {error}");
    error
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = Config::from_toml(MINIMAL, "x").unwrap();
    let p = &config.proxmox;
    assert_eq!(p.endpoints, ["https://127.0.0.1:8006"]);
    assert_eq!(p.login, Login::Token("/etc/containerd-shim-proxmox/token".into()));
    assert_eq!(p.trust, Trust::SystemRoots);
    assert_eq!(p.pmxcfs, Path::new("/etc/pve"));
    let times = [p.connect_timeout, p.request_timeout, p.task_timeout, config.ct.start_timeout];
    assert_eq!(times.map(|t| t.as_secs()), [5, 30, 60, 30]);
    assert_eq!(config.ct.vmid_range.to_string(), "90000-99999");
    assert_eq!(config.ct.tags, ["containerd"]);
    assert_eq!(config.paths.run_dir, Path::new("/run/containerd-shim-proxmox"));
    assert_eq!(config.paths.state_dir, Path::new("/var/lib/containerd-shim-proxmox"));
    assert_eq!(config.log.level, log::LevelFilter::Info);
}

#[test]
fn the_shipped_file_is_the_defaults_and_names_every_key() {
    let shipped = Config::from_toml(SHIPPED, "x").unwrap();
    let ca = Trust::CaFile("/etc/pve/pve-root-ca.pem".into());
    let mut expected =
        Config::from_toml("[proxmox]\nendpoint = \"https://127.0.0.1:8006\"\n", "x").unwrap();
    expected.proxmox.trust = ca;
    assert_eq!(shipped, expected);
    // Each commented key works when its comment sign is removed.
    for key in ["node", "init"] {
        let text = SHIPPED.replace(&format!("#{key} ="), &format!("{key} ="));
        assert_ne!(text, SHIPPED);
        Config::from_toml(&text, "x").unwrap();
    }
    let text = SHIPPED.replace("#endpoint =", "endpoint =").replace("\nendpoint = \"", "\n#");
    assert_eq!(Config::from_toml(&text, "x").unwrap().proxmox.endpoints.len(), 2);
    let text = SHIPPED.replace("\ntoken_file", "\n#").replace("#password_file", "password_file");
    let login = Config::from_toml(&text, "x").unwrap().proxmox.login;
    assert_eq!(login, Login::Password("/etc/containerd-shim-proxmox/password".into()));
    assert!(SHIPPED.contains("#fingerprint ="));
}

#[test]
fn every_value_can_be_set() {
    let text = format!(
        "[proxmox]\nendpoint = \"https://pve.example.com/\"\nnode = \"n2\"\ntoken_file = \"/a\"\n\
         fingerprint = \"{PAIRS}\"\npmxcfs = \"/p\"\nconnect_timeout = 1\nrequest_timeout = 2\n\
         task_timeout = 3\n[ct]\nvmid_range = \"100-200\"\ntags = []\nrootfs = \"snapshot\"\n\
         network = \"namespace\"\nplacement = \"local\"\nabstract_sockets = \"shared\"\nunprivileged = true\nstart_timeout = 4\n[paths]\n\
         run_dir = \"/r\"\nstate_dir = \"/s\"\ninit = \"/i\"\n[log]\nlevel = \"trace\"\n"
    );
    let config = Config::from_toml(&text, "x").unwrap();
    assert_eq!(config.proxmox.endpoints, ["https://pve.example.com:8006"]);
    assert_eq!(config.proxmox.login, Login::Token("/a".into()));
    let Trust::Fingerprints(fingerprints) = config.proxmox.trust else { panic!() };
    assert_eq!(fingerprints.len(), 1);
    assert_eq!(fingerprints[0].to_string(), PAIRS.to_uppercase());
    assert_eq!(config.paths.init.as_deref(), Some(Path::new("/i")));
    assert_eq!(config.log.level, log::LevelFilter::Trace);
    assert!(config.ct.tags.is_empty());
    assert_eq!(config.ct.abstract_sockets, AbstractSockets::Shared);
    assert!(config.ct.unprivileged);
}

#[test]
fn endpoints_and_fingerprints_may_be_several() {
    let other = PAIRS.replace("00:11", "FF:11");
    let text = format!(
        "[proxmox]\nendpoint = [\"https://A\", \"https://[::1]:443/\", \"https://192.0.2.1:8007\"]\n\
         fingerprint = [\"{PAIRS}\", \"{other}\"]\npassword_file = \"/p\"\n"
    );
    let p = Config::from_toml(&text, "x").unwrap().proxmox;
    assert_eq!(p.endpoints, ["https://a:8006", "https://[::1]:443", "https://192.0.2.1:8007"]);
    let Trust::Fingerprints(fingerprints) = p.trust else { panic!() };
    assert_eq!(fingerprints[1].to_string(), other.to_uppercase());
    assert_eq!(p.login, Login::Password("/p".into()));
}

#[test]
fn each_mistake_names_the_key_and_the_remedy() {
    let with = |line: &str| format!("{MINIMAL}{line}\n");
    let table: &[(String, &[&str])] = &[
        (String::new(), &["proxmox.endpoint: is missing", "endpoint = "]),
        ("x".into(), &["line 1: "]),
        (format!("{MINIMAL}[ct]\nvmid_range = \"a\nb\""), &["line 6: "]),
        ("proxmox = 1".into(), &["proxmox: expected a table", "[proxmox]"]),
        (format!("top = 1\n{MINIMAL}"), &["top: unknown key", "proxmox, ct, paths, log"]),
        (with("[nope]\na = 1"), &["nope: unknown key", "proxmox, ct, paths, log"]),
        (with("tokenfile = \"/x\""), &["proxmox.tokenfile: unknown key", "token_file"]),
        (with("\"a\\nb\" = 1"), &["proxmox.a\\nb: unknown key"]),
        (with("insecure = true"), &["proxmox.insecure: unknown key"]),
        (with("token = \"planted-secret\""), &["proxmox.token: unknown key", "token_file"]),
        (
            "[proxmox]\nendpoint = 8006".into(),
            &["proxmox.endpoint: expected a string", "https://127.0.0.1:8006"],
        ),
        ("[proxmox]\nendpoint = \"\"".into(), &["proxmox.endpoint: must not be empty"]),
        (
            "[proxmox]\nendpoint = \"http://x:8006\"".into(),
            &["proxmox.endpoint: ", "not an https URL", "https://HOST:8006"],
        ),
        (
            "[proxmox]\nendpoint = \"pve1:8006\"".into(),
            &["proxmox.endpoint: ", "https://HOST:8006"],
        ),
        ("[proxmox]\nendpoint = \"https://\"".into(), &["proxmox.endpoint: ", "https://HOST:8006"]),
        (
            "[proxmox]\nendpoint = \"https://x:8006/api2/json\"".into(),
            &["proxmox.endpoint: ", "after the host"],
        ),
        (
            "[proxmox]\nendpoint = \"https://root:planted-secret@x:8006\"".into(),
            &["proxmox.endpoint: ", "token_file"],
        ),
        (
            "[proxmox]\nendpoint = \"https://root:planted-secret@x:99999\"".into(),
            &["proxmox.endpoint: ", "token_file"],
        ),
        ("[proxmox]\nendpoint = []".into(), &["proxmox.endpoint: must not be empty"]),
        (
            "[proxmox]\nendpoint = [\"https://x\", 1]".into(),
            &["proxmox.endpoint: expected a string", "got a number"],
        ),
        (
            "[proxmox]\nendpoint = [\"https://x\", \"https://X:8006/\"]".into(),
            &["proxmox.endpoint: names 'https://x:8006' twice"],
        ),
        (
            "[proxmox]\nendpoint = \"https://x:99999\"".into(),
            &["proxmox.endpoint: ", "https://HOST:8006"],
        ),
        ("[proxmox]\nendpoint = \"https://x#y\"".into(), &["proxmox.endpoint: ", "after the host"]),
        ("[proxmox]\nendpoint = \"https://x:\"".into(), &["proxmox.endpoint: ", "no port"]),
        (
            "[proxmox]\nendpoint = \"https://x?a=b\"".into(),
            &["proxmox.endpoint: ", "after the host"],
        ),
        ("[proxmox]\nendpoint = \"https://-x-:1\"".into(), &["proxmox.endpoint: ", "no host"]),
        (
            with("token_file = \"/a\"\npassword_file = \"/b\""),
            &["proxmox.password_file: cannot be set together with proxmox.token_file"],
        ),
        (
            "[proxmox]\nendpoint = \"https://x\"\nnode = \"a.b\"".into(),
            &["proxmox.node: 'a.b' is not a node name"],
        ),
        ("[proxmox]\nendpoint = \"https://x\"\nnode = \"../x\"".into(), &["proxmox.node: "]),
        (
            with("token_file = \"token\""),
            &[
                "proxmox.token_file: 'token' is not an absolute path",
                "/etc/containerd-shim-proxmox/token",
            ],
        ),
        (
            with("fingerprint = \"AA:BB\""),
            &[
                "proxmox.fingerprint: expected 32 hexadecimal pairs such as AA:BB:…",
                "pvenode cert info",
            ],
        ),
        (
            with(&format!("fingerprint = \"{}\"", PAIRS.replace(':', ""))),
            &["proxmox.fingerprint: "],
        ),
        (with(&format!("fingerprint = \"{PAIRS}:00\"")), &["proxmox.fingerprint: "]),
        (
            with(&format!("fingerprint = \"{PAIRS}\"\nca_file = \"/x\"")),
            &["proxmox.ca_file: cannot be set together with proxmox.fingerprint; remove one"],
        ),
        (
            with("connect_timeout = 0"),
            &["proxmox.connect_timeout: ", "seconds from 1 to 300", "got 0"],
        ),
        (with("request_timeout = -1"), &["proxmox.request_timeout: ", "got -1"]),
        (with("task_timeout = \"60\""), &["proxmox.task_timeout: ", "such as 60", "got a string"]),
        (with("task_timeout = 1.5"), &["proxmox.task_timeout: ", "got a fraction"]),
        (
            with("[ct]\nvmid_range = \"99-200\""),
            &["ct.vmid_range: '99-200'", "100 <= FIRST <= LAST <= 999999999"],
        ),
        (with("[ct]\nvmid_range = \"300-200\""), &["ct.vmid_range: "]),
        (with("[ct]\nvmid_range = \"100-1000000000\""), &["ct.vmid_range: "]),
        (with("[ct]\nvmid_range = 100"), &["ct.vmid_range: expected a string"]),
        (with("[ct]\ntags = \"containerd\""), &["ct.tags: expected a list", "got a string"]),
        (with("[ct]\ntags = [\"a\", 1]"), &["ct.tags: expected a list", "a number in it"]),
        (with("[ct]\ntags = [\"a b\"]"), &["ct.tags: 'a b' is not a Proxmox tag", "letters"]),
        (with("[ct]\ntags = [\"-a\"]"), &["ct.tags: '-a'"]),
        (with("[ct]\ntags = [\"\"]"), &["ct.tags: ''"]),
        (with("[ct]\ntags = [\"a;b\"]"), &["ct.tags: 'a;b'"]),
        (with("[ct]\ntags = [\"a\\nlxc.hook.pre-start: x\"]"), &["ct.tags: 'a\\nlxc"]),
        (
            with("[ct]\nrootfs = \"volume\""),
            &["ct.rootfs: \"volume\" is not supported yet", "\"snapshot\""],
        ),
        (with("[ct]\nrootfs = \"nfs\""), &["ct.rootfs: 'nfs' is not a value", "\"snapshot\""]),
        (with("[ct]\nnetwork = \"bridge\""), &["ct.network: \"bridge\" is not supported yet"]),
        (with("[ct]\nplacement = \"remote\""), &["ct.placement: \"remote\" is not supported yet"]),
        (with("[ct]\nstart_timeout = 0"), &["ct.start_timeout: "]),
        (
            with("[ct]\nbridge = \"vmbr0\""),
            &["ct.bridge: unknown key", "the keys of [ct] are vmid_range"],
        ),
        (with("[paths]\nrun_dir = \"run\""), &["paths.run_dir: 'run' is not an absolute path"]),
        (with("[paths]\nrun_dir = \"/a b\""), &["paths.run_dir: '/a b' contains white space"]),
        (
            with("[paths]\nrun_dir = \"/a\\tb\""),
            &["paths.run_dir: must not contain control characters"],
        ),
        (
            with("[paths]\nrun_dir = \"/a\\nlxc.hook.start-host=/x\""),
            &["paths.run_dir: must not contain control characters"],
        ),
        (with("[paths]\nrun_dir = \"/a/../b\""), &["paths.run_dir: ", "'..'"]),
        (with("[paths]\nstate_dir = \"/a\\\"b\""), &["paths.state_dir: ", "quote"]),
        (with("[paths]\ninit = \"/a\\u00a0b\""), &["paths.init: ", "white space"]),
        (with("[log]\nlevel = \"loud\""), &["log.level: 'loud'", "\"info\""]),
        (with("[log]\nlevel = 3"), &["log.level: expected a string"]),
    ];
    for (text, parts) in table {
        let error = error(text);
        for part in *parts {
            assert!(error.contains(part), "{text}\n-> {error}\nlacks {part}");
        }
        assert!(!error.contains("planted-secret"), "{error}");
    }
}

#[test]
fn a_missing_file_is_named_with_the_remedy() {
    let error = Config::load(Path::new("/nonexistent/config.toml")).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/config.toml: cannot be read: "), "{error}");
    assert!(error.contains("config_path"), "{error}");
}

#[test]
fn runtime_options_choose_body_over_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, MINIMAL).unwrap();
    let by_path = RuntimeOptions { config_path: Some(path.clone()), config_body: None };
    assert_eq!(Config::resolve(Some(&by_path)).unwrap().origin, path.display().to_string());
    let body = MINIMAL.replace("pve1", "other");
    let both = RuntimeOptions { config_body: Some(body), ..by_path };
    let config = Config::resolve(Some(&both)).unwrap();
    assert_eq!(config.proxmox.node, "other");
    assert!(config.origin.contains("config_body"));
    let bad = RuntimeOptions { config_body: Some("[proxmox]".into()), config_path: None };
    let error = Config::resolve(Some(&bad)).unwrap_err().to_string();
    assert!(error.starts_with("config_body of the runtime options: proxmox.endpoint: "), "{error}");
}

#[test]
fn init_is_found_as_configured_or_beside_the_shim() {
    let dir = tempfile::tempdir().unwrap();
    let exe = dir.path().join("containerd-shim-proxmox-v2");
    let init = dir.path().join("proxmox-shim-init");
    let mut config = Config::from_toml(MINIMAL, "/etc/x.toml").unwrap();

    std::fs::write(&init, "").unwrap();
    let error = config.init_path_beside(Some(&exe)).err().map(|e| e.to_string());
    if let Some(error) = error {
        // Not executable, and none is installed: all places are named.
        assert!(
            error.contains(init.to_str().unwrap()) && error.contains(INSTALLED_INIT),
            "{error}"
        );
    }
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(config.init_path_beside(Some(&exe)).unwrap(), init);

    // A configured path is never replaced by another.
    config.paths.init = Some(dir.path().join("none"));
    let error = config.init_path_beside(Some(&exe)).unwrap_err().to_string();
    assert!(error.starts_with("/etc/x.toml: paths.init: "), "{error}");
    assert!(!error.contains(INSTALLED_INIT), "{error}");
}

proptest! {
    #[test]
    fn no_text_makes_it_panic_or_speak_two_lines(text in "(\\PC|\n){0,200}") {
        if let Err(error) = Config::from_toml(&text, "x") {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }

    #[test]
    fn accepted_paths_are_safe_in_an_lxc_configuration(path in "/(\\PC|\n|\t){0,40}") {
        // JSON's escapes are TOML's too.
        let quoted = serde_json::to_string(&path).unwrap();
        let text = format!("{MINIMAL}[paths]\nrun_dir = {quoted}\n");
        if let Ok(config) = Config::from_toml(&text, "x") {
            prop_assert_eq!(config.paths.run_dir.as_path(), Path::new(&path));
            prop_assert!(!path.contains(|c: char| c.is_whitespace() || c.is_control() || "\"'\\#".contains(c)));
        }
    }
}
