//! Disturbs a run on real processes.
//!
//! The driver starts `everstep train` as a child, reads the run's files, strikes when a fault is due, checks that it really had its
//! effect, takes it back when its time is over, starts the agent again where a fault ended it, and leaves no process behind.

use std::time::{Duration, SystemTime};

use everstep_cluster::{RunDir, Topology};
use everstep_protocol::random::{Purpose, Stream};

use crate::ChaosError;
use crate::proxy::udp::UdpProxies;
use crate::record::{Commit, FaultRecord, Life};
use crate::scenario::Scenario;
use crate::store::WorkloadStore;

mod agent;
mod network;
mod observer;
mod ongoing;
mod phase;
mod schedule;
mod store;
mod strike;

use agent::{AgentChild, Ended};
use observer::Observer;
use ongoing::Ongoing;
use schedule::Schedule;

pub use agent::TrainCommand;

/// How often the driver looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How often it takes samples of what processes use, in seconds.
const SAMPLE_EVERY_SECONDS: f64 = 1.0;

/// A fault whose target is not there is tried again for so long.
pub(crate) const PATIENCE_SECONDS: f64 = 30.0;

/// What a disturbed run was like.
#[derive(Debug)]
pub struct Observed {
    /// Faults in the order in which they struck.
    pub faults: Vec<FaultRecord>,
    /// Commits in the order in which they were logged.
    pub commits: Vec<Commit>,
    /// Events with their times.
    pub events: Vec<(f64, everstep_telemetry::EventRecord)>,
    /// Every life of every process.
    pub lives: Vec<Life>,
    /// How long it took.
    pub seconds: f64,
    /// When it was started.
    pub origin: SystemTime,
    /// Why it did not end as it should.
    pub failure: Option<String>,
}

/// A run goes on for so long after its storm, so that the last faults are seen to be mended.
const CALM_SECONDS: f64 = 5.0;

/// Drives one disturbed run.
#[derive(Debug)]
pub(crate) struct Driver<'a> {
    scenario: &'a Scenario,
    topology: &'a Topology,
    run_dir: RunDir,
    store: WorkloadStore,
    /// Between the processes, if a fault needs them.
    proxies: Option<UdpProxies>,
    observer: Observer,
    agent: AgentChild,
    random: Stream,
    schedule: Schedule,
    ongoing: Vec<Ongoing>,
    faults: Vec<FaultRecord>,
    sampled_at: f64,
    /// Since when the storm is over and nothing is under way.
    calm_since: Option<f64>,
}

impl<'a> Driver<'a> {
    /// Runs the scenario to its end. A run that fails is observed too; only what the driver itself cannot do is an error.
    pub(crate) fn run(
        scenario: &'a Scenario,
        topology: &'a Topology,
        proxies: Option<UdpProxies>,
        store: WorkloadStore,
        command: TrainCommand,
        seed: u64,
        say: &mut dyn FnMut(&str),
    ) -> Result<Observed, ChaosError> {
        let origin = SystemTime::now();
        let run_dir = RunDir::new(&command.run_dir);
        let mut driver = Self {
            proxies,
            observer: Observer::new(run_dir.clone(), origin),
            store,
            agent: AgentChild::start(command, topology)?,
            random: Stream::new(seed, Purpose::Fault, &[1]),
            schedule: Schedule::new(scenario, seed),
            ongoing: Vec::new(),
            faults: Vec::new(),
            sampled_at: 0.0,
            calm_since: None,
            scenario,
            topology,
            run_dir,
        };
        let failure = driver.follow(say)?;
        let seconds = driver.observer.now();
        driver.end();
        driver.observer.look();
        Ok(Observed {
            faults: driver.faults,
            commits: driver.observer.commits,
            events: driver.observer.events,
            lives: driver.observer.lives,
            seconds,
            origin,
            failure,
        })
    }

    /// Until the run is over; says why if it did not end as it should.
    fn follow(&mut self, say: &mut dyn FnMut(&str)) -> Result<Option<String>, ChaosError> {
        let mut progress = (0, 0.0);
        loop {
            // Asked before looking, so that the last lines of a run that ended are seen too.
            let ended = self.agent.ended(self.observer.now());
            self.observer.look();
            let now = self.observer.now();
            if let Some(agent) = self.agent.alive() {
                self.observer.note_life(agent);
            }
            match ended {
                Some(Ended::Finished | Ended::Stopped) => return Ok(None),
                Some(Ended::Failed(reason)) => return Ok(Some(reason)),
                None => {}
            }
            if self.observer.step() > progress.0 || self.agent.is_away() {
                progress = (self.observer.step(), now);
            }
            if now > self.scenario.limits.seconds {
                return Ok(Some(format!(
                    "not over after {} s",
                    self.scenario.limits.seconds
                )));
            }
            if now - progress.1 > self.scenario.limits.stall_seconds {
                return Ok(Some(format!(
                    "no step was committed for {} s",
                    self.scenario.limits.stall_seconds
                )));
            }
            self.disturb(now, say);
            if self.is_storm_over(now) {
                self.agent.leave();
            }
            if now - self.sampled_at > SAMPLE_EVERY_SECONDS {
                self.sampled_at = now;
                self.observer.sample_usage();
            }
            if self.may_restart_agent() {
                self.agent.restart_if_due(now)?;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Goes on with what is under way, and begins what is due.
    fn disturb(&mut self, now: f64, say: &mut dyn FnMut(&str)) {
        let mut ongoing = std::mem::take(&mut self.ongoing);
        ongoing.retain_mut(|ongoing| !self.go_on(ongoing, now));
        self.ongoing = ongoing;
        for victim in self.faults.iter_mut().flat_map(|fault| &mut fault.victims) {
            if victim.replaced_at.is_none() {
                let other = |life: &&Life| {
                    life.process == victim.process
                        && life.identity != victim.identity
                        && life.from >= victim.at
                };
                victim.replaced_at = self.observer.lives.iter().find(other).map(|life| life.from);
            }
        }
        if self.agent.is_away() {
            return;
        }
        for due in self
            .schedule
            .due(&self.observer, &self.run_dir, self.store.folder())
        {
            match self.strike(&due.fault, now) {
                Ok(()) => {
                    let step = self.observer.step();
                    let record = &self.faults[self.faults.len() - 1];
                    let names: Vec<String> = record
                        .victims
                        .iter()
                        .map(|victim| format!("{} (pid {})", victim.process, victim.identity.pid))
                        .chain(record.object.clone())
                        .collect();
                    let label = due.fault.label();
                    say(&format!(
                        "{now:8.2} s  step {step}: {label}  {}",
                        names.join(", ")
                    ));
                }
                Err(reason) => self.schedule.missed(due, now, reason, &mut self.faults),
            }
        }
    }

    /// Whether a storm that ends has ended, and what it did is mended: the run has no more to show.
    fn is_storm_over(&mut self, now: f64) -> bool {
        let is_calm =
            self.schedule.is_storm_over(now) && self.ongoing.is_empty() && !self.agent.is_away();
        if !is_calm {
            self.calm_since = None;
            return false;
        }
        now - *self.calm_since.get_or_insert(now) > CALM_SECONDS
    }

    /// An agent that is started while the store is away would refuse to train.
    fn may_restart_agent(&self) -> bool {
        !self.ongoing.iter().any(Ongoing::holds_store)
    }

    /// Takes everything back and ends every process of the run.
    fn end(&mut self) {
        let now = self.observer.now();
        for mut ongoing in std::mem::take(&mut self.ongoing) {
            self.take_back(&mut ongoing, now);
        }
        self.agent.end();
    }
}
