//! Plans as text: one item a line, as the minimiser prints them and `--plan` reads them.
//!
//! ```text
//! topology workers=3 shards=3 coordinators=2 replication=2 colocated=false
//! workload slots=8 blocks=4 steps=10 checkpoint_every=4 evaluate_every=0 chunks=2 audit_permille=0
//! timing latency_max_ms=3 seed_max_ms=50 compute_max_ms=10 store_max_ms=30 shares_log=true
//! chaos_ms 900
//! fault kill target=leader at=phase:decided:2:0 salt=0
//! fault freeze for_ms=1500 target=worker-0 at=step:3 salt=1
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use everstep_protocol::Role;

use super::{Action, Moment, Plan, PlannedFault, Target, Timing, Topology, Workload};
use crate::phase::Phase;

/// A plan that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError {
    /// Its line, counted from 1.
    pub line: usize,
    /// What is wrong, and what is allowed.
    pub what: String,
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for PlanError {}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Worker => "worker",
        Role::Shard => "shard",
        Role::Coordinator => "coordinator",
    }
}

fn role_of(name: &str) -> Option<Role> {
    [Role::Worker, Role::Shard, Role::Coordinator]
        .into_iter()
        .find(|role| role_name(*role) == name)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Any => f.write_str("any"),
            Target::Role(role) => f.write_str(role_name(*role)),
            Target::Actor(role, index) => write!(f, "{}-{index}", role_name(*role)),
            Target::Leader => f.write_str("leader"),
            Target::Successor => f.write_str("successor"),
            Target::LeaderAndSuccessor => f.write_str("leader-and-successor"),
            Target::Primary(None) => f.write_str("primary"),
            Target::Primary(Some(block)) => write!(f, "primary-of-{block}"),
            Target::Replicas(None) => f.write_str("replicas"),
            Target::Replicas(Some(block)) => write!(f, "replicas-of-{block}"),
            Target::AllOf(role) => write!(f, "all-{}s", role_name(*role)),
            Target::All => f.write_str("all"),
            Target::Concerned => f.write_str("concerned"),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = [
            Target::Any,
            Target::Leader,
            Target::Successor,
            Target::LeaderAndSuccessor,
            Target::Primary(None),
            Target::Replicas(None),
            Target::All,
            Target::Concerned,
        ];
        if let Some(target) = plain.into_iter().find(|target| target.to_string() == text) {
            return Ok(target);
        }
        if let Some(role) = role_of(text) {
            return Ok(Target::Role(role));
        }
        let of = |prefix: &str| text.strip_prefix(prefix)?.parse().ok();
        if let Some(block) = of("primary-of-") {
            return Ok(Target::Primary(Some(block)));
        }
        if let Some(block) = of("replicas-of-") {
            return Ok(Target::Replicas(Some(block)));
        }
        let all = text
            .strip_prefix("all-")
            .and_then(|roles| role_of(roles.strip_suffix('s')?));
        if let Some(role) = all {
            return Ok(Target::AllOf(role));
        }
        text.rsplit_once('-')
            .and_then(|(role, index)| Some(Target::Actor(role_of(role)?, index.parse().ok()?)))
            .ok_or_else(|| {
                format!(
                    "unknown target `{text}`; one of any, worker, worker-0, all-workers (also shard, coordinator), leader, \
                     successor, leader-and-successor, primary, primary-of-0, replicas, replicas-of-0, all, concerned"
                )
            })
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Moment::At(at_ms) => write!(f, "ms:{at_ms}"),
            Moment::Step(step) => write!(f, "step:{step}"),
            Moment::Phase {
                phase,
                from_step,
                skip,
            } => write!(f, "phase:{phase}:{from_step}:{skip}"),
        }
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORMS: &str = "`ms:N`, `step:N` or `phase:NAME:FROM_STEP:SKIP`";
        let wrong = || format!("unknown moment `{text}`; {FORMS}");
        let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).ok_or_else(wrong);
        let mut parts = text.split(':');
        let moment = match parts.next() {
            Some("ms") => Moment::At(number(parts.next())?),
            Some("step") => Moment::Step(number(parts.next())?),
            Some("phase") => Moment::Phase {
                phase: parts.next().ok_or_else(wrong)?.parse::<Phase>()?,
                from_step: number(parts.next())?,
                skip: number(parts.next())?,
            },
            _ => return Err(wrong()),
        };
        parts.next().map_or(Ok(moment), |_| Err(wrong()))
    }
}

