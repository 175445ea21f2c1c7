//! Starts runs, follows them, kills their processes, and counts what really happened.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use everstep_cluster::RunDir;
use everstep_cluster::control::{self, Injection, Reply, Request};
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

/// The one line of the error with which a command refused what it was asked for, without its `error: `.
pub(crate) fn error_line(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let errors = said.lines().filter_map(|line| line.strip_prefix("error: "));
    let errors: Vec<&str> = errors.collect();
    assert_eq!(errors.len(), 1, "{said}");
    errors[0].to_owned()
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
    /// A small Llama, for [`Self::with_model`].
    pub(crate) const LLAMA: &str = r#"
architecture = "llama"
layers = 1
heads = 4
kv_heads = 2
width = 32
context = 32
"#;

    /// Latent attention, experts whose biases move, and a module that predicts further tokens.
    pub(crate) const DEEPSEEK_V3: &str = r#"
architecture = "deepseek_v3"
layers = 2
heads = 4
width = 32
context = 32
[model.mla]
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
[model.moe]
experts = 8
experts_per_token = 2
ffn_width = 16
groups = 4
groups_per_token = 2
balance_rate = 0.01
[model.mtp]
"#;

    /// A small but real run: byte-level text, one layer, eight slots, an optimizer step every few milliseconds.
    pub(crate) fn new() -> Self {
        Self::with_model(Self::LLAMA, 1, "")
    }

    /// The same with experts, Muon, moments in bfloat16, a mean of the weights, and gradients accumulated over micro-batches.
    pub(crate) fn of_experts() -> Self {
        let model = Self::DEEPSEEK_V3.to_owned() + "[optimizer.muon]";
        Self::with_model(&model, 2, "moments = \"bfloat16\"\nema_decay = 0.9")
    }

    /// The same with another model, which may end with tables of other sections, and with so many micro-batches in a slot.
    pub(crate) fn with_model(model: &str, micro_batches: u32, optimizer: &str) -> Self {
        let rows = 8 * micro_batches;
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
{model}
[batch]
slots = 8
rows = {rows}
micro_batches = {micro_batches}

[optimizer]
lr = 3e-3
min_lr = 3e-4
warmup_steps = 10
{optimizer}

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
block_params = 3072
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
        let leader = "name = \"coordinator\"";
        let name = format!("cluster-{workers}-{shards}-{replication}.toml");
        self.write_cluster(&name, leader, [workers, shards, replication], "")
    }

    /// Two coordinators, two workers, and two shards with each block on both; `more` is added to the file.
    pub(crate) fn cluster_with_standby(&self, more: &str) -> PathBuf {
        let leaders = "name = \"coordinator\"\ncount = 2";
        self.write_cluster("cluster-standby.toml", leaders, [2, 2, 2], more)
    }

    fn write_cluster(
        &self,
        file: &str,
        coordinators: &str,
        [workers, shards, replication]: [u32; 3],
        more: &str,
    ) -> PathBuf {
        let text = format!(
            r#"
[[node]]
name = "local"

[[process]]
{coordinators}
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

{more}
"#
        );
        let path = self.path().join(file);
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
        self.start_command(run_dir, self.train(run_dir, topology))
    }

    /// The same for the agent of a node, whose run directory is its own.
    pub(crate) fn start_node(&self, node: &str, command: Command) -> Running {
        let mut running = self.start_command(&format!("node-{node}"), command);
        running.node = node.to_owned();
        running
    }

    /// The same for a command that the test made. What it prints goes to `{run_dir}.stderr`.
    pub(crate) fn start_command(&self, run_dir: &str, mut command: Command) -> Running {
        let errors = fs::File::create(self.path().join(format!("{run_dir}.stderr"))).unwrap();
        command.stdin(Stdio::null()).stderr(errors);
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let waiter = Some(std::thread::spawn(move || child.wait().unwrap()));
        Running {
            pid,
            waiter,
            run_dir: self.path().join(run_dir),
            node: "local".to_owned(),
        }
    }

    /// Starts a run that may be told to misbehave, with so many milliseconds added to each task of its two workers: a run that lasts.
    pub(crate) fn start_slow(&self, run_dir: &str, topology: &Path, delay_ms: u64) -> Running {
        let mut train = self.train(run_dir, Some(topology));
        train.args(["--set", "chaos.allow=true"]);
        let running = self.start_command(run_dir, train);
        running.wait_for_step(3);
        for worker in ["worker-0", "worker-1"] {
            running.slow_down(worker, delay_ms);
        }
        running
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

    /// What `metrics.jsonl` says of the numbers: step, loss, and gradient norm with the load of experts, exactly.
    pub(crate) fn numbers(&self, run_dir: &str) -> Vec<(u64, String, String)> {
        let number = |line: &Value, field: &str| line[field].to_string();
        let line = |line: Value| {
            (
                line["step"].as_u64().unwrap(),
                number(&line, "loss"),
                number(&line, "grad_norm") + &number(&line, "expert_load"),
            )
        };
        self.lines(run_dir, "metrics.jsonl")
            .into_iter()
            .map(line)
            .collect()
    }

    /// How many events of a kind there are.
    pub(crate) fn count(&self, run_dir: &str, kind: &str) -> usize {
        self.events(run_dir, kind).len()
    }

    /// The events of a kind, in the order of the file.
    pub(crate) fn events(&self, run_dir: &str, kind: &str) -> Vec<Value> {
        let mut events = self.lines(run_dir, "events.jsonl");
        events.retain(|event| event["kind"] == kind);
        events
    }

    /// Demands the weights and every number of the undisturbed run.
    pub(crate) fn demand_undisturbed(&self, run_dir: &str) {
        self.demand_undisturbed_digest(run_dir);
        self.demand_undisturbed_numbers(&self.numbers(run_dir));
    }

    /// Demands the weights of the undisturbed run.
    pub(crate) fn demand_undisturbed_digest(&self, run_dir: &str) {
        assert_eq!(self.digest(run_dir, None), undisturbed(&[]).digest);
    }

    /// Demands that these are all numbers of the undisturbed run.
    pub(crate) fn demand_undisturbed_numbers(&self, numbers: &[(u64, String, String)]) {
        assert_eq!(numbers, undisturbed(&[]).numbers);
    }

    /// All logs of a run, for the message of a failing test.
    pub(crate) fn logs(&self, run_dir: &str) -> String {
        logs_in(&self.path().join(run_dir))
    }
}

/// What the run printed, and the ends of its processes' logs.
fn logs_in(run_dir: &Path) -> String {
    let printed = run_dir.with_extension("stderr");
    let logs = fs::read_dir(run_dir.join("logs")).into_iter().flatten();
    let logs = logs.flatten().map(|entry| entry.path());
    let mut all = String::new();
    for path in std::iter::once(printed).chain(logs) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(40).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        all += &format!("--- {name}\n{}\n", tail.join("\n"));
    }
    all
}

