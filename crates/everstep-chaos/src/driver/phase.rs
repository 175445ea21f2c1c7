//! What the cluster is doing right now, as its files tell.

use std::fs;
use std::path::Path;

use everstep_cluster::RunDir;
use everstep_telemetry::Event;

use super::observer::Observer;
use crate::scenario::Phase;

/// A loss counts as just noticed for so long.
const FRESH_SECONDS: f64 = 0.5;

pub(super) fn holds(
    phase: Phase,
    observer: &Observer,
    run_dir: &RunDir,
    store: Option<&Path>,
) -> bool {
    let last = |wanted: &dyn Fn(&Event) -> bool| {
        let found = observer.events.iter().rev();
        found
            .map(|(at, record)| (*at, &record.event))
            .find(|(_, event)| wanted(event))
    };
    let now = observer.now();
    match phase {
        Phase::Start => observer.commits.is_empty() && !observer.alive().is_empty(),
        Phase::Checkpoint => match store {
            Some(store) => has_unfinished_checkpoint(store),
            None => last(&|event| {
                matches!(
                    event,
                    Event::CheckpointStarted { .. }
                        | Event::CheckpointCommitted { .. }
                        | Event::CheckpointAbandoned { .. }
                )
            })
            .is_some_and(|(_, event)| matches!(event, Event::CheckpointStarted { .. })),
        },
        Phase::Evaluation => {
            let step = observer.step();
            step > 0 && evaluation_period(run_dir).is_some_and(|every| step.is_multiple_of(every))
        }
        Phase::Recovery => last(&|event| matches!(event, Event::ProcessLost { .. }))
            .is_some_and(|(at, _)| now - at < FRESH_SECONDS),
        Phase::Election => {
            let elected = last(&|event| matches!(event, Event::LeaderElected { .. }));
            elected.is_some_and(|(at, event)| {
                let Event::LeaderElected { process, .. } = event else {
                    return false;
                };
                observer.events.iter().rev().any(|(lost_at, record)| {
                    matches!(&record.event, Event::ProcessLost { process: lost, .. } if lost == process)
                        && *lost_at > at
                })
            })
        }
        Phase::Seeding => {
            let back = last(
                &|event| matches!(event, Event::ProcessRestarted { process, .. } if process.starts_with("shard")),
            );
            let seeded = last(&|event| matches!(event, Event::BackupSeeded { .. }));
            back.is_some_and(|(back, _)| seeded.is_none_or(|(seeded, _)| seeded < back))
        }
        Phase::Rollback => {
            let back = last(&|event| matches!(event, Event::Rollback { .. }));
            back.is_some_and(|(at, _)| observer.commits.last().is_none_or(|last| last.at < at))
        }
    }
}

/// Whether some checkpoint has objects and no manifest, and is newer than all that have one.
fn has_unfinished_checkpoint(store: &Path) -> bool {
    let runs = fs::read_dir(store).into_iter().flatten().flatten();
    runs.map(|run| run.path().join("checkpoints"))
        .filter_map(|checkpoints| {
            let steps = fs::read_dir(checkpoints).into_iter().flatten().flatten();
            steps
                .filter_map(|step| {
                    let number: u64 = step.file_name().to_str()?.parse().ok()?;
                    Some((number, step.path()))
                })
                .max()
        })
        .any(|(_, newest)| !newest.join("MANIFEST.json").exists())
}

fn evaluation_period(run_dir: &RunDir) -> Option<u64> {
    let text = fs::read_to_string(run_dir.run_file()).ok()?;
    let run: toml::Table = toml::from_str(&text).ok()?;
    let every = run.get("evaluation")?.get("every")?.as_integer()?;
    u64::try_from(every).ok().filter(|every| *every > 0)
}
