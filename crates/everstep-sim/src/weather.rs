//! Conditions that last: of links, of workers, of the store.

use everstep_protocol::Step;

use crate::plan::Action;

/// What a condition does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Drop,
    Duplicate,
    Delay,
    Reorder,
    Corrupt,
    SlowLink,
    SlowWorker,
    LyingWorker,
    SlowStore,
    StoreOutage,
    LostReply,
    StaleList,
}

impl Condition {
    /// The condition that an action brings, if it does, and how strong it is: thousandths, milliseconds or a factor; 1 where there is
    /// nothing to say.
    pub(crate) fn of(action: &Action) -> Option<(Condition, u64)> {
        Some(match *action {
            Action::Drop { permille, .. } => (Condition::Drop, permille),
            Action::Duplicate { permille, .. } => (Condition::Duplicate, permille),
            Action::Delay { permille, .. } => (Condition::Delay, permille),
            Action::Reorder { .. } => (Condition::Reorder, 1),
            Action::Corrupt { permille, .. } => (Condition::Corrupt, permille),
            Action::SlowLink { tensor_ms, .. } => (Condition::SlowLink, tensor_ms),
            Action::SlowWorker { factor, .. } => (Condition::SlowWorker, factor),
            Action::LyingWorker { permille, .. } => (Condition::LyingWorker, permille),
            Action::SlowStore { max_ms, .. } => (Condition::SlowStore, max_ms),
            Action::StoreOutage { .. } => (Condition::StoreOutage, 1),
            Action::LostReply { permille, .. } => (Condition::LostReply, permille),
            Action::StaleList { .. } => (Condition::StaleList, 1),
            _ => return None,
        })
    }

    /// Whether it is one of the store, which everybody has in common.
    fn is_of_store(self) -> bool {
        matches!(
            self,
            Condition::SlowStore
                | Condition::StoreOutage
                | Condition::LostReply
                | Condition::StaleList
        )
    }

    /// The hosts that it meets, as bits, when it is aimed at `hosts`, or at everybody who comes.
    pub(crate) fn mask(self, hosts: &[usize], at_all: bool) -> u64 {
        if at_all || self.is_of_store() {
            return u64::MAX;
        }
        hosts.iter().fold(0, |mask, host| mask | (1 << host))
    }
}

/// A condition, where and until when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) condition: Condition,
    /// Hosts it meets, as bits.
    pub(crate) hosts: u64,
    pub(crate) until_ms: u64,
    /// Thousandths, milliseconds or a factor.
    pub(crate) value: u64,
}

/// The weather on one link.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinkWeather {
    pub(crate) drop_permille: u64,
    pub(crate) duplicate_permille: u64,
    pub(crate) delay_permille: u64,
    pub(crate) corrupt_permille: u64,
    pub(crate) tensor_ms: u64,
    pub(crate) reorders: bool,
}

/// All conditions that hold.
#[derive(Debug, Default)]
pub(crate) struct Weather {
    windows: Vec<Window>,
    /// What listings show while they are out of date: the last epoch and the newest checkpoint.
    pub(crate) stale: (u64, Step),
}

impl Weather {
    pub(crate) fn push(&mut self, window: Window) {
        self.windows.push(window);
    }

    pub(crate) fn clear(&mut self) {
        self.windows.clear();
    }

    /// The strongest condition of this kind that meets `host` now; 0 if none does.
    pub(crate) fn strength(&self, condition: Condition, host: usize, now_ms: u64) -> u64 {
        self.windows
            .iter()
            .filter(|window| {
                window.condition == condition
                    && window.hosts & (1 << host) != 0
                    && now_ms < window.until_ms
            })
            .map(|window| window.value)
            .max()
            .unwrap_or(0)
    }

    pub(crate) fn of_link(&self, from: usize, to: usize, now_ms: u64) -> LinkWeather {
        let mut weather = LinkWeather::default();
        let ends = (1u64 << from) | (1 << to);
        for window in &self.windows {
            if window.hosts & ends == 0 || now_ms >= window.until_ms {
                continue;
            }
            let value = window.value;
            let field = match window.condition {
                Condition::Drop => &mut weather.drop_permille,
                Condition::Duplicate => &mut weather.duplicate_permille,
                Condition::Delay => &mut weather.delay_permille,
                Condition::Corrupt => &mut weather.corrupt_permille,
                Condition::SlowLink => &mut weather.tensor_ms,
                Condition::Reorder => {
                    weather.reorders = true;
                    continue;
                }
                _ => continue,
            };
            *field = (*field).max(value);
        }
        weather
    }
}
