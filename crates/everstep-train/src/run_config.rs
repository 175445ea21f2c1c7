//! A run file that was checked.

use std::path::Path;

use everstep_data::DataConfig;
use everstep_optim::{OptimizerConfig, ParameterSpec, Update};
use everstep_spec::{ModelConfig, spec};
use serde::Serialize;

use crate::error::RunFileError;
use crate::safeguards::{AuditConfig, ChaosConfig, PolicyConfig};
use crate::sections::{
    BatchConfig, CheckpointConfig, ClusterConfig, ComputeConfig, EvaluationConfig,
    OptimizerSection, RunFile, RunSection,
};
use crate::{check, groups, overrides, syntax};

/// A checked run file. Every field holds what it may; defaults that follow from other fields are filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunConfig {
    /// What the run is.
    pub run: RunSection,
    /// The model; `vocab_size` may still be 0, see [`Self::resolve_vocab`].
    pub model: ModelConfig,
    /// The text and the tokenizer; `context` is filled in.
    pub data: DataConfig,
    /// The global batch.
    pub batch: BatchConfig,
    /// The optimizer as it was written; [`Self::optimizer`] is what the shards take.
    pub optimizer: OptimizerSection,
    /// What workers compute in and on.
    pub compute: ComputeConfig,
    /// Held-out evaluation.
    pub evaluation: EvaluationConfig,
    /// Checkpoints.
    pub checkpoint: CheckpointConfig,
    /// How the cluster keeps the run.
    pub cluster: ClusterConfig,
    /// Slots that are computed twice and compared.
    pub audit: AuditConfig,
    /// Steps that are not what they should be.
    pub policy: PolicyConfig,
    /// Faults made on purpose.
    pub chaos: ChaosConfig,
}

/// What belongs to `[optimizer]` and concerns workers instead of shards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerExtras {
    /// Coefficient of the z-loss; 0 is off.
    pub z_loss: f64,
}

impl RunConfig {
    /// Reads the run file `file`, applies `overrides` (`section.field=value`) in their order, and checks everything that
    /// needs no other file.
    ///
    /// # Errors
    /// [`RunFileError`] names the file, the field and what is allowed.
    pub fn read(file: &Path, overrides: &[String]) -> Result<Self, RunFileError> {
        let text = std::fs::read_to_string(file).map_err(|source| RunFileError::Read {
            file: file.to_owned(),
            source,
        })?;
        Self::parse(file, &text, overrides)
    }

    /// As [`Self::read`], for a text that stands in `file`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(file: &Path, text: &str, overrides: &[String]) -> Result<Self, RunFileError> {
        let mut table = syntax::parse(file, text)?;
        overrides::apply(&mut table, overrides)?;
        let sections = check::check(file, syntax::understand(file, table)?)?;
        let RunFile {
            run,
            model,
            data,
            batch,
            optimizer,
            compute,
            evaluation,
            checkpoint,
            cluster,
            audit,
            policy,
            chaos,
        } = sections;
        Ok(Self {
            run,
            model,
            data,
            batch,
            optimizer,
            compute,
            evaluation,
            checkpoint,
            cluster,
            audit,
            policy,
            chaos,
        })
    }

    /// The run file that says the same, complete with every default; reading it gives an equal configuration.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("sections of strings, numbers and lists are TOML")
    }

    /// Length of a training window in tokens.
    pub fn context(&self) -> usize {
        self.data.context.unwrap_or(self.model.context)
    }

    /// The optimizer of this run.
    pub fn optimizer(&self) -> OptimizerConfig {
        check::optimizer_config(&self.optimizer, self.run.steps)
    }

    /// The model's parameters in canonical order, each with what the optimizer does to it.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let mut parameters = everstep_spec::parameters(&self.model);
        if self.optimizer.muon.is_some() {
            for parameter in &mut parameters {
                let is_table = spec::is_table(&self.model, &parameter.name);
                if parameter.update == Update::Decayed && !is_table {
                    parameter.update = Update::Muon;
                }
            }
        }
        groups::assign(&self.optimizer.group, &mut parameters);
        parameters
    }

    /// What belongs to `[optimizer]` and concerns workers.
    pub fn optimizer_extras(&self) -> OptimizerExtras {
        OptimizerExtras {
            z_loss: self.optimizer.z_loss,
        }
    }

    /// Steps that this run takes: `run.stop_at`, or `run.steps`.
    pub fn last_step(&self) -> u64 {
        self.run.stop_at.unwrap_or(self.run.steps)
    }

    /// Sets `model.vocab_size` to the tokenizer's if it was left out.
    ///
    /// # Errors
    /// [`RunFileError::Field`] if the model's vocabulary is smaller than the tokenizer's.
    pub fn resolve_vocab(&mut self, vocab_size: usize, file: &Path) -> Result<(), RunFileError> {
        match self.model.vocab_size {
            0 => {
                self.model.vocab_size = vocab_size;
                Ok(())
            }
            size if size < vocab_size => Err(RunFileError::field(
                file,
                "model.vocab_size",
                format!(
                    "is {size}, but the tokenizer has {vocab_size} tokens; allowed: at least {vocab_size}, or leave it out"
                ),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
