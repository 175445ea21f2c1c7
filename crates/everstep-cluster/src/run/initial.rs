//! The weights of a Hugging Face folder that a run starts from. They are copied into the run directory when the run begins, as its data
//! are, and their digest is part of what the run is: nothing that happens to the folder later can change a bit.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use everstep_spec::ModelConfig;
use everstep_spec::hugging_face::{ExportOptions, WeightsFolder, write_folder};
use everstep_train::RunConfig;

use super::{RunError, absolute};
use crate::rundir::RunDir;

/// The copy in the run directory, opened and compared with its digest when the first block is asked for.
#[derive(Debug)]
pub(super) struct InitialWeights {
    dir: PathBuf,
    digest: String,
    opened: OnceLock<Result<WeightsFolder, String>>,
}

impl InitialWeights {
    /// Those of a run whose file names a folder.
    pub(super) fn of(config: &ModelConfig, run_dir: &RunDir) -> Option<Self> {
        config.init.as_ref().map(|_| Self {
            dir: run_dir.initial_weights(),
            digest: config.init_digest.clone().unwrap_or_default(),
            opened: OnceLock::new(),
        })
    }

    /// A range of the flattened parameters.
    ///
    /// # Errors
    /// The copy cannot be read, or is not what the run began with.
    pub(super) fn values(&self, range: Range<usize>) -> Result<Vec<f32>, RunError> {
        let opened = self.opened.get_or_init(|| {
            let folder = WeightsFolder::open(&self.dir).map_err(|error| error.to_string())?;
            let found = folder.digest().map_err(|error| error.to_string())?;
            if found != self.digest {
                return Err(format!(
                    "{}: its weights have the digest {found}; allowed: {}, with which the run began",
                    self.dir.display(),
                    self.digest
                ));
            }
            Ok(folder)
        });
        let folder = opened
            .as_ref()
            .map_err(|error| RunError::User(error.clone()))?;
        let mut values = Vec::with_capacity(range.len());
        folder
            .read(range, &mut values)
            .map_err(|error| RunError::User(error.to_string()))?;
        Ok(values)
    }
}

/// Checks the folder that `model.init` names, writes its digest into `config`, and copies its weights unless the run directory has them.
///
/// # Errors
/// One line that names the file, the field and what is allowed.
pub(super) fn resolve(
    config: &mut RunConfig,
    run_file: &Path,
    run_dir: &RunDir,
) -> Result<(), RunError> {
    let Some(init) = &config.model.init else {
        return Ok(());
    };
    let wrong = |field: &str, reason: String| {
        RunError::User(format!("{}: model.{field}: {reason}", run_file.display()))
    };
    let base = absolute(run_file);
    let source = base.parent().unwrap_or(Path::new(".")).join(init);
    if !source.exists()
        && let Some(digest) = begun_with(config, run_dir)
    {
        // The run has its copy, and the folder may be gone.
        config.model.init_digest = Some(digest);
        return Ok(());
    }
    let folder = WeightsFolder::open(&source).map_err(|error| wrong("init", error.to_string()))?;
    if config.model.vocab_size == 0 {
        config.model.vocab_size = folder.config().vocab_size;
    }
    config
        .model
        .check_same_model(folder.config())
        .map_err(|error| {
            let reason = format!(
                "is {}; allowed: {}, which {} has",
                error.value,
                error.allowed,
                source.display()
            );
            wrong(&error.field, reason)
        })?;
    let digest = folder
        .digest()
        .map_err(|error| wrong("init", error.to_string()))?;
    match &config.model.init_digest {
        Some(given) if *given != digest => {
            let reason = format!(
                "is {given}, but the weights in {} have {digest}; allowed: the same, or leave it out",
                source.display()
            );
            return Err(wrong("init_digest", reason));
        }
        _ => config.model.init_digest = Some(digest.clone()),
    }
    let target = run_dir.initial_weights();
    if run_dir.run_file().exists() && WeightsFolder::open(&target).is_ok() {
        // Whoever reads the copy of a run that has begun compares it with its digest.
        return Ok(());
    }
    copy(&folder, &digest, &target)
}

/// The digest of the weights with which the run in `run_dir` began, if it began with the folder that `config` names.
fn begun_with(config: &RunConfig, run_dir: &RunDir) -> Option<String> {
    let known = RunConfig::read(&run_dir.run_file(), &[]).ok()?;
    let is_same = known.model.init == config.model.init;
    known.model.init_digest.filter(|_| is_same)
}

/// Writes the weights into the run directory, unless they are there.
fn copy(folder: &WeightsFolder, digest: &str, target: &Path) -> Result<(), RunError> {
    let user = |error: &dyn std::fmt::Display| RunError::User(error.to_string());
    let present = WeightsFolder::open(target).and_then(|copy| copy.digest());
    if present.is_ok_and(|present| present == digest) {
        return Ok(());
    }
    if target.exists() {
        // Of an attempt with other weights that never became a run, or damaged.
        fs::remove_dir_all(target)
            .map_err(|error| user(&format!("{}: {error}", target.display())))?;
    }
    let options = ExportOptions {
        dtype: folder.dtype(),
        max_shard_bytes: u64::MAX,
    };
    write_folder(target, folder.config(), options, None, |range, values| {
        folder.read(range, values)
    })
    .map_err(|error| user(&error))
}
