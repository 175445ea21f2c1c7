//! Quarantines that outlive the whole cluster: `quarantine/worker-<index>.json` in the store. Until the store has one, it lies in
//! `DIR/quarantine/` of the leader that wrote it, so that a full stop while the store is away forgets nothing.
//!
//! A quarantine is of a device, and is known by the process and node that the worker lived in. If the topology puts the worker elsewhere, the
//! record stays and does not count.

use std::fs;
use std::sync::Arc;

use everstep_store::{Quarantine, StoreError};

use crate::process::ProcessContext;
use crate::run::{RunContext, RunError};
use crate::rundir::RunDir;
use crate::status::{LeaderStatus, replace_durably};
use crate::store_health::{Access, patiently};
use crate::topology::{ActorAddress, ActorRole, Topology};

/// What the store and this node know, and what of it counts in this topology. Whatever the store lacks is sent to it again.
///
/// # Errors
/// The store does not answer.
pub(crate) async fn look(context: &Arc<ProcessContext>) -> Result<Vec<Quarantine>, StoreError> {
    let pending = pending(&context.run_dir);
    for quarantine in &pending {
        store(context, quarantine.clone());
    }
    let num_workers = context.run.topology.count(ActorRole::Worker);
    let mut known = context.store.quarantines(num_workers).await?;
    known.extend(pending.into_iter().map(|own| (own.worker, own)));
    let counts = |quarantine: &Quarantine| counts(&context.run.topology, quarantine);
    Ok(known.into_values().filter(counts).collect())
}

/// As [`look`], however long the store takes.
pub(crate) async fn find(context: &Arc<ProcessContext>) -> Vec<Quarantine> {
    match patiently(context, Access::Read, || look(context)).await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "quarantines cannot be read; those that shards and this node know count");
            pending(&context.run_dir)
        }
    }
}

/// Writes a quarantine to this node's disk, and to the store as soon as that takes it.
pub(crate) fn record(context: &Arc<ProcessContext>, quarantine: Quarantine) {
    let file = file(&context.run_dir, quarantine.worker);
    if let Err(error) = replace_durably(&file, &quarantine) {
        tracing::error!(%error, worker = quarantine.worker, "a quarantine is on no disk of this node");
    }
    store(context, quarantine);
}

fn store(context: &Arc<ProcessContext>, quarantine: Quarantine) {
    let context = context.clone();
    tokio::spawn(async move {
        let put = || context.store.put_quarantine(&quarantine);
        match patiently(&context, Access::Write, put).await {
            Ok(()) => drop(fs::remove_file(file(&context.run_dir, quarantine.worker))),
            Err(error) => tracing::error!(%error, "the store does not take a quarantine"),
        }
    });
}

fn file(run_dir: &RunDir, worker: u32) -> std::path::PathBuf {
    run_dir.quarantine().join(format!("worker-{worker}.json"))
}

/// What the store may lack. A file that is damaged was being written when the power went, before anybody relied on it.
fn pending(run_dir: &RunDir) -> Vec<Quarantine> {
    let entries = fs::read_dir(run_dir.quarantine()).into_iter().flatten();
    let files = entries.flatten().map(|entry| entry.path());
    files
        .filter(|path| path.extension().is_some_and(|kind| kind == "json"))
        .filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok())
        .collect()
}

/// Whether the worker still lives where its device lied; a damaged record, which does not say where, counts.
fn counts(topology: &Topology, quarantine: &Quarantine) -> bool {
    let address = ActorAddress {
        role: ActorRole::Worker,
        index: quarantine.worker,
    };
    let process = topology
        .actors()
        .find(|(actor, _)| *actor == address)
        .map(|(_, process)| &topology.processes[process as usize]);
    let here = process.is_some_and(|process| {
        quarantine.process.is_empty()
            || (process.name == quarantine.process && process.node == quarantine.node)
    });
    if !here {
        tracing::warn!(
            worker = quarantine.worker,
            process = quarantine.process,
            node = quarantine.node,
            "a quarantine is of a process that this topology does not have"
        );
    }
    here
}

