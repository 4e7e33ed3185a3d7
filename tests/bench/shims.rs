//! `make bench`: this shim beside Debian's `containerd-shim-runc-v2`, in one run and interleaved,
//! so that both see the same machine in the same state.
//!
//! Single steps are timed by driving the shims' own API, with one driver for both; whole
//! `ctr run --rm` goes through containerd. Ours is measured with a simulator that answers at once
//! and, where Proxmox takes part, also with one that has the delays of a real node.
//!
//! Environment: those of the end-to-end suites (`harness::node::Setting`), and
//! `BENCH_ROUNDS` (20), `BENCH_STDOUT_MIB` (1024).

#[path = "../e2e/harness/mod.rs"]
mod harness;
#[path = "../simulator/trust.rs"]
mod trust;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::direct::{Driver, Shim, Stdio3};
use harness::node::{Node, Options, Setting};
use harness::process::{self, Running};
use harness::{image, sys};
use serde_json::{Value, json};

/// How long a shim is left alone before its memory is taken again.
const IDLE: Duration = Duration::from_secs(7);

const RUNC: &str = "io.containerd.runc.v2";

/// Who is measured. The order is that of the table's columns.
const OURS: usize = 0;
const RUNC_COLUMN: usize = 1;
const OURS_NODE: usize = 2;
const COLUMNS: [&str; 3] = ["ours", "runc", "ours, node's delays"];

struct Subject<'a> {
    column: usize,
    runtime: String,
    node: &'a Node,
    driver: Driver<'a>,
}

/// Samples by metric and column, in the order the metrics first appeared.
#[derive(Default)]
struct Results {
    metrics: Vec<(&'static str, &'static str)>,
    samples: BTreeMap<(&'static str, usize), Vec<f64>>,
}

impl Results {
    fn add(&mut self, metric: &'static str, unit: &'static str, column: usize, value: f64) {
        if !self.metrics.iter().any(|(name, _)| *name == metric) {
            self.metrics.push((metric, unit));
        }
        self.samples.entry((metric, column)).or_default().push(value);
    }

    fn time(&mut self, metric: &'static str, column: usize, value: Duration) {
        self.add(metric, "ms", column, value.as_secs_f64() * 1000.0);
    }

    fn summary(&self, metric: &str, column: usize) -> Option<Summary> {
        let (_, samples) =
            self.samples.iter().find(|((name, of), _)| *name == metric && *of == column)?;
        Summary::of(samples)
    }
}

struct Summary {
    median: f64,
    low: f64,
    high: f64,
    count: usize,
}

impl Summary {
    fn of(samples: &[f64]) -> Option<Summary> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            *sorted.get(middle)?
        } else {
            (sorted.get(middle.checked_sub(1)?)? + sorted.get(middle)?) / 2.0
        };
        Some(Summary { median, low: *sorted.first()?, high: *sorted.last()?, count: sorted.len() })
    }

    fn json(&self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        json!({"min": round(self.low), "max": round(self.high), "samples": self.count})
    }
}

fn main() -> ExitCode {
    // `cargo bench` passes --bench, `cargo test --benches` nothing: only the first one means us.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let setting = Setting::from_environment();
    let number = |name: &str, default: usize| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (rounds, mebibytes) = (number("BENCH_ROUNDS", 20), number("BENCH_STDOUT_MIB", 1024));
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    sys::on_termination(|signal| {
        harness::node::tear_down_all();
        std::process::exit(128 + signal);
    });
    let quick = Node::start(&setting, Options::default());
    let slow = setting.is_proxmox().then(|| {
        Node::start(&setting, Options { profile: "node".to_owned(), ..Options::default() })
    });
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut results = Results::default();
        measure(&quick, slow.as_deref(), rounds, mebibytes, &mut results);
        results
    }));
    for node in std::iter::once(&quick).chain(slow.as_ref()) {
        node.tear_down(outcome.is_err());
    }
    match outcome {
        Ok(results) => {
            print!("{}", table(&results));
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench/summary.json");
            fs::create_dir_all(path.parent().expect("it has a parent"))
                .expect("create the directory");
            let text = serde_json::to_string_pretty(&summary(&results)).expect("it is JSON");
            fs::write(&path, text + "\n").expect("write the summary");
            println!("\nwritten to {}", path.display());
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn subject<'a>(column: usize, runtime: &str, node: &'a Node) -> Subject<'a> {
    let driver = Driver::new(node, runtime, &node.root.join(format!("b{column}")));
    Subject { column, runtime: runtime.to_owned(), node, driver }
}

