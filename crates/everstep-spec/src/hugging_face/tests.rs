use std::fs;

use everstep_optim::Init;

use super::*;
use crate::config::{
    ExpertsConfig, LatentConfig, LinearConfig, Llama3Config, Mlp, Positions, PredictionConfig,
    RopeScaling, YarnConfig,
};
use crate::spec::parameters;

fn small(architecture: Architecture) -> ModelConfig {
    let is_deepseek = architecture == Architecture::DeepseekV3;
    ModelConfig {
        vocab_size: 11,
        mla: is_deepseek.then_some(LatentConfig {
            q_lora_rank: None,
            kv_lora_rank: 6,
            qk_nope_head_dim: 4,
            qk_rope_head_dim: 2,
            v_head_dim: 3,
        }),
        moe: is_deepseek.then(|| ExpertsConfig::new(4, 2, 8)),
        mtp: is_deepseek.then(|| PredictionConfig::new(1)),
        ..ModelConfig::new(architecture, 2, 2, 8, 6)
    }
}

fn json_of(config: &ModelConfig) -> Value {
    to_json(config, TensorType::Float32, SpecialTokens::default()).unwrap()
}

/// Values that bfloat16 and float16 hold exactly.
fn value(index: usize) -> f32 {
    (index % 251) as f32 / 64.0 - 1.5
}

fn export(config: &ModelConfig, out: &Path, options: ExportOptions) {
    let tokenizer = ExportedTokenizer {
        json: b"{}",
        end_of_text: Some((3, "<|endoftext|>")),
    };
    write_folder(out, config, options, Some(tokenizer), |range, values| {
        values.extend(range.map(value));
        Ok(())
    })
    .unwrap();
}

fn shards_of(max_shard_bytes: u64, dtype: TensorType) -> ExportOptions {
    ExportOptions {
        dtype,
        max_shard_bytes,
    }
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, fs::read(path).unwrap())
    };
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(entry).collect();
    files.sort();
    files
}

#[test]
fn configurations_go_out_and_come_back() {
    let mut llama = ModelConfig {
        vocab_size: 99,
        kv_heads: 2,
        ..ModelConfig::new(Architecture::Llama, 2, 4, 64, 32)
    };
    llama.rope_theta = 500_000.0;
    let mut gpt2 = ModelConfig {
        vocab_size: 99,
        ..ModelConfig::new(Architecture::Gpt2, 2, 4, 64, 32)
    };
    let mut stretched = llama.clone();
    stretched.rope_scaling = Some(RopeScaling::Llama3(Llama3Config {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 16,
    }));
    let mut linear = llama.clone();
    linear.rope_scaling = Some(RopeScaling::Linear(LinearConfig { factor: 2.0 }));
    let deepseek = small(Architecture::DeepseekV3);
    let mut yarn = deepseek.clone();
    yarn.rope_scaling = Some(RopeScaling::Yarn(YarnConfig {
        factor: 40.0,
        original_context: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim: 0.0,
    }));
    for config in [llama, stretched, linear, gpt2.clone(), deepseek, yarn] {
        config.validate().unwrap();
        assert_eq!(from_json(&json_of(&config)).unwrap(), config);
    }
    gpt2.mlp = Mlp::GeluTanh;
    assert_eq!(json_of(&gpt2)["activation_function"], "gelu_new");
}

#[test]
fn a_gpt2_without_biases_is_exported_with_zeros() {
    let config = small(Architecture::Gpt2);
    assert!(zero_tensors(&config).is_empty());
    let bare = ModelConfig {
        bias: false,
        ..config.clone()
    };
    let zeros = zero_tensors(&bare);
    assert!(zeros.iter().all(|parameter| parameter.init == Init::Zeros));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    export(&bare, &out, ExportOptions::default());
    let folder = WeightsFolder::open(&out).unwrap();
    assert_eq!(*folder.config(), config);
    let mut values = Vec::new();
    folder.read(0..folder.num_elements(), &mut values).unwrap();
    let mut offset = 0;
    for parameter in parameters(&config) {
        let end = offset + parameter.num_elements();
        let is_zero = values[offset..end].iter().all(|&value| value == 0.0);
        assert_eq!(
            is_zero,
            parameter.name.ends_with(".bias"),
            "{}",
            parameter.name
        );
        offset = end;
    }
}

