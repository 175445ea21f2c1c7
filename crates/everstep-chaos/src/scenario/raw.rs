//! A scenario file as it is written, and its checks.

use std::path::{Path, PathBuf};

use everstep_cluster::ActorRole;
use everstep_cluster::control::Injection;
use serde::Deserialize;

use super::fault::{Action, Damage, Direction, Fault, Moment, Phase, Target, Weather};
use super::storm::{Spacing, Storm};
use super::{Check, Limits, Workload};

/// Field and message.
type Wrong = (String, String);

/// Kinds of faults, for messages.
const KINDS: &str = "kill, pause, partition, network, store_outage, store_slow, store_errors, damage, flip_gradient_bits, non_finite, \
     hang_device, slow_device, panic, drain";

/// Named targets, for messages.
const TARGETS: &str =
    "any, leader, leader-and-successor, replicas-of-a-block, agent, all, every-process-in-turn";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scenario {
    name: String,
    workload: RawWorkload,
    #[serde(default, rename = "fault")]
    faults: Vec<RawFault>,
    storm: Option<RawStorm>,
    check: Check,
    #[serde(default)]
    limits: RawLimits,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkload {
    run: PathBuf,
    topology: PathBuf,
    #[serde(default)]
    set: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    seconds: Option<f64>,
    stall_seconds: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStorm {
    every_seconds: Option<f64>,
    every_steps: Option<u64>,
    faults_per_hour: Option<f64>,
    #[serde(default)]
    after_step: u64,
    #[serde(default)]
    after_seconds: f64,
    for_seconds: Option<f64>,
    count_max: Option<usize>,
    #[serde(rename = "fault")]
    faults: Vec<RawFault>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFault {
    kind: String,
    // Whom.
    role: Option<ActorRole>,
    index: Option<u32>,
    process: Option<String>,
    node: Option<String>,
    target: Option<String>,
    // When.
    after_step: Option<u64>,
    after_seconds: Option<f64>,
    phase: Option<Phase>,
    repeat: Option<u64>,
    every_steps: Option<u64>,
    weight: Option<f64>,
    // How.
    seconds: Option<f64>,
    direction: Option<Direction>,
    flap_ms: Option<u64>,
    loss: Option<f64>,
    delay_ms: Option<u64>,
    reorder: Option<f64>,
    duplicate: Option<f64>,
    corrupt: Option<f64>,
    bandwidth_mbit: Option<f64>,
    status: Option<u16>,
    share: Option<f64>,
    how: Option<Damage>,
}

impl Scenario {
    pub(super) fn check(self, path: &Path) -> Result<super::Scenario, Wrong> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        if self.name != stem {
            return Err((
                "name".to_owned(),
                format!(
                    "is \"{}\"; allowed: \"{stem}\", as the file is called",
                    self.name
                ),
            ));
        }
        if self.faults.is_empty() && self.storm.is_none() {
            return Err((
                "fault".to_owned(),
                "nothing is planned; allowed: at least one [[fault]], or a [storm]".to_owned(),
            ));
        }
        let mut faults = Vec::new();
        for (index, fault) in self.faults.into_iter().enumerate() {
            faults.extend(fault.planned(&format!("fault {}", index + 1))?);
        }
        let storm = self.storm.map(RawStorm::check).transpose()?;
        let planned = storm
            .as_ref()
            .map_or(Some(0), |storm| storm.count_max)
            .map(|storm| storm + faults.len());
        if let (Some(planned), Some(demanded)) = (planned, self.check.faults)
            && demanded > planned
        {
            return Err((
                "check.faults".to_owned(),
                format!("is {demanded}; allowed: at most {planned}, since no more are planned"),
            ));
        }
        if planned.is_none() && self.check.faults.is_none() {
            return Err((
                "check.faults".to_owned(),
                "is missing; a storm without count_max needs the least number of faults".to_owned(),
            ));
        }
        let positive = |field: &str, value: Option<f64>, default: f64| match value {
            None => Ok(default),
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => Err((
                format!("limits.{field}"),
                format!("is {value}; allowed: above 0"),
            )),
        };
        let default = Limits::default();
        let limits = Limits {
            seconds: positive("seconds", self.limits.seconds, default.seconds)?,
            stall_seconds: positive(
                "stall_seconds",
                self.limits.stall_seconds,
                default.stall_seconds,
            )?,
        };
        let workload = Workload {
            run: find(path, &self.workload.run, "run")?,
            topology: find(path, &self.workload.topology, "topology")?,
            set: self.workload.set,
        };
        Ok(super::Scenario {
            file: path.to_owned(),
            name: self.name,
            workload,
            faults,
            storm,
            check: self.check,
            limits,
        })
    }
}

/// A path of the file is meant from the nearest folder above it in which it exists, so that scenarios work from everywhere.
fn find(scenario: &Path, named: &Path, field: &str) -> Result<PathBuf, Wrong> {
    let scenario = std::path::absolute(scenario).unwrap_or_else(|_| scenario.to_owned());
    scenario
        .ancestors()
        .skip(1)
        .map(|folder| folder.join(named))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            (
                format!("workload.{field}"),
                format!(
                    "there is no {} in a folder above the scenario",
                    named.display()
                ),
            )
        })
}