fn measure(
    quick: &Arc<Node>,
    slow: Option<&Node>,
    rounds: usize,
    mebibytes: usize,
    results: &mut Results,
) {
    let ours = quick.setting.runtime.clone();
    let subjects: Vec<Subject> = [
        Some(subject(OURS, &ours, quick)),
        Some(subject(RUNC_COLUMN, RUNC, quick)),
        slow.map(|node| subject(OURS_NODE, &ours, node)),
    ]
    .into_iter()
    .flatten()
    .collect();
    // The node's delays matter only where Proxmox takes part.
    let without_proxmox = || subjects.iter().filter(|subject| subject.column != OURS_NODE);

    // The first round fills caches and is not counted.
    for round in 0..=rounds {
        for subject in &subjects {
            let mut scrap = Results::default();
            let into = if round == 0 { &mut scrap } else { &mut *results };
            lifecycle(subject, &format!("l{round}"), into);
        }
    }
    progress("lifecycle");
    for round in 0..=rounds {
        for subject in &subjects {
            let took = ctr_runs(subject, 1, round);
            if round > 0 {
                results.time("ctr run --rm", subject.column, took);
            }
        }
    }
    progress("ctr run");
    for round in 0..=rounds {
        for members in [1, 5] {
            for subject in &subjects {
                let mut scrap = Results::default();
                let into = if round == 0 { &mut scrap } else { &mut *results };
                // Memory varies little, and each look at it takes a while.
                let idles = (1..=3).contains(&round) && subject.column != OURS_NODE;
                pod(subject, members, &format!("pod{members}-{round}"), idles, into);
            }
        }
    }
    progress("pods");
    for (count, start, run, repeat) in [
        (8, "create+start, 8 at once", "ctr run --rm, 8 at once", rounds.div_ceil(4)),
        (32, "create+start, 32 at once", "ctr run --rm, 32 at once", rounds.div_ceil(7)),
    ] {
        for round in 0..repeat {
            for subject in &subjects {
                let took = parallel_starts(subject, count, round, results);
                results.time(start, subject.column, took);
                let took = ctr_runs(subject, count, 1000 + round);
                results.time(run, subject.column, took);
            }
        }
        progress(start);
    }
    for (metric, block) in [("stdout, 4 KiB blocks", 4096), ("stdout, 1 MiB blocks", 1 << 20)] {
        for round in 0..3 {
            for subject in without_proxmox() {
                let speed = throughput(subject, mebibytes, block, round);
                results.add(metric, "MiB/s", subject.column, speed);
            }
        }
        progress(metric);
    }
    for subject in without_proxmox() {
        let binary = quick.setting.shim_binary(&subject.runtime);
        let bytes = fs::metadata(&binary).map(|meta| meta.len()).unwrap_or(0);
        results.add("size of the binary", "MiB", subject.column, bytes as f64 / f64::from(1 << 20));
    }
}

fn progress(what: &str) {
    eprintln!("measured: {what}");
}

/// One container from nothing to nothing, each step timed, with execs and memory in between.
fn lifecycle(subject: &Subject, id: &str, results: &mut Results) {
    let (driver, column) = (&subject.driver, subject.column);
    let spec = driver.spec(id, &["sleep", "1000"]);
    let begin = Instant::now();
    let shim = driver.start(id, &spec);
    let bootstrapped = Instant::now();
    shim.create(&Stdio3::default()).expect("create");
    let created = Instant::now();
    shim.start("").expect("start");
    let started = Instant::now();
    results.time("create+start", column, started - begin);
    results.time("  of it: shim start", column, bootstrapped - begin);
    results.time("  of it: create", column, created - bootstrapped);
    results.time("  of it: start", column, started - created);
    for number in 0..3 {
        execute(subject, &shim, &format!("e{number}"), results);
    }
    if let Ok(reply) = shim.connect() {
        memory(reply.shim_pid, "1 container", column, results);
    }
    let kill = Instant::now();
    shim.kill("", 9, false).expect("kill");
    let (_, exited) = driver.events.wait_exit(id, id);
    results.time("kill to exit event", column, exited - kill);
    let delete = Instant::now();
    shim.delete("").expect("delete");
    results.time("delete", column, delete.elapsed());
    shim.finish();
    driver.remove_bundle(id);
}