/// The fields of an action, by name; one place for writing and for reading.
type Fields = Vec<(&'static str, u64)>;

fn parts(action: &Action) -> (&'static str, Fields) {
    match *action {
        Action::Kill { down_ms } => (
            "kill",
            down_ms.map(|ms| ("down_ms", ms)).into_iter().collect(),
        ),
        Action::KillMidway => ("kill-midway", vec![]),
        Action::RollingRestart { pause_ms } => ("rolling-restart", vec![("pause_ms", pause_ms)]),
        Action::Freeze { for_ms } => ("freeze", vec![("for_ms", for_ms)]),
        Action::Partition { for_ms } => ("partition", vec![("for_ms", for_ms)]),
        Action::OneWayCut { for_ms } => ("one-way-cut", vec![("for_ms", for_ms)]),
        Action::Flap { for_ms, period_ms } => {
            ("flap", vec![("for_ms", for_ms), ("period_ms", period_ms)])
        }
        Action::FalseSuspicion => ("false-suspicion", vec![]),
        Action::Drain => ("drain", vec![]),
        Action::Drop { for_ms, permille } => {
            ("drop", vec![("for_ms", for_ms), ("permille", permille)])
        }
        Action::Duplicate { for_ms, permille } => (
            "duplicate",
            vec![("for_ms", for_ms), ("permille", permille)],
        ),
        Action::Delay { for_ms, permille } => {
            ("delay", vec![("for_ms", for_ms), ("permille", permille)])
        }
        Action::Reorder { for_ms } => ("reorder", vec![("for_ms", for_ms)]),
        Action::Corrupt { for_ms, permille } => {
            ("corrupt", vec![("for_ms", for_ms), ("permille", permille)])
        }
        Action::SlowLink { for_ms, tensor_ms } => (
            "slow-link",
            vec![("for_ms", for_ms), ("tensor_ms", tensor_ms)],
        ),
        Action::SlowWorker { for_ms, factor } => {
            ("slow-worker", vec![("for_ms", for_ms), ("factor", factor)])
        }
        Action::LyingWorker { for_ms, permille } => (
            "lying-worker",
            vec![("for_ms", for_ms), ("permille", permille)],
        ),
        Action::LateJoin { at_ms } => ("late-join", vec![("at_ms", at_ms)]),
        Action::SlowStore { for_ms, max_ms } => {
            ("slow-store", vec![("for_ms", for_ms), ("max_ms", max_ms)])
        }
        Action::StoreOutage { for_ms } => ("store-outage", vec![("for_ms", for_ms)]),
        Action::LostReply { for_ms, permille } => (
            "lost-reply",
            vec![("for_ms", for_ms), ("permille", permille)],
        ),
        Action::StaleList { for_ms } => ("stale-list", vec![("for_ms", for_ms)]),
        Action::StoreRace => ("store-race", vec![]),
        Action::DamageCheckpoint { missing } => {
            ("damage-checkpoint", vec![("missing", u64::from(missing))])
        }
        Action::Aftershock { times } => ("aftershock", vec![("times", times)]),
    }
}

/// Named values of a line; each may be taken once.
struct Values<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Values<'a> {
    fn read(words: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        for word in words {
            let (name, value) = word
                .split_once('=')
                .ok_or_else(|| format!("`{word}` is not `name=value`"))?;
            if values.insert(name, value).is_some() {
                return Err(format!("`{name}` twice"));
            }
        }
        Ok(Self(values))
    }

    fn optional<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        self.0
            .remove(name)
            .map(|value| {
                value
                    .parse()
                    .map_err(|_| format!("`{name}` cannot be `{value}`"))
            })
            .transpose()
    }

    fn take<T: FromStr>(&mut self, name: &str) -> Result<T, String> {
        self.optional(name)?
            .ok_or_else(|| format!("`{name}` is missing"))
    }

    fn close(self) -> Result<(), String> {
        match self.0.keys().next() {
            Some(name) => Err(format!("unknown field `{name}`")),
            None => Ok(()),
        }
    }
}