impl RawStorm {
    fn check(self) -> Result<Storm, Wrong> {
        let wrong =
            |field: &str, message: &str| Err((format!("storm.{field}"), message.to_owned()));
        let spacing = match (self.every_seconds, self.every_steps, self.faults_per_hour) {
            (Some(seconds), None, None) if seconds > 0.0 => Spacing::EverySeconds(seconds),
            (None, Some(steps), None) if steps > 0 => Spacing::EverySteps(steps),
            (None, None, Some(rate)) if rate > 0.0 => Spacing::RandomSeconds(3_600.0 / rate),
            _ => {
                return wrong(
                    "every_seconds",
                    "allowed: one of every_seconds, every_steps and faults_per_hour, above 0",
                );
            }
        };
        if self.faults.is_empty() {
            return wrong("fault", "is empty; allowed: at least one kind of fault");
        }
        if self.count_max == Some(0) {
            return wrong("count_max", "is 0; allowed: at least 1");
        }
        let mut faults = Vec::new();
        for (index, mut fault) in self.faults.into_iter().enumerate() {
            let place = format!("storm.fault {}", index + 1);
            let weight = fault.weight.take().unwrap_or(1.0);
            if !(weight > 0.0 && weight.is_finite()) {
                return Err((
                    format!("{place}: weight"),
                    format!("is {weight}; allowed: above 0"),
                ));
            }
            for (name, given) in [
                ("after_step", fault.after_step.is_some()),
                ("after_seconds", fault.after_seconds.is_some()),
                ("repeat", fault.repeat.is_some()),
            ] {
                if given {
                    return Err((
                        format!("{place}: {name}"),
                        "the storm decides when its faults strike".to_owned(),
                    ));
                }
            }
            // The moment is the storm's; a phase of its own is waited for.
            fault.after_step = Some(self.after_step);
            faults.extend(
                fault
                    .planned(&place)?
                    .into_iter()
                    .map(|fault| (weight, fault)),
            );
        }
        Ok(Storm {
            faults,
            spacing,
            from: Moment {
                after_step: self.after_step,
                after_seconds: self.after_seconds,
                phase: None,
            },
            for_seconds: self.for_seconds,
            count_max: self.count_max,
        })
    }
}

impl RawFault {
    /// The faults that this entry stands for: one, or as many as it is repeated.
    fn planned(mut self, place: &str) -> Result<Vec<Fault>, Wrong> {
        let action = self.action(place)?;
        let target = self.target(place, &action)?;
        let wrong = |field: &str, message: String| Err((format!("{place}: {field}"), message));
        if self.after_step.is_none() && self.after_seconds.is_none() && self.phase.is_none() {
            return wrong(
                "after_step",
                "is missing; allowed: at least one of after_step, after_seconds and phase"
                    .to_owned(),
            );
        }
        let moment = Moment {
            after_step: self.after_step.take().unwrap_or(0),
            after_seconds: self.after_seconds.take().unwrap_or(0.0),
            phase: self.phase.take(),
        };
        let repeat = self.repeat.take().unwrap_or(1);
        let every_steps = self.every_steps.take();
        if repeat == 0 || (repeat > 1) != every_steps.is_some() {
            return wrong(
                "repeat",
                "allowed: at least 2, together with every_steps".to_owned(),
            );
        }
        if let Some(field) = self.left_over() {
            return wrong(
                field,
                format!(
                    "does not belong to a fault of kind {}{}",
                    action.kind(),
                    match target {
                        Target::Store => String::new(),
                        _ => format!(" that strikes {}", target.label()),
                    }
                ),
            );
        }
        let fault = |number: u64| Fault {
            place: place.to_owned(),
            action: action.clone(),
            target: target.clone(),
            moment: Moment {
                after_step: moment.after_step + number * every_steps.unwrap_or(0),
                ..moment
            },
        };
        Ok((0..repeat).map(fault).collect())
    }

