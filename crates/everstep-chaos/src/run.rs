//! A scenario from beginning to end: the undisturbed run, the disturbed one, the comparison, the report.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use everstep_cluster::{ActorRole, RunDir};
use everstep_telemetry::MetricsLog;
use everstep_train::RunConfig;

use crate::ChaosError;
use crate::driver::{Driver, TrainCommand};
use crate::proxy::udp::UdpProxies;
use crate::report::{self, Digests, Report, Results};
use crate::scenario::{Scenario, Storm};
use crate::store::WorkloadStore;

/// How a scenario is to be run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The `everstep` binary.
    pub executable: PathBuf,
    /// The folder for both runs and the report; it must not exist, or be empty.
    pub run_dir: PathBuf,
    /// Draws targets and the faults of storms.
    pub seed: u64,
    /// More `field=value` overrides of the run file.
    pub set: Vec<String>,
    /// The run directory of a finished undisturbed run to compare with, instead of a new one.
    pub undisturbed: Option<PathBuf>,
}

/// Runs a scenario on real processes. `say` gets lines for people.
///
/// # Errors
/// A user's mistake, or something that the system refuses. A run that fails is no error but a report that says so.
pub fn run(
    scenario: &Scenario,
    options: &RunOptions,
    say: &mut dyn FnMut(&str),
) -> Result<Report, ChaosError> {
    let mut topology = scenario.topology()?;
    let run_dir =
        std::path::absolute(&options.run_dir).map_err(ChaosError::io("find", &options.run_dir))?;
    let set: Vec<String> = scenario
        .workload
        .set
        .iter()
        .chain(&options.set)
        .cloned()
        .collect();
    let config = RunConfig::read(&scenario.workload.run, &set)
        .map_err(|error| ChaosError::User(error.to_string()))?;
    let own_stores = config.run.store.is_some();
    // The two runs must not meet in one store, nor this one those of an earlier day.
    let undisturbed_store = RunDir::new(run_dir.join("undisturbed")).default_store();
    let disturbed_store = match &config.run.store {
        Some(store) => format!(
            "{}/{}",
            store.trim_end_matches('/'),
            part(scenario, options)
        ),
        None => RunDir::new(run_dir.join("disturbed")).default_store(),
    };
    let variable = |name: &str| std::env::var(name).ok();
    let mut store =
        WorkloadStore::new(&disturbed_store, &config.run.name, variable).map_err(|wrong| {
            ChaosError::User(format!("{}: {wrong}", scenario.workload.run.display()))
        })?;
    store.check(scenario)?;
    claim(&run_dir)?;
    let train = |name: &str, topology: Option<&Path>| TrainCommand {
        executable: options.executable.clone(),
        run_file: scenario.workload.run.clone(),
        topology: topology.map(Path::to_owned),
        set: set.clone(),
        run_dir: run_dir.join(name),
        log: run_dir.join(format!("{name}.log")),
        environment: Vec::new(),
    };
    // A run that is stopped after its storm tells only then how far the undisturbed one has to go.
    let is_stopped = scenario.storm.as_ref().is_some_and(Storm::is_limited);
    let undisturbed = |steps: Option<u64>, say: &mut dyn FnMut(&str)| match &options.undisturbed {
        Some(finished) => std::path::absolute(finished).map_err(ChaosError::io("find", finished)),
        None => {
            say("undisturbed run, in one process");
            let mut command = train("undisturbed", None);
            command
                .set
                .extend(steps.map(|steps| format!("run.stop_at={steps}")));
            if own_stores {
                command.set.push(set_store(&undisturbed_store));
            }
            undisturbed_run(&command)?;
            Ok(command.run_dir)
        }
    };
    let first = match is_stopped {
        true => None,
        false => Some(undisturbed(None, say)?),
    };
    say("disturbed run");
    let (proxies, topology_file) = if scenario.needs_udp_proxy() {
        let proxies = UdpProxies::start(&mut topology, options.seed)
            .map_err(|error| ChaosError::Failed(format!("proxies cannot start: {error}")))?;
        let path = run_dir.join("topology.toml");
        let text = topology
            .to_toml()
            .map_err(|error| ChaosError::Failed(error.to_string()))?;
        fs::write(&path, text).map_err(ChaosError::io("write", &path))?;
        (Some(proxies), path)
    } else {
        (None, scenario.workload.topology.clone())
    };
    let mut command = train("disturbed", Some(&topology_file));
    if scenario.injects() {
        command.set.push("chaos.allow=true".to_owned());
    }
    if own_stores {
        command.set.push(set_store(&disturbed_store));
    }
    store.start_proxy(scenario, options.seed)?;
    command.environment = store.environment();
    let disturbed = command.run_dir.clone();
    let (seed, topology) = (options.seed, &topology);
    let observed = Driver::run(scenario, topology, proxies, store, command, seed, say)?;
    let ended = match observed.failure {
        None => Some(digests(&options.executable, &disturbed)?),
        Some(_) => None,
    };
    let undisturbed = match (first, &ended) {
        (Some(first), _) => Some(first),
        (None, Some(ended)) => Some(undisturbed(Some(ended.step), say)?),
        (None, None) => None,
    };
    let results = Results {
        undisturbed: match &undisturbed {
            Some(undisturbed) => Some(digests(&options.executable, undisturbed)?),
            None => None,
        },
        numbers_equal: match &undisturbed {
            Some(undisturbed) => {
                let (mut expected, mut seen) = (numbers(undisturbed)?, numbers(&disturbed)?);
                if is_stopped {
                    // Evaluated is the last version of the run, whatever it is.
                    for last in [&mut expected, &mut seen]
                        .into_iter()
                        .filter_map(|all| all.last_mut())
                    {
                        last.validation_loss = None;
                    }
                }
                expected == seen
            }
            None => false,
        },
        disturbed: ended,
        goodput: everstep_cluster::goodput(&RunDir::new(&disturbed)).ok(),
        num_workers: topology.count(ActorRole::Worker),
    };
    let report = Report::new(scenario, options.seed, &observed, results);
    let write = |name: &str, text: String| {
        let path = run_dir.join(name);
        fs::write(&path, text).map_err(ChaosError::io("write", &path))
    };
    let json = serde_json::to_string_pretty(&report)
        .map_err(|error| ChaosError::Failed(format!("the report cannot be written: {error}")))?;
    write("report.json", json)?;
    write("timeline.svg", report::timeline(scenario, &observed))?;
    Ok(report)
}

