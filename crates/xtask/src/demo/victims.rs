//! Killing processes of a running cluster, and making sure that they really died.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::scenario::{Fault, Role};

/// A process of the cluster, as `everstep status --json` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) name: String,
    pub(crate) roles: Vec<String>,
    pub(crate) pid: i32,
    pub(crate) restarts: u64,
}

/// Reads the processes that have a pid now.
pub(crate) fn processes(status: &Value) -> Result<Vec<Process>> {
    let rows = status["processes"]
        .as_array()
        .context("`everstep status --json` lists no processes")?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            let roles = match &row["roles"] {
                Value::Array(roles) => roles
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect(),
                Value::String(roles) => roles
                    .split(',')
                    .map(|role| role.trim().to_owned())
                    .collect(),
                _ => return None,
            };
            Some(Process {
                name: row["name"].as_str()?.to_owned(),
                roles,
                pid: i32::try_from(row["pid"].as_i64()?)
                    .ok()
                    .filter(|pid| *pid > 1)?,
                restarts: row["restarts"].as_u64().unwrap_or(0),
            })
        })
        .collect())
}

/// One kill: whom, when, and what was seen of it.
#[derive(Debug, Clone)]
pub(crate) struct Kill {
    /// The role whose process dies.
    pub(crate) role: Role,
    /// It dies as soon as this step is committed.
    pub(crate) after_step: u64,
    /// The process that was killed and the last step that was committed before.
    pub(crate) victim: Option<(Process, u64, Instant)>,
    /// How long it took until the cluster had a new process in its place.
    pub(crate) replaced_after: Option<Duration>,
    /// Whether `events.jsonl` tells of the loss.
    pub(crate) noticed: bool,
}

impl Kill {
    pub(crate) fn planned(fault: &Fault) -> Self {
        let Fault::Kill { role, after_step } = *fault;
        Self {
            role,
            after_step,
            victim: None,
            replaced_after: None,
            noticed: false,
        }
    }

    /// Sends SIGKILL to a process that plays the role.
    ///
    /// A process that plays every role would end the run and show nothing, so the victim plays this one only.
    pub(crate) fn strike(&mut self, processes: &[Process], step: u64) -> Result<()> {
        let victim = processes
            .iter()
            .find(|process| {
                process.roles.len() == 1 && is_role(&process.roles[0], self.role.name())
            })
            .with_context(|| {
                format!(
                    "no process plays {} alone; the cluster has {processes:?}",
                    self.role.name()
                )
            })?;
        // A pid may have been given to somebody else in the meantime.
        ensure!(
            is_everstep(victim.pid),
            "process {} is not ours",
            victim.pid
        );
        kill(Pid::from_raw(victim.pid), Signal::SIGKILL)
            .with_context(|| format!("cannot kill process {}", victim.pid))?;
        self.victim = Some((victim.clone(), step, Instant::now()));
        Ok(())
    }

    /// Looks whether the cluster has put another process in the victim's place.
    pub(crate) fn look_for_replacement(&mut self, processes: &[Process]) {
        let Some((victim, _, since)) = &self.victim else {
            return;
        };
        let replaced = processes
            .iter()
            .any(|process| process.name == victim.name && process.pid != victim.pid);
        if replaced && self.replaced_after.is_none() {
            self.replaced_after = Some(since.elapsed());
        }
    }

    /// Takes an event of the run into account.
    pub(crate) fn look_at_event(&mut self, event: &Value) {
        let Some((victim, _, _)) = &self.victim else {
            return;
        };
        let names_victim = event.as_object().is_some_and(|fields| {
            fields.iter().any(|(name, value)| {
                name != "kind"
                    && (value.as_str() == Some(&victim.name)
                        || (name == "pid" && value.as_i64() == Some(victim.pid.into())))
            })
        });
        self.noticed |= event["kind"] == "process_lost" && names_victim;
    }

    /// Ends the demo if the kill did not happen as told.
    pub(crate) fn must_have_happened(&self) -> Result<()> {
        let Some((victim, step, _)) = &self.victim else {
            bail!(
                "the run ended before step {}, so no {} was killed",
                self.after_step,
                self.role.name()
            );
        };
        ensure!(
            self.replaced_after.is_some(),
            "{} (killed after step {step}) was never replaced",
            victim.name
        );
        ensure!(
            self.noticed,
            "events.jsonl says nothing about the loss of {}",
            victim.name
        );
        Ok(())
    }
}

/// Status may name a role `worker` or an instance of it `worker-2`.
fn is_role(name: &str, role: &str) -> bool {
    name.strip_prefix(role)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', ':', '/', '.']))
}

fn is_everstep(pid: i32) -> bool {
    std::fs::read_link(PathBuf::from(format!("/proc/{pid}/exe"))).is_ok_and(|exe| {
        exe.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("everstep"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cluster(pid: i64) -> Vec<Process> {
        processes(&json!({"processes": [
            {"name": "c", "node": "here", "roles": ["coordinator"], "pid": 11, "state": "running", "restarts": 0},
            {"name": "w1", "node": "here", "roles": ["worker"], "pid": pid, "state": "running", "restarts": 0},
            {"name": "gone", "node": "here", "roles": ["worker"], "pid": null, "state": "backoff", "restarts": 3},
        ]}))
        .unwrap()
    }

    #[test]
    fn status_is_read_and_processes_without_pid_are_skipped() {
        let names: Vec<String> = cluster(12)
            .into_iter()
            .map(|process| process.name)
            .collect();
        assert_eq!(names, ["c", "w1"]);
    }

    #[test]
    fn a_process_of_somebody_else_is_left_alone() {
        let own = i64::from(std::process::id());
        let error = Kill::planned(&Fault::Kill {
            role: Role::Worker,
            after_step: 1,
        })
        .strike(&cluster(own), 1)
        .unwrap_err();
        assert!(error.to_string().contains("is not ours"), "{error}");
    }

    #[test]
    fn a_kill_counts_only_when_it_was_seen_from_both_sides() {
        let mut kill = Kill::planned(&Fault::Kill {
            role: Role::Worker,
            after_step: 5,
        });
        assert!(kill.must_have_happened().is_err());
        let victim = cluster(12).remove(1);
        kill.victim = Some((victim, 5, Instant::now()));
        kill.look_for_replacement(&cluster(12));
        assert!(kill.replaced_after.is_none());
        kill.look_for_replacement(&cluster(13));
        kill.look_at_event(&json!({"kind": "process_lost", "process": "other"}));
        assert!(kill.must_have_happened().is_err());
        kill.look_at_event(&json!({"kind": "process_lost", "process": "w1"}));
        kill.must_have_happened().unwrap();
    }

    #[test]
    fn roles_may_carry_an_instance() {
        assert!(
            is_role("shard", "shard")
                && is_role("shard-0", "shard")
                && !is_role("sharder", "shard")
        );
    }
}
