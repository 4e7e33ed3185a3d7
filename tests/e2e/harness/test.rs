//! What one test sees: its own container ids on a shared node, and the check that nothing is left
//! of them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::direct::{Driver, Refusal, Stdio3};
use super::events::Event;
use super::image::IMAGE;
use super::node::Node;
use super::process::{self, Output, Running};
use super::sys;

/// One test under way.
pub struct Test {
    pub node: Arc<Node>,
    prefix: String,
    ids: Mutex<Vec<String>>,
    directory: PathBuf,
}

impl Test {
    /// Runs a test body, removes what it left running, and fails if anything stays behind.
    pub fn execute(node: Arc<Node>, number: usize, suite: &str, body: fn(&Test)) {
        // After a signal the remaining tests must not make again what was just removed.
        assert!(node.root.exists(), "the node is being torn down");
        let prefix = format!("t{number:03}-{suite}-");
        let directory = node.root.join(format!("t{number:03}"));
        std::fs::create_dir(&directory).expect("create the test's directory");
        let test = Test { node, prefix, ids: Mutex::default(), directory };
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&test)));
        if outcome.is_err() {
            // The first failure is the one to report; this only spares the other tests.
            let _ = catch_unwind(AssertUnwindSafe(|| test.remove_all()));
        }
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        test.remove_all();
        test.nothing_is_left();
    }

    /// A container id of this test.
    pub fn id(&self, name: &str) -> String {
        let id = format!("{}{name}", self.prefix);
        let mut ids = self.ids.lock().expect("no panic under this lock");
        if !ids.contains(&id) {
            ids.push(id.clone());
        }
        id
    }

    /// A directory of this test on the host.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A path in that directory, as text.
    pub fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    #[track_caller]
    pub fn ctr(&self, arguments: &[&str]) -> Output {
        self.node.ctr(arguments)
    }

    /// `ctr run` with the runtime under test.
    pub fn run_command(&self, flags: &[&str], id: &str, command: &[&str]) -> std::process::Command {
        let mut ctr = self.node.ctr_command();
        ctr.arg("run").args(self.node.runtime_flags());
        ctr.arg("--fifo-dir").arg(self.node.root.join("fifo"));
        ctr.args(flags).args([IMAGE, id]).args(command);
        ctr
    }

    /// `ctr run --rm`: waits for the container and removes it.
    #[track_caller]
    pub fn run(&self, flags: &[&str], id: &str, command: &[&str]) -> Output {
        let mut all = vec!["--rm"];
        all.extend(flags);
        process::run(&mut self.run_command(&all, id, command))
    }

    /// Runs a shell script to its end in a container that is removed afterwards.
    #[track_caller]
    pub fn sh(&self, flags: &[&str], id: &str, script: &str) -> Output {
        self.run(flags, id, &["sh", "-c", script])
    }

    /// `ctr run -d`: a container in the background.
    #[track_caller]
    pub fn start(&self, flags: &[&str], id: &str, command: &[&str]) {
        let mut all = vec!["--detach"];
        all.extend(flags);
        process::run(&mut self.run_command(&all, id, command)).ok();
    }

    /// A container in the background that only sleeps and dies at once of SIGTERM.
    #[track_caller]
    pub fn start_idle(&self, flags: &[&str], id: &str) {
        self.start_with_trap(flags, id, "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done");
    }

    /// A shell script in the background, which has a handler for SIGTERM when this returns.
    #[track_caller]
    pub fn start_with_trap(&self, flags: &[&str], id: &str, script: &str) {
        self.start(flags, id, &["sh", "-c", script]);
        let pid = self.pid(id);
        process::eventually("it handles SIGTERM", Duration::from_secs(20), || {
            process::catches(pid, libc::SIGTERM).then_some(())
        });
    }

    pub fn exec_command(
        &self,
        flags: &[&str],
        id: &str,
        command: &[&str],
    ) -> std::process::Command {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
        let mut ctr = self.node.ctr_command();
        ctr.args(["tasks", "exec"]);
        // The two exclude each other here, but not in `ctr run`.
        if !flags.contains(&"--log-uri") {
            ctr.arg("--fifo-dir").arg(self.node.root.join("fifo"));
        }
        if !flags.contains(&"--exec-id") {
            let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            ctr.arg("--exec-id").arg(format!("e{number}"));
        }
        ctr.args(flags).arg(id).args(command);
        ctr
    }

    #[track_caller]
    pub fn exec(&self, flags: &[&str], id: &str, command: &[&str]) -> Output {
        process::run(&mut self.exec_command(flags, id, command))
    }

    #[track_caller]
    pub fn exec_sh(&self, id: &str, script: &str) -> Output {
        self.exec(&[], id, &["sh", "-c", script])
    }

    #[track_caller]
    pub fn kill(&self, id: &str, signal: &str) -> Output {
        self.ctr(&["tasks", "kill", "--signal", signal, id])
    }

    /// What the name of the suites' image means.
    #[track_caller]
    pub fn image_digest(&self) -> String {
        let images = self.ctr(&["images", "ls"]).ok().text();
        let line = images.lines().find(|line| line.starts_with(&format!("{IMAGE} ")));
        line.and_then(|line| line.split_whitespace().nth(2)).expect("a digest").to_owned()
    }

    /// The task's line in `ctr tasks ls`: pid and status.
    pub fn task(&self, id: &str) -> Option<(u32, String)> {
        let list = self.ctr(&["tasks", "ls"]).ok().text();
        list.lines().find_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            (words.len() >= 3 && words[0] == id)
                .then(|| (words[1].parse().unwrap_or(0), words[2].to_owned()))
        })
    }

    #[track_caller]
    pub fn pid(&self, id: &str) -> u32 {
        self.task(id).unwrap_or_else(|| panic!("{id} has no task")).0
    }

    #[track_caller]
    pub fn wait_status(&self, id: &str, status: &str) {
        process::eventually(&format!("{id} is {status}"), Duration::from_secs(20), || {
            self.task(id).filter(|(_, now)| now == status)
        });
    }

    /// Waits for the exit event of the container's own process.
    #[track_caller]
    pub fn wait_exit(&self, id: &str) -> Event {
        self.node.events.wait(id, "exit", "")
    }

    /// Deletes a stopped task and its container.
    #[track_caller]
    pub fn delete(&self, id: &str) {
        // Newer versions of ctr exit with the task's status: only the outcome counts.
        let output = self.ctr(&["tasks", "delete", id]);
        assert!(self.task(id).is_none(), "the task {id} is still there: {}", output.stderr);
        self.ctr(&["containers", "delete", id]).ok();
    }

    /// Kills, deletes and forgets a container.
    pub fn remove(&self, id: &str) {
        if self.task(id).is_some() {
            self.kill(id, "SIGKILL");
            process::eventually(&format!("{id} is deleted"), Duration::from_secs(20), || {
                self.ctr(&["tasks", "delete", "--force", id]);
                self.task(id).is_none().then_some(())
            });
        }
        let listed = self.ctr(&["containers", "ls", "-q"]).text();
        if listed.lines().any(|line| line == id) {
            self.ctr(&["containers", "delete", id]).ok();
        }
    }

    fn remove_all(&self) {
        let ids = self.ids.lock().expect("no panic under this lock").clone();
        for id in ids {
            self.remove(&id);
        }
    }

    /// Nothing of this test's containers may exist once they are deleted. What a shim does after
    /// its reply (its own end, the CT's destruction) gets a moment.
    #[track_caller]
    fn nothing_is_left(&self) {
        let ids = self.ids.lock().expect("no panic under this lock").clone();
        let end = process::deadline(Duration::from_secs(10));
        loop {
            let remains = self.node.remains(&self.prefix, &ids);
            if remains.is_empty() {
                return;
            }
            assert!(std::time::Instant::now() < end, "left behind: {remains:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs a container without containerd, for what `ctr` has no flag for: `change` edits the
    /// specification that containerd would have sent. The status and both streams as text.
    #[track_caller]
    pub fn run_spec(
        &self,
        id: &str,
        command: &[&str],
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Result<(u32, String), Refusal> {
        let driver = self.driver();
        let mut spec = driver.spec(id, command);
        change(&mut spec);
        let log = self.directory.join(format!("{id}.out"));
        let uri = format!("file://{}", log.display());
        let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
        let shim = driver.start(id, &spec);
        let outcome = shim.create(&io).and_then(|_| shim.start("")).and_then(|_| shim.wait(""));
        shim.finish();
        driver.remove_bundle(id);
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        outcome.map(|reply| (reply.exit_status, text.trim_end().to_owned()))
    }

    /// Runs a container without containerd and one exec in it: `change` edits its specification,
    /// `process` that of the exec, which begins as the container's own. The exec's status and both
    /// of its streams as text.
    #[track_caller]
    pub fn exec_spec(
        &self,
        id: &str,
        command: &[&str],
        change: impl FnOnce(&mut serde_json::Value),
        process: impl FnOnce(&mut serde_json::Value),
    ) -> Result<(u32, String), Refusal> {
        let driver = self.driver();
        let mut spec = driver.spec(id, &["sleep", "1000"]);
        change(&mut spec);
        let mut exec = spec["process"].clone();
        exec["args"] = serde_json::json!(command);
        process(&mut exec);
        let log = self.directory.join(format!("{id}.out"));
        let uri = format!("file://{}", log.display());
        let io = Stdio3 { stdout: uri.clone(), stderr: uri, ..Stdio3::default() };
        let shim = driver.start(id, &spec);
        let outcome = shim
            .create(&Stdio3::default())
            .and_then(|_| shim.start(""))
            .and_then(|_| shim.exec("e", &exec, &io))
            .and_then(|()| shim.start("e"))
            .and_then(|_| shim.wait("e"));
        shim.finish();
        driver.remove_bundle(id);
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        outcome.map(|reply| (reply.exit_status, text.trim_end().to_owned()))
    }

    /// What a shim that was driven without containerd has logged.
    pub fn shim_log(&self, id: &str) -> String {
        std::fs::read_to_string(self.node.root.join(format!("{id}.shim.log"))).unwrap_or_default()
    }

    /// Drives the shim under test directly, with bundles in this test's directory.
    pub fn driver(&self) -> Driver<'_> {
        Driver::new(&self.node, &self.node.setting.runtime, &self.directory)
    }

    /// Starts a command without waiting for it.
    pub fn spawn(&self, mut command: std::process::Command) -> Running {
        Running::spawn(&mut command, None)
    }

    /// kill -9 of a container's shim; waits until it is gone.
    #[track_caller]
    pub fn kill_shim(&self, id: &str) {
        let pids = self.node.shims(id);
        assert_eq!(pids.len(), 1, "one shim per container, found {pids:?}");
        sys::kill(pids[0], libc::SIGKILL);
        process::eventually("the shim is gone", Duration::from_secs(5), || {
            (!process::is_alive(pids[0])).then_some(())
        });
    }
}
