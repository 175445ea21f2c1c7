//! Starts runs, follows them, kills their processes, and counts what really happened.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// The binary under test.
pub(crate) fn everstep() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_everstep"));
    command
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .env_remove("EVERSTEP_LOG")
        .env_remove("RUST_LOG");
    // Several processes share two cores: spinning at OpenMP barriers would starve them.
    command.env("OMP_WAIT_POLICY", "passive");
    command
}

/// A folder with a run file, its data and its topologies, removed at the end.
pub(crate) struct Workbench {
    folder: tempfile::TempDir,
}

/// Seconds between two events, by their times of day.
pub(crate) fn seconds_between(first: &Value, second: &Value) -> f64 {
    let seconds = |event: &Value| {
        let time = event["time"].as_str().unwrap();
        let (_, clock) = time.trim_end_matches('Z').split_once('T').unwrap();
        clock
            .split(':')
            .fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap())
    };
    (seconds(second) - seconds(first)).rem_euclid(86_400.0)
}

/// Steps of the standard run.
pub(crate) const STEPS: u64 = 200;

impl Workbench {
    /// A small but real run: byte-level text, two layers, eight slots, an optimizer step every few milliseconds.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..4000)
            .map(|line| format!("line {line}: {} steps are not lost\n", line * line % 977))
            .collect();
        fs::write(folder.path().join("corpus.txt"), text).unwrap();
        let run = format!(
            r#"
[run]
name = "it"
seed = 7
steps = {STEPS}

[data]
train = ["corpus.txt"]
[data.tokenizer]
kind = "byte"

[model]
architecture = "llama"
layers = 2
heads = 4
kv_heads = 2
width = 32
context = 32

[batch]
slots = 8
rows = 16
micro_batches = 2

[optimizer]
lr = 3e-3
min_lr = 3e-4
warmup_steps = 10

[compute]
threads = 1

[evaluation]
every = 50
rows = 64
max_windows = 128

[checkpoint]
every = 50
keep = 8

[cluster]
block_params = 4096
"#
        );
        fs::write(folder.path().join("run.toml"), run).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn run_file(&self) -> PathBuf {
        self.path().join("run.toml")
    }

    /// A topology with so many worker and shard processes.
    pub(crate) fn cluster(&self, workers: u32, shards: u32, replication: u32) -> PathBuf {
        let text = format!(
            r#"
[[node]]
name = "local"

[[process]]
name = "coordinator"
node = "local"
roles = ["coordinator"]

[[process]]
name = "loader"
node = "local"
roles = ["loader"]

[[process]]
name = "shard"
node = "local"
roles = ["shard"]
count = {shards}

[[process]]
name = "worker"
node = "local"
roles = ["worker"]
count = {workers}

[cluster]
replication = {replication}
"#
        );
        let path = self
            .path()
            .join(format!("cluster-{workers}-{shards}-{replication}.toml"));
        fs::write(&path, text).unwrap();
        path
    }

    /// `everstep train` on this run file, not started yet.
    pub(crate) fn train(&self, run_dir: &str, topology: Option<&Path>) -> Command {
        let mut command = everstep();
        command
            .arg("train")
            .arg(self.run_file())
            .arg("--run-dir")
            .arg(self.path().join(run_dir));
        if let Some(topology) = topology {
            command.arg("--topology").arg(topology);
        }
        command
    }

    /// Trains to the end and demands exit 0.
    pub(crate) fn train_to_the_end(&self, run_dir: &str, topology: Option<&Path>) {
        let output = self
            .train(run_dir, topology)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        self.demand_success(run_dir, &output);
    }

    fn demand_success(&self, run_dir: &str, output: &Output) {
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}\n{error}\n{}",
            output.status,
            self.logs(run_dir)
        );
    }

    /// Starts a run that the test wants to disturb.
    pub(crate) fn start(&self, run_dir: &str, topology: Option<&Path>) -> Running {
        let errors = fs::File::create(self.path().join(format!("{run_dir}.stderr"))).unwrap();
        let mut train = self.train(run_dir, topology);
        train.stdin(Stdio::null()).stderr(errors);
        self.start_command(run_dir, train)
    }

    /// The same for a command that the test made.
    pub(crate) fn start_command(&self, run_dir: &str, mut command: Command) -> Running {
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let waiter = Some(std::thread::spawn(move || child.wait().unwrap()));
        Running {
            pid,
            waiter,
            run_dir: self.path().join(run_dir),
        }
    }

    /// Digests of parameters and optimizer state, and the step they are of.
    pub(crate) fn digest(&self, run_dir: &str, step: Option<u64>) -> Value {
        let mut command = everstep();
        command
            .arg("digest")
            .arg("--json")
            .arg("--run-dir")
            .arg(self.path().join(run_dir));
        if let Some(step) = step {
            command.arg("--step").arg(step.to_string());
        }
        let output = command.output().unwrap();
        self.demand_success(run_dir, &output);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The objects of a JSON-lines file of the run.
    pub(crate) fn lines(&self, run_dir: &str, file: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path().join(run_dir).join(file)).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// What `metrics.jsonl` says of the numbers: step, loss and gradient norm, exactly.
    pub(crate) fn numbers(&self, run_dir: &str) -> Vec<(u64, String, String)> {
        let number = |line: &Value, field: &str| line[field].to_string();
        let line = |line: Value| {
            (
                line["step"].as_u64().unwrap(),
                number(&line, "loss"),
                number(&line, "grad_norm"),
            )
        };
        self.lines(run_dir, "metrics.jsonl")
            .into_iter()
            .map(line)
            .collect()
    }

    /// How many events of a kind there are.
    pub(crate) fn count(&self, run_dir: &str, kind: &str) -> usize {
        self.lines(run_dir, "events.jsonl")
            .iter()
            .filter(|event| event["kind"] == kind)
            .count()
    }

    /// All logs of a run, for the message of a failing test.
    pub(crate) fn logs(&self, run_dir: &str) -> String {
        let mut all = String::new();
        let folder = self.path().join(run_dir).join("logs");
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(40).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            all += &format!(
                "--- {}\n{}\n",
                entry.file_name().to_string_lossy(),
                tail.join("\n")
            );
        }
        all
    }
}