/// The disturbed run's part of a store that others may use as well.
fn part(scenario: &Scenario, options: &RunOptions) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now_ms = now.map_or(0, |since| since.as_millis());
    format!("{}-{}-{now_ms}", scenario.name, options.seed)
}

fn set_store(url: &str) -> String {
    format!("run.store={}", toml::Value::String(url.to_owned()))
}

/// Makes the folder; one that holds something is somebody's.
fn claim(run_dir: &Path) -> Result<(), ChaosError> {
    fs::create_dir_all(run_dir).map_err(ChaosError::io("make", run_dir))?;
    let mut entries = fs::read_dir(run_dir).map_err(ChaosError::io("read", run_dir))?;
    if entries.next().is_some() {
        return Err(ChaosError::User(format!(
            "--run-dir: {} is not empty; allowed: a folder that does not exist yet",
            run_dir.display()
        )));
    }
    Ok(())
}

fn undisturbed_run(command: &TrainCommand) -> Result<(), ChaosError> {
    let mut child = command.spawn()?;
    let status = child
        .wait()
        .map_err(ChaosError::io("wait for", &command.executable))?;
    if status.success() {
        return Ok(());
    }
    let reason = command.last_error().unwrap_or_default();
    // Exit code 2 is a user's mistake, which the run's own line explains.
    Err(match status.code() {
        Some(2) => ChaosError::User(reason),
        _ => ChaosError::Failed(format!(
            "the undisturbed run ended with {status}: {reason} (see {})",
            command.log.display()
        )),
    })
}

/// Digests of the last committed step.
fn digests(executable: &Path, run_dir: &Path) -> Result<Digests, ChaosError> {
    let output = Command::new(executable)
        .args(["digest", "--json", "--run-dir"])
        .arg(run_dir)
        .stdin(Stdio::null())
        .output()
        .map_err(ChaosError::io("start", executable))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(ChaosError::Failed(format!(
            "everstep digest on {} ended with {}: {}",
            run_dir.display(),
            output.status,
            error.trim()
        )));
    }
    let value: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| ChaosError::Failed(format!("everstep digest gave no JSON: {error}")))?;
    let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
    Ok(Digests {
        step: value["step"].as_u64().unwrap_or(0),
        parameters: text("parameters"),
        optimizer: text("optimizer"),
    })
}

/// What one step's line of `metrics.jsonl` says of the training, as bits.
#[derive(Debug, PartialEq, Eq)]
struct StepNumbers {
    step: u64,
    loss: u64,
    grad_norm: u64,
    validation_loss: Option<u64>,
}

/// The numbers of every step.
fn numbers(run_dir: &Path) -> Result<Vec<StepNumbers>, ChaosError> {
    let path = RunDir::new(run_dir).metrics();
    let rows = MetricsLog::read(&path).map_err(|error| ChaosError::Failed(error.to_string()))?;
    let numbers = rows.iter().map(|row| StepNumbers {
        step: row.step,
        loss: row.loss.to_bits(),
        grad_norm: row.grad_norm.to_bits(),
        validation_loss: row.validation_loss.map(f64::to_bits),
    });
    Ok(numbers.collect())
}
