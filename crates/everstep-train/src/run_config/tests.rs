use std::path::PathBuf;
use std::time::Duration;

use everstep_data::TokenizerKind;
use everstep_optim::{ComputeDtype, Layout, Schedule, Update};
use everstep_protocol::Step;
use everstep_protocol::policy::LossPolicy;
use everstep_spec::{Architecture, Mlp, Norm, Positions};

use super::*;
use crate::checkpoint_every::CheckpointEvery;
use crate::sections::{Determinism, Election};

const SMALL: &str = r#"
[run]
name = "small"
steps = 100

[model]
architecture = "llama"
layers = 2
heads = 4
width = 64
context = 32

[data]
train = ["*.txt"]

[batch]
slots = 4
rows = 8

[optimizer]
lr = 1e-3
"#;

fn parse(text: &str, set: &[&str]) -> Result<RunConfig, RunFileError> {
    let set: Vec<String> = set.iter().map(|&change| change.into()).collect();
    RunConfig::parse(Path::new("runs/small.toml"), text, &set)
}

fn small(set: &[&str]) -> RunConfig {
    parse(SMALL, set).unwrap()
}

/// The error that an override causes, without the file's name.
fn error(set: &str) -> String {
    let error = parse(SMALL, &[set]).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
        .strip_prefix("runs/small.toml: ")
        .unwrap_or(&error)
        .to_owned()
}

#[test]
fn defaults_are_filled_in() {
    let config = small(&[]);
    assert_eq!(
        (config.run.seed, config.run.determinism, config.run.stop_at),
        (0, Determinism::Strict, None)
    );
    assert_eq!(
        (config.context(), config.data.context, config.last_step()),
        (32, Some(32), 100)
    );
    assert_eq!(
        (config.batch.micro_batches, config.batch.rows_per_slot()),
        (1, 2)
    );
    assert_eq!(
        (config.compute.dtype, config.compute.device.as_str()),
        (ComputeDtype::Float32, "auto")
    );
    assert_eq!(
        (
            config.evaluation.every,
            config.checkpoint.every,
            config.checkpoint.keep
        ),
        (0, CheckpointEvery::Steps(100), 3)
    );
    assert_eq!(
        (config.cluster.replication, config.cluster.block_params),
        (1, 1 << 20)
    );
    assert_eq!(config.cluster.election, Election::Store);
    assert_eq!(config.optimizer(), OptimizerConfig::new(1e-3, 100));
    assert_eq!(config.optimizer_extras().z_loss, 0.0);
}

#[test]
fn checkpoints_are_due_by_steps_by_time_or_by_what_is_best() {
    for (text, every) in [
        ("0", CheckpointEvery::Steps(0)),
        ("250", CheckpointEvery::Steps(250)),
        ("90s", CheckpointEvery::Time(Duration::from_secs(90))),
        ("1h 5m", CheckpointEvery::Time(Duration::from_secs(3900))),
        ("100ms", CheckpointEvery::Time(Duration::from_millis(100))),
        ("auto", CheckpointEvery::Auto),
    ] {
        let config = small(&[&format!("checkpoint.every={text}")]);
        assert_eq!(config.checkpoint.every, every, "{text}");
        // What is written to the run directory is understood again.
        let written = toml::to_string(&config).unwrap();
        let again = RunConfig::parse(Path::new("run.toml"), &written, &[]).unwrap();
        assert_eq!(again.checkpoint, config.checkpoint, "{text}");
    }
}

#[test]
fn overrides_reach_every_section() {
    let config = small(&[
        "run.seed=5",
        "run.stop_at=40",
        "run.determinism=relaxed",
        "run.store=s3://bucket/runs",
        "model.context=64",
        "data.context=16",
        "data.tokenizer.kind=char",
        "batch.micro_batches=2",
        "optimizer.schedule=wsd",
        "optimizer.decay_fraction=0.25",
        "optimizer.z_loss=1e-4",
        "compute.dtype=bfloat16",
        "compute.threads=2",
        "evaluation.every=10",
        "cluster.election=static",
        "cluster.replication=2",
    ]);
    assert_eq!(
        (
            config.run.seed,
            config.last_step(),
            config.run.determinism.is_relaxed()
        ),
        (5, 40, true)
    );
    assert_eq!(config.run.store.as_deref(), Some("s3://bucket/runs"));
    assert_eq!((config.model.context, config.context()), (64, 16));
    assert_eq!(config.data.tokenizer.kind, TokenizerKind::Char);
    assert_eq!(
        (config.optimizer().schedule, config.optimizer().decay_steps),
        (Schedule::Wsd, Some(25))
    );
    assert_eq!(config.compute.dtype, ComputeDtype::Bfloat16);
    assert_eq!(config.cluster.election, Election::Static);
}

