//! The Kubernetes files of `shim-config/`, run as the kubelet would run them. There is no registry here,
//! so images of other content stand in for those that the files name.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use k8s_cri::v1::NamespaceMode;
use yaml_rust2::{Yaml, YamlLoader};

use crate::harness::cri::{Container, Cri, Pod, shipped};
use crate::harness::image;
use crate::harness::node::{Node, Options};
use crate::harness::process::{self, eventually};
use crate::harness::test::Test;
use crate::suites::own_node;

own_node!("workloads", Options { cri: Some("podsandbox"), ..Options::default() };
    the_pod_runs,
    the_deployment_runs,
    the_class_is_complete,
);

/// The documents of a file, by kind.
fn documents(file: &str) -> Vec<Yaml> {
    YamlLoader::load_from_str(shipped(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn document(file: &str, kind: &str) -> Yaml {
    let found =
        documents(file).into_iter().find(|document| document["kind"].as_str() == Some(kind));
    found.unwrap_or_else(|| panic!("{file} has no {kind}"))
}

fn text(yaml: &Yaml) -> &str {
    yaml.as_str().unwrap_or_else(|| panic!("{yaml:?} is no text"))
}

fn list(yaml: &Yaml) -> &[Yaml] {
    yaml.as_vec().map_or(&[], Vec::as_slice)
}

/// A field that this test does not know would not be tested.
#[track_caller]
fn has_only(yaml: &Yaml, known: &[&str]) {
    for (key, _) in yaml.as_hash().expect("an object") {
        assert!(known.contains(&text(key)), "{} is not tested", text(key));
    }
}

/// Thousandths of a processor.
fn millicores(quantity: &Yaml) -> Option<i64> {
    let text = quantity.as_str()?;
    Some(text.strip_suffix('m').expect("in thousandths").parse().expect("a number"))
}

fn bytes(quantity: &Yaml) -> Option<i64> {
    let text = quantity.as_str()?;
    let number: i64 = text.strip_suffix("Mi").expect("in mebibytes").parse().expect("a number");
    Some(number << 20)
}

/// What the kubelet makes of `spec.runtimeClassName`: the handler that containerd is asked for.
fn check_class(spec: &Yaml) {
    let class = document("runtimeclass.yaml", "RuntimeClass");
    assert_eq!(text(&spec["runtimeClassName"]), text(&class["metadata"]["name"]));
}

/// The pod of a specification, as the kubelet asks for it.
fn pod(node: &Node, name: &str, spec: &Yaml) -> Pod {
    has_only(spec, &["runtimeClassName", "shareProcessNamespace", "containers"]);
    check_class(spec);
    let mut pod = Pod::new(node, name);
    if spec["shareProcessNamespace"].as_bool() == Some(true) {
        pod.namespaces[1] = NamespaceMode::Pod;
    }
    pod
}

fn container(spec: &Yaml) -> Container {
    has_only(
        spec,
        &["name", "image", "command", "ports", "readinessProbe", "resources", "securityContext"],
    );
    let command: Vec<&str> = list(&spec["command"]).iter().map(text).collect();
    let mut container = Container::new(text(&spec["name"]), &command);
    container.image = Some(text(&spec["image"]).to_owned());
    let (requests, limits) = (&spec["resources"]["requests"], &spec["resources"]["limits"]);
    container.memory = bytes(&limits["memory"]);
    container.cpu_quota = millicores(&limits["cpu"]).map(|cores| cores * 100);
    container.cpu_shares = millicores(&requests["cpu"]).map(|cores| cores * 1024 / 1000);
    let security = &spec["securityContext"];
    if !security.is_badvalue() {
        has_only(security, &["allowPrivilegeEscalation", "seccompProfile"]);
        container.no_new_privileges = security["allowPrivilegeEscalation"].as_bool() == Some(false);
        container.seccomp = security["seccompProfile"]["type"].as_str() == Some("RuntimeDefault");
    }
    container
}

/// Images of the names in the files: `nginx` serves HTTP, the others do as they are told.
fn import_images(node: &Node, containers: &[Yaml]) {
    for spec in containers {
        let name = text(&spec["image"]);
        let command: &[&str] = match name.contains("nginx") {
            true => &["httpd", "-f", "-h", "/etc", "-p", "80"],
            false => &["sh"],
        };
        let archive = node.root.join("workload.tar");
        image::write_as(name, command, &node.root.join("rootfs"), &archive);
        node.ctr(&["images", "import", &archive.display().to_string()]).ok();
    }
}

/// An answer to `GET /group`, which is in the image.
fn http(address: &str, port: u64) -> String {
    eventually(&format!("{address}:{port} answers"), Duration::from_secs(20), || {
        let mut stream = TcpStream::connect(format!("{address}:{port}")).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(b"GET /group HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.contains("200 OK").then_some(answer)
    })
}

fn check_limits(cri: &Cri, id: &str, container: &Container) {
    let pid = cri.pid(id);
    let value =
        |controller: &str, v1: &str, v2: &str| process::cgroup_value(pid, id, controller, v1, v2);
    if let Some(memory) = container.memory {
        let limit = value("memory", "memory.limit_in_bytes", "memory.max");
        assert_eq!(limit, memory.to_string());
    }
    if let Some(quota) = container.cpu_quota {
        let limit = value("cpu", "cpu.cfs_quota_us", "cpu.max");
        assert_eq!(limit.split_whitespace().next(), Some(quota.to_string().as_str()));
    }
    if let Some(shares) = container.cpu_shares {
        // On cgroup2 as runc converts them; releases differ in the formula.
        let weight: i64 = value("cpu", "cpu.shares", "cpu.weight").parse().expect("a number");
        let converted = 1 + (shares - 2) * 9999 / 262_142;
        assert!(weight == shares || (converted..converted * 8).contains(&weight), "{weight}");
    }
    let flag = |field: &str| process::status_field(pid, field).expect("a field of its status");
    assert_eq!(flag("NoNewPrivs"), u8::from(container.no_new_privileges).to_string());
    assert_eq!(flag("Seccomp"), if container.seccomp { "2" } else { "0" });
}

fn the_pod_runs(t: &Test) {
    let cri = Cri { node: &t.node };
    let file = document("pod.yaml", "Pod");
    let (name, spec) = (text(&file["metadata"]["name"]), &file["spec"]);
    let containers = list(&spec["containers"]);
    import_images(&t.node, containers);
    let pod = pod(&t.node, name, spec);
    let id = cri.run_pod(&pod);
    let (_, address) = cri.pod_status(&id);
    let mut running = Vec::new();
    for spec in containers {
        let container = container(spec);
        let created = cri.run(&id, &pod, &container);
        check_limits(&cri, &created, &container);
        for port in list(&spec["ports"]) {
            let port = port["containerPort"].as_i64().expect("a number");
            assert!(http(&address, port as u64).contains("root:x:0:"));
        }
        // As `kubernetes.md` says.
        let vmid = t.node.pve().vmid_of(&created).expect("it is a CT");
        let configurations = t.node.pve().configurations();
        let text = &configurations.iter().find(|(found, _)| *found == vmid).expect("its file").1;
        assert!(text.contains(&format!("hostname: {name}-{}\n", container.name)), "{text}");
        running.push((created, container));
    }
    // It shares its processes, and the observer sees the server in them and in its network.
    let (observer, _) = &running[1];
    assert_eq!(cri.output(observer, "cat /proc/1/comm"), "pod-sandbox");
    assert_eq!(cri.output(observer, "ps | grep -c '[h]ttpd -f'"), "1");
    let get = "wget -q -O - http://127.0.0.1/group | head -n 1";
    assert_eq!(cri.output(observer, get), "root:x:0:");

    debug(&cri, &id, &pod, &running);

    // What the class says of its cost: the shim, and the monitor of each container.
    let class = document("runtimeclass.yaml", "RuntimeClass");
    let overhead = bytes(&class["overhead"]["podFixed"]["memory"]).expect("memory");
    let shim = t.node.shims("")[0];
    let monitors = running.iter().map(|(id, _)| {
        let parent = process::status_field(cri.pid(id), "PPid").expect("PPid");
        parent.parse::<u32>().expect("a pid")
    });
    let cost: i64 = monitors.chain([shim]).map(private_bytes).sum();
    assert!(cost > 0 && cost < overhead, "{cost} bytes, the class says {overhead}");
    cri.remove_pod(&id);
}

/// The guide's `kubectl debug`: a container that joins the processes of another of a running pod.
fn debug(cri: &Cri, id: &str, pod: &Pod, running: &[(String, Container)]) {
    let guide = shipped("kubernetes.md").lines().map(str::trim);
    let mut words = guide.filter_map(|line| line.strip_prefix("kubectl debug "));
    let words: Vec<&str> = words.next().expect("a debug example").split(' ').collect();
    assert_eq!(words[0], pod.name);
    let option = |name: &str| {
        let value = words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{words:?} without {name}"))
    };
    let target = running.iter().find(|(_, container)| container.name == option("--target"));
    let (target, _) = target.expect("the target is one of the pod");
    let mut container = Container::idle("debugger");
    container.image = Some(option("--image").to_owned());
    container.target = Some(target.clone());
    let debugger = cri.run(id, pod, &container);
    assert_eq!(cri.output(&debugger, "ps | grep -c '[h]ttpd -f'"), "1");
    let get = "wget -q -O - http://127.0.0.1/group | head -n 1";
    assert_eq!(cri.output(&debugger, get), "root:x:0:");
    assert!(cri.node.pve().vmid_of(&debugger).is_some(), "it is a CT");
    cri.stop(&debugger, 1);
    cri.remove(&debugger);
}

/// The memory that a process costs.
fn private_bytes(pid: u32) -> i64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("its memory");
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss");
    let kilobytes: i64 = line.split_whitespace().next().expect("a number").parse().expect("it");
    kilobytes << 10
}

fn the_deployment_runs(t: &Test) {
    let cri = Cri { node: &t.node };
    let file = document("deployment.yaml", "Deployment");
    let template = &file["spec"]["template"];
    let labels = &template["metadata"]["labels"];
    assert_eq!(&file["spec"]["selector"]["matchLabels"], labels);
    let service = document("deployment.yaml", "Service");
    assert_eq!(&service["spec"]["selector"], labels);
    let containers = list(&template["spec"]["containers"]);
    import_images(&t.node, containers);
    let replicas = file["spec"]["replicas"].as_i64().expect("a number");
    let name = text(&file["metadata"]["name"]);
    let mut addresses = Vec::new();
    for replica in 0..replicas {
        let pod = pod(&t.node, &format!("{name}-{replica}"), &template["spec"]);
        let id = cri.run_pod(&pod);
        let (_, address) = cri.pod_status(&id);
        for spec in containers {
            let container = container(spec);
            let created = cri.run(&id, &pod, &container);
            check_limits(&cri, &created, &container);
        }
        addresses.push(address);
    }
    // The Service's port is one of the container's, and so is that of its probe.
    let ports = list(&containers[0]["ports"]);
    let number = |name: &Yaml| {
        let port = ports.iter().find(|port| port["name"] == *name).expect("a port of this name");
        port["containerPort"].as_i64().expect("a number") as u64
    };
    let target = number(&service["spec"]["ports"][0]["targetPort"]);
    let probe = &containers[0]["readinessProbe"]["httpGet"];
    assert_eq!((number(&probe["port"]), text(&probe["path"])), (target, "/"));
    addresses.iter().for_each(|address| {
        http(address, target);
    });
    assert_eq!(t.node.shims("").len() as i64, replicas);
    cri.pods().iter().for_each(|pod| cri.remove_pod(pod));
}

fn the_class_is_complete(t: &Test) {
    let class = document("runtimeclass.yaml", "RuntimeClass");
    has_only(&class, &["apiVersion", "kind", "metadata", "handler", "overhead", "scheduling"]);
    assert_eq!(text(&class["apiVersion"]), "node.k8s.io/v1");
    assert!(millicores(&class["overhead"]["podFixed"]["cpu"]).is_some());
    // Both configurations of containerd have the runtime that it selects.
    for file in ["containerd-1.toml", "containerd-2.toml"] {
        let table = format!(".containerd.runtimes.{}]", text(&class["handler"]));
        assert!(shipped(file).lines().any(|line| line.ends_with(&table)), "{file}");
    }
    // The label that it wants on a node is the one that the guide has the administrator set.
    let selector = class["scheduling"]["nodeSelector"].as_hash().expect("an object");
    assert_eq!(selector.len(), 1);
    for (key, value) in selector {
        let label = format!("kubectl label node NODE {}={}", text(key), text(value));
        assert!(shipped("kubernetes.md").contains(&label), "{label}");
    }
    // A pod of an unknown class is nobody's.
    let cri = Cri { node: &t.node };
    let refused = cri.try_run_pod_of(&Pod::new(&t.node, "other"), "unknown".to_owned());
    refused.expect_err("there is no such handler");
}