#[test]
fn what_has_no_counterpart_is_named() {
    let rope = ModelConfig {
        positions: Positions::Rope,
        ..small(Architecture::Gpt2)
    };
    let error = to_json(&rope, TensorType::Float32, SpecialTokens::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "positions=`rope` has no counterpart; allowed: learned"
    );
    let changed = |architecture, field: &str, value: Value| {
        let mut json = json_of(&small(architecture));
        json[field] = value;
        from_json(&json).unwrap_err().to_string()
    };
    for (field, value, says) in [
        (
            "model_type",
            json!("bert"),
            "model_type=`bert` has no counterpart; allowed: llama, gpt2, deepseek_v3",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "longrope"}),
            "rope_type=`longrope` has no counterpart; allowed: default, linear, llama3, yarn",
        ),
        (
            "rope_parameters",
            json!(7),
            "rope_parameters=`7` has no counterpart; allowed: an object",
        ),
        (
            "hidden_act",
            json!("relu"),
            "hidden_act=`relu` has no counterpart; allowed: silu",
        ),
        (
            "head_dim",
            json!(7),
            "head_dim=`7` has no counterpart; allowed: hidden_size / num_attention_heads",
        ),
        (
            "mlp_bias",
            json!(true),
            "mlp_bias=`true` has no counterpart; allowed: the value of attention_bias",
        ),
        (
            "num_hidden_layers",
            json!(null),
            "num_hidden_layers is missing; allowed: a whole number",
        ),
        (
            "num_hidden_layers",
            json!("2"),
            "num_hidden_layers=`\"2\"` has no counterpart; allowed: a whole number",
        ),
        (
            "quantization_config",
            json!({"bits": 4}),
            "quantization_config=`{\"bits\":4}` has no counterpart; allowed: nothing: weights that are not quantized",
        ),
    ] {
        assert_eq!(changed(Architecture::Llama, field, value), says);
    }
    for (field, value, says) in [
        (
            "add_cross_attention",
            json!(true),
            "add_cross_attention=`true` has no counterpart; allowed: false",
        ),
        (
            "scale_attn_weights",
            json!(false),
            "scale_attn_weights=`false` has no counterpart; allowed: true",
        ),
        (
            "activation_function",
            json!("relu"),
            "activation_function=`relu` has no counterpart; allowed: gelu, gelu_new, gelu_pytorch_tanh",
        ),
    ] {
        assert_eq!(changed(Architecture::Gpt2, field, value), says);
    }
    for (field, value, says) in [
        (
            "scoring_func",
            json!("softmax"),
            "scoring_func=`\"softmax\"` has no counterpart; allowed: sigmoid",
        ),
        (
            "n_group",
            json!(3),
            "moe.groups=`3` has no counterpart; allowed: a divisor of moe.experts=`4`",
        ),
        (
            "num_key_value_heads",
            json!(1),
            "kv_heads=`1` has no counterpart; allowed: heads=`2`, or leave it out",
        ),
        (
            "attention_bias",
            json!(true),
            "bias=`true` has no counterpart; allowed: false",
        ),
        (
            "kv_lora_rank",
            json!(null),
            "kv_lora_rank is missing; allowed: a whole number",
        ),
    ] {
        assert_eq!(changed(Architecture::DeepseekV3, field, value), says);
    }
}

#[test]
fn modules_for_multi_token_prediction_stand_behind_the_last_layer() {
    let with = small(Architecture::DeepseekV3);
    let without = ModelConfig {
        mtp: None,
        ..with.clone()
    };
    let is_own =
        |config: &ModelConfig, name: &str| matches!(role(config, name), Role::Parameter(_));
    for (name, of_both, of_one) in [
        ("model.layers.1.mlp.gate.weight", true, true),
        ("model.layers.2.eh_proj.weight", false, true),
        ("model.layers.2.embed_tokens.weight", false, false),
        ("model.layers.2.shared_head.head.weight", false, false),
        ("model.layers.3.eh_proj.weight", false, false),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", false, false),
    ] {
        assert_eq!(is_own(&without, name), of_both, "{name}");
        assert_eq!(is_own(&with, name), of_one, "{name}");
    }

    // A folder that speaks of modules and has none, as transformers writes it, is a model without.
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    export(&without, &out, shards_of(u64::MAX, TensorType::Float32));
    let file = out.join("config.json");
    let text = fs::read_to_string(&file).unwrap();
    let speaks = text.replace(
        "\"num_nextn_predict_layers\": 0",
        "\"num_nextn_predict_layers\": 1",
    );
    assert_ne!(text, speaks);
    fs::write(&file, speaks).unwrap();
    assert_eq!(WeightsFolder::open(&out).unwrap().config(), &without);
}

