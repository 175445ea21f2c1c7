//! The checkpointer actor: everything that touches the object store, beside training and never inside it.
//!
//! Each job is a task of its own; what fails is tried again here (loads) or asked for again by the leader (snapshots).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use everstep_optim::{BlockState, TrainingNumerics};
use everstep_protocol::{BlockId, Lineage, Member, Step, shard};
use everstep_store::{CheckpointManifest, CheckpointObject, Commit};
use everstep_telemetry::{Event, names};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::task::JoinSet;
use tracing::Instrument;

use super::ActorArguments;
use crate::process::ProcessContext;

const RETRY: Duration = Duration::from_millis(500);

/// Snapshots shards, uploads, commits manifests, prunes.
pub(crate) struct Checkpointer;

/// Takes a shard's event back to it.
pub(crate) type ShardReply = Box<dyn FnOnce(shard::Event<TrainingNumerics>) + Send>;
/// Takes a loaded block back to the shard; called once for each.
pub(crate) type LoadReply = Box<dyn Fn(shard::Event<TrainingNumerics>) + Send>;

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
        /// The coordinator.
        committed: Box<dyn FnOnce(Step) + Send>,
    },
    /// Looks after finished tasks.
    Check,
}

pub(crate) struct CheckpointerState {
    context: Arc<ProcessContext>,
    jobs: JoinSet<()>,
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
                state
                    .jobs
                    .spawn(store(context, writer, version, blocks, stored).instrument(span));
            }
            CheckpointerMessage::Commit {
                epoch,
                version,
                objects,
                committed,
            } => {
                state
                    .jobs
                    .spawn(commit(context, epoch, version, objects, committed));
            }
            CheckpointerMessage::Check => {
                while let Some(ended) = state.jobs.try_join_next() {
                    ended?;
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
                Ok(state) => loaded(event(block, state)),
                Err(error) => tracing::error!(%error, block, "initial weights could not be made"),
            }
        }
        return;
    }
    loop {
        match context.store.load_blocks(version.0, &blocks).await {
            Ok(states) => {
                for state in states {
                    let (parameters, first, second) =
                        (state.param.into(), state.m.into(), state.v.into());
                    loaded(event(
                        state.block,
                        BlockState {
                            parameters,
                            first_moment: first,
                            second_moment: second,
                        },
                    ));
                }
                return;
            }
            Err(error) => {
                tracing::error!(%error, step = version.0, "a checkpoint cannot be read now; trying again");
                tokio::time::sleep(RETRY).await;
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
) {
    let ids: Vec<BlockId> = blocks.iter().map(|(block, _)| *block).collect();
    let states: Vec<everstep_store::BlockState> = blocks
        .into_iter()
        .map(|(block, state)| everstep_store::BlockState {
            block,
            param: state.parameters.into_vec(),
            m: state.first_moment.into_vec(),
            v: state.second_moment.into_vec(),
        })
        .collect();
    // The writer's life is part of the name: a later life never overwrites an object that a manifest may name.
    let name = format!("shard-{}-{:x}", writer.index, writer.incarnation);
    match context.store.put_blocks(version.0, &name, &states).await {
        Ok(object) => match serde_json::to_vec(&object) {
            Ok(object) => stored(shard::Event::Stored {
                version,
                blocks: ids,
                object,
            }),
            Err(error) => tracing::error!(%error, "an object's record cannot be written"),
        },
        Err(error) => {
            tracing::warn!(%error, step = version.0, "a snapshot could not be stored; training goes on without it")
        }
    }
}

async fn commit(
    context: Arc<ProcessContext>,
    epoch: u64,
    version: Step,
    objects: Vec<Vec<u8>>,
    committed: Box<dyn FnOnce(Step) + Send>,
) {
    let started = Instant::now();
    let manifest = match manifest(&context, version, &objects) {
        Ok(manifest) => manifest,
        Err(error) => {
            return tracing::error!(
                error,
                step = version.0,
                "the checkpoint cannot be committed"
            );
        }
    };
    loop {
        match context.store.commit(&manifest).await {
            Ok(outcome) => {
                if matches!(outcome, Commit::Created) {
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
            Err(error) => {
                tracing::warn!(%error, step = version.0, "the manifest could not be written; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
    if let Err(error) = context
        .ledger
        .record_commit(version.0, manifest.manifest_digest())
    {
        tracing::error!(%error, "the ledger does not take the committed step");
    }
    committed(version);
    match context
        .store
        .prune(context.run.config.checkpoint.keep)
        .await
    {
        Ok(report) => tracing::debug!(?report, "pruned"),
        Err(error) => tracing::warn!(%error, "old checkpoints could not be pruned"),
    }
}

/// The manifest of a checkpoint. A block that two replicas stored is taken from the first; both have the same bits.
fn manifest(
    context: &ProcessContext,
    version: Step,
    objects: &[Vec<u8>],
) -> Result<CheckpointManifest, String> {
    let mut seen = BTreeSet::new();
    let mut kept = Vec::new();
    for object in objects {
        let mut object: CheckpointObject =
            serde_json::from_slice(object).map_err(|error| error.to_string())?;
        object.blocks.retain(|entry| seen.insert(entry.block));
        if !object.blocks.is_empty() {
            kept.push(object);
        }
    }
    let metadata = context.run.checkpoint_metadata();
    CheckpointManifest::new(
        version.0,
        &context.run.identity,
        context.run.num_blocks(),
        kept,
        metadata,
    )
    .map_err(|error| error.to_string())
}