/// What the standard run gives when nothing disturbs it.
#[derive(serde::Deserialize, serde::Serialize)]
pub(crate) struct Undisturbed {
    pub(crate) digest: Value,
    pub(crate) numbers: Vec<(u64, String, String)>,
}

/// Trained in one process by the first test that asks, for the tests of all processes that the harness starts: kept as a file whose name
/// changes with the program, with libtorch and with the run.
pub(crate) fn undisturbed(settings: &[&str]) -> Undisturbed {
    let bench = Workbench::new();
    let mut key = blake3::Hasher::new();
    let libtorch = "../../third_party/libtorch/lib/libtorch_cpu.so";
    let programs = [
        env!("CARGO_BIN_EXE_everstep"),
        env!("CARGO_BIN_EXE_everstep-compute"),
        libtorch,
    ];
    for program in programs {
        let file = fs::metadata(program).unwrap();
        key.update(format!("{program} {} {:?}", file.len(), file.modified().unwrap()).as_bytes());
    }
    key.update(&fs::read(bench.run_file()).unwrap());
    key.update(settings.join(" ").as_bytes());
    let name = format!("undisturbed-{}", &key.finalize().to_hex()[..16]);
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let lock = fs::File::create(kept.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if let Ok(text) = fs::read(&kept) {
        return serde_json::from_slice(&text).unwrap();
    }
    let mut train = bench.train("laptop", None);
    for setting in settings {
        train.args(["--set", setting]);
    }
    bench.demand_success("laptop", &train.stdin(Stdio::null()).output().unwrap());
    let undisturbed = Undisturbed {
        digest: bench.digest("laptop", None),
        numbers: bench.numbers("laptop"),
    };
    let written = kept.with_extension("new");
    fs::write(&written, serde_json::to_vec(&undisturbed).unwrap()).unwrap();
    fs::rename(written, kept).unwrap();
    undisturbed
}

/// How long a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Looks until `found` gives something; fails, with what it was, after a minute.
pub(crate) fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not in time");
        std::thread::yield_now();
    }
}

/// The point in time of an event, in seconds since the epoch.
pub(crate) fn time_of(event: &Value) -> f64 {
    let record: everstep_telemetry::EventRecord = serde_json::from_value(event.clone()).unwrap();
    let since = std::time::UNIX_EPOCH;
    record
        .at()
        .unwrap()
        .duration_since(since)
        .unwrap()
        .as_secs_f64()
}