    fn action(&mut self, place: &str) -> Result<Action, Wrong> {
        let field = |field: &str| format!("{place}: {field}");
        let seconds = |given: Option<f64>| match given {
            Some(seconds) if seconds > 0.0 => Ok(seconds),
            Some(seconds) => Err((field("seconds"), format!("is {seconds}; allowed: above 0"))),
            None => Err((field("seconds"), "is missing".to_owned())),
        };
        let share = |name: &str, given: Option<f64>, default: f64| {
            let share = given.unwrap_or(default);
            if (0.0..=1.0).contains(&share) {
                Ok(share)
            } else {
                Err((field(name), format!("is {share}; allowed: 0 to 1")))
            }
        };
        Ok(match self.kind.as_str() {
            "kill" => Action::Kill,
            "pause" => Action::Pause {
                seconds: self
                    .seconds
                    .take()
                    .map(|given| seconds(Some(given)))
                    .transpose()?,
            },
            "partition" => Action::Partition {
                direction: self.direction.take().unwrap_or(Direction::Both),
                seconds: seconds(self.seconds.take())?,
                flap_ms: match self.flap_ms.take() {
                    Some(0) => {
                        return Err((field("flap_ms"), "is 0; allowed: at least 1".to_owned()));
                    }
                    flap_ms => flap_ms,
                },
            },
            "network" => {
                let weather = Weather {
                    loss: share("loss", self.loss.take(), 0.0)?,
                    delay_ms: self.delay_ms.take().unwrap_or(0),
                    reorder: share("reorder", self.reorder.take(), 0.0)?,
                    duplicate: share("duplicate", self.duplicate.take(), 0.0)?,
                    corrupt: share("corrupt", self.corrupt.take(), 0.0)?,
                    bandwidth_mbit: self.bandwidth_mbit.take().unwrap_or(0.0),
                };
                if weather == Weather::default() {
                    return Err((
                        field("loss"),
                        "is missing; allowed: at least one of loss, delay_ms, reorder, duplicate, corrupt and bandwidth_mbit, above 0"
                            .to_owned(),
                    ));
                }
                if !(weather.bandwidth_mbit == 0.0 || weather.bandwidth_mbit >= 0.001) {
                    return Err((
                        field("bandwidth_mbit"),
                        format!("is {}; allowed: at least 0.001", weather.bandwidth_mbit),
                    ));
                }
                Action::Network {
                    weather,
                    seconds: seconds(self.seconds.take())?,
                }
            }
            "store_outage" => Action::StoreOutage {
                seconds: seconds(self.seconds.take())?,
            },
            "store_slow" => Action::StoreSlow {
                delay_ms: self.delay_ms.take().unwrap_or(1_000),
                seconds: seconds(self.seconds.take())?,
            },
            "store_errors" => Action::StoreErrors {
                status: match self.status.take() {
                    None => 503,
                    Some(status @ (403 | 429 | 500..=599)) => status,
                    Some(status) => {
                        return Err((
                            field("status"),
                            format!("is {status}; allowed: 403, 429 and 500 to 599"),
                        ));
                    }
                },
                share: share("share", self.share.take(), 1.0)?,
                seconds: seconds(self.seconds.take())?,
            },
            "damage" => Action::Damage {
                how: self.how.take().unwrap_or(Damage::Flip),
            },
            "flip_gradient_bits" => Action::Inject {
                injection: Injection::FlipGradientBits {
                    share: share("share", self.share.take(), 0.01)?,
                },
                seconds: self.seconds.take(),
            },
            "non_finite" => Action::Inject {
                injection: Injection::NonFiniteGradient,
                seconds: None,
            },
            "hang_device" => Action::Inject {
                injection: Injection::HangDevice,
                seconds: None,
            },
            "slow_device" => Action::Inject {
                injection: Injection::SlowDevice {
                    delay_ms: self.delay_ms.take().unwrap_or(500),
                },
                seconds: self.seconds.take(),
            },
            "panic" => Action::Inject {
                injection: Injection::Panic {
                    role: self.role.unwrap_or(ActorRole::Worker),
                },
                seconds: None,
            },
            "drain" => Action::Drain,
            unknown => {
                return Err((
                    field("kind"),
                    format!("there is no fault \"{unknown}\"; allowed: {KINDS}"),
                ));
            }
        })
    }

