//! Every check of a run file that needs no other file.

use std::path::Path;

use everstep_data::DataError;
use everstep_optim::{ComputeDtype, OptimizerConfig, Schedule};

use crate::error::RunFileError;
use crate::groups;
use crate::safeguards;
use crate::sections::{OptimizerSection, RunFile};

/// Slots beyond this are slips of the keyboard.
const SLOTS_MAX: usize = 1 << 16;
const NAME_BYTES_MAX: usize = 100;

/// Checks all sections and completes what follows from others: `data.context`.
pub(crate) fn check(file: &Path, mut sections: RunFile) -> Result<RunFile, RunFileError> {
    let wrong = |field: &str, reason: String| Err(RunFileError::field(file, field, reason));
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
        audit: _,
        policy: _,
        chaos: _,
    } = &sections;

    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let name = &run.name;
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || name.starts_with('.')
        || !name.bytes().all(is_plain)
    {
        return wrong(
            "run.name",
            format!(
                "{name:?} names no run; allowed: 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`, not starting with `.`"
            ),
        );
    }
    at_least_one(file, "run.steps", run.steps)?;
    if let Some(stop) = run.stop_at
        && !(1..=run.steps).contains(&stop)
    {
        return wrong(
            "run.stop_at",
            format!("is {stop}; allowed: 1 to run.steps ({})", run.steps),
        );
    }
    if run.store.as_deref() == Some("") {
        return wrong(
            "run.store",
            "is empty; allowed: a URL such as file:///data/runs or s3://bucket/prefix".into(),
        );
    }

    let mut sized = model.clone();
    // 0 means that the tokenizer decides, which is known later.
    sized.vocab_size = sized.vocab_size.max(1);
    if let Err(error) = sized.validate() {
        return wrong(
            &format!("model.{}", error.field),
            format!("is {}; allowed: {}", error.value, error.allowed),
        );
    }
    match data.check() {
        Ok(()) => {}
        Err(DataError::Config { field, reason }) => return wrong(field, reason),
        Err(error) => return wrong("data", error.to_string()),
    }
    let context = data.context.unwrap_or(model.context);
    if context > model.context {
        return wrong(
            "data.context",
            format!(
                "is {context}; allowed: 1 to model.context ({})",
                model.context
            ),
        );
    }

    if !(1..=SLOTS_MAX).contains(&batch.slots) {
        return wrong(
            "batch.slots",
            format!("is {}; allowed: 1 to {SLOTS_MAX}", batch.slots),
        );
    }
    at_least_one(file, "batch.micro_batches", batch.micro_batches as u64)?;
    let Some(unit) = batch.slots.checked_mul(batch.micro_batches) else {
        return wrong(
            "batch.micro_batches",
            format!("is {}; allowed: fewer", batch.micro_batches),
        );
    };
    if batch.rows == 0 || !batch.rows.is_multiple_of(unit) {
        let (slots, micro) = (batch.slots, batch.micro_batches);
        let above = batch.rows.next_multiple_of(unit).max(unit);
        let near = match above - unit {
            0 => above.to_string(),
            below => format!("{below} or {above}"),
        };
        return wrong(
            "batch.rows",
            format!(
                "is {}; allowed: a multiple of batch.slots x batch.micro_batches = {slots} x {micro} = {unit}, such as {near}",
                batch.rows
            ),
        );
    }

    let mut reached = 0;
    for stage in &batch.ramp {
        if stage.until <= reached {
            return wrong(
                "batch.ramp.until",
                format!(
                    "is {}; allowed: more than {reached}, where the stage before ends",
                    stage.until
                ),
            );
        }
        if stage.rows == 0 || !stage.rows.is_multiple_of(unit) {
            return wrong(
                "batch.ramp.rows",
                format!(
                    "is {}; allowed: a multiple of batch.slots x batch.micro_batches = {unit}",
                    stage.rows
                ),
            );
        }
        reached = stage.until;
    }

    check_optimizer(file, optimizer, run.steps)?;
    if let Err(reason) = groups::check(&optimizer.group, &sized) {
        return wrong("optimizer.group.parameters", reason);
    }

    let digits = compute.device.strip_prefix("cuda:").unwrap_or("none");
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !matches!(compute.device.as_str(), "auto" | "cpu" | "cuda") && !is_number {
        return wrong(
            "compute.device",
            format!(
                "is {:?}; allowed: \"auto\", \"cpu\", \"cuda\", \"cuda:N\"",
                compute.device
            ),
        );
    }
    if compute.fp8 && compute.dtype != ComputeDtype::Bfloat16 {
        let allowed = "is true; allowed: with compute.dtype = \"bfloat16\" only";
        return wrong("compute.fp8", allowed.into());
    }
    at_least_one(file, "compute.threads", compute.threads.unwrap_or(1) as u64)?;
    at_least_one(file, "evaluation.rows", evaluation.rows as u64)?;
    if evaluation.every > 0 && !data.has_validation() {
        return wrong(
            "evaluation.every",
            format!(
                "is {}, but no text is held out; allowed: 0, or data.validation or data.validation_fraction",
                evaluation.every
            ),
        );
    }
    at_least_one(file, "checkpoint.keep", checkpoint.keep as u64)?;
    at_least_one(
        file,
        "checkpoint.keep_every",
        checkpoint.keep_every.unwrap_or(1),
    )?;
    if checkpoint.keep_best > 0 && evaluation.every == 0 {
        return wrong(
            "checkpoint.keep_best",
            format!(
                "is {}, but nothing is evaluated; allowed: 0, or evaluation.every above 0",
                checkpoint.keep_best
            ),
        );
    }
    at_least_one(file, "cluster.replication", cluster.replication.into())?;
    at_least_one(file, "cluster.block_params", cluster.block_params as u64)?;
    at_least_one(file, "cluster.lease_ms", cluster.lease_ms)?;
    safeguards::check(file, &sections)?;

    sections.data.context = Some(context);
    Ok(sections)
}