/// By its process, or by itself: a damaged record does not say where it lived.
fn is_named(quarantine: &Quarantine, name: &str) -> bool {
    quarantine.process == name || format!("worker-{}", quarantine.worker) == name
}

/// The quarantined workers of a run, as the store and this node know them.
///
/// # Errors
/// The store cannot be read.
pub async fn list(run: &RunContext) -> Result<Vec<Quarantine>, RunError> {
    let num_workers = run.topology.count(ActorRole::Worker);
    let mut known = run.open_store()?.quarantines(num_workers).await?;
    let pending = pending(run.run_dir()).into_iter();
    known.extend(pending.map(|own| (own.worker, own)));
    Ok(known.into_values().collect())
}

/// Lifts the quarantines of a process's workers, or of all if `process` is none; returns them.
///
/// # Errors
/// Processes of the run are alive, who would keep the quarantine; nobody is quarantined there; the store cannot be written.
pub async fn clear(run: &RunContext, process: Option<&str>) -> Result<Vec<Quarantine>, RunError> {
    let living = run.living_processes();
    if !living.is_empty() {
        return Err(RunError::User(format!(
            "the run is going on ({} alive), and keeps a quarantine for as long as it does; stop it first",
            living.join(", ")
        )));
    }
    let known = list(run).await?;
    let names: Vec<&str> = known.iter().map(|one| one.process.as_str()).collect();
    let chosen: Vec<Quarantine> = known
        .iter()
        .filter(|one| process.is_none_or(|process| is_named(one, process)))
        .cloned()
        .collect();
    if let (Some(process), true) = (process, chosen.is_empty()) {
        let names = if names.is_empty() {
            "nobody is".to_owned()
        } else {
            names.join(", ")
        };
        return Err(RunError::User(format!(
            "{process} is not quarantined; quarantined: {names}"
        )));
    }
    let store = run.open_store()?;
    let failed = |error: std::io::Error| {
        RunError::User(format!("{}: {error}", run.run_dir().path().display()))
    };
    for quarantine in &chosen {
        store.lift_quarantine(quarantine.worker).await?;
        match fs::remove_file(file(run.run_dir(), quarantine.worker)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(error));
            }
            _ => {}
        }
    }
    if let Some(mut status) = LeaderStatus::read(run.run_dir()) {
        status.quarantined.retain(|shown| {
            let is_lifted = |lifted: &Quarantine| lifted.worker == shown.worker;
            !chosen.iter().any(is_lifted)
        });
        status.write(run.run_dir()).map_err(failed)?;
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quarantine(process: &str, node: &str) -> Quarantine {
        Quarantine {
            worker: 0,
            process: process.to_owned(),
            node: node.to_owned(),
            ..Quarantine::default()
        }
    }

    #[test]
    fn a_quarantine_is_of_a_place() {
        let topology = Topology::laptop(1);
        let process = &topology.processes[0];
        assert!(counts(&topology, &quarantine(&process.name, &process.node)));
        assert!(!counts(&topology, &quarantine(&process.name, "elsewhere")));
        assert!(!counts(&topology, &quarantine("other", &process.node)));
        assert!(counts(&topology, &Quarantine::default()), "damaged");
    }

    #[test]
    fn half_a_file_is_no_quarantine() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        assert!(pending(&run_dir).is_empty());
        let known = quarantine("worker-0", "a");
        replace_durably(&file(&run_dir, 0), &known).unwrap();
        fs::write(run_dir.quarantine().join("worker-1.json"), "{\"worker\"").unwrap();
        fs::write(run_dir.quarantine().join("worker-2.77.tmp"), "{}").unwrap();
        assert_eq!(pending(&run_dir), [known]);
    }
}