/// Now, in seconds since the epoch.
pub(crate) fn now() -> f64 {
    let since = std::time::UNIX_EPOCH;
    std::time::SystemTime::now()
        .duration_since(since)
        .unwrap()
        .as_secs_f64()
}

/// The lines of a file that others append to, as they come, until the process `pid` ends or a minute is over.
fn follow(file: &Path, pid: Pid) -> impl Iterator<Item = Value> + use<> {
    let mut tail = Command::new("timeout")
        .arg(PATIENCE.as_secs().to_string())
        .args(["tail", "-n", "+1", "--retry", "-s", "0.02", "-f"])
        .arg(format!("--pid={pid}"))
        .arg(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = tail.stdout.take().unwrap();
    let tail = Tail(tail);
    let lines = BufReader::new(stdout).lines();
    lines.map(move |line| {
        let _ = &tail;
        serde_json::from_str(&line.unwrap()).unwrap()
    })
}

/// Ended with whoever reads it.
struct Tail(Child);

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A run in progress; its processes are killed when the test gives up on it.
pub(crate) struct Running {
    pid: Pid,
    /// Waits for the run, so that no zombie looks as if it were alive.
    waiter: Option<JoinHandle<ExitStatus>>,
    run_dir: PathBuf,
    node: String,
}

impl Running {
    /// Where it writes.
    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Steps as they are committed: blocks until the next line of `metrics.jsonl`, ends with the run.
    pub(crate) fn steps(&self) -> impl Iterator<Item = u64> + use<> {
        let lines = follow(&self.run_dir.join("metrics.jsonl"), self.pid);
        lines.map(|line| line["step"].as_u64().unwrap())
    }

    /// Waits until so many steps are committed; fails if the run ends before, or within a minute.
    pub(crate) fn wait_for_step(&self, wanted: u64) {
        let found = self.steps().any(|step| step >= wanted);
        assert!(found, "step {wanted} was not committed in time");
    }

    /// Waits until so many more steps are committed.
    pub(crate) fn wait_for_more_steps(&self, more: u64) {
        self.wait_for_step(self.num_logged() + more);
    }

    /// Steps that this node has logged as committed.
    pub(crate) fn num_logged(&self) -> u64 {
        let metrics = fs::read_to_string(self.run_dir.join("metrics.jsonl"));
        metrics.map_or(0, |text| text.lines().count() as u64)
    }

    /// The first event of a kind that `is_it`, already there or to come; fails if the run ends before, or after a minute.
    pub(crate) fn wait_for_event(&self, kind: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let mut events = follow(&self.run_dir.join("events.jsonl"), self.pid);
        let event = events.find(|event| event["kind"] == kind && is_it(event));
        event.unwrap_or_else(|| panic!("no such {kind} event in time\n{}", logs_in(&self.run_dir)))
    }

    /// Adds so many milliseconds to each task of a worker; the run must allow it.
    pub(crate) fn slow_down(&self, worker: &str, delay_ms: u64) {
        let run_dir = RunDir::new(&self.run_dir);
        let request = Request::Inject {
            process: worker.to_owned(),
            fault: Injection::SlowDevice { delay_ms },
        };
        let reply = control::send(&run_dir, &self.node, &request).unwrap();
        assert_eq!(reply, Reply::Done);
    }

    /// Slots that a worker process has computed in all its lives.
    pub(crate) fn slots(&self, worker: &str) -> u64 {
        let file = self.run_dir.join(format!("status/{worker}.slots"));
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("computed "));
        line.map_or(0, |number| number.trim().parse().unwrap())
    }

    /// What `everstep status --json` says.
    pub(crate) fn status(&self) -> Value {
        let output = everstep()
            .args(["status", "--json", "--run-dir"])
            .arg(&self.run_dir)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Processes with their pids, from the file that `everstep status` shows, since steps between two kills are short.
    pub(crate) fn processes(&self) -> Vec<(String, Option<i32>)> {
        let text = fs::read(self.run_dir.join(format!("status/node-{}.json", self.node))).unwrap();
        let status: Vec<Value> = serde_json::from_slice(&text).unwrap();
        let process = |process: &Value| {
            let pid = process["pid"].as_i64().map(|pid| pid as i32);
            (process["name"].as_str().unwrap().to_owned(), pid)
        };
        status.iter().map(process).collect()
    }

    /// Pids of the processes that may be alive; none if no agent wrote yet.
    fn pids(&self) -> Vec<i32> {
        let text = fs::read(self.run_dir.join(format!("status/node-{}.json", self.node)))
            .unwrap_or_default();
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