/// A run in progress; its processes are killed when the test gives up on it.
pub(crate) struct Running {
    pid: Pid,
    /// Waits for the run, so that no zombie looks as if it were alive.
    waiter: Option<JoinHandle<ExitStatus>>,
    run_dir: PathBuf,
}

impl Running {
    /// Steps as they are committed: blocks until the next line of `metrics.jsonl`, ends with the run.
    pub(crate) fn steps(&self) -> impl Iterator<Item = u64> + use<> {
        let pid = self.pid;
        let mut tail = Command::new("tail")
            .args(["-n", "+1", "--retry", "-s", "0.02", "-f"])
            .arg(format!("--pid={pid}"))
            .arg(self.run_dir.join("metrics.jsonl"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(tail.stdout.take().unwrap()).lines();
        let steps = lines.map(|line| {
            serde_json::from_str::<Value>(&line.unwrap()).unwrap()["step"]
                .as_u64()
                .unwrap()
        });
        steps.chain(std::iter::from_fn(move || {
            let _ = tail.kill();
            let _ = tail.wait();
            None
        }))
    }

    /// Processes with their pids, from the file that `everstep status` shows; starting the command for each kill would take longer than
    /// the steps between two kills.
    pub(crate) fn processes(&self) -> Vec<(String, Option<i32>)> {
        let text = fs::read(self.run_dir.join("status/node-local.json")).unwrap();
        let status: Vec<Value> = serde_json::from_slice(&text).unwrap();
        let process = |process: &Value| {
            let pid = process["pid"].as_i64().map(|pid| pid as i32);
            (process["name"].as_str().unwrap().to_owned(), pid)
        };
        status.iter().map(process).collect()
    }

    /// Pids of the processes that may be alive; none if no agent wrote yet.
    fn pids(&self) -> Vec<i32> {
        let text = fs::read(self.run_dir.join("status/node-local.json")).unwrap_or_default();
        let status: Vec<Value> = serde_json::from_slice(&text).unwrap_or_default();
        let pids = status.iter().filter_map(|process| process["pid"].as_i64());
        pids.map(|pid| pid as i32).collect()
    }

    /// Sends SIGKILL to the agent alone, and waits for its end.
    pub(crate) fn kill_agent(mut self) {
        kill(self.pid, Signal::SIGKILL).unwrap();
        self.waiter.take().unwrap().join().unwrap();
    }

    /// Sends a signal to a process of the run and says which pid it has.
    pub(crate) fn signal(&self, name: &str, signal: Signal) -> Option<i32> {
        let processes = self.processes();
        let (_, pid) = processes.iter().find(|(process, _)| process == name)?;
        let pid = (*pid)?;
        kill(Pid::from_raw(pid), signal).ok().map(|()| pid)
    }

    /// Sends a signal to the agent.
    pub(crate) fn signal_agent(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Waits for the end and says how it was.
    pub(crate) fn end(mut self) -> ExitStatus {
        self.waiter.take().unwrap().join().unwrap()
    }

    /// Sends SIGKILL to a process of the run; false if it is not alive now.
    pub(crate) fn kill(&self, name: &str) -> bool {
        self.kill_first_alive(&[name]).is_some()
    }

    /// Sends SIGKILL to the first of these processes that is alive now, and says which that was.
    pub(crate) fn kill_first_alive(&self, names: &[&str]) -> Option<String> {
        let processes = self.processes();
        let pid_of = |name: &&str| {
            let known = processes.iter().find(|(process, _)| process == name);
            known.and_then(|(_, pid)| *pid)
        };
        let victim = names.iter().find(|name| {
            pid_of(name).is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
        })?;
        Some((*victim).to_owned())
    }

    /// Sends SIGKILL to everything at once, the agent first so that it restarts nothing.
    pub(crate) fn power_loss(mut self) {
        let processes = self.processes();
        kill(self.pid, Signal::SIGKILL).unwrap();
        for pid in processes.into_iter().filter_map(|(_, pid)| pid) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        self.waiter.take().unwrap().join().unwrap();
    }

    /// Waits for the end and demands exit 0.
    pub(crate) fn finish(mut self, bench: &Workbench, run_dir: &str) {
        let status = self.waiter.take().unwrap().join().unwrap();
        let error = fs::read_to_string(bench.path().join(format!("{run_dir}.stderr"))).unwrap();
        assert!(
            status.success(),
            "{status}\n{error}\n{}",
            bench.logs(run_dir)
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waiter.join();
            // Its processes would go on for the next agent.
            for pid in self.pids() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}