fn at_least_one(file: &Path, field: &str, value: u64) -> Result<(), RunFileError> {
    match value {
        0 => Err(RunFileError::field(
            file,
            field,
            "is 0; allowed: at least 1",
        )),
        _ => Ok(()),
    }
}

fn check_optimizer(
    file: &Path,
    section: &OptimizerSection,
    steps: u64,
) -> Result<(), RunFileError> {
    let wrong = |field: &str, reason: String| {
        Err(RunFileError::field(
            file,
            format!("optimizer.{field}"),
            reason,
        ))
    };
    if let Some(fraction) = section.decay_fraction {
        if section.decay_steps.is_some() {
            return wrong(
                "decay_fraction",
                "not allowed together with optimizer.decay_steps; give one of them".into(),
            );
        }
        if section.schedule != Schedule::Wsd {
            let name = section.schedule.name();
            return wrong(
                "decay_fraction",
                format!("not allowed with schedule = \"{name}\" (only wsd has it)"),
            );
        }
        if !(fraction > 0.0 && fraction <= 1.0) {
            return wrong(
                "decay_fraction",
                format!("is {fraction}; allowed: above 0, at most 1"),
            );
        }
    }
    if !(section.z_loss.is_finite() && section.z_loss >= 0.0) {
        return wrong(
            "z_loss",
            format!("is {}; allowed: 0 (off) or more", section.z_loss),
        );
    }
    optimizer_config(section, steps)
        .validate()
        .map_err(|error| {
            let field = match error.field {
                "num_steps" => "run.steps".into(),
                field => format!("optimizer.{field}"),
            };
            // The optimizer's own errors speak of its field for the length of the run.
            let allowed = error.allowed.replace("`num_steps`", "run.steps");
            RunFileError::field(
                file,
                field,
                format!("is {}; allowed: {allowed}", error.value),
            )
        })
}

/// The optimizer of a run of `steps` steps.
pub(crate) fn optimizer_config(section: &OptimizerSection, steps: u64) -> OptimizerConfig {
    let by_fraction = section
        .decay_fraction
        .map(|fraction| (fraction * steps as f64).ceil() as u64);
    OptimizerConfig {
        min_lr: section.min_lr,
        betas: section.betas,
        eps: section.eps,
        weight_decay: section.weight_decay,
        grad_clip: section.grad_clip,
        schedule: section.schedule,
        warmup_steps: section.warmup_steps,
        decay_end_step: section.decay_end_step,
        decay_steps: section.decay_steps.or(by_fraction),
        moments: section.moments,
        ema_decay: section.ema_decay,
        muon: section.muon.clone(),
        group: section.group.clone(),
        ..OptimizerConfig::new(section.lr, steps)
    }
}
