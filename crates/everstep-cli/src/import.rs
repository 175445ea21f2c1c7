//! `everstep import`: a run file that trains on from a Hugging Face folder.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use everstep_data::Tokenizer;
use everstep_spec::hugging_face::WeightsFolder;
use everstep_train::RunConfig;
use toml::{Table, Value};

use crate::args::ImportArgs;
use crate::user;

/// Windows are no longer than this if the file is not changed: a model's own context may be beyond what a machine can hold.
const CONTEXT_MAX: usize = 1024;

pub(crate) fn run(args: ImportArgs) -> anyhow::Result<()> {
    let folder = WeightsFolder::open(&args.folder).map_err(user)?;
    let digest = folder.digest().map_err(user)?;
    let tokenizer_file = match &args.tokenizer {
        Some(path) => path.clone(),
        None => args.folder.join("tokenizer.json"),
    };
    let tokenizer = Tokenizer::open(&tokenizer_file).map_err(|error| {
        user(format!(
            "{error}; allowed: a tokenizer.json in the folder, or --tokenizer"
        ))
    })?;
    let model = folder.config();
    if tokenizer.vocab_size() > model.vocab_size {
        return Err(user(format!(
            "{}: has {} tokens; allowed: at most {}, the model's vocab_size",
            tokenizer_file.display(),
            tokenizer.vocab_size(),
            model.vocab_size
        )));
    }

    let mut model = Table::try_from(model)?;
    model.insert("init".into(), text(&absolute(&args.folder)?));
    model.insert("init_digest".into(), digest.clone().into());
    let context = folder.config().context.min(CONTEXT_MAX) as i64;
    let train: Vec<Value> = args
        .train
        .iter()
        .map(|path| Ok(text(&absolute(path)?)))
        .collect::<anyhow::Result<_>>()?;
    let data = Table::from_iter([
        ("train".into(), train.into()),
        ("context".into(), context.into()),
        (
            "tokenizer".into(),
            table([
                ("kind", "file".into()),
                ("path", text(&absolute(&tokenizer_file)?)),
            ]),
        ),
    ]);
    let run = Table::from_iter([
        (
            "run".into(),
            table([("name", name(&args.folder).into()), ("steps", 1000.into())]),
        ),
        ("model".into(), model.into()),
        ("data".into(), data.into()),
        (
            "batch".into(),
            table([("slots", 8.into()), ("rows", 8.into())]),
        ),
        (
            "optimizer".into(),
            table([("lr", 2e-5.into()), ("warmup_steps", 50.into())]),
        ),
    ]);
    let run_file = toml::to_string(&run)?;
    // What this command writes, `train` takes.
    RunConfig::parse(
        args.out.as_deref().unwrap_or(Path::new("import")),
        &run_file,
        &[],
    )
    .map_err(user)?;
    match &args.out {
        None => std::io::stdout().lock().write_all(run_file.as_bytes())?,
        Some(out) => fs::File::create_new(out)
            .and_then(|mut file| file.write_all(run_file.as_bytes()))
            .map_err(|error| user(format!("{}: cannot be written: {error}", out.display())))?,
    }
    eprintln!(
        "{}: {} parameters in {} files, {}, digest {digest}",
        args.folder.display(),
        folder.num_elements(),
        folder.num_files(),
        folder.dtype(),
    );
    Ok(())
}

fn table<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Table(
        fields
            .into_iter()
            .map(|(field, value)| (field.to_owned(), value))
            .collect(),
    )
}

/// A run file may lie anywhere, so it names what it needs by whole paths.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).map_err(|error| user(format!("{}: {error}", path.display())))
}

fn text(path: &Path) -> Value {
    path.to_string_lossy().into_owned().into()
}

/// The folder's name, as far as it can name a run.
fn name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = name
        .chars()
        .map(|c| if plain(c) { c } else { '-' })
        .take(100)
        .collect();
    match name.trim_start_matches('.') {
        "" => "imported".to_owned(),
        name => name.to_owned(),
    }
}
