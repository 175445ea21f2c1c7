//! `everstep export`: a committed step as a Hugging Face folder.

use everstep_cluster::{RunContext, RunDir};
use everstep_spec::hugging_face::{ExportOptions, ExportedTokenizer, TensorType, write_folder};

use crate::args::{ExportArgs, ExportDtype};
use crate::{trained, user};

pub(crate) fn run(args: ExportArgs) -> anyhow::Result<()> {
    let run = RunContext::open(&RunDir::new(&args.run_dir)).map_err(user)?;
    let parameters = trained::parameters(&run, args.step, args.ema)?;
    let tokenizer = run.dataset().tokenizer();
    let tokenizer = ExportedTokenizer {
        json: tokenizer.json(),
        end_of_text: tokenizer.end_of_text(),
    };
    let options = ExportOptions {
        dtype: match args.dtype {
            ExportDtype::Float32 => TensorType::Float32,
            ExportDtype::Bfloat16 => TensorType::Bfloat16,
            ExportDtype::Float16 => TensorType::Float16,
        },
        max_shard_bytes: args.max_shard_bytes,
    };
    let config = &run.config.model;
    write_folder(
        &args.out,
        config,
        options,
        Some(tokenizer),
        |range, values| {
            values.extend_from_slice(&parameters[range]);
            Ok(())
        },
    )
    .map_err(user)?;
    eprintln!("{}", args.out.display());
    Ok(())
}
