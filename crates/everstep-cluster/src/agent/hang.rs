//! Telling a hung process from a slow one.
//!
//! A process is judged by what it did, not by how long it was silent: on a starved machine everybody is silent. It is hung if it is stopped, or if
//! a compute thread is in a task and uses no CPU time. Silence alone counts after a long while only, and only time in which the agent itself ran.

use everstep_telemetry::Event;

use super::{Agent, body};
use crate::control::DevicePulse;
use crate::proc::{self, Stat};
use crate::status::ProcessState;
use crate::topology::AgentSettings;

/// How often the agent looks.
pub(super) const LOOK_MS: u64 = 100;
/// What one look adds to a time at most: if the agent itself was held up, others were as well.
const LOOK_MS_MAX: u64 = 3 * LOOK_MS;
/// A process that was stopped by a signal so long is called hung, whenever it is to be ended.
const STOPPED_NOTICED_MS: u64 = 900;

/// When a process is taken for hung.
#[derive(Clone, Copy, Debug)]
pub struct HangPolicy {
    /// It was stopped by a signal so long; until then it may go on by itself, though it is called hung earlier.
    pub stopped_ms: u64,
    /// A compute thread was in a task so long without CPU time.
    pub idle_task_ms: u64,
    /// A task on an accelerator, where CPU time says nothing, took so long and twenty times as long as any before.
    pub accelerator_task_ms: u64,
    /// It was linked, and has said nothing for so long.
    pub silent_ms: u64,
    /// It has not linked so long after its start.
    pub start_ms: u64,
}

impl Default for HangPolicy {
    fn default() -> Self {
        Self {
            stopped_ms: STOPPED_NOTICED_MS,
            idle_task_ms: 10_000,
            accelerator_task_ms: 60_000,
            silent_ms: 10_000,
            start_ms: 120_000,
        }
    }
}

impl HangPolicy {
    /// What the topology file asks for.
    pub fn of(settings: &AgentSettings) -> Self {
        let default = Self::default();
        let stopped_ms = settings
            .stopped_seconds
            .map(|seconds| (seconds * 1e3) as u64);
        Self {
            stopped_ms: stopped_ms.unwrap_or(default.stopped_ms),
            ..default
        }
    }
}

/// Why a process is taken for hung, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hang {
    pub(super) reason: String,
    pub(super) for_ms: u64,
    /// It is ended now; otherwise it may go on by itself.
    pub(super) is_final: bool,
}

/// One process as the agent sees it.
#[derive(Debug, Default)]
pub(super) struct HangWatch {
    linked: bool,
    stopped_ms: u64,
    silent_ms: u64,
    devices: Vec<DeviceWatch>,
}

#[derive(Clone, Copy, Debug)]
struct DeviceWatch {
    pulse: DevicePulse,
    idle_ms: u64,
    longest_task_ms: u64,
}

impl HangWatch {
    /// The process is linked.
    pub(super) fn linked(&mut self) {
        self.linked = true;
        self.silent_ms = 0;
    }

    /// The process says how far its compute threads are.
    pub(super) fn pulse(&mut self, pulses: &[DevicePulse]) {
        self.linked();
        // A compute thread that came or went shifts the others: all are watched anew.
        let known = if self.devices.len() == pulses.len() {
            std::mem::take(&mut self.devices)
        } else {
            Vec::new()
        };
        let watch = |(index, pulse): (usize, &DevicePulse)| {
            let before = known.get(index).copied();
            let mut watch = before.unwrap_or(DeviceWatch {
                pulse: *pulse,
                idle_ms: 0,
                longest_task_ms: 0,
            });
            let is_same_task = watch.pulse.finished == pulse.finished && pulse.busy_ms.is_some();
            if !is_same_task {
                let took_ms = watch.pulse.busy_ms.unwrap_or(0);
                watch.longest_task_ms = watch.longest_task_ms.max(took_ms);
            }
            // CPU time that was not measured before says nothing yet.
            if !is_same_task
                || watch.pulse.cpu_ticks.is_none()
                || watch.pulse.cpu_ticks != pulse.cpu_ticks
            {
                watch.idle_ms = 0;
            }
            watch.pulse = *pulse;
            watch
        };
        self.devices = pulses.iter().enumerate().map(watch).collect();
    }

