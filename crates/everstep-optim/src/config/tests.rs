use super::*;

fn rates(config: &OptimizerConfig, steps: &[u64]) -> Vec<f64> {
    config.validate().unwrap();
    steps
        .iter()
        .map(|&step| config.learning_rate(Step(step)))
        .collect()
}

fn block(update: Update) -> Block {
    Block {
        offset: 0,
        len: 1,
        update,
        group: 0,
    }
}

fn config(schedule: Schedule) -> OptimizerConfig {
    OptimizerConfig {
        min_lr: 0.1,
        schedule,
        warmup_steps: 3,
        ..OptimizerConfig::new(1.0, 103)
    }
}

#[test]
fn warm_up_is_linear_for_all() {
    for schedule in [
        Schedule::Cosine,
        Schedule::Linear,
        Schedule::Wsd,
        Schedule::Constant,
    ] {
        assert_eq!(
            rates(&config(schedule), &[0, 1, 2, 3]),
            [0.25, 0.5, 0.75, 1.0]
        );
    }
}

#[test]
fn schedules_have_their_shapes() {
    let rounded = |config: &OptimizerConfig, steps: &[u64]| -> Vec<f64> {
        rates(config, steps)
            .iter()
            .map(|rate| (rate * 1e9).round() / 1e9)
            .collect()
    };
    let steps = [3, 28, 53, 78, 103, 500];
    assert_eq!(
        rounded(&config(Schedule::Cosine), &steps),
        [1.0, 0.868198052, 0.55, 0.231801948, 0.1, 0.1]
    );
    assert_eq!(
        rounded(&config(Schedule::Linear), &steps),
        [1.0, 0.775, 0.55, 0.325, 0.1, 0.1]
    );
    assert_eq!(rounded(&config(Schedule::Constant), &steps), [1.0; 6]);
    let wsd = OptimizerConfig {
        decay_steps: Some(50),
        ..config(Schedule::Wsd)
    };
    assert_eq!(rounded(&wsd, &steps), [1.0, 1.0, 1.0, 0.55, 0.1, 0.1]);
    let short = OptimizerConfig {
        decay_end_step: Some(53),
        ..config(Schedule::Linear)
    };
    assert_eq!(rounded(&short, &steps), [1.0, 0.55, 0.1, 0.1, 0.1, 0.1]);
    let long = OptimizerConfig {
        decay_end_step: Some(203),
        ..config(Schedule::Linear)
    };
    assert_eq!(rounded(&long, &[103]), [0.55]);
}

#[test]
fn bits_are_pinned() {
    let step = config(Schedule::Cosine).adam_step(Step(28), 0.5, &block(Update::Decayed));
    let bits = [step.keep, step.root_factor, step.step_size].map(f32::to_bits);
    assert_eq!(bits, PINNED, "{bits:#x?}");
}
const PINNED: [u32; 3] = [0x3f69_c62d, 0x3f91_7c6f, 0x3f69_3ead];

#[test]
fn decay_is_for_decayed_blocks() {
    let config = config(Schedule::Constant);
    let keep = |update| config.adam_step(Step(50), 1.0, &block(update)).keep;
    assert_eq!((keep(Update::Decayed), keep(Update::Plain)), (0.9, 1.0));
}

#[test]
fn clipping_is_torchs() {
    let config = config(Schedule::Constant);
    assert_eq!(config.clip_factor(0.5), 1.0);
    assert_eq!(config.clip_factor(4.0), 1.0 / (4.0 + 1e-6));
    assert_eq!(
        OptimizerConfig {
            grad_clip: 0.0,
            ..config
        }
        .clip_factor(4.0),
        1.0
    );
}

#[test]
fn wrong_fields_are_named() {
    let check = |change: fn(&mut OptimizerConfig), field: &str| {
        let mut config = config(Schedule::Cosine);
        change(&mut config);
        let error = config.validate().unwrap_err();
        assert_eq!(error.field, field, "{error}");
    };
    check(|config| config.lr = 0.0, "lr");
    check(|config| config.lr = f64::NAN, "lr");
    check(|config| config.min_lr = 1.5, "min_lr");
    check(|config| config.min_lr = -0.5, "min_lr");
    check(|config| config.betas[1] = 1.0, "betas");
    check(|config| config.betas[0] = f64::NAN, "betas");
    check(|config| config.eps = 0.0, "eps");
    check(|config| config.weight_decay = 1.0, "weight_decay");
    check(|config| config.weight_decay = f64::NAN, "weight_decay");
    check(|config| config.grad_clip = f64::INFINITY, "grad_clip");
    check(|config| config.num_steps = 0, "num_steps");
    check(|config| config.warmup_steps = 103, "warmup_steps");
    check(|config| config.decay_end_step = Some(3), "warmup_steps");
    check(|config| config.decay_end_step = Some(0), "decay_end_step");
    check(|config| config.decay_steps = Some(3), "decay_steps");
    check(
        |config| {
            config.schedule = Schedule::Wsd;
            config.decay_steps = Some(104);
        },
        "decay_steps",
    );
    check(
        |config| {
            config.schedule = Schedule::Wsd;
            config.warmup_steps = 93;
        },
        "warmup_steps",
    );
    check(
        |config| {
            config.schedule = Schedule::Constant;
            config.decay_end_step = Some(50);
        },
        "decay_end_step",
    );
}

#[test]
fn means_that_would_stand_still_are_refused() {
    let config = |beta2, ema_decay| OptimizerConfig {
        betas: [0.9, beta2],
        moments: MomentDtype::Bfloat16,
        ema_decay,
        ..OptimizerConfig::new(1e-3, 10)
    };
    assert_eq!(config(0.99, Some(0.9999)).validate(), Ok(()));
    let error = config(0.999, None).validate().unwrap_err();
    assert_eq!(
        error.to_string(),
        "`moments` is \"bfloat16\"; allowed: \"float32\" with a decay of 0.999 (`betas`, `muon.momentum`): a mean in bfloat16 that decays more slowly than 0.992 stands still"
    );
    let error = config(0.99, Some(1.0)).validate().unwrap_err();
    assert_eq!(error.field, "ema_decay");
}

#[test]
fn errors_say_what_is_allowed() {
    let config = OptimizerConfig {
        warmup_steps: 200,
        ..config(Schedule::Cosine)
    };
    let text = "`warmup_steps` is 200; allowed: less than the step at which the cosine schedule ends (103)";
    assert_eq!(config.validate().unwrap_err().to_string(), text);
}

#[test]
fn run_files_need_little_and_may_hold_nothing_unknown() {
    let parsed: OptimizerConfig =
        toml::from_str("lr = 1e-3\nnum_steps = 10\nschedule = \"wsd\"").unwrap();
    assert_eq!(
        parsed,
        OptimizerConfig {
            schedule: Schedule::Wsd,
            ..OptimizerConfig::new(1e-3, 10)
        }
    );
    let written = toml::to_string(&parsed).unwrap();
    assert_eq!(toml::from_str::<OptimizerConfig>(&written).unwrap(), parsed);
    let error =
        toml::from_str::<OptimizerConfig>("lr = 1e-3\nnum_steps = 10\nwarmup = 3").unwrap_err();
    assert!(
        error.to_string().contains("unknown field `warmup`"),
        "{error}"
    );
    let error = toml::from_str::<OptimizerConfig>("lr = 1e-3\nnum_steps = 10\nschedule = \"step\"")
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("`cosine`, `linear`, `wsd`, `constant`"),
        "{error}"
    );
}