#[test]
fn folders_of_any_sharding_and_type_hold_the_same_weights() {
    for architecture in [
        Architecture::Llama,
        Architecture::Gpt2,
        Architecture::DeepseekV3,
    ] {
        let config = small(architecture);
        let dir = tempfile::tempdir().unwrap();
        let mut digests = Vec::new();
        for (index, (max_shard_bytes, dtype)) in [
            (u64::MAX, TensorType::Float32),
            (1000, TensorType::Float32),
            (0, TensorType::Bfloat16),
            (1000, TensorType::Float16),
        ]
        .into_iter()
        .enumerate()
        {
            let out = dir.path().join(index.to_string());
            export(&config, &out, shards_of(max_shard_bytes, dtype));
            let folder = WeightsFolder::open(&out).unwrap();
            assert_eq!((folder.config(), folder.dtype()), (&config, dtype));
            let tensors = parameters(&config).len();
            match max_shard_bytes {
                0 => assert_eq!(folder.num_files(), tensors),
                1000 => assert!((2..tensors).contains(&folder.num_files())),
                _ => assert_eq!(folder.num_files(), 1),
            }
            let mut all = Vec::new();
            folder.read(0..folder.num_elements(), &mut all).unwrap();
            assert!(
                all.iter()
                    .enumerate()
                    .all(|(index, &read)| read == value(index))
            );
            // Ranges that begin and end inside of tensors.
            let mut parts = Vec::new();
            for start in (0..all.len()).step_by(97) {
                folder
                    .read(start..all.len().min(start + 97), &mut parts)
                    .unwrap();
            }
            assert_eq!(parts, all);
            digests.push(folder.digest().unwrap());

            // And out again: the same bytes.
            let again = dir.path().join(format!("{index}-again"));
            let tokenizer = ExportedTokenizer {
                json: b"{}",
                end_of_text: Some((3, "<|endoftext|>")),
            };
            let options = shards_of(max_shard_bytes, folder.dtype());
            write_folder(
                &again,
                folder.config(),
                options,
                Some(tokenizer),
                |range, values| folder.read(range, values),
            )
            .unwrap();
            assert_eq!(files(&out), files(&again));
        }
        digests.dedup();
        assert_eq!(digests.len(), 1, "{digests:?}");
    }
}

#[test]
fn an_export_takes_no_ones_place_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(Architecture::Llama);
    let out = dir.path().join("out");
    let write = |dtype, value: f32| {
        write_folder(
            &out,
            &config,
            shards_of(u64::MAX, dtype),
            None,
            |range, values| {
                values.extend(range.map(|_| value));
                Ok(())
            },
        )
    };
    let error = write(TensorType::Float16, 1e5).unwrap_err().to_string();
    assert!(
        error.ends_with("lm_head.weight: 1e5 is too large for float16; allowed: --dtype float32"),
        "{error}"
    );
    assert_eq!(files(dir.path()), []);
    // An empty folder is no one's, and what a killed export left is in nobody's way.
    fs::create_dir(&out).unwrap();
    fs::create_dir(dir.path().join(".out.partial")).unwrap();
    write(TensorType::Float16, 1.0).unwrap();
    let before = files(&out);
    assert_eq!(
        write(TensorType::Float32, 2.0).unwrap_err().to_string(),
        format!(
            "{}: is in the way; allowed: a folder that does not exist or is empty",
            out.display()
        )
    );
    assert_eq!(files(&out), before);
    assert!(!dir.path().join(".out.partial").exists());
}

/// A sharded folder of a small model, to be damaged.
struct Damaged {
    dir: tempfile::TempDir,
}

