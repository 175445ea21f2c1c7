//! What a run is, for every process of it: checked configuration, layout, numerics, dataset, identity.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use everstep_data::{DataError, Dataset, TokenBatch};
use everstep_optim::{BlockState, Layout, TrainingNumerics};
use everstep_protocol::audit::AuditPlan;
use everstep_protocol::coordinator::CoordinatorConfig;
use everstep_protocol::{BlockId, Decision, Step, Task};
use everstep_store::{Digest, EVALUATION_LOSS, Retention, RunIdentity, RunStore};
use everstep_telemetry::{EventLog, Goodput, MetricsLog, Telemetry};
use everstep_train::{Backend, BatchSource, Election, PretrainingData, ReplicaPlan, RunConfig};

use crate::agent::lock::AgentLock;
use crate::life;
use crate::rundir::RunDir;
use crate::topology::{ActorRole, Topology, TopologyError};
use initial::InitialWeights;

mod initial;
mod placement;
mod prepare;

pub use prepare::RunRequest;

/// What is wrong with a run: one line that names the file, the field and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The run file.
    #[error(transparent)]
    Run(#[from] everstep_train::RunFileError),
    /// The topology file.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The data.
    #[error(transparent)]
    Data(#[from] everstep_data::DataError),
    /// The object store.
    #[error(transparent)]
    Store(#[from] everstep_store::StoreError),
    /// Logs and traces.
    #[error(transparent)]
    Telemetry(#[from] everstep_telemetry::TelemetryError),
    /// Certificates.
    #[error(transparent)]
    Certificates(#[from] everstep_transport::CertError),
    /// Anything else that the user can mend.
    #[error("{0}")]
    User(String),
}

/// Periods of the cluster's protocol.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Unanswered messages are said again after this long.
    pub resend_ms: u64,
    /// A new leader waits this long for shards that have not said what they hold.
    pub gather_ms: u64,
    /// A standby runs for leadership when the leader was silent this long.
    pub leader_timeout_ms: u64,
    /// How often machines look at the clock.
    pub tick_ms: u64,
}

impl Timing {
    pub(crate) fn tick(&self) -> Duration {
        Duration::from_millis(self.tick_ms)
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            resend_ms: 300,
            gather_ms: 5_000,
            leader_timeout_ms: 1_500,
            tick_ms: 50,
        }
    }
}

/// What of a run's state becomes a model's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// The parameters that were trained.
    Trained,
    /// Their running mean.
    Averaged,
}

/// One run, the same in every process.
#[derive(Debug)]
pub struct RunContext {
    /// The checked run file.
    pub config: RunConfig,
    /// Which roles live where.
    pub topology: Topology,
    /// Identity of the run, as the store and the ledgers keep it. Its environment is known to whoever prepared the run.
    pub identity: RunIdentity,
    /// Short form of the identity, in every message header.
    pub run_id: u64,
    /// The arithmetic of the protocol.
    pub numerics: TrainingNumerics,
    /// Periods.
    pub timing: Timing,
    run_dir: RunDir,
    data: PretrainingData,
    initial_weights: Option<InitialWeights>,
    /// Held by whoever prepared the run to supervise it.
    _lock: Option<AgentLock>,
}

impl RunContext {
    /// Name of the run.
    pub fn name(&self) -> &str {
        &self.config.run.name
    }

    /// Where the run lives.
    pub fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// Steps that this run takes before it stops.
    pub fn num_steps(&self) -> u64 {
        self.config.last_step()
    }

    /// Slots per step.
    pub fn num_slots(&self) -> u32 {
        self.config.batch.slots as u32
    }

    /// Blocks of the layout.
    pub fn num_blocks(&self) -> u32 {
        self.numerics.layout().num_blocks()
    }

    /// The layout of the parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        self.numerics.layout()
    }

    /// The dataset.
    pub fn dataset(&self) -> &Dataset {
        self.data.dataset()
    }

    /// Learning rate of a step.
    pub fn learning_rate(&self, step: Step) -> f64 {
        self.numerics.config().learning_rate(step)
    }

    /// How many times the mean of its layer the fullest expert of a step was chosen; nothing for a model without experts.
    pub fn expert_load(&self, step: Step, decision: &Decision) -> Option<f64> {
        let per_token = self.config.model.moe.as_ref()?.experts_per_token;
        let choices = self.config.batch.rows_at(step.0) * self.config.context() * per_token;
        Some(1.0 + decision.load_excess / choices as f64)
    }

    /// By layer, how many times the mean each expert was chosen.
    pub(crate) fn expert_loads(&self, choices: &[u64]) -> Vec<Vec<f64>> {
        let Some(moe) = &self.config.model.moe else {
            return Vec::new();
        };
        let loads = |layer: &[u64]| {
            let mean = layer.iter().sum::<u64>() as f64 / layer.len() as f64;
            // More places would say nothing.
            let load = |&count: &u64| (count as f64 / mean.max(1.0) * 1e3).round() / 1e3;
            layer.iter().map(load).collect()
        };
        choices.chunks(moe.experts).map(loads).collect()
    }

    /// The last step in the metrics log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn last_logged_step(&self) -> Result<Option<u64>, RunError> {
        if !self.run_dir.metrics().exists() {
            return Ok(None);
        }
        Ok(MetricsLog::open(self.run_dir.metrics())?.last_step())
    }

    /// Names of the run's processes that live on this machine, whoever started them.
    pub fn living_processes(&self) -> Vec<String> {
        life::all_living(&self.run_dir, &self.topology)
    }

    /// Whether the last step is committed.
    ///
    /// # Errors
    /// The object store cannot be read.
    pub async fn is_finished(&self) -> Result<bool, RunError> {
        let committed = self.open_store()?.checkpoints().await?;
        Ok(committed.contains(&self.num_steps()))
    }

    /// URL of the object store.
    pub fn store_url(&self, run_dir: &RunDir) -> String {
        self.config
            .run
            .store
            .clone()
            .unwrap_or_else(|| run_dir.default_store())
    }

    /// Opens the object store.
    ///
    /// # Errors
    /// A URL that cannot be used.
    pub fn open_store(&self) -> Result<RunStore, RunError> {
        Ok(RunStore::open(&self.store_url(&self.run_dir), self.name())?)
    }

    /// `step`, or the last committed one.
    ///
    /// # Errors
    /// It is not committed, or nothing is.
    pub async fn committed_step(
        &self,
        store: &RunStore,
        step: Option<u64>,
    ) -> Result<u64, RunError> {
        store.check_run(&self.identity).await?;
        let committed = store.checkpoints().await?;
        let list = || {
            committed
                .iter()
                .map(u64::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        };
        match step {
            None => committed.last().copied().ok_or_else(|| {
                RunError::User(format!(
                    "{}: no step is committed yet",
                    self.run_dir.path().display()
                ))
            }),
            Some(step) if committed.contains(&step) => Ok(step),
            Some(step) => Err(RunError::User(format!(
                "--step: no checkpoint of step {step} is committed; there are: {}",
                list()
            ))),
        }
    }

    /// The master parameters at `step`, or at the last committed one, or the running mean of them, in the layout's order. Those of step 0
    /// are always known.
    ///
    /// # Errors
    /// The step is not committed, its checkpoint is damaged or cannot be read, or the run keeps no mean.
    pub async fn parameters_at(
        &self,
        step: Option<u64>,
        weights: Weights,
    ) -> Result<Vec<f32>, RunError> {
        if weights == Weights::Averaged && self.numerics.config().ema_decay.is_none() {
            return Err(RunError::User(format!(
                "--ema: {} keeps no running mean of its weights; `optimizer.ema_decay` of its run file would have",
                self.run_dir.path().display()
            )));
        }
        if step == Some(0) {
            let blocks = 0..self.num_blocks();
            let states: Vec<BlockState> = blocks
                .map(|block| self.initial_state(block))
                .collect::<Result<_, _>>()?;
            let parameters = states.iter().map(|state| state.parameters.as_slice());
            return Ok(parameters.collect::<Vec<_>>().concat());
        }
        let store = self.open_store()?;
        let step = self.committed_step(&store, step).await?;
        self.load_parameters(&store, step, weights).await
    }

    async fn load_parameters(
        &self,
        store: &RunStore,
        step: u64,
        weights: Weights,
    ) -> Result<Vec<f32>, RunError> {
        let blocks: Vec<BlockId> = (0..self.num_blocks()).collect();
        let mut values = vec![0.0; self.layout().num_elements()];
        for state in store.load_blocks(step, &blocks).await? {
            let block = self.layout().block(state.block);
            let found = match weights {
                Weights::Trained => &state.param,
                Weights::Averaged => &state.ema,
            };
            if found.len() != block.len {
                return Err(RunError::User(format!(
                    "checkpoint {step} is of another model: block {} has {} values, not {}",
                    state.block,
                    found.len(),
                    block.len
                )));
            }
            values[block.offset..block.offset + block.len].copy_from_slice(found);
        }
        Ok(values)
    }

    /// Starts telemetry for a process of the run.
    ///
    /// # Errors
    /// The log cannot be opened, or a filter is not understood.
    pub fn telemetry(&self, process: u32) -> Result<Telemetry, RunError> {
        let process = &self.topology.processes[process as usize];
        Ok(everstep_telemetry::init(everstep_telemetry::Options {
            process: process.name.clone(),
            node: process.node.clone(),
            run_id: self.identity.digest().to_string(),
            log_file: Some(self.run_dir.log(&process.name)),
            ..Default::default()
        })?)
    }

    pub(crate) fn is_static_election(&self) -> bool {
        self.config.cluster.election == Election::Static
    }

    pub(crate) fn coordinator_config(&self) -> CoordinatorConfig {
        let evaluation = &self.config.evaluation;
        let chunks = if evaluation.every == 0 {
            0
        } else {
            self.data.num_evaluation_chunks()
        };
        let num_shards = self.topology.count(ActorRole::Shard);
        CoordinatorConfig {
            num_slots: self.num_slots(),
            num_blocks: self.num_blocks(),
            num_steps: self.num_steps(),
            replication: self
                .topology
                .cluster
                .replication
                .unwrap_or(self.config.cluster.replication)
                .min(num_shards),
            checkpoint_every: self.config.checkpoint.every.steps().unwrap_or(0),
            evaluate_every: if chunks == 0 { 0 } else { evaluation.every },
            num_evaluation_chunks: chunks as u32,
            num_shards,
            shard_domains: self.topology.shard_domains(),
            gather_ms: self.timing.gather_ms,
            lease_ms: self.config.cluster.lease_ms,
            resend_ms: self.timing.resend_ms,
            audit: self.audit_plan(),
            skip_limit: self.config.policy.skip_limit,
        }
    }

    /// Which slots are computed twice.
    pub(crate) fn audit_plan(&self) -> AuditPlan {
        AuditPlan {
            seed: self.config.run.seed,
            share: self.config.audit.share,
        }
    }

    /// What a manifest says beside the state.
    pub(crate) fn checkpoint_metadata(
        &self,
        evaluation_loss: Option<f64>,
    ) -> BTreeMap<String, String> {
        let version = ("everstep".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        let loss = evaluation_loss.map(|loss| (EVALUATION_LOSS.to_owned(), loss.to_string()));
        loss.into_iter().chain([version]).collect()
    }

    /// Which checkpoints are kept.
    pub(crate) fn retention(&self) -> Retention {
        let checkpoint = &self.config.checkpoint;
        Retention {
            last: checkpoint.keep,
            every_steps: checkpoint.keep_every,
            best: checkpoint.keep_best,
        }
    }

    /// State of a block before step 0: weights of the folder that the run file names, or drawn from the seed.
    ///
    /// # Errors
    /// The weights cannot be read, or are not what the run began with.
    pub(crate) fn initial_state(&self, block: BlockId) -> Result<BlockState, RunError> {
        match &self.initial_weights {
            None => Ok(self.numerics.initial_state(self.config.run.seed, block)),
            Some(weights) => {
                let place = self.layout().block(block);
                let values = weights.values(place.offset..place.offset + place.len)?;
                Ok(self.numerics.first_state(values))
            }
        }
    }

    /// The tokens of a task: a pure function of the dataset, the seed and the task.
    pub(crate) fn batch(&self, step: Step, task: Task) -> Result<TokenBatch, DataError> {
        match task {
            Task::Slot(slot) | Task::Audit { slot, .. } => self.data.batch(step.0, slot as usize),
            Task::Evaluate(chunk) => self.data.evaluation_batch(u64::from(chunk)),
        }
    }

    /// What a replica of the run's parameters is built from.
    pub fn replica_plan(&self) -> ReplicaPlan<'_> {
        ReplicaPlan {
            config: &self.config,
            layout: self.layout(),
            end_of_text: self.dataset().manifest().tokenizer.eot,
            threads: self.threads(),
        }
    }

    /// Intra-op threads of one worker. Gradients had the same bits with 1 and with 2 threads in every shape tried, but not with more,
    /// so a machine with more cores does not get more by itself.
    pub(crate) fn threads(&self) -> usize {
        self.config
            .compute
            .threads
            .unwrap_or_else(|| placement::threads(self.topology.count(ActorRole::Worker) as usize))
    }

    /// What a strict run must find again.
    fn environment(&self, backend: &dyn Backend) -> Result<BTreeMap<String, String>, RunError> {
        let environment = backend.environment(&self.config);
        let mut environment = environment.map_err(|error| RunError::User(error.to_string()))?;
        let threads = match self.config.compute.threads {
            Some(threads) if threads > placement::THREADS_OF_EQUAL_BITS => threads.to_string(),
            _ => format!("1 to {}", placement::THREADS_OF_EQUAL_BITS),
        };
        environment.insert("threads".to_owned(), threads);
        Ok(environment)
    }
}

/// What a run's wall time was good for, as far as its logs tell; needs no more than the run directory, so it works while everything is dead.
///
/// # Errors
/// A file of the run directory cannot be read.
pub fn goodput(run_dir: &RunDir) -> Result<Goodput, RunError> {
    let config = RunConfig::read(&run_dir.run_file(), &[])?;
    let slots = crate::slots::read(run_dir, config.batch.slots as u64)
        .map_err(|error| RunError::User(format!("{}: {error}", run_dir.status().display())))?;
    Ok(everstep_telemetry::goodput::account(
        &MetricsLog::read(run_dir.metrics())?,
        &EventLog::read(run_dir.events())?,
        slots,
    ))
}

/// Short form of a digest.
fn short(digest: Digest) -> u64 {
    let hex = digest.to_string();
    u64::from_str_radix(&hex[..16], 16).unwrap_or_default()
}

/// A path, absolute from the current folder on.
fn absolute(path: &std::path::Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
