//! Following a run while it trains, and disturbing it.

use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::Demo;
use super::follow::JsonLines;
use super::victims::{self, Kill};
use crate::process;

/// How often the run's files are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often the run is asked for its processes while a victim's replacement is awaited.
const ASK_EVERY: Duration = Duration::from_millis(1_000);

/// A run that commits no step for so long is stuck. Preparing the data and the first step take longest.
const STALL: Duration = Duration::from_secs(300);

/// How long a run that is told to stop may take before it is killed.
const STOP: Duration = Duration::from_secs(10);

/// Follows the disturbed run and disturbs it.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    demo: &'a Demo<'a>,
    run_dir: &'a Path,
    metrics: JsonLines,
    events: JsonLines,
    pub(super) kills: Vec<Kill>,
    /// The last committed step.
    step: u64,
    last_progress: Instant,
    last_asked: Instant,
    /// Step and digest of the first checkpoint after the kills.
    pub(super) compared: Option<(u64, Value)>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(demo: &'a Demo<'a>, run_dir: &'a Path) -> Self {
        Self {
            demo,
            run_dir,
            metrics: JsonLines::new(run_dir.join("metrics.jsonl")),
            events: JsonLines::new(run_dir.join("events.jsonl")),
            kills: demo.scenario.faults.iter().map(Kill::planned).collect(),
            step: 0,
            last_progress: Instant::now(),
            last_asked: Instant::now(),
            compared: None,
        }
    }

    /// Runs `command` to its end, which must be a good one, and kills on the way.
    pub(super) fn train(mut self, mut command: Command) -> Result<Self> {
        println!("$ {}", process::shown(&command));
        let mut child = Running(command.spawn().context("cannot start everstep")?);
        let status = loop {
            // Asked before looking, so that the last lines of a run that ended are seen too.
            let ended = child.ended()?;
            self.look(ended.is_none())?;
            if let Some(status) = ended {
                break status;
            }
            thread::sleep(LOOK_EVERY);
        };
        ensure!(
            status.success(),
            "training ended with {status}; see {}",
            self.run_dir.join("logs").display()
        );
        Ok(self)
    }

    fn look(&mut self, alive: bool) -> Result<()> {
        for row in self.metrics.fresh()? {
            self.step = self.step.max(row["step"].as_u64().unwrap_or(0));
            self.last_progress = Instant::now();
        }
        for event in self.events.fresh()? {
            self.kills
                .iter_mut()
                .for_each(|kill| kill.look_at_event(&event));
            self.compare_at(&event)?;
        }
        if !alive {
            return Ok(());
        }
        if self.last_progress.elapsed() > STALL {
            bail!(
                "no step was committed for {} s; see {}",
                STALL.as_secs(),
                self.run_dir.join("logs").display()
            );
        }
        let due = self
            .kills
            .iter()
            .any(|kill| kill.victim.is_none() && kill.after_step <= self.step);
        let awaited = self
            .kills
            .iter()
            .any(|kill| kill.victim.is_some() && kill.replaced_after.is_none());
        if due || (awaited && self.last_asked.elapsed() > ASK_EVERY) {
            self.last_asked = Instant::now();
            self.ask()?;
        }
        Ok(())
    }

    /// Asks for the processes, looks for replacements and kills who is due; the next only when the last is replaced.
    fn ask(&mut self) -> Result<()> {
        let processes = victims::processes(&self.demo.json(&["status"], self.run_dir)?)?;
        for kill in &mut self.kills {
            kill.look_for_replacement(&processes);
            if kill.victim.is_none() && kill.after_step <= self.step {
                kill.strike(&processes, self.step)?;
                if let Some((victim, step, _)) = &kill.victim {
                    println!(
                        "SIGKILL to {} (pid {}), which is a {}, after step {step}",
                        victim.name,
                        victim.pid,
                        kill.role.name()
                    );
                }
            }
            if kill.replaced_after.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Takes the digest of the first checkpoint that holds steps from after all kills, before it can be pruned.
    fn compare_at(&mut self, event: &Value) -> Result<()> {
        let last_kill = self
            .kills
            .iter()
            .map(|kill| kill.victim.as_ref().map(|(_, step, _)| *step));
        let Some(last_kill) = last_kill
            .collect::<Option<Vec<u64>>>()
            .and_then(|steps| steps.into_iter().max())
        else {
            return Ok(());
        };
        let step = event["step"]
            .as_u64()
            .filter(|step| event["kind"] == "checkpoint_committed" && *step > last_kill + 1);
        if let (Some(step), None) = (step, &self.compared) {
            let digest = self
                .demo
                .json(&["digest", "--step", &step.to_string()], self.run_dir)?;
            self.compared = Some((step, digest));
        }
        Ok(())
    }
}

/// A child that does not outlive the demo.
#[derive(Debug)]
struct Running(Child);

impl Running {
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.0.try_wait().context("cannot wait for everstep")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // Asked politely first: the agent stops its processes. A demo that fails has nothing else to do than wait.
            let pid = i32::try_from(self.0.id()).map(Pid::from_raw);
            if pid.is_ok_and(|pid| kill(pid, Signal::SIGTERM).is_ok()) {
                let start = Instant::now();
                while matches!(self.0.try_wait(), Ok(None)) && start.elapsed() < STOP {
                    thread::sleep(LOOK_EVERY);
                }
            }
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
}
