//! What a run is.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// What a run is: everything that its result depends on, as digests, and where it was computed.
///
/// Stored as `manifest.json`, in every checkpoint (by digest) and in every process's ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunIdentity {
    /// The run's name.
    pub run: String,
    /// The run's seed.
    pub seed: u64,
    /// Of the checked configuration, without what cannot change the result (paths, ports, telemetry).
    pub configuration: Digest,
    /// Of the packed dataset.
    pub dataset: Digest,
    /// Of the tokenizer file.
    pub tokenizer: Digest,
    /// Of how the parameters are laid out in blocks: names, shapes, groups, block bounds.
    pub layout: Digest,
    /// `strict` or `relaxed`.
    pub determinism: String,
    /// Device kind, libtorch version, kernel settings: what a strict run must not change without being told to.
    /// Not part of [`RunIdentity::digest`] and [`RunIdentity::differences`].
    pub environment: BTreeMap<String, String>,
}

impl RunIdentity {
    /// Of the tests' run `r`.
    #[cfg(test)]
    pub(crate) fn any() -> Self {
        let digest = Digest::of(b"any");
        Self {
            run: "r".to_owned(),
            seed: 1,
            configuration: digest,
            dataset: digest,
            tokenizer: digest,
            layout: digest,
            determinism: "strict".to_owned(),
            environment: BTreeMap::new(),
        }
    }

    /// The digest that checkpoints carry: BLAKE3 of the compact JSON of this struct with an empty `environment`.
    pub fn digest(&self) -> Digest {
        let bare = Self {
            environment: BTreeMap::new(),
            ..self.clone()
        };
        Digest::of(&serde_json::to_vec(&bare).expect("strings, integers and maps always serialize"))
    }

    /// The fields in which `self` (expected) and `other` (found) differ, without the environment.
    pub fn differences(&self, other: &Self) -> Vec<Difference> {
        let pairs = [
            ("run", self.run.clone(), other.run.clone()),
            ("seed", self.seed.to_string(), other.seed.to_string()),
            (
                "configuration",
                self.configuration.into(),
                other.configuration.into(),
            ),
            ("dataset", self.dataset.into(), other.dataset.into()),
            ("tokenizer", self.tokenizer.into(), other.tokenizer.into()),
            ("layout", self.layout.into(), other.layout.into()),
            (
                "determinism",
                self.determinism.clone(),
                other.determinism.clone(),
            ),
        ];
        differences(
            pairs
                .into_iter()
                .map(|(field, a, b)| (field.to_owned(), a, b)),
        )
    }

    /// The settings in which the environments of `self` (expected) and `other` (found) differ.
    pub fn environment_differences(&self, other: &Self) -> Vec<Difference> {
        let mut names: Vec<&String> = self
            .environment
            .keys()
            .chain(other.environment.keys())
            .collect();
        names.sort();
        names.dedup();
        let value = |identity: &Self, name: &str| {
            identity.environment.get(name).cloned().unwrap_or_default()
        };
        differences(
            names
                .into_iter()
                .map(|name| (name.clone(), value(self, name), value(other, name))),
        )
    }
}

fn differences(pairs: impl Iterator<Item = (String, String, String)>) -> Vec<Difference> {
    pairs
        .filter(|(_, expected, found)| expected != found)
        .map(|(field, expected, found)| Difference {
            field,
            expected,
            found,
        })
        .collect()
}

/// One field in which two identities differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The field's name.
    pub field: String,
    /// The value that was expected.
    pub expected: String,
    /// The value that was found.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field,
            expected,
            found,
        } = self;
        write!(f, "{field} is `{found}` and not `{expected}`")
    }
}