impl Damaged {
    fn new(architecture: Architecture) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = shards_of(1000, TensorType::Float32);
        export(&small(architecture), &dir.path().join("f"), options);
        Self { dir }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join("f").join(file)
    }

    /// The file that holds a tensor.
    fn file_of(&self, tensor: &str) -> String {
        let index: Value = serde_json::from_slice(&fs::read(self.path(INDEX)).unwrap()).unwrap();
        index["weight_map"][tensor].as_str().unwrap().to_owned()
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        change(&mut json);
        fs::write(self.path(file), json.to_string()).unwrap();
    }

    /// Replaces the header of a file.
    fn edit_header(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let bytes = fs::read(self.path(file)).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut json = serde_json::from_slice(&bytes[8..end]).unwrap();
        change(&mut json);
        let text = json.to_string();
        let length = (text.len() as u64).to_le_bytes();
        fs::write(
            self.path(file),
            [&length, text.as_bytes(), &bytes[end..]].concat(),
        )
        .unwrap();
    }

    /// The error, behind the name of the folder.
    fn error(&self) -> String {
        let error = match WeightsFolder::open(&self.path("")) {
            Ok(folder) => folder.digest().unwrap_err(),
            Err(error) => error,
        };
        let text = error.to_string();
        let folder = format!("{}", self.dir.path().join("f").display());
        assert_eq!(text.lines().count(), 1, "{text}");
        text.strip_prefix(&folder).unwrap_or(&text).to_owned()
    }
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn damaged_folders_are_refused_with_file_and_field() {
    let output = "lm_head.weight";
    let files = Damaged::new(Architecture::Llama);
    let first = &*files.file_of(output);
    let fifth = files.file_of("model.layers.1.input_layernorm.weight");
    let embedding = files.file_of("model.embed_tokens.weight");
    let case = |damage: &dyn Fn(&Damaged), says: &str| {
        let damaged = Damaged::new(Architecture::Llama);
        damage(&damaged);
        let error = damaged.error();
        let says = says.replace("FIRST", first).replace("FIFTH", &fifth);
        let says = says.replace("EMBEDDING", &embedding);
        assert!(error.starts_with(&says), "{error}\n{says}");
    };
    case(
        &|d| fs::remove_file(d.path("config.json")).unwrap(),
        "/config.json: cannot be read: ",
    );
    case(
        &|d| fs::write(d.path("config.json"), "[").unwrap(),
        "/config.json: is not JSON: ",
    );
    case(
        &|d| fs::write(d.path("config.json"), "[]").unwrap(),
        "/config.json: is not a JSON object",
    );
    case(
        &|d| d.edit("config.json", |json| json["num_hidden_layers"] = json!(3)),
        "/: no file of it holds the tensor model.layers.2.self_attn.q_proj.weight; allowed: all tensors",
    );
    case(
        &|d| d.edit("config.json", |json| json["num_hidden_layers"] = json!(1)),
        "/FIFTH: model.layers.1.input_layernorm.weight: the model that config.json describes has no such tensor",
    );
    case(
        &|d| d.edit("config.json", |json| json["vocab_size"] = json!(12)),
        "/EMBEDDING: model.embed_tokens.weight: shape is [11, 8]; allowed: [12, 8], as config.json says",
    );
    case(
        &|d| fs::remove_file(d.path(INDEX)).unwrap(),
        "/model.safetensors: cannot be read: No such file or directory (os error 2); allowed: model.safetensors, or model.safetensors.index.json",
    );
    case(
        &|d| fs::remove_file(d.path(first)).unwrap(),
        "/model.safetensors.index.json: weight_map.lm_head.weight: names FIRST, which is not there",
    );
    case(
        &|d| {
            d.edit(INDEX, |json| {
                json["weight_map"]["lm_head.weight"] = json!("../x")
            })
        },
        "/model.safetensors.index.json: weight_map.lm_head.weight: is \"../x\"; allowed: the name of a file beside it",
    );
    case(
        &|d| d.edit(INDEX, |json| json["weight_map"] = json!({})),
        "/model.safetensors.index.json: weight_map: names no tensor",
    );
    case(
        &|d| d.edit(INDEX, |json| json["weight_map"]["x"] = json!(first)),
        "/FIRST: has no tensor x; allowed: what model.safetensors.index.json says",
    );
    case(
        &|d| {
            d.edit(INDEX, |json| {
                drop(
                    json["weight_map"]
                        .as_object_mut()
                        .unwrap()
                        .remove("lm_head.weight"),
                )
            })
        },
        "/FIRST: lm_head.weight: model.safetensors.index.json does not name it",
    );
    case(
        &|d| d.edit_header(first, |json| json["lm_head.weight"]["dtype"] = json!("I8")),
        "/FIRST: lm_head.weight: dtype is `I8`; allowed: F32, BF16, F16",
    );
    case(
        &|d| {
            d.edit_header(first, |json| {
                json["lm_head.weight"]["shape"] = json!([u64::MAX, 8])
            })
        },
        "/FIRST: lm_head.weight: shape is [18446744073709551615, 8]; allowed: fewer",
    );
    case(
        &|d| {
            d.edit_header(first, |json| {
                json["lm_head.weight"]["shape"] = json!([10, 8])
            })
        },
        "/FIRST: lm_head.weight: data_offsets are 0 and 352; allowed: 320 bytes",
    );
    case(
        &|d| {
            d.edit_header(first, |json| {
                json["lm_head.weight"]["data_offsets"] = json!([4, 356])
            })
        },
        "/FIRST: a tensor starts at byte 4 of the data and the one before it ends at 0",
    );
}

