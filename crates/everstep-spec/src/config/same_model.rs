//! Whether a run trains the model that a folder holds.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{ConfigError, ModelConfig, Positions, check};

/// What belongs to training, and not to the weights that it makes.
const TRAINING_FIELDS: [&str; 7] = [
    "dropout",
    "init_std",
    "init",
    "init_digest",
    "moe.balance_rate",
    "moe.balance_loss",
    "mtp.loss",
];

impl ModelConfig {
    /// The first field of the model itself in which `self` differs from `folder`, that of a folder whose weights it starts from.
    ///
    /// What belongs to training may differ, and the context of a model that rotates its positions: no weight depends on it.
    ///
    /// # Errors
    /// The field, with what the folder has.
    pub fn check_same_model(&self, folder: &Self) -> Result<(), ConfigError> {
        let (own, other) = (self.fields_of_weights(), folder.fields_of_weights());
        let names: BTreeSet<&String> = own.keys().chain(other.keys()).collect();
        let text = |fields: &BTreeMap<String, Value>, name: &String| match fields.get(name) {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => "nothing".to_owned(),
        };
        for name in names {
            let is_free = name == "context" && self.positions == Positions::Rope;
            let (value, allowed) = (text(&own, name), text(&other, name));
            check(name, &value, is_free || value == allowed, || allowed)?;
        }
        Ok(())
    }

    /// The fields that decide what a model with given weights computes; those of tables within have the table's name before a dot.
    fn fields_of_weights(&self) -> BTreeMap<String, Value> {
        let mut fields = BTreeMap::new();
        let table = serde_json::to_value(self).expect("plain fields become JSON");
        flatten(String::new(), table, &mut fields);
        for training in TRAINING_FIELDS {
            fields.remove(training);
        }
        fields
    }
}

fn flatten(name: String, value: Value, fields: &mut BTreeMap<String, Value>) {
    let Value::Object(table) = value else {
        fields.insert(name, value);
        return;
    };
    for (field, value) in table {
        let dot = if name.is_empty() { "" } else { "." };
        flatten(format!("{name}{dot}{field}"), value, fields);
    }
}