fn read_action(name: &str, values: &mut Values<'_>) -> Result<Action, String> {
    let mut number = |field: &str| values.take::<u64>(field);
    Ok(match name {
        "kill" => Action::Kill {
            down_ms: values.optional("down_ms")?,
        },
        "kill-midway" => Action::KillMidway,
        "rolling-restart" => Action::RollingRestart {
            pause_ms: number("pause_ms")?,
        },
        "freeze" => Action::Freeze {
            for_ms: number("for_ms")?,
        },
        "partition" => Action::Partition {
            for_ms: number("for_ms")?,
        },
        "one-way-cut" => Action::OneWayCut {
            for_ms: number("for_ms")?,
        },
        "flap" => Action::Flap {
            for_ms: number("for_ms")?,
            period_ms: number("period_ms")?,
        },
        "false-suspicion" => Action::FalseSuspicion,
        "drain" => Action::Drain,
        "drop" => Action::Drop {
            for_ms: number("for_ms")?,
            permille: number("permille")?,
        },
        "duplicate" => Action::Duplicate {
            for_ms: number("for_ms")?,
            permille: number("permille")?,
        },
        "delay" => Action::Delay {
            for_ms: number("for_ms")?,
            permille: number("permille")?,
        },
        "reorder" => Action::Reorder {
            for_ms: number("for_ms")?,
        },
        "corrupt" => Action::Corrupt {
            for_ms: number("for_ms")?,
            permille: number("permille")?,
        },
        "slow-link" => Action::SlowLink {
            for_ms: number("for_ms")?,
            tensor_ms: number("tensor_ms")?,
        },
        "slow-worker" => Action::SlowWorker {
            for_ms: number("for_ms")?,
            factor: number("factor")?,
        },
        "lying-worker" => Action::LyingWorker {
            for_ms: number("for_ms")?,
            permille: number("permille")?,
        },
        "late-join" => Action::LateJoin {
            at_ms: number("at_ms")?,
        },
        "slow-store" => Action::SlowStore {
            for_ms: number("for_ms")?,
            max_ms: number("max_ms")?,
        },
        "store-outage" => Action::StoreOutage {
            for_ms: number("for_ms")?,
        },
        "lost-reply" => Action::LostReply {
            for_ms: number("for_ms")?,
            permille: number("permille")?,
        },
        "stale-list" => Action::StaleList {
            for_ms: number("for_ms")?,
        },
        "store-race" => Action::StoreRace,
        "damage-checkpoint" => Action::DamageCheckpoint {
            missing: number("missing")? != 0,
        },
        "aftershock" => Action::Aftershock {
            times: number("times")?,
        },
        other => return Err(format!("unknown fault `{other}`")),
    })
}

pub(super) fn write_fault(fault: &PlannedFault, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (name, fields) = parts(&fault.action);
    write!(f, "fault {name}")?;
    for (field, value) in fields {
        write!(f, " {field}={value}")?;
    }
    write!(
        f,
        " target={} at={} salt={}",
        fault.target, fault.moment, fault.salt
    )
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Topology {
            num_workers,
            num_shards,
            num_coordinators,
            replication,
            colocated,
        } = &self.topology;
        writeln!(
            f,
            "topology workers={num_workers} shards={num_shards} coordinators={num_coordinators} replication={replication} \
             colocated={colocated}"
        )?;
        let Workload {
            num_slots,
            num_blocks,
            num_steps,
            checkpoint_every,
            evaluate_every,
            num_chunks,
            audit_permille,
        } = &self.workload;
        writeln!(
            f,
            "workload slots={num_slots} blocks={num_blocks} steps={num_steps} checkpoint_every={checkpoint_every} \
             evaluate_every={evaluate_every} chunks={num_chunks} audit_permille={audit_permille}"
        )?;
        let Timing {
            latency_max_ms,
            seed_max_ms,
            compute_max_ms,
            store_max_ms,
            shares_log,
        } = &self.timing;
        writeln!(
            f,
            "timing latency_max_ms={latency_max_ms} seed_max_ms={seed_max_ms} compute_max_ms={compute_max_ms} \
             store_max_ms={store_max_ms} shares_log={shares_log}"
        )?;
        if let Some(chaos_ms) = self.chaos_ms {
            writeln!(f, "chaos_ms {chaos_ms}")?;
        }
        for fault in &self.faults {
            writeln!(f, "{fault}")?;
        }
        Ok(())
    }
}

