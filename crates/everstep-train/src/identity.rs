//! Which fields decide the numbers of a run.

use std::collections::{BTreeMap, BTreeSet};

use toml::Value;

use crate::run_config::RunConfig;
use crate::safeguards::LossSpike;

/// Fields, and sections, that decide the final weights. Everything else (evaluation, checkpoints, replication, threads, where
/// to stop) may change when a run goes on.
const NUMERIC: [&str; 13] = [
    "run.seed",
    "run.steps",
    "run.determinism",
    "model.",
    "data.",
    "batch.",
    "optimizer.",
    "compute.dtype",
    "compute.fp8",
    "cluster.block_params",
    "policy.loss_spike",
    "policy.spike_sd",
    "policy.spike_window",
];

/// Fields whose effect the dataset's digest stands for: the same text elsewhere is the same run.
const OF_THE_DATASET: [&str; 4] = [
    "data.train",
    "data.validation",
    "data.validation_fraction",
    "data.tokenizer.",
];

/// One field in which two runs differ so that their weights would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumericDifference {
    /// Dotted path of the field.
    pub field: String,
    /// Its value in the first run, as TOML.
    pub known: String,
    /// Its value in the other one.
    pub given: String,
}

impl RunConfig {
    /// A text that is equal for runs that give the same weights on the same dataset: `field = value` lines, sorted.
    pub fn numeric_identity(&self) -> String {
        let fields = self.numeric_fields();
        let own = fields
            .iter()
            .filter(|(field, _)| !starts_with_any(field, &OF_THE_DATASET));
        own.map(|(field, value)| format!("{field} = {value}\n"))
            .collect()
    }

    /// The fields that decide the numbers and differ between `self` (known) and `other` (given), by name. Fields that were left out
    /// and follow from others differ with them.
    pub fn numeric_differences(&self, other: &Self) -> Vec<NumericDifference> {
        let (known, given) = (self.numeric_fields(), other.numeric_fields());
        let names: BTreeSet<&String> = known.keys().chain(given.keys()).collect();
        let value = |fields: &BTreeMap<String, String>, name: &String| {
            fields
                .get(name)
                .cloned()
                .unwrap_or_else(|| "nothing".into())
        };
        let differs = |name: &&String| known.get(*name) != given.get(*name);
        let difference = |name: &String| NumericDifference {
            field: name.clone(),
            known: value(&known, name),
            given: value(&given, name),
        };
        names.into_iter().filter(differs).map(difference).collect()
    }

    fn numeric_fields(&self) -> BTreeMap<String, String> {
        let all = Value::try_from(self).expect("sections of strings, numbers and lists are TOML");
        let mut fields = BTreeMap::new();
        flatten("", &all, &mut fields);
        fields.retain(|field, _| starts_with_any(field, &NUMERIC));
        // Its digest stands for what the folder holds: the same weights elsewhere are the same run.
        fields.remove("model.init");
        if self.policy.loss_spike == LossSpike::Off {
            // What a spike would be decides nothing, then.
            fields.retain(|field, _| !field.starts_with("policy."));
        }
        fields
    }
}

/// Whether `field` is one of `patterns`, or lies in one that ends with a dot.
fn starts_with_any(field: &str, patterns: &[&str]) -> bool {
    patterns.iter().any(|pattern| match pattern.ends_with('.') {
        true => field.starts_with(pattern),
        false => field == *pattern,
    })
}

fn flatten(path: &str, value: &Value, fields: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                flatten(&path, value, fields);
            }
        }
        leaf => {
            fields.insert(path.to_owned(), leaf.to_string());
        }
    }
}
