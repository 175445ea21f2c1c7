//! How often checkpoints are taken.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserializer, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Shorter intervals would checkpoint every step, which a number of steps says better.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const ALLOWED: &str =
    "a number of steps, a time of at least 100ms such as \"30s\" or \"10m\", or \"auto\"";

/// `checkpoint.every`: steps as a number, a time as a text (`"30s"`, `"10m"`), or `"auto"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointEvery {
    /// Every so many steps; 0 is only after the last.
    Steps(u64),
    /// This long after the last one was begun.
    Time(Duration),
    /// As often as what they cost and how often something fails make best (Young 1974; Daly 2006).
    Auto,
}

impl CheckpointEvery {
    /// The number of steps, if that is how it is given.
    pub fn steps(self) -> Option<u64> {
        match self {
            Self::Steps(steps) => Some(steps),
            Self::Time(_) | Self::Auto => None,
        }
    }
}

impl fmt::Display for CheckpointEvery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(steps) => write!(f, "{steps} steps"),
            Self::Time(interval) => write!(f, "{}", humantime::format_duration(*interval)),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl Serialize for CheckpointEvery {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Steps(steps) => serializer.serialize_u64(*steps),
            Self::Time(_) | Self::Auto => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for CheckpointEvery {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EveryVisitor)
    }
}

struct EveryVisitor;

impl Visitor<'_> for EveryVisitor {
    type Value = CheckpointEvery;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ALLOWED)
    }

    fn visit_u64<E: de::Error>(self, steps: u64) -> Result<CheckpointEvery, E> {
        Ok(CheckpointEvery::Steps(steps))
    }

    fn visit_i64<E: de::Error>(self, steps: i64) -> Result<CheckpointEvery, E> {
        let wrong = |_| E::invalid_value(Unexpected::Signed(steps), &self);
        u64::try_from(steps)
            .map(CheckpointEvery::Steps)
            .map_err(wrong)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<CheckpointEvery, E> {
        if text == "auto" {
            return Ok(CheckpointEvery::Auto);
        }
        match humantime::parse_duration(text) {
            Ok(interval) if interval >= INTERVAL_MIN => Ok(CheckpointEvery::Time(interval)),
            _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
        }
    }
}
