//! The checkpointer actor: everything that touches the object store, beside training and never inside it.
//!
//! Each job is a task of its own, and goes on until the store has taken it. Snapshots take room, so a writer may have two
//! under way: the older one goes on, so that some checkpoint gets done, and a newer one takes the place of the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use everstep_optim::{BlockState, TrainingNumerics};
use everstep_protocol::{BlockId, Lineage, Member, Step, shard};
use everstep_store::{
    BlockSource, CheckpointManifest, CheckpointObject, Commit, Loaded, StoreError,
};
use everstep_telemetry::{Event, names};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};
use tracing::Instrument;

use super::ActorArguments;
use crate::history;
use crate::process::ProcessContext;
use crate::snapshot;
use crate::store_health::{Access, Backoff, patiently};

/// Versions that a writer may have on their way to the store.
const SNAPSHOTS_MAX: usize = 2;
/// A checkpoint that verified and then does not may have met a bad line: it is read so often before it is taken for damaged.
const DAMAGED_READS: u32 = 4;

/// Snapshots shards, uploads, commits manifests, prunes.
pub(crate) struct Checkpointer;

/// Takes a shard's event back to it.
pub(crate) type ShardReply = Box<dyn FnOnce(shard::Event<TrainingNumerics>) + Send>;
/// Takes a loaded block back to the shard, called once for each; or nothing, if the checkpoint is damaged.
pub(crate) type LoadReply = Box<dyn Fn(Option<shard::Event<TrainingNumerics>>) + Send>;

/// What the checkpointer is asked for.
pub(crate) enum CheckpointerMessage {
    /// Load blocks of a committed checkpoint; version 0 is made from the seed.
    Load {
        /// The line of state.
        lineage: Lineage,
        /// The version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
        /// The shard.
        loaded: LoadReply,
    },
    /// Upload a snapshot.
    Store {
        /// Whose snapshot.
        writer: Member,
        /// The version.
        version: Step,
        /// The blocks.
        blocks: Vec<(BlockId, BlockState)>,
        /// The shard.
        stored: ShardReply,
    },
    /// Write a manifest.
    Commit {
        /// The leader's epoch, for the event.
        epoch: u64,
        /// The version.
        version: Step,
        /// What the shards said of their objects.
        objects: Vec<Vec<u8>>,
        /// The mean loss of the version's evaluation, if there was one.
        evaluation_loss: Option<f64>,
        /// The coordinator.
        ended: Box<dyn FnOnce(Committed) + Send>,
    },
    /// Looks after finished tasks.
    Check,
}

/// How a commit ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Committed {
    /// The version has a manifest.
    Yes(Step),
    /// Objects of the version are gone, so it gets none.
    Refused(Step),
}

pub(crate) struct CheckpointerState {
    context: Arc<ProcessContext>,
    jobs: JoinSet<()>,
    uploads: BTreeMap<(Member, Step), Vec<Upload>>,
}

/// A snapshot on its way; dropping it gives it up.
struct Upload {
    _given_up: oneshot::Sender<()>,
    task: AbortHandle,
}

impl CheckpointerState {
    /// Gives up what a new snapshot of `writer` takes the place of.
    fn make_room(&mut self, writer: Member, version: Step) {
        self.uploads.retain(|_, parts| {
            parts.retain(|part| !part.task.is_finished());
            !parts.is_empty()
        });
        let others: Vec<Step> = self
            .uploads
            .keys()
            .filter(|(member, other)| *member == writer && *other != version)
            .map(|(_, other)| *other)
            .collect();
        if let (true, Some(victim)) = (others.len() >= SNAPSHOTS_MAX, others.last()) {
            tracing::warn!(
                step = victim.0,
                by = version.0,
                "a snapshot is given up for a newer one, since the store is slow or away"
            );
            self.uploads.remove(&(writer, *victim));
        }
    }
}