#[test]
fn mistakes_name_the_field_and_what_is_allowed() {
    for (set, expected) in [
        (
            "run.step=3",
            "run.step: unknown field; allowed: `name`, `seed`, `steps`, `stop_at`, `store`, `determinism`",
        ),
        (
            "data.tokenizer.size=3",
            "data.tokenizer.size: unknown field; allowed: `kind`, `vocab_size`, `path`",
        ),
        (
            "modle.width=3",
            "modle: unknown field; allowed: `run`, `model`, `data`, `batch`, `optimizer`, `compute`, `evaluation`, `checkpoint`, `cluster`",
        ),
        (
            "model.layer=3",
            "model.layer: unknown field; allowed: `architecture`, `vocab_size`, `layers`",
        ),
        (
            "run.steps=ten",
            "run.steps: invalid type: string \"ten\"; allowed: a whole number, 0 or more",
        ),
        (
            "run.steps=-1",
            "run.steps: invalid value: integer `-1`; allowed: a whole number, 0 or more",
        ),
        (
            "optimizer.lr=fast",
            "optimizer.lr: invalid type: string \"fast\"; allowed: a number",
        ),
        (
            "data.train=a.txt",
            "data.train: invalid type: string \"a.txt\"; allowed: a list, such as",
        ),
        (
            "data.tokenizer.kind=word",
            "data.tokenizer.kind: unknown value `word`; allowed: `bpe`, `char`, `byte`, `file`",
        ),
        (
            "cluster.election=raft",
            "cluster.election: unknown value `raft`; allowed: `store` or `static`",
        ),
        (
            "compute.dtype=float16",
            "compute.dtype: unknown value `float16`; allowed: `f32`, `float32`, ",
        ),
        (
            "run.name=a/b",
            "run.name: \"a/b\" names no run; allowed: 1 to 100 letters",
        ),
        ("run.steps=0", "run.steps: is 0; allowed: at least 1"),
        (
            "run.stop_at=101",
            "run.stop_at: is 101; allowed: 1 to run.steps (100)",
        ),
        ("run.store=", "run.store: is empty; allowed: a URL"),
        (
            "model.heads=5",
            "model.heads: is 5; allowed: a divisor of width=`64`",
        ),
        (
            "data.train=[]",
            "data.train: is empty; allowed: at least one path",
        ),
        (
            "data.tokenizer.vocab_size=9",
            "data.tokenizer.vocab_size: 9 is too small; allowed: at least 257",
        ),
        (
            "data.context=33",
            "data.context: is 33; allowed: 1 to model.context (32)",
        ),
        ("batch.slots=0", "batch.slots: is 0; allowed: 1 to 65536"),
        (
            "batch.rows=9",
            "batch.rows: is 9; allowed: a multiple of batch.slots x batch.micro_batches = 4 x 1 = 4, such as 8 or 12",
        ),
        (
            "batch.rows=2",
            "batch.rows: is 2; allowed: a multiple of batch.slots x batch.micro_batches = 4 x 1 = 4, such as 4",
        ),
        (
            "batch.rows=0",
            "batch.rows: is 0; allowed: a multiple of batch.slots x batch.micro_batches = 4 x 1 = 4, such as 4",
        ),
        (
            "batch.micro_batches=3",
            "batch.rows: is 8; allowed: a multiple of batch.slots x batch.micro_batches = 4 x 3 = 12, such as 12",
        ),
        (
            "optimizer.lr=-1",
            "optimizer.lr: is -1; allowed: a number above 0",
        ),
        (
            "optimizer.warmup_steps=100",
            "optimizer.warmup_steps: is 100; allowed: less than the step",
        ),
        (
            "optimizer.decay_fraction=0.1",
            "optimizer.decay_fraction: not allowed with schedule = \"cosine\"",
        ),
        (
            "optimizer.z_loss=-1.0",
            "optimizer.z_loss: is -1; allowed: 0 (off) or more",
        ),
        (
            "compute.device=gpu",
            "compute.device: is \"gpu\"; allowed: \"auto\", \"cpu\", \"cuda\", \"cuda:N\"",
        ),
        (
            "compute.device=cuda:",
            "compute.device: is \"cuda:\"; allowed:",
        ),
        (
            "compute.threads=0",
            "compute.threads: is 0; allowed: at least 1",
        ),
        (
            "evaluation.rows=0",
            "evaluation.rows: is 0; allowed: at least 1",
        ),
        (
            "checkpoint.every=soon",
            "checkpoint.every: invalid value: string \"soon\"; allowed: a number of steps, a time of at least 100ms such as \"30s\" or \"10m\", or \"auto\"",
        ),
        (
            "checkpoint.every=1ms",
            "checkpoint.every: invalid value: string \"1ms\"; allowed: a number of steps",
        ),
        (
            "checkpoint.every=-1",
            "checkpoint.every: invalid value: integer `-1`; allowed: a number of steps",
        ),
        (
            "checkpoint.keep_every=0",
            "checkpoint.keep_every: is 0; allowed: at least 1",
        ),
        (
            "checkpoint.keep_best=1",
            "checkpoint.keep_best: is 1, but nothing is evaluated; allowed: 0, or evaluation.every above 0",
        ),
        (
            "checkpoint.keep=0",
            "checkpoint.keep: is 0; allowed: at least 1",
        ),
        (
            "cluster.lease_ms=0",
            "cluster.lease_ms: is 0; allowed: at least 1",
        ),
        ("steps=3", "--set steps=3: `steps` is not a field"),
    ] {
        assert!(
            error(set).starts_with(expected),
            "--set {set}\n gives {}\n not  {expected}",
            error(set)
        );
    }
}