    /// `elapsed_ms` after the last look, the system says `stat`.
    pub(super) fn look(
        &mut self,
        policy: &HangPolicy,
        elapsed_ms: u64,
        stat: Stat,
    ) -> Option<Hang> {
        let elapsed_ms = elapsed_ms.min(LOOK_MS_MAX);
        let hang = |reason: String, for_ms: u64| {
            Some(Hang {
                reason,
                for_ms,
                is_final: true,
            })
        };
        if stat.state == 'T' {
            self.stopped_ms += elapsed_ms;
            let for_ms = self.stopped_ms;
            let is_final = for_ms >= policy.stopped_ms;
            return (is_final || for_ms >= STOPPED_NOTICED_MS).then(|| Hang {
                reason: "it is stopped by a signal".to_owned(),
                for_ms,
                is_final,
            });
        }
        self.stopped_ms = 0;
        if stat.state == 't' {
            return None;
        }
        self.silent_ms += elapsed_ms;
        let silent_max_ms = if self.linked {
            policy.silent_ms
        } else {
            policy.start_ms
        };
        if self.silent_ms >= silent_max_ms {
            return hang("it says nothing".to_owned(), self.silent_ms);
        }
        for device in &mut self.devices {
            let Some(busy_ms) = device.pulse.busy_ms else {
                continue;
            };
            if device.pulse.accelerated {
                let max_ms = policy.accelerator_task_ms.max(20 * device.longest_task_ms);
                if busy_ms >= max_ms {
                    return hang("a task on its device does not end".to_owned(), busy_ms);
                }
            } else if device.pulse.cpu_ticks.is_some() {
                device.idle_ms += elapsed_ms;
                if device.idle_ms >= policy.idle_task_ms {
                    let reason = "its compute thread is in a task and uses no CPU time";
                    return hang(reason.to_owned(), device.idle_ms);
                }
            }
        }
        None
    }
}

impl Agent {
    /// Looks at every living process, and ends those that are hung for good.
    pub(super) fn look(&mut self, elapsed_ms: u64) {
        for slot in 0..self.slots.len() {
            let Some(alive) = &mut self.slots[slot].alive else {
                continue;
            };
            let Some(stat) = proc::stat(alive.body.pid) else {
                continue;
            };
            if alive.killed.is_some() || !stat.is_alive() {
                continue;
            }
            let hang = alive.watch.look(&self.options.hang, elapsed_ms, stat);
            let before_ms = alive.hung_ms;
            alive.hung_ms = hang.as_ref().map(|hang| hang.for_ms);
            match hang {
                Some(hang) => {
                    if hang.is_final {
                        body::kill(&alive.fd);
                        let seconds = hang.for_ms as f64 / 1e3;
                        alive.killed = Some(format!("hung for {seconds:.1} s: {}", hang.reason));
                    }
                    if before_ms.is_none() {
                        self.hung(slot, hang);
                    }
                }
                None => {
                    if let Some(ms) = before_ms {
                        self.woke(slot, ms);
                    }
                }
            }
        }
    }

    fn hung(&mut self, slot: usize, hang: Hang) {
        tracing::warn!(process = self.name(slot), reason = hang.reason, "hung");
        self.slots[slot].state = ProcessState::Hung;
        self.status_is_old = true;
        self.log(&Event::ProcessHung {
            process: self.name(slot),
            node: self.node(slot),
            reason: hang.reason,
            seconds: hang.for_ms as f64 / 1e3,
        });
    }