impl Actor for Checkpointer {
    type Msg = CheckpointerMessage;
    type State = CheckpointerState;
    type Arguments = ActorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<CheckpointerMessage>,
        arguments: ActorArguments,
    ) -> Result<CheckpointerState, ActorProcessingErr> {
        let context = arguments.context;
        context.set_checkpointer(myself.clone());
        myself.send_interval(Duration::from_secs(1), || CheckpointerMessage::Check);
        Ok(CheckpointerState {
            context,
            jobs: JoinSet::new(),
            uploads: BTreeMap::new(),
        })
    }

    async fn handle(
        &self,
        _myself: ActorRef<CheckpointerMessage>,
        message: CheckpointerMessage,
        state: &mut CheckpointerState,
    ) -> Result<(), ActorProcessingErr> {
        let context = state.context.clone();
        match message {
            CheckpointerMessage::Load {
                lineage,
                version,
                blocks,
                loaded,
            } => {
                state
                    .jobs
                    .spawn(load(context, lineage, version, blocks, loaded));
            }
            CheckpointerMessage::Store {
                writer,
                version,
                blocks,
                stored,
            } => {
                let span = tracing::info_span!(names::span::UPLOAD, step = version.0);
                state.make_room(writer, version);
                let (given_up, signal) = oneshot::channel();
                let upload = store(context, writer, version, blocks, stored, signal);
                let upload = upload.instrument(span);
                let task = state
                    .jobs
                    .spawn_on(upload, state.context.background.handle());
                let upload = Upload {
                    _given_up: given_up,
                    task,
                };
                state
                    .uploads
                    .entry((writer, version))
                    .or_default()
                    .push(upload);
            }
            CheckpointerMessage::Commit {
                epoch,
                version,
                objects,
                evaluation_loss,
                ended,
            } => {
                let manifest = match manifest(&context, version, &objects, evaluation_loss) {
                    Ok(manifest) => manifest,
                    Err(error) => {
                        let step = version.0;
                        tracing::error!(error, step, "the checkpoint cannot be committed");
                        ended(Committed::Refused(version));
                        return Ok(());
                    }
                };
                state.jobs.spawn(async move {
                    let committed = commit(&context, epoch, &manifest).await;
                    ended(committed);
                    if let Committed::Yes(_) = committed {
                        prune(&context).await;
                    }
                });
            }
            CheckpointerMessage::Check => {
                while let Some(ended) = state.jobs.try_join_next() {
                    // One job's failure must not take the others along; whoever waits for it asks again.
                    if let Err(error) = ended {
                        tracing::error!(%error, "a job of the checkpointer failed");
                    }
                }
            }
        }
        Ok(())
    }
}

async fn load(
    context: Arc<ProcessContext>,
    lineage: Lineage,
    version: Step,
    blocks: Vec<BlockId>,
    loaded: LoadReply,
) {
    let event = |block, state| shard::Event::Loaded {
        lineage,
        version,
        block,
        state,
    };
    if version.0 == 0 {
        for block in blocks {
            let run = context.run.clone();
            match tokio::task::spawn_blocking(move || run.initial_state(block)).await {
                Ok(Ok(state)) => loaded(Some(event(block, state))),
                Ok(Err(error)) => {
                    tracing::error!(%error, block, "initial weights cannot be read");
                    return loaded(None);
                }
                Err(error) => tracing::error!(%error, block, "initial weights could not be made"),
            }
        }
        return;
    }
    let mut backoff = Backoff::default();
    let mut damaged = 0;
    loop {
        let read = || context.store.load(version.0, &blocks);
        match patiently(&context, Access::Read, read).await {
            Ok(Loaded { states, num_near }) => {
                context.event(&Event::StateRestored {
                    process: context.name().to_owned(),
                    step: version.0,
                    blocks: blocks.len() as u64,
                    local_blocks: num_near as u64,
                });
                for state in states {
                    let Some(history) = history::from_text(&state.extra) else {
                        let (block, extra) = (state.block, state.extra);
                        tracing::error!(block, extra, "a checkpoint's history is not understood");
                        return loaded(None);
                    };
                    let block = state.block;
                    let state = BlockState {
                        parameters: state.param.into(),
                        first_moment: state.m.into(),
                        second_moment: state.v.into(),
                        average: state.ema.into(),
                        history,
                    };
                    if let Err(error) = context.run.numerics.check_state(block, &state) {
                        tracing::error!(block, %error, "a checkpoint is of another model");
                        return loaded(None);
                    }
                    loaded(Some(event(block, state)));
                }
                return;
            }
            Err(error) => {
                damaged += 1;
                tracing::error!(%error, step = version.0, damaged, "a checkpoint cannot be read; trying again");
                if damaged >= DAMAGED_READS {
                    return loaded(None);
                }
                backoff.wait().await;
            }
        }
    }
}