#[test]
fn missing_fields_and_sections_are_named() {
    let missing = |line: &str| {
        assert!(SMALL.contains(line));
        parse(&SMALL.replace(line, ""), &[])
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        missing("steps = 100\n"),
        "runs/small.toml: run.steps: is missing; it has no default"
    );
    assert_eq!(
        missing("[optimizer]\nlr = 1e-3\n"),
        "runs/small.toml: optimizer: is missing; it has no default"
    );
    assert_eq!(
        missing("layers = 2\n"),
        "runs/small.toml: model.layers: is missing; it has no default"
    );
    let evaluated = parse(
        SMALL,
        &["evaluation.every=5", "data.validation_fraction=0.0"],
    )
    .unwrap_err()
    .to_string();
    assert!(
        evaluated.contains("evaluation.every: is 5, but no text is held out; allowed: 0, or"),
        "{evaluated}"
    );
    let both = parse(
        SMALL,
        &[
            "optimizer.schedule=wsd",
            "optimizer.decay_steps=3",
            "optimizer.decay_fraction=0.1",
        ],
    );
    assert!(
        both.unwrap_err()
            .to_string()
            .contains("optimizer.decay_fraction: not allowed together with")
    );
}

#[test]
fn a_file_that_is_missing_or_no_toml_is_named() {
    let missing = RunConfig::read(Path::new("no/such.toml"), &[])
        .unwrap_err()
        .to_string();
    assert!(
        missing.starts_with("no/such.toml: cannot be read: "),
        "{missing}"
    );
    for (text, place) in [
        ("[run]\nname = \n", "2:8"),
        ("[run]\nname = \"a\"\nname = \"b\"\n", "3:1"),
        ("\u{e4} = ", "1:1"),
    ] {
        let error = parse(text, &[]).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("runs/small.toml:{place}: ")),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_run_file_that_is_written_out_reads_the_same() {
    for set in [
        &[
            "run.stop_at=7",
            "data.tokenizer.kind=char",
            "evaluation.every=3",
        ][..],
        &[],
    ] {
        let mut config = small(set);
        config.resolve_vocab(777, Path::new("x")).unwrap();
        let again = parse(&config.to_toml(), &[]).unwrap();
        assert_eq!(config, again);
        assert_eq!(config.numeric_differences(&again), []);
    }
}

#[test]
fn the_vocabulary_follows_the_tokenizer_or_must_hold_it() {
    let file = Path::new("a.toml");
    let mut config = small(&[]);
    config.resolve_vocab(300, file).unwrap();
    assert_eq!(config.model.vocab_size, 300);
    config.resolve_vocab(300, file).unwrap();
    let mut padded = small(&["model.vocab_size=320"]);
    padded.resolve_vocab(300, file).unwrap();
    assert_eq!(padded.model.vocab_size, 320);
    let error = padded.resolve_vocab(321, file).unwrap_err().to_string();
    assert_eq!(
        error,
        "a.toml: model.vocab_size: is 320, but the tokenizer has 321 tokens; allowed: at least 321, or leave it out"
    );
}

#[test]
fn what_decides_the_numbers_is_told_from_what_does_not() {
    let base = small(&[]);
    let free = small(&[
        "run.stop_at=9",
        "run.name=other",
        "evaluation.every=3",
        "checkpoint.every=1",
        "cluster.replication=2",
        "cluster.lease_ms=5",
        "compute.threads=2",
        "compute.device=cpu",
    ]);
    assert_eq!(base.numeric_differences(&free), []);
    assert_eq!(base.numeric_identity(), free.numeric_identity());
    for (set, field) in [
        ("run.seed=1", "run.seed"),
        ("run.steps=99", "run.steps"),
        ("model.width=32", "model.ffn_width"),
        ("batch.slots=2", "batch.slots"),
        ("optimizer.z_loss=0.1", "optimizer.z_loss"),
        ("compute.dtype=bfloat16", "compute.dtype"),
        ("cluster.block_params=9", "cluster.block_params"),
        ("data.context=8", "data.context"),
    ] {
        let other = small(&[set]);
        assert_eq!(base.numeric_differences(&other)[0].field, field);
        assert_ne!(base.numeric_identity(), other.numeric_identity(), "{set}");
    }
    let moved = small(&["data.train=[\"elsewhere.txt\"]"]);
    assert_eq!(
        base.numeric_identity(),
        moved.numeric_identity(),
        "the dataset's digest stands for it"
    );
    let difference = base.numeric_differences(&moved).remove(0);
    assert_eq!(
        (difference.known.as_str(), difference.given.as_str()),
        ("[\"*.txt\"]", "[\"elsewhere.txt\"]")
    );
}

fn example(name: &str, set: &[&str]) -> RunConfig {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(name);
    let set: Vec<String> = set.iter().map(|&change| change.into()).collect();
    RunConfig::read(&path, &set).unwrap()
}

#[test]
fn the_shakespeare_example_is_nanogpts_configuration() {
    let config = example("shakespeare-char.toml", &[]);
    let model = &config.model;
    assert_eq!(
        (model.architecture, model.norm, model.positions, model.mlp),
        (
            Architecture::Gpt2,
            Norm::Layer,
            Positions::Learned,
            Mlp::Gelu
        )
    );
    assert_eq!(
        (
            model.layers,
            model.heads,
            model.width,
            model.context,
            model.ffn_width
        ),
        (4, 4, 128, 64, 512)
    );
    assert!(model.tied_embeddings && !model.bias && model.dropout == 0.0);
    assert_eq!(
        (config.run.steps, config.batch.rows, config.context()),
        (2000, 12, 64)
    );
    let optimizer = config.optimizer();
    assert_eq!(
        (optimizer.betas, optimizer.weight_decay, optimizer.grad_clip),
        ([0.9, 0.99], 0.1, 1.0)
    );
    assert_eq!(
        (optimizer.warmup_steps, optimizer.schedule),
        (100, Schedule::Cosine)
    );
    assert_eq!(optimizer.learning_rate(Step(100)), 1e-3);
    assert_eq!(optimizer.learning_rate(Step(2000)), 1e-4);
    assert_eq!(
        (config.evaluation.every, config.evaluation.max_windows),
        (250, 0)
    );
    assert_eq!(config.data.held_out_fraction(), 0.1);
}

#[test]
fn the_demo_example_takes_its_text_from_overrides() {
    let config = example(
        "demo.toml",
        &["data.train=[\"/tmp/corpus\"]", "run.stop_at=40"],
    );
    assert_eq!(
        (config.data.train, config.run.stop_at),
        (vec!["/tmp/corpus".to_owned()], Some(40))
    );
}

#[test]
fn safeguards_are_off_unless_asked_for() {
    let config = small(&[]);
    assert_eq!(config.audit, AuditConfig { share: 0.0 });
    assert!(!config.chaos.allow);
    let asked = small(&["audit.share=0.02", "chaos.allow=true"]);
    assert_eq!(asked.audit.share, 0.02);
    assert!(asked.chaos.allow);
    assert_eq!(config.numeric_identity(), asked.numeric_identity());
}

#[test]
fn bad_safeguards_are_named() {
    assert_eq!(
        error("audit.share=1.5"),
        "audit.share: is 1.5; allowed: 0 (off) to 1"
    );
    let relaxed = parse(SMALL, &["audit.share=0.5", "run.determinism=relaxed"]).unwrap_err();
    assert!(relaxed.to_string().contains("audit.share"), "{relaxed}");
}

#[test]
fn a_policy_is_part_of_the_numbers_only_if_it_can_change_them() {
    let plain = small(&[]);
    let limited = small(&["policy.skip_limit=3", "policy.spike_sd=2"]);
    assert_eq!(plain.policy.losses(), LossPolicy::default());
    assert_eq!(plain.numeric_identity(), limited.numeric_identity());
    assert!(!plain.numeric_identity().contains("policy"));
    let skips = small(&["policy.loss_spike=skip"]);
    let others = small(&["policy.loss_spike=skip", "policy.spike_window=50"]);
    assert_ne!(plain.numeric_identity(), skips.numeric_identity());
    assert_eq!(
        skips.numeric_differences(&others)[0].field,
        "policy.spike_window"
    );
    let expected = LossPolicy {
        spike_sd: 6.0,
        window: 100,
    };
    assert_eq!(skips.policy.losses(), expected);
}

#[test]
fn bad_policies_are_named() {
    let unknown = error("policy.loss_spike=rollback");
    assert!(
        unknown.starts_with("policy.loss_spike: unknown value `rollback`; allowed: `off`"),
        "{unknown}"
    );
    assert!(error("policy.non_finite=ignore").starts_with("policy.non_finite: unknown value"));
    assert_eq!(
        error("policy.spike_sd=0"),
        "policy.spike_sd: is 0; allowed: a number above 0"
    );
    assert_eq!(
        error("policy.spike_window=1"),
        "policy.spike_window: is 1; allowed: 2 or more"
    );
}

#[test]
fn groups_are_named_by_patterns_and_the_first_one_counts() {
    let group = |patterns: &str, more: &str| {
        let text = format!(
            "optimizer.group=[{{parameters = {patterns}{more}}}, {{parameters = [\"*norm*\"]}}]"
        );
        [text]
    };
    let [fields] = group(
        "[\"model.embed_tokens.*\", \"model.layers.1.*\"]",
        ", lr_scale = 0.5",
    );
    let config = small(&["model.vocab_size=11", &fields]);
    let groups = config.parameters().into_iter();
    let grouped: Vec<(String, u8)> = groups.map(|it| (it.name, it.group)).collect();
    let of = |name: &str| {
        let found = grouped.iter().find(|(known, _)| known == name);
        found.unwrap().1
    };
    assert_eq!(of("model.embed_tokens.weight"), 1);
    assert_eq!(of("model.layers.1.input_layernorm.weight"), 1);
    assert_eq!(of("model.layers.0.input_layernorm.weight"), 2);
    assert_eq!(of("model.layers.0.mlp.up_proj.weight"), 0);
    assert_eq!(config.optimizer().group[0].lr_scale, 0.5);
    let again = RunConfig::parse(Path::new("run.toml"), &config.to_toml(), &[]).unwrap();
    assert_eq!(again.optimizer, config.optimizer);
    let differences = small(&["model.vocab_size=11"]).numeric_differences(&config);
    assert_eq!(differences[0].field, "optimizer.group");

    let [none] = group("[\"layers.7.*\"]", "");
    assert_eq!(
        error(&none),
        "optimizer.group.parameters: has \"layers.7.*\", which is none of the model's parameters; allowed: names such as \"model.norm.weight\", with `*` for anything"
    );
    let [wrong] = group("[\"a[\"]", "");
    assert!(
        error(&wrong).contains("has \"a[\", which is no pattern"),
        "{}",
        error(&wrong)
    );
    let [steep] = group("[\"*\"]", ", weight_decay = 1e4");
    assert!(error(&steep).starts_with("optimizer.group.weight_decay: is 10000; allowed: "));
}

#[test]
fn muon_moves_the_matrices_of_layers_alone() {
    let plain = small(&["model.vocab_size=11"]);
    let matrices = |config: &RunConfig, update| {
        let all = config.parameters().into_iter();
        let moved = all.filter(|parameter| parameter.update == update);
        moved.map(|parameter| parameter.name).collect::<Vec<_>>()
    };
    let tables = ["model.embed_tokens.weight", "lm_head.weight"];
    assert!(matrices(&plain, Update::Muon).is_empty());
    assert_eq!(matrices(&plain, Update::Decayed).len(), 2 * 7 + 2);
    let muon = small(&["model.vocab_size=11", "optimizer.muon.momentum=0.9"]);
    assert_eq!(matrices(&muon, Update::Muon).len(), 2 * 7);
    assert_eq!(matrices(&muon, Update::Decayed), tables);
    let optimizer = muon.optimizer().muon.unwrap();
    assert_eq!((optimizer.momentum, optimizer.rms), (0.9, 0.2));
    let layout = Layout::new(muon.parameters(), 1 << 20).unwrap();
    // Embedding, all matrices, output, norms.
    assert_eq!(layout.num_blocks(), 4);
    let layout = Layout::new(muon.parameters(), 1).unwrap();
    let whole = layout
        .blocks()
        .iter()
        .filter(|block| block.update == Update::Muon);
    assert_eq!(whole.count(), 2 * 7);
    let differences = plain.numeric_differences(&muon);
    let fields: Vec<_> = differences.iter().map(|it| it.field.as_str()).collect();
    assert_eq!(fields, ["optimizer.muon.momentum", "optimizer.muon.rms"]);
    assert_eq!(
        error("optimizer.muon.momentum=1"),
        "optimizer.muon.momentum: is 1; allowed: 0 or more, below 1"
    );
}

#[test]
fn fp8_needs_bfloat16_and_makes_another_run() {
    assert_eq!(
        error("compute.fp8=true"),
        "compute.fp8: is true; allowed: with compute.dtype = \"bfloat16\" only"
    );
    let plain = small(&["compute.dtype=bfloat16"]);
    let rounded = small(&["compute.dtype=bfloat16", "compute.fp8=true"]);
    assert!(!plain.numeric_identity().contains("fp8"));
    assert_eq!(plain.numeric_differences(&rounded)[0].field, "compute.fp8");
}

#[test]
fn a_batch_grows_by_stages() {
    let plain = small(&["batch.rows=16"]);
    let config = small(&[
        "batch.rows=16",
        "batch.ramp=[{ until = 10, rows = 4 }, { until = 20, rows = 8 }]",
    ]);
    let rows = [0, 9, 10, 19, 20].map(|step| config.batch.rows_at(step));
    assert_eq!(rows, [4, 4, 8, 8, plain.batch.rows]);
    assert!(!plain.numeric_identity().contains("ramp"));
    assert_eq!(plain.numeric_differences(&config)[0].field, "batch.ramp");
    assert_eq!(
        error("batch.ramp=[{ until = 9, rows = 6 }]"),
        "batch.ramp.rows: is 6; allowed: a multiple of batch.slots x batch.micro_batches = 4"
    );
    assert_eq!(
        error("batch.ramp=[{ until = 9, rows = 4 }, { until = 9, rows = 8 }]"),
        "batch.ramp.until: is 9; allowed: more than 9, where the stage before ends"
    );
}