    fn woke(&mut self, slot: usize, hung_ms: u64) {
        tracing::warn!(process = self.name(slot), hung_ms, "goes on");
        self.slots[slot].state = ProcessState::Running;
        self.status_is_old = true;
        self.log(&Event::ProcessWoke {
            process: self.name(slot),
            node: self.node(slot),
            seconds: hung_ms as f64 / 1e3,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(state: char) -> Stat {
        Stat {
            state,
            started_ticks: 1,
            cpu_ticks: 1,
        }
    }

    fn pulse(finished: u64, busy_ms: Option<u64>, cpu_ticks: Option<u64>) -> [DevicePulse; 1] {
        [DevicePulse {
            finished,
            busy_ms,
            cpu_ticks,
            accelerated: false,
        }]
    }

    /// Looks until the process is taken for hung; `pulses` says what is heard before the look at so many milliseconds.
    fn hung_after(
        state: char,
        pulses: impl Fn(u64) -> Option<[DevicePulse; 1]>,
    ) -> Option<(u64, String)> {
        let policy = HangPolicy::default();
        let mut watch = HangWatch::default();
        watch.linked();
        (1..1_000).map(|look| look * LOOK_MS).find_map(|ms| {
            if let Some(pulse) = pulses(ms) {
                watch.pulse(&pulse);
            }
            let hang = watch.look(&policy, LOOK_MS, stat(state))?;
            Some((ms, hang.reason))
        })
    }

    #[test]
    fn a_stopped_process_is_noticed_within_a_second() {
        let (ms, reason) = hung_after('T', |_| None).unwrap();
        assert!(ms <= 1_000 && reason.contains("stopped"), "{ms} {reason}");
    }

    #[test]
    fn a_stopped_process_may_be_left_to_wake_up() {
        let settings = AgentSettings {
            stopped_seconds: Some(3.0),
            ..AgentSettings::default()
        };
        let policy = HangPolicy::of(&settings);
        let mut watch = HangWatch::default();
        let looks: Vec<Option<bool>> = (1..=30)
            .map(|_| {
                watch
                    .look(&policy, LOOK_MS, stat('T'))
                    .map(|hang| hang.is_final)
            })
            .collect();
        assert!(looks[..8].iter().all(Option::is_none));
        assert!(looks[8..29].iter().all(|look| *look == Some(false)));
        assert_eq!(looks[29], Some(true));
        assert_eq!(watch.look(&policy, LOOK_MS, stat('S')), None);
        assert_eq!(watch.look(&policy, LOOK_MS, stat('T')), None);
    }

    #[test]
    fn a_process_under_a_debugger_is_not_hung() {
        assert_eq!(hung_after('t', |_| None), None);
    }

    #[test]
    fn a_deadlocked_thread_is_noticed_and_a_slow_one_is_not() {
        let deadlocked = |ms| Some(pulse(4, Some(ms), (ms >= 1_000).then_some(70)));
        let (ms, reason) = hung_after('S', deadlocked).unwrap();
        assert!((10_000..12_000).contains(&ms), "{ms}");
        assert!(reason.contains("no CPU time"));
        // A tick of CPU time every five seconds: starved, but alive.
        let slow = |ms| Some(pulse(4, Some(ms), (ms >= 1_000).then_some(70 + ms / 5_000)));
        assert_eq!(hung_after('R', slow), None);
        let idle = |_| Some(pulse(4, None, None));
        assert_eq!(hung_after('S', idle), None);
        let next_tasks = |ms| Some(pulse(ms / 9_000, Some(ms % 9_000), Some(70)));
        assert_eq!(hung_after('S', next_tasks), None);
    }

    #[test]
    fn silence_counts_after_a_long_while_and_not_while_the_agent_was_held_up() {
        let (ms, reason) = hung_after('S', |_| None).unwrap();
        assert!(ms == 10_000 && reason.contains("says nothing"), "{ms}");
        let mut watch = HangWatch::default();
        watch.linked();
        for _ in 0..30 {
            let hang = watch.look(&HangPolicy::default(), 60_000, stat('S'));
            assert_eq!(hang, None);
        }
    }

    #[test]
    fn a_task_on_an_accelerator_is_measured_by_its_peers() {
        let policy = HangPolicy::default();
        let mut watch = HangWatch::default();
        let on_gpu = |finished, busy_ms| {
            let mut pulse = pulse(finished, Some(busy_ms), Some(70));
            pulse[0].accelerated = true;
            pulse
        };
        watch.pulse(&on_gpu(0, 9_000));
        watch.pulse(&on_gpu(1, 100));
        watch.pulse(&on_gpu(1, 170_000));
        assert_eq!(watch.look(&policy, LOOK_MS, stat('S')), None);
        watch.pulse(&on_gpu(1, 190_000));
        assert!(watch.look(&policy, LOOK_MS, stat('S')).is_some());
    }
}
