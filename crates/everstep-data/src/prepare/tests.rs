use std::path::PathBuf;

use super::*;
use crate::batch::IGNORED;
use crate::config::TokenizerConfig;
use crate::manifest::entropy;

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self { dir }
    }

    fn base(&self) -> &Path {
        self.dir.path()
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out/dataset")
    }

    fn error(&self, config: &DataConfig) -> String {
        let error = prepare(config, self.base(), &self.out())
            .unwrap_err()
            .to_string();
        let left = std::fs::read_dir(self.dir.path().join("out"))
            .map(|entries| entries.count())
            .unwrap_or(0);
        assert_eq!(left, 0, "something was left behind");
        error
    }
}

fn config(train: &[&str], kind: TokenizerKind) -> DataConfig {
    DataConfig::new(
        train.iter().map(|&pattern| pattern.into()).collect(),
        TokenizerConfig::new(kind),
    )
}

fn prose(lines: usize) -> String {
    (0..lines)
        .map(|i| {
            format!(
                "Line {i} of the tale, where {} foxes met {} hares.\n",
                i * 7 % 11,
                i * 5 % 13
            )
        })
        .collect()
}

#[test]
fn a_character_dataset_holds_the_text_itself() {
    let text: String = prose(40);
    let case = Case::new(&[("tale.txt", &text)]);
    let dataset = open_or_prepare(
        &config(&["tale.txt"], TokenizerKind::Char),
        case.base(),
        &case.out(),
    )
    .unwrap();
    let cut = (text.len() as f64 * 0.9) as usize;
    let decode = |split, count| {
        dataset
            .tokenizer()
            .decode(&dataset.read(split, 0, count).unwrap())
            .unwrap()
    };
    assert_eq!(decode(Split::Train, usize::MAX), text[..cut]);
    assert_eq!(decode(Split::Validation, usize::MAX), text[cut..]);
    let manifest = dataset.manifest();
    assert_eq!(
        (manifest.train.tokens, manifest.train.documents),
        (cut as u64, 1)
    );
    let mut counts = vec![0; dataset.vocab_size()];
    dataset
        .read(Split::Train, 0, usize::MAX)
        .unwrap()
        .iter()
        .for_each(|&token| counts[token as usize] += 1);
    assert_eq!(manifest.unigram_entropy, entropy(&counts));
    assert_eq!(manifest.bytes_per_token(), 1.0);
    dataset.verify().unwrap();
}

#[test]
fn batches_are_windows_of_the_text_and_their_targets_are_one_ahead() {
    let text = prose(60);
    let case = Case::new(&[("tale.txt", &text)]);
    let dataset = open_or_prepare(
        &config(&["tale.txt"], TokenizerKind::Byte),
        case.base(),
        &case.out(),
    )
    .unwrap();
    let order = dataset.order(5, 16, 3, 2).unwrap();
    for (step, slot) in [(0, 0), (4, 2), (900, 1)] {
        let batch = dataset.batch(&order, None, step, slot).unwrap();
        assert_eq!((batch.rows, batch.columns, batch.inputs.len()), (2, 16, 32));
        for (row, sample) in order.samples(step, slot).iter().enumerate() {
            let start = sample.start as usize;
            let expected: Vec<i64> = text.as_bytes()[start..start + 17]
                .iter()
                .map(|&byte| byte.into())
                .collect();
            assert_eq!(batch.inputs[row * 16..][..16], expected[..16]);
            assert_eq!(batch.targets[row * 16..][..16], expected[1..]);
        }
    }
    let windows = dataset.validation_windows(16, 0);
    let tail = &text.as_bytes()[(text.len() as f64 * 0.9) as usize..];
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for chunk in 0..windows.chunks(4) {
        let batch = dataset.validation_chunk(&windows, chunk, 4).unwrap();
        assert_eq!(batch.inputs.len(), batch.rows * batch.columns);
        inputs.extend(batch.inputs);
        targets.extend(
            batch
                .targets
                .iter()
                .copied()
                .filter(|&target| target != IGNORED),
        );
    }
    assert_eq!(
        targets,
        tail[1..]
            .iter()
            .map(|&byte| i64::from(byte))
            .collect::<Vec<_>>()
    );
    assert_eq!(inputs.len() as u64, windows.len() * 16);
    assert_eq!(
        dataset
            .validation_chunk(&windows, windows.chunks(4), 4)
            .unwrap()
            .rows,
        0
    );
}

#[test]
fn a_bpe_dataset_separates_documents_and_is_equal_on_any_number_of_threads() {
    let long = prose(4000);
    let files: Vec<(String, String)> = (0..9)
        .map(|i| (format!("d/{i}.md"), prose(10 + i)))
        .collect();
    let mut listed: Vec<(&str, &str)> = files
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()))
        .collect();
    listed.push(("long.txt", &long));
    listed.push((
        "lines.jsonl",
        "{\"text\":\"first\"}\n{\"text\":\"second\"}\n",
    ));
    let case = Case::new(&listed);
    let mut config = config(&["d/*.md", "long.txt"], TokenizerKind::Bpe);
    config.validation = vec!["*.jsonl".into()];
    config.tokenizer.vocab_size = Some(400);
    let made: Vec<DatasetManifest> = [1, 3]
        .iter()
        .map(|&threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| prepare(&config, case.base(), &case.out()).unwrap())
        })
        .collect();
    assert_eq!(made[0], made[1]);
    let dataset = Dataset::open(&case.out()).unwrap();
    let eot = dataset.tokenizer().eot().unwrap();
    let train = dataset.read(Split::Train, 0, usize::MAX).unwrap();
    assert_eq!(train.iter().filter(|&&token| token == eot).count(), 10);
    let texts: Vec<String> = train
        .split(|&token| token == eot)
        .map(|tokens| dataset.tokenizer().decode(tokens).unwrap())
        .collect();
    assert_eq!(texts[3], files[3].1);
    assert_eq!(texts[9], long);
    // Tokens of a long text do not depend on where it was cut for the threads.
    assert!(long.len() > 2 * CHUNK_BYTES);
    let whole = dataset.tokenizer().encode(&long).unwrap();
    assert!(train.ends_with(&[whole, vec![eot]].concat()));
    assert_eq!(dataset.manifest().validation.documents, 2);
    assert!(dataset.manifest().bytes_per_token() > 1.5);
}