    fn target(&mut self, place: &str, action: &Action) -> Result<Target, Wrong> {
        let given = [
            self.role.is_some(),
            self.process.is_some(),
            self.node.is_some(),
            self.target.is_some(),
        ];
        let given = given.into_iter().filter(|given| *given).count();
        let on_store = matches!(
            action,
            Action::StoreOutage { .. }
                | Action::StoreSlow { .. }
                | Action::StoreErrors { .. }
                | Action::Damage { .. }
        );
        if on_store && given == 0 {
            return Ok(Target::Store);
        }
        if on_store || given != 1 {
            let allowed = if on_store {
                "none, it strikes the store"
            } else {
                "exactly one of role (with index), process, node and target"
            };
            return Err((format!("{place}: target"), format!("allowed: {allowed}")));
        }
        let target = if let Some(role) = self.role.take() {
            Target::Role {
                role,
                index: self.index.take(),
            }
        } else if let Some(process) = self.process.take() {
            Target::Process(process)
        } else if let Some(node) = self.node.take() {
            Target::Node(node)
        } else {
            match self.target.take().unwrap_or_default().as_str() {
                "any" => Target::Any,
                "leader" => Target::Leader,
                "leader-and-successor" => Target::LeaderAndSuccessor,
                "replicas-of-a-block" => Target::ReplicasOfABlock,
                "agent" => Target::Agent,
                "all" => Target::All,
                "every-process-in-turn" => Target::EveryProcessInTurn,
                unknown => {
                    return Err((
                        format!("{place}: target"),
                        format!("there is no target \"{unknown}\"; allowed: {TARGETS}"),
                    ));
                }
            }
        };
        let one_process = matches!(
            target,
            Target::Role { .. } | Target::Process(_) | Target::Any | Target::Leader
        );
        let fits = match action {
            Action::Kill => true,
            Action::Drain => matches!(target, Target::Node(_)),
            Action::Inject { injection, .. } => {
                one_process
                    && (matches!(injection, Injection::Panic { .. })
                        || matches!(
                            target,
                            Target::Process(_)
                                | Target::Role {
                                    role: ActorRole::Worker,
                                    ..
                                }
                        ))
            }
            Action::Network { .. } if target == Target::All => true,
            _ => one_process || matches!(target, Target::Node(_) | Target::ReplicasOfABlock),
        };
        if !fits {
            return Err((
                format!("{place}: target"),
                format!("{} cannot strike {}", action.kind(), target.label()),
            ));
        }
        Ok(target)
    }

    /// A field that nobody asked for.
    fn left_over(&self) -> Option<&'static str> {
        [
            ("index", self.index.is_some()),
            ("weight", self.weight.is_some()),
            ("seconds", self.seconds.is_some()),
            ("direction", self.direction.is_some()),
            ("flap_ms", self.flap_ms.is_some()),
            ("loss", self.loss.is_some()),
            ("delay_ms", self.delay_ms.is_some()),
            ("reorder", self.reorder.is_some()),
            ("duplicate", self.duplicate.is_some()),
            ("corrupt", self.corrupt.is_some()),
            ("bandwidth_mbit", self.bandwidth_mbit.is_some()),
            ("status", self.status.is_some()),
            ("share", self.share.is_some()),
            ("how", self.how.is_some()),
        ]
        .into_iter()
        .find_map(|(name, given)| given.then_some(name))
    }
}
