//! `everstep digest`.

use std::io::Write as _;

use everstep_cluster::{RunContext, RunDir};

use crate::args::DigestArgs;
use crate::user;

pub(crate) fn run(args: DigestArgs) -> anyhow::Result<()> {
    let run = RunContext::open(&RunDir::new(&args.run.run_dir)).map_err(user)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (step, digest) = runtime.block_on(async {
        let store = run.open_store().map_err(user)?;
        let step = run.committed_step(&store, args.step).await.map_err(user)?;
        anyhow::Ok((step, store.digest(step).await.map_err(user)?))
    })?;
    let (parameters, optimizer) = (digest.parameters.to_string(), digest.optimizer.to_string());
    let mut out = std::io::stdout().lock();
    if args.run.json {
        writeln!(
            out,
            "{}",
            serde_json::json!({ "step": step, "parameters": parameters, "optimizer": optimizer })
        )?;
    } else {
        writeln!(
            out,
            "step        {step}\nparameters  {parameters}\noptimizer   {optimizer}"
        )?;
    }
    Ok(())
}
