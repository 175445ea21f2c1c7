//! When and how often a dead process is started again.

use std::collections::VecDeque;

use crate::topology::AgentSettings;

/// When and how often a dead process is started again.
///
/// A process that lived long is restarted at once, and so is one that was killed from outside: neither is a crash loop. One that dies young by
/// itself waits longer each time, and after [`max_young_deaths`](Self::max_young_deaths) in a row it stays down. Kills are believed to come
/// from outside as long as there are not too many: a process that the system kills for its memory again and again is a crash loop, too.
#[derive(Clone, Copy, Debug)]
pub struct RestartPolicy {
    /// A process that lived this long is restarted at once.
    pub settled_ms: u64,
    /// First wait of one that died earlier; doubles with every early death in a row.
    pub backoff_first_ms: u64,
    /// Longest wait.
    pub backoff_max_ms: u64,
    /// Early deaths in a row after which the process stays down.
    pub max_young_deaths: u32,
    /// Kills within [`kills_window_ms`](Self::kills_window_ms) after which a further one counts as any other death.
    pub max_kills: usize,
    /// See [`max_kills`](Self::max_kills).
    pub kills_window_ms: u64,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            settled_ms: 5_000,
            backoff_first_ms: 50,
            backoff_max_ms: 5_000,
            max_young_deaths: 12,
            max_kills: 20,
            kills_window_ms: 60_000,
        }
    }
}

impl RestartPolicy {
    /// What the topology file asks for.
    pub fn of(settings: &AgentSettings) -> Self {
        let default = Self::default();
        Self {
            max_young_deaths: settings
                .crash_loop_deaths
                .unwrap_or(default.max_young_deaths),
            ..default
        }
    }
}

/// What becomes of a process that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is started again after this wait.
    Restart {
        /// The wait.
        wait_ms: u64,
    },
    /// It stays down.
    GiveUp {
        /// Early deaths in a row.
        deaths: u32,
    },
}

/// How a life ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Death {
    /// When, by the agent's clock.
    pub(super) now_ms: u64,
    /// How long it lived.
    pub(super) lived_ms: u64,
    /// It had joined and got SIGKILL.
    pub(super) is_kill: bool,
}

/// The deaths of one process.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    young: u32,
    kills_ms: VecDeque<u64>,
}

impl Deaths {
    /// Decides on a death.
    pub(super) fn judge(&mut self, policy: &RestartPolicy, death: Death) -> Verdict {
        let at_once = Verdict::Restart { wait_ms: 0 };
        if death.is_kill {
            let begin_ms = death.now_ms.saturating_sub(policy.kills_window_ms);
            self.kills_ms.push_back(death.now_ms);
            self.kills_ms.retain(|kill_ms| *kill_ms >= begin_ms);
            if self.kills_ms.len() <= policy.max_kills {
                return at_once;
            }
        }
        if death.lived_ms >= policy.settled_ms {
            self.young = 0;
            return at_once;
        }
        self.young += 1;
        if self.young > policy.max_young_deaths {
            return Verdict::GiveUp { deaths: self.young };
        }
        let doubled = policy.backoff_first_ms << (self.young - 1).min(16);
        Verdict::Restart {
            wait_ms: doubled.min(policy.backoff_max_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn death(now_ms: u64, lived_ms: u64, is_kill: bool) -> Death {
        Death {
            now_ms,
            lived_ms,
            is_kill,
        }
    }

    #[test]
    fn waits_of_a_crash_loop_grow_and_it_ends() {
        let policy = RestartPolicy::default();
        let mut deaths = Deaths::default();
        let mut judge = |lived_ms| deaths.judge(&policy, death(0, lived_ms, false));
        for wait_ms in [
            50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000, 5000,
        ] {
            assert_eq!(judge(10), Verdict::Restart { wait_ms });
        }
        assert_eq!(judge(10), Verdict::GiveUp { deaths: 13 });
        assert_eq!(judge(5_000), Verdict::Restart { wait_ms: 0 });
        assert_eq!(judge(10), Verdict::Restart { wait_ms: 50 });
    }

    #[test]
    fn kills_are_no_crash_loop_unless_there_are_too_many() {
        let policy = RestartPolicy::default();
        let mut deaths = Deaths::default();
        for kill in 0..1_000 {
            let verdict = deaths.judge(&policy, death(kill * 3_100, 100, true));
            assert_eq!(verdict, Verdict::Restart { wait_ms: 0 });
        }
        let (mut now_ms, mut restarts) = (4_000_000, 0);
        while let Verdict::Restart { wait_ms } = deaths.judge(&policy, death(now_ms, 100, true)) {
            now_ms += wait_ms + 100;
            restarts += 1;
        }
        assert_eq!(
            restarts,
            policy.max_kills + policy.max_young_deaths as usize
        );
    }
}
