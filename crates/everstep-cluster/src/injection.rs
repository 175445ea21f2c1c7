//! Faults that a process has been told to have: what `everstep chaos inject` asks for, done where it would happen by itself.
//!
//! Nothing here runs unless the run file says `[chaos] allow = true`. Every fault that really happens is logged as `fault_injected`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use everstep_optim::Gradient;
use everstep_protocol::Step;
use everstep_protocol::random::{Purpose, Stream};
use everstep_telemetry::Event;

use crate::control::Injection;
use crate::process::ProcessContext;
use crate::topology::ActorRole;

/// Keeps these draws apart from those of other users of [`Purpose::Fault`].
const FLIPS: u64 = 1 << 32;

/// What a process has been told to do wrong.
#[derive(Debug, Default)]
pub(crate) struct Injected {
    faults: Mutex<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    flip_share: f64,
    /// The next slot's gradient is not a number.
    non_finite: bool,
    /// The device blocks in its next task.
    hang: bool,
    delay_ms: u64,
    /// Roles of which an actor panics at its next message.
    panics: BTreeSet<ActorRole>,
    /// How often each slot of the newest step was computed here: a second computation is another draw.
    attempts: (Step, BTreeMap<u32, u64>),
}

impl Injected {
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProcessContext {
    /// Makes this process misbehave from now on.
    ///
    /// # Errors
    /// The run does not allow it, the process has no actor that could, or a value is out of range: one line that says what is allowed.
    pub(crate) fn inject(&self, injection: Injection) -> Result<(), String> {
        if !self.run.config.chaos.allow {
            return Err(format!(
                "run {} allows no faults on purpose; its run file must say [chaos] allow = true",
                self.run.name()
            ));
        }
        let needs = match &injection {
            Injection::Panic { role } => *role,
            _ => ActorRole::Worker,
        };
        let roles = &self.run.topology.processes[self.process as usize].roles;
        if !roles.contains(&needs) {
            let (process, role) = (self.name(), needs.name());
            return Err(format!(
                "process {process} has no {role}; allowed: a process that has one"
            ));
        }
        let mut faults = self.injected.faults();
        match injection {
            Injection::FlipGradientBits { share } if !(0.0..=1.0).contains(&share) => {
                return Err(format!("share is {share}; allowed: 0 to 1"));
            }
            Injection::FlipGradientBits { share } => faults.flip_share = share,
            Injection::NonFiniteGradient => faults.non_finite = true,
            Injection::HangDevice => faults.hang = true,
            Injection::SlowDevice { delay_ms } => faults.delay_ms = delay_ms,
            Injection::Panic { role } => {
                faults.panics.insert(role);
            }
        }
        Ok(())
    }

    fn log_fault(&self, fault: &str, step: Option<Step>, slot: Option<u32>) {
        tracing::warn!(fault, ?step, ?slot, "a fault was asked for");
        self.event(&Event::FaultInjected {
            process: self.name().to_owned(),
            node: self.node().to_owned(),
            fault: fault.to_owned(),
            step: step.map(|step| step.0),
            slot: slot.map(u64::from),
        });
    }

    /// Called by an actor at every message: panics if that was asked for.
    pub(crate) fn panic_if_asked(&self, role: ActorRole) {
        if self.injected.faults().panics.remove(&role) {
            self.log_fault("panic", None, None);
            panic!("this {} was asked to panic", role.name());
        }
    }

    /// Called by the device before a task: takes longer, or for ever, if that was asked for.
    pub(crate) fn disturb_device(&self, step: Step) {
        let (hang, delay_ms) = {
            let mut faults = self.injected.faults();
            (std::mem::take(&mut faults.hang), faults.delay_ms)
        };
        if hang {
            self.log_fault("hang_device", Some(step), None);
            loop {
                std::thread::park();
            }
        }
        if delay_ms > 0 {
            self.log_fault("slow_device", Some(step), None);
            std::thread::sleep(Duration::from_millis(delay_ms));
        }
    }

    /// Called by the device with a slot's gradient: spoils it if that was asked for.
    pub(crate) fn disturb_gradient(&self, step: Step, slot: u32, gradients: &mut [Gradient]) {
        let (share, non_finite, attempt) = {
            let mut faults = self.injected.faults();
            if faults.flip_share == 0.0 && !faults.non_finite {
                return;
            }
            if faults.attempts.0 != step {
                faults.attempts = (step, BTreeMap::new());
            }
            let attempt = faults.attempts.1.entry(slot).or_default();
            *attempt += 1;
            let attempt = *attempt;
            let non_finite = std::mem::take(&mut faults.non_finite);
            (faults.flip_share, non_finite, attempt)
        };
        if non_finite && let Some(first) = gradients.first_mut() {
            if let Some(value) = first.values.make_mut().first_mut() {
                *value = f32::NAN;
            }
            self.log_fault("non_finite_gradient", Some(step), Some(slot));
        }
        let key = [
            FLIPS | u64::from(self.process),
            step.0,
            u64::from(slot),
            attempt,
        ];
        let mut draws = Stream::new(self.run.config.run.seed, Purpose::Fault, &key);
        if draws.unit_f64() < share {
            flip_bit(gradients, &mut draws);
            self.log_fault("flip_gradient_bits", Some(step), Some(slot));
        }
    }
}

/// Flips one bit of one element of all blocks.
fn flip_bit(gradients: &mut [Gradient], draws: &mut Stream) {
    let num_elements: usize = gradients.iter().map(|block| block.values.len()).sum();
    if num_elements == 0 {
        return;
    }
    let mut at = draws.below(num_elements as u64) as usize;
    let bit = draws.below(32);
    for block in gradients {
        if at < block.values.len() {
            let value = &mut block.values.make_mut()[at];
            *value = f32::from_bits(value.to_bits() ^ (1 << bit));
            return;
        }
        at -= block.values.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_of_one_element_flips_and_another_one_next_time() {
        let honest = || {
            vec![
                Gradient::new(vec![1.0_f32; 5], 1.0, 1),
                Gradient::new(vec![2.0_f32; 7], 1.0, 1),
            ]
        };
        let lie = |attempt: u64| {
            let mut gradients = honest();
            let mut draws = Stream::new(1, Purpose::Fault, &[FLIPS, 2, 3, attempt]);
            flip_bit(&mut gradients, &mut draws);
            gradients
        };
        let bits = |gradients: &[Gradient]| -> Vec<u32> {
            let values = gradients.iter().flat_map(|block| block.values.as_slice());
            values.map(|value| value.to_bits()).collect()
        };
        for attempt in 0..100 {
            let (lie, truth) = (bits(&lie(attempt)), bits(&honest()));
            let flipped: u32 = lie
                .iter()
                .zip(&truth)
                .map(|(a, b)| (a ^ b).count_ones())
                .sum();
            assert_eq!(flipped, 1);
        }
        assert_ne!(lie(1), lie(2));
        assert_eq!(lie(1), lie(1));
    }
}