#[test]
fn every_truncation_is_found() {
    let damaged = Damaged::new(Architecture::Gpt2);
    let file = damaged.file_of("transformer.wte.weight");
    let whole = fs::read(damaged.path(&file)).unwrap();
    for len in 0..whole.len() {
        fs::write(damaged.path(&file), &whole[..len]).unwrap();
        let error = damaged.error();
        assert!(error.starts_with(&format!("/{file}: ")), "{len}: {error}");
    }
    fs::write(damaged.path(&file), [&whole[..], &[0]].concat()).unwrap();
    assert!(
        damaged.error().contains("but its header speaks of"),
        "{}",
        damaged.error()
    );
    fs::write(damaged.path(&file), &whole).unwrap();
    WeightsFolder::open(&damaged.path("")).unwrap();
}

#[test]
fn values_that_are_no_numbers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("f");
    write_folder(
        &out,
        &small(Architecture::Llama),
        ExportOptions::default(),
        None,
        |range, values| {
            values.extend(range.map(|index| if index == 90 { f32::NAN } else { 1.0 }));
            Ok(())
        },
    )
    .unwrap();
    let error = WeightsFolder::open(&out).unwrap().digest().unwrap_err();
    assert_eq!(
        error.reason,
        "model.layers.0.self_attn.q_proj.weight: element 2 is NaN; allowed: finite numbers"
    );
}

/// The published GPT-2 has no prefix, brings its causal mask and, by some writers, the output matrix that is tied.
#[test]
fn other_writers_names_and_extras_are_understood() {
    let config = small(Architecture::Gpt2);
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = (dir.path().join("own"), dir.path().join("other"));
    export(&config, &own, ExportOptions::default());
    let expected = WeightsFolder::open(&own).unwrap().digest().unwrap();

    fs::create_dir(&other).unwrap();
    fs::copy(own.join("config.json"), other.join("config.json")).unwrap();
    let write = |head: f32| {
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        let mut offset = 0;
        for parameter in parameters(&config) {
            let name = parameter
                .name
                .strip_prefix("transformer.")
                .unwrap()
                .to_owned();
            let values = (offset..offset + parameter.num_elements())
                .map(value)
                .collect();
            offset += parameter.num_elements();
            tensors.push((name, parameter.shape, values));
        }
        let mut output = tensors[0].2.clone();
        output[5] += head;
        tensors.push(("h.0.attn.bias".into(), vec![1, 1, 6, 6], vec![1.0; 36]));
        tensors.push(("lm_head.weight".into(), vec![11, 8], output));
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let described = tensors
            .iter()
            .map(|(name, shape, _)| (name.as_str(), shape.as_slice()));
        let mut bytes = header::write(described, TensorType::Float32);
        for (_, _, values) in &tensors {
            TensorType::Float32.encode(values, &mut bytes).unwrap();
        }
        fs::write(other.join("model.safetensors"), bytes).unwrap();
    };
    write(0.0);
    assert_eq!(
        WeightsFolder::open(&other).unwrap().digest().unwrap(),
        expected
    );
    write(1.0);
    assert_eq!(
        WeightsFolder::open(&other).unwrap_err().reason,
        "lm_head.weight: differs from transformer.wte.weight; allowed: the same values, since config.json says tie_word_embeddings"
    );
}

/// What we write is what the safetensors crate reads.
#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let config = small(Architecture::Llama);
    let dir = tempfile::tempdir().unwrap();
    export(&config, &dir.path().join("f"), ExportOptions::default());
    let bytes = fs::read(dir.path().join("f/model.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut offset = 0;
    for parameter in parameters(&config) {
        let tensor = read.tensor(&parameter.name).unwrap();
        assert_eq!(tensor.shape(), parameter.shape);
        let expected: Vec<u8> = (offset..offset + parameter.num_elements())
            .flat_map(|index| value(index).to_le_bytes())
            .collect();
        assert_eq!(tensor.data(), expected, "{}", parameter.name);
        offset += parameter.num_elements();
    }
    assert_eq!(read.names().len(), parameters(&config).len());
}