/// A pod sandbox and the containers that join it, one after the other as the kubelet starts them.
fn pod(subject: &Subject, members: usize, id: &str, idles: bool, results: &mut Results) {
    let [ready, gone, memory, idle] = match members {
        1 => [
            "pod of 1, until it is ready",
            "pod of 1, delete",
            "PSS of a pod's shim, 1 container",
            "  of it: after 7 s without a call",
        ],
        _ => [
            "pod of 5, until it is ready",
            "pod of 5, delete",
            "PSS of a pod's shim, 5 containers",
            "  of them: after 7 s without a call",
        ],
    };
    let (driver, column) = (&subject.driver, subject.column);
    let annotations = |kind: &str| {
        json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": id,
        })
    };
    let begin = Instant::now();
    let mut spec = driver.spec(id, &["sleep", "1000"]);
    spec["annotations"] = annotations("sandbox");
    let kinds = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
    ]);
    let sandbox = driver.start(id, &spec);
    let pid = sandbox.create(&Stdio3::default()).expect("create the sandbox");
    sandbox.start("").expect("start the sandbox");
    let mut containers = Vec::new();
    for number in 0..members {
        let name = format!("{id}-{number}");
        let mut spec = driver.spec(&name, &["sleep", "1000"]);
        spec["annotations"] = annotations("container");
        let shared = kinds
            .map(|(kind, file)| json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")}));
        let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "pid"})];
        namespaces.extend(shared);
        spec["linux"]["namespaces"] = json!(namespaces);
        let container = driver.join(&name, &spec, &sandbox);
        container.create(&Stdio3::default()).expect("create a container");
        container.start("").expect("start a container");
        containers.push(container);
    }
    results.time(ready, column, begin.elapsed());
    let shim = sandbox.connect().expect("connect").shim_pid;
    if let Some(kilobytes) = pss_of(shim) {
        results.add(memory, "kB", column, kilobytes);
    }
    if idles {
        std::thread::sleep(IDLE);
        if let Some(kilobytes) = pss_of(shim) {
            results.add(idle, "kB", column, kilobytes);
        }
    }
    let begin = Instant::now();
    for shim in containers.iter().chain([&sandbox]) {
        shim.kill("", 9, false).expect("kill");
        shim.wait("").expect("wait");
        shim.delete("").expect("delete");
    }
    sandbox.shutdown();
    process::eventually("the shim ends", Duration::from_secs(5), || {
        (!process::is_alive(shim)).then_some(())
    });
    results.time(gone, column, begin.elapsed());
    containers.iter().chain([&sandbox]).for_each(|shim| driver.remove_bundle(&shim.id));
}

fn execute(subject: &Subject, shim: &Shim, exec: &str, results: &mut Results) {
    let process = json!({
        "args": ["probe", "true"],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    });
    let begin = Instant::now();
    shim.exec(exec, &process, &Stdio3::default()).expect("exec");
    shim.start(exec).expect("start of the exec");
    results.time("exec to started", subject.column, begin.elapsed());
    let (_, exited) = subject.driver.events.wait_exit(&shim.id, exec);
    results.time("exec to exit event", subject.column, exited - begin);
    shim.delete(exec).expect("delete of the exec");
}

/// Proportional memory and threads of one shim.
fn memory(pid: u32, what: &str, column: usize, results: &mut Results) {
    let (pss, threads) = match what {
        "1 container" => ("PSS of a shim, 1 container", "threads of a shim"),
        _ => ("PSS of a shim, 32 containers", "threads of a shim, 32 containers"),
    };
    if let Some(kilobytes) = pss_of(pid) {
        results.add(pss, "kB", column, kilobytes);
    }
    let count = process::status_field(pid, "Threads").and_then(|text| text.parse().ok());
    results.add(threads, "threads", column, count.unwrap_or(0.0));
}