#[test]
fn a_matching_folder_is_reused_and_any_other_is_made_again() {
    let case = Case::new(&[("a.txt", &prose(30))]);
    let mut config = config(&["a.txt"], TokenizerKind::Char);
    let digest = |config: &DataConfig| {
        open_or_prepare(config, case.base(), &case.out())
            .unwrap()
            .manifest()
            .digest
            .clone()
    };
    let modified = || {
        std::fs::metadata(case.out().join(MANIFEST_FILE))
            .unwrap()
            .modified()
            .unwrap()
    };
    let (first, made) = (digest(&config), modified());
    config.context = Some(8);
    assert_eq!((digest(&config), modified()), (first.clone(), made));

    let shard = case.out().join("train-00000.tokens");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    assert!(Dataset::open(&case.out()).unwrap().verify().is_err());
    assert_eq!(digest(&config), first, "a damaged folder is repaired");
    Dataset::open(&case.out()).unwrap().verify().unwrap();

    std::fs::write(case.base().join("a.txt"), prose(31)).unwrap();
    assert_ne!(digest(&config), first);
    let names: Vec<_> = std::fs::read_dir(case.dir.path().join("out"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["dataset"], "nothing temporary is left");
}

#[test]
fn an_existing_tokenizer_is_used_as_it_is() {
    let case = Case::new(&[("a.txt", &prose(80)), ("b.txt", &prose(7))]);
    let made = open_or_prepare(
        &config(&["a.txt"], TokenizerKind::Bpe),
        case.base(),
        &case.out(),
    )
    .unwrap();
    let path = case.base().join("given.json");
    std::fs::write(&path, made.tokenizer().json()).unwrap();
    let mut config = config(&["b.txt"], TokenizerKind::File);
    config.tokenizer.path = Some("given.json".into());
    let other = open_or_prepare(&config, case.base(), &case.base().join("other")).unwrap();
    assert_eq!(other.tokenizer().digest(), made.tokenizer().digest());
    std::fs::write(&path, "{}").unwrap();
    assert!(
        case.error_of(&config)
            .contains("given.json`: is not a tokenizer.json")
    );
}

impl Case {
    fn error_of(&self, config: &DataConfig) -> String {
        prepare(config, self.base(), &self.base().join("fresh"))
            .unwrap_err()
            .to_string()
    }
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    let case = Case::new(&[
        ("empty.txt", ""),
        ("tiny.txt", "abcdefgh"),
        ("bad.jsonl", "{\"text\":\"a\"}\n{\n"),
    ]);
    std::fs::write(case.base().join("raw.bin"), [b'\n', 0xff, 0xfe]).unwrap();
    assert!(
        case.error(&config(&["no/*.txt"], TokenizerKind::Bpe))
            .starts_with("data.train: no file matches `no/*.txt`")
    );
    assert_eq!(
        case.error(&config(&["empty*", "empty.txt"], TokenizerKind::Bpe)),
        "data.train: the 1 files that `empty* empty.txt` matches hold no text"
    );
    assert!(
        case.error(&config(&["raw.bin"], TokenizerKind::Byte))
            .contains("raw.bin`:2: is not UTF-8 text")
    );
    assert!(
        case.error(&config(&["bad.jsonl"], TokenizerKind::Byte))
            .contains("bad.jsonl`:2: needs a JSON object")
    );
    let mut both = config(&["tiny.txt"], TokenizerKind::Byte);
    both.validation = vec!["*.txt".into()];
    assert!(
        case.error(&both)
            .contains("data.validation: names `tiny.txt`, which data.train names too")
    );
    both.validation = vec!["empty.txt".into()];
    assert!(
        case.error(&both)
            .starts_with("data.validation: the 1 files")
    );
    let mut long = config(&["tiny.txt"], TokenizerKind::Byte);
    long.context = Some(7);
    assert!(
        case.error(&long)
            .contains("the training text has only 7; allowed here: 1 to 6")
    );
}

#[test]
fn a_target_that_cannot_be_written_or_is_not_ours_is_refused() {
    let case = Case::new(&[("a.txt", &prose(9)), ("mine/thesis.txt", "precious")]);
    let config = config(&["a.txt"], TokenizerKind::Byte);
    let into = |out: &str| {
        prepare(&config, case.base(), &case.base().join(out))
            .unwrap_err()
            .to_string()
    };
    assert!(
        into("a.txt/dataset").starts_with("cannot create `"),
        "{}",
        into("a.txt/dataset")
    );
    assert!(into("mine").contains("mine`: is in the way; allowed: a new or empty folder"));
    assert!(into("a.txt").contains("is in the way"));
    assert!(case.base().join("mine/thesis.txt").exists());
}