async fn store(
    context: Arc<ProcessContext>,
    writer: Member,
    version: Step,
    blocks: Vec<(BlockId, BlockState)>,
    stored: ShardReply,
    given_up: oneshot::Receiver<()>,
) {
    let ids: Vec<BlockId> = blocks.iter().map(|(block, _)| *block).collect();
    // The writer's life is part of the name: a later life never overwrites an object that a manifest may name.
    let name = format!("shard-{}-{:x}", writer.index, writer.incarnation);
    let memory_bytes = context.run.config.checkpoint.memory_bytes;
    let dir = context.run_dir.snapshots();
    let hold = move || snapshot::hold(version.0, blocks, memory_bytes, &dir);
    // Only a panic keeps it from an answer.
    let Ok(states) = tokio::task::spawn_blocking(hold).await else {
        return stored(shard::Event::StoreAbandoned {
            version,
            blocks: ids,
        });
    };
    let write = || put(&context, version, &name, &states);
    let written = tokio::select! {
        written = patiently(&context, Access::Write, write) => written,
        _ = given_up => {
            return stored(shard::Event::StoreAbandoned { version, blocks: ids });
        }
    };
    match written {
        Ok(objects) => match serde_json::to_vec(&objects) {
            Ok(object) => stored(shard::Event::Stored {
                version,
                blocks: ids,
                object,
            }),
            Err(error) => tracing::error!(%error, "an object's record cannot be written"),
        },
        Err(error) => {
            tracing::error!(%error, step = version.0, "a snapshot could not be stored; training goes on without it");
            stored(shard::Event::StoreAbandoned {
                version,
                blocks: ids,
            });
        }
    }
}

/// Writes blocks, without those that an older checkpoint has. The last version's are written in full: its commit must not be refused
/// because an older checkpoint is gone.
async fn put<B: BlockSource>(
    context: &ProcessContext,
    version: Step,
    name: &str,
    blocks: &[B],
) -> Result<Vec<CheckpointObject>, StoreError> {
    if version.0 >= context.run.num_steps() {
        return Ok(vec![
            context.store.put_blocks(version.0, name, blocks).await?,
        ]);
    }
    context.store.put_changed(version.0, name, blocks).await
}

async fn commit(context: &ProcessContext, epoch: u64, manifest: &CheckpointManifest) -> Committed {
    let started = Instant::now();
    let version = Step(manifest.step);
    let is_last = manifest.step >= context.run.num_steps();
    let mut backoff = Backoff::default();
    let mut refused = 0;
    loop {
        let write = || context.store.commit(manifest);
        match patiently(context, Access::Write, write).await {
            Ok(outcome) => {
                if matches!(outcome, Commit::Created | Commit::Repaired) {
                    let seconds = started.elapsed().as_secs_f64();
                    context.event(&Event::CheckpointCommitted {
                        step: version.0,
                        epoch,
                        bytes: manifest.bytes(),
                        seconds,
                    });
                }
                break;
            }
            // Somebody removed what was written. The next checkpoint takes its place, and nothing takes that of the last one.
            Err(error @ StoreError::Damaged(_)) if !is_last && refused >= DAMAGED_READS => {
                tracing::error!(%error, step = version.0, "the checkpoint is given up");
                return Committed::Refused(version);
            }
            Err(error) => {
                tracing::warn!(%error, step = version.0, "the manifest could not be written; trying again");
                refused += 1;
                backoff.wait().await;
            }
        }
    }
    let digest = manifest.manifest_digest();
    if let Err(error) = context.ledger.record_commit(version.0, digest) {
        tracing::error!(%error, "the ledger does not take the committed step");
    }
    Committed::Yes(version)
}

async fn prune(context: &ProcessContext) {
    let retention = context.run.retention();
    let pruned = async {
        let plan = context.store.plan_prune(&retention).await?;
        context.store.carry_out(&plan).await
    };
    match pruned.await {
        Ok(report) => tracing::debug!(?report, "pruned"),
        Err(error) => tracing::warn!(%error, "old checkpoints could not be pruned"),
    }
}

/// The manifest of a checkpoint. A block that two replicas stored is taken from the first; both have the same bits.
fn manifest(
    context: &ProcessContext,
    version: Step,
    objects: &[Vec<u8>],
    evaluation_loss: Option<f64>,
) -> Result<CheckpointManifest, String> {
    let mut seen = BTreeSet::new();
    let mut kept = Vec::new();
    for objects in objects {
        let objects: Vec<CheckpointObject> =
            serde_json::from_slice(objects).map_err(|error| error.to_string())?;
        for mut object in objects {
            object.blocks.retain(|entry| seen.insert(entry.block));
            if !object.blocks.is_empty() {
                kept.push(object);
            }
        }
    }
    let metadata = context.run.checkpoint_metadata(evaluation_loss);
    CheckpointManifest::new(
        version.0,
        &context.run.identity,
        context.run.num_blocks(),
        kept,
        metadata,
    )
    .map_err(|error| error.to_string())
}