fn pss_of(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Starts `count` containers at once; the time until the last one runs. With 32 of them the
/// shims' memory is taken.
fn parallel_starts(
    subject: &Subject,
    count: usize,
    round: usize,
    results: &mut Results,
) -> Duration {
    let driver = &subject.driver;
    let ids: Vec<String> = (0..count).map(|number| format!("p{count}-{round}-{number}")).collect();
    let begin = Instant::now();
    let shims: Vec<(Shim, u32)> = std::thread::scope(|scope| {
        let threads: Vec<_> = ids
            .iter()
            .map(|id| {
                scope.spawn(move || {
                    let shim = driver.start(id, &driver.spec(id, &["sleep", "1000"]));
                    let pid = shim.create(&Stdio3::default()).expect("create");
                    shim.start("").expect("start");
                    (shim, pid)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a start failed")).collect()
    });
    let took = begin.elapsed();
    if count == 32 {
        for (shim, pid) in &shims {
            if let Ok(reply) = shim.connect() {
                memory(reply.shim_pid, "32 containers", subject.column, results);
            }
            // What a container costs beside its shim: LXC's monitor. runc leaves none.
            let monitor = process::status_field(*pid, "PPid").and_then(|text| text.parse().ok());
            let kilobytes = monitor
                .filter(|monitor| comm(*monitor).contains("lxc"))
                .and_then(pss_of)
                .unwrap_or(0.0);
            results.add("PSS of a monitor, 32 containers", "kB", subject.column, kilobytes);
        }
    }
    std::thread::scope(|scope| {
        for (shim, _) in &shims {
            scope.spawn(move || shim.finish());
        }
    });
    ids.iter().for_each(|id| driver.remove_bundle(id));
    took
}

fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
}

/// `ctr run --rm … true`, `count` at once; the time until the last one has ended.
fn ctr_runs(subject: &Subject, count: usize, round: usize) -> Duration {
    let begin = Instant::now();
    let running: Vec<_> = (0..count)
        .map(|number| {
            let id = format!("c{}-{round}-{number}", subject.column);
            let mut ctr = subject.node.ctr_command();
            ctr.arg("run").args(subject.node.flags_for(&subject.runtime));
            ctr.arg("--fifo-dir").arg(subject.node.root.join("fifo"));
            ctr.args(["--rm", image::IMAGE, &id, "true"]);
            Running::spawn(&mut ctr, None)
        })
        .collect();
    for run in running {
        run.wait().ok();
    }
    begin.elapsed()
}

/// MiB per second from the first byte to the last, through a FIFO as containerd's clients use it.
fn throughput(subject: &Subject, mebibytes: usize, block: usize, round: usize) -> f64 {
    let driver = &subject.driver;
    let (id, total) = (format!("s{block}-{round}"), mebibytes << 20);
    let arguments = ["probe", "flood", &total.to_string(), &block.to_string()];
    let fifo = subject.node.root.join(format!("{id}-{}.out", subject.column));
    sys::mkfifo(&fifo);
    // runc's shim wants both streams; nothing comes through this one.
    let errors = fifo.with_extension("err");
    sys::mkfifo(&errors);
    let held = File::options().read(true).write(true).open(&errors).expect("open the FIFO");
    let path = fifo.clone();
    let reader = std::thread::spawn(move || {
        let mut file = File::open(path).expect("open the FIFO");
        let mut buffer = vec![0u8; 1 << 20];
        let (mut got, mut first, mut last) = (0usize, None, Instant::now());
        while got < total {
            match file.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(count) => got += count,
            }
            last = Instant::now();
            first.get_or_insert(last);
        }
        (got, last - first.unwrap_or(last))
    });
    let shim = driver.start(&id, &driver.spec(&id, &arguments));
    let io = Stdio3 {
        stdout: fifo.display().to_string(),
        stderr: errors.display().to_string(),
        ..Stdio3::default()
    };
    shim.create(&io).expect("create");
    shim.start("").expect("start");
    let (got, took) = reader.join().expect("the reader failed");
    assert_eq!(got, total, "bytes that arrived");
    assert_eq!(shim.wait("").expect("wait").exit_status, 0);
    shim.finish();
    driver.remove_bundle(&id);
    drop(held);
    for path in [fifo, errors] {
        let _ = fs::remove_file(path);
    }
    mebibytes as f64 / took.as_secs_f64()
}

fn table(results: &Results) -> String {
    let mut text = format!(
        "\n{:<34} {:>24} {:>24} {:>7}  {:>24}\n",
        "median (min-max)", COLUMNS[OURS], COLUMNS[RUNC_COLUMN], "ratio", COLUMNS[OURS_NODE]
    );
    for (metric, unit) in &results.metrics {
        let cell = |column| match results.summary(metric, column) {
            Some(s) => format!("{} ({}-{})", short(s.median), short(s.low), short(s.high)),
            None => "-".to_owned(),
        };
        let ratio = ratio(results, metric).map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        text += &format!(
            "{:<34} {:>24} {:>24} {:>7}  {:>24}\n",
            format!("{metric} [{unit}]"),
            cell(OURS),
            cell(RUNC_COLUMN),
            ratio,
            cell(OURS_NODE)
        );
    }
    text
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn ratio(results: &Results, metric: &str) -> Option<f64> {
    let ours = results.summary(metric, OURS)?.median;
    let runc = results.summary(metric, RUNC_COLUMN)?.median;
    (runc != 0.0).then(|| ours / runc)
}

fn summary(results: &Results) -> Value {
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    let mut all = serde_json::Map::new();
    for (metric, unit) in &results.metrics {
        let median =
            |column| results.summary(metric, column).map(|summary| json!(round(summary.median)));
        let mut entry = json!({
            "ours": median(OURS),
            "runc": median(RUNC_COLUMN),
            "ratio": ratio(results, metric).map(round),
            "unit": unit,
        });
        for (column, name) in [(OURS, "ours_spread"), (RUNC_COLUMN, "runc_spread")] {
            entry[name] = results.summary(metric, column).map_or(Value::Null, |s| s.json());
        }
        if let Some(summary) = results.summary(metric, OURS_NODE) {
            entry["ours_node"] = json!(round(summary.median));
            entry["ours_node_spread"] = summary.json();
        }
        all.insert(key(metric), entry);
    }
    Value::Object(all)
}

/// `create+start, 8 at once` becomes `create_start_8_at_once`.
fn key(metric: &str) -> String {
    let words: Vec<_> = metric
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    words.join("_")
}
