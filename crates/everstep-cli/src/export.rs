//! `everstep export`: a committed step as a Hugging Face folder.

use std::collections::HashMap;
use std::fs;

use everstep_cluster::{RunContext, RunDir};
use safetensors::tensor::{Dtype, TensorView};

use crate::args::ExportArgs;
use crate::user;

pub(crate) fn run(args: ExportArgs) -> anyhow::Result<()> {
    let run = RunContext::open(&RunDir::new(&args.run_dir)).map_err(user)?;
    if args.out.exists() {
        return Err(user(format!(
            "{}: exists already; choose a folder that does not",
            args.out.display()
        )));
    }
    let config = everstep_model::hugging_face::to_json(&run.config.model, "float32")
        .map_err(|error| user(format!("model.{error}")))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let parameters = runtime.block_on(async {
        let store = run.open_store().map_err(user)?;
        let step = run.committed_step(&store, args.step).await.map_err(user)?;
        run.load_parameters(&store, step).await.map_err(user)
    })?;
    let bytes: Vec<u8> = parameters
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let layout = run.layout();
    let mut tensors = Vec::new();
    for (index, parameter) in layout.parameters().iter().enumerate() {
        let start = 4 * layout.offset(index);
        let data = &bytes[start..start + 4 * parameter.num_elements()];
        tensors.push((
            parameter.name.clone(),
            TensorView::new(Dtype::F32, parameter.shape.clone(), data)?,
        ));
    }
    // Tensors that Hugging Face's class has and ours leaves out because they are always zero.
    let zeros = everstep_model::hugging_face::zero_tensors(&run.config.model);
    let zero_bytes = vec![
        0;
        4 * zeros
            .iter()
            .map(everstep_optim::ParameterSpec::num_elements)
            .max()
            .unwrap_or(0)
    ];
    for parameter in &zeros {
        let data = &zero_bytes[..4 * parameter.num_elements()];
        tensors.push((
            parameter.name.clone(),
            TensorView::new(Dtype::F32, parameter.shape.clone(), data)?,
        ));
    }
    // Written beside its place and renamed, so that nothing half-written stays under the name.
    let temporary = args.out.with_extension("partial");
    fs::create_dir_all(&temporary)
        .map_err(|error| user(format!("{}: {error}", temporary.display())))?;
    fs::write(
        temporary.join("config.json"),
        serde_json::to_vec_pretty(&config)?,
    )?;
    fs::write(
        temporary.join("tokenizer.json"),
        run.dataset().tokenizer().json(),
    )?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(
        tensors,
        &Some(metadata),
        &temporary.join("model.safetensors"),
    )?;
    fs::rename(&temporary, &args.out)?;
    eprintln!("{}", args.out.display());
    Ok(())
}