fn read_line(plan: &mut Plan, line: &str) -> Result<(), String> {
    let mut words = line.split_whitespace();
    match words.next() {
        Some("topology") => {
            let mut values = Values::read(words)?;
            plan.topology = Topology {
                num_workers: values.take("workers")?,
                num_shards: values.take("shards")?,
                num_coordinators: values.take("coordinators")?,
                replication: values.take("replication")?,
                colocated: values.take("colocated")?,
            };
            values.close()
        }
        Some("workload") => {
            let mut values = Values::read(words)?;
            plan.workload = Workload {
                num_slots: values.take("slots")?,
                num_blocks: values.take("blocks")?,
                num_steps: values.take("steps")?,
                checkpoint_every: values.take("checkpoint_every")?,
                evaluate_every: values.take("evaluate_every")?,
                num_chunks: values.take("chunks")?,
                audit_permille: values.take("audit_permille")?,
            };
            values.close()
        }
        Some("timing") => {
            let mut values = Values::read(words)?;
            plan.timing = Timing {
                latency_max_ms: values.take("latency_max_ms")?,
                seed_max_ms: values.take("seed_max_ms")?,
                compute_max_ms: values.take("compute_max_ms")?,
                store_max_ms: values.take("store_max_ms")?,
                shares_log: values.take("shares_log")?,
            };
            values.close()
        }
        Some("chaos_ms") => {
            let value = words.next().and_then(|value| value.parse().ok());
            plan.chaos_ms = Some(value.ok_or("`chaos_ms` needs a whole number")?);
            Ok(())
        }
        Some("fault") => {
            let name = words.next().ok_or("`fault` needs a kind")?;
            let mut values = Values::read(words)?;
            let action = read_action(name, &mut values)?;
            let text = |value: Option<String>, name: &str| {
                value.ok_or_else(|| format!("`{name}` is missing"))
            };
            let target = text(values.optional("target")?, "target")?.parse()?;
            let moment = text(values.optional("at")?, "at")?.parse()?;
            let salt = values.optional("salt")?;
            values.close()?;
            plan.push(action, target, moment);
            if let (Some(salt), Some(fault)) = (salt, plan.faults.last_mut()) {
                fault.salt = salt;
            }
            Ok(())
        }
        Some(other) => Err(format!(
            "unknown item `{other}`; one of topology, workload, timing, chaos_ms, fault"
        )),
        None => Ok(()),
    }
}

impl FromStr for Plan {
    type Err = PlanError;

    /// Reads what [`Display`](fmt::Display) writes. Lines that begin with `#` are ignored; what is not given is as in
    /// [`Plan::default`].
    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut plan = Plan::default();
        for (line, content) in (1..).zip(text.lines()) {
            if !content.trim_start().starts_with('#') {
                read_line(&mut plan, content).map_err(|what| PlanError { line, what })?;
            }
        }
        plan.check().map_err(|what| PlanError { line: 0, what })?;
        Ok(plan)
    }
}

impl Plan {
    /// Whether it can be run: counts within what the simulator bears, targets that exist.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(format!("`{name}` is {value}; {low} to {high} are allowed"))
            }
        };
        let (topology, workload) = (&self.topology, &self.workload);
        within("workers", topology.num_workers.into(), 1, 16)?;
        within("shards", topology.num_shards.into(), 1, 16)?;
        within("coordinators", topology.num_coordinators.into(), 1, 8)?;
        within("replication", topology.replication.into(), 1, 8)?;
        within("slots", workload.num_slots.into(), 1, 256)?;
        within("blocks", workload.num_blocks.into(), 1, 64)?;
        within("steps", workload.num_steps, 1, 10_000)?;
        within("chunks", workload.num_chunks.into(), 0, 64)?;
        within("audit_permille", workload.audit_permille, 0, 1000)?;
        for fault in &self.faults {
            let exists = match fault.target {
                Target::Actor(Role::Worker, index) => index < topology.num_workers,
                Target::Actor(Role::Shard, index) => index < topology.num_shards,
                Target::Actor(Role::Coordinator, index) => index < topology.num_coordinators,
                Target::Primary(Some(block)) | Target::Replicas(Some(block)) => {
                    block < workload.num_blocks
                }
                Target::Concerned => matches!(fault.moment, Moment::Phase { .. }),
                _ => true,
            };
            if !exists {
                return Err(format!("`{fault}`: the target does not exist"));
            }
        }
        Ok(())
    }
}
