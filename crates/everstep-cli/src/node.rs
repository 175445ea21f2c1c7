//! `everstep node`: the agent of one machine of a cluster.

use std::sync::Arc;

use crate::args::NodeArgs;
use crate::{train, user};

pub(crate) fn run(args: NodeArgs) -> anyhow::Result<()> {
    if args.run.topology.is_none() {
        return Err(user(
            "--topology is needed: the node must be one of its nodes",
        ));
    }
    let run = Arc::new(train::prepare(&args.run, Some(&args.node), false)?);
    let run_dir = run.run_dir().clone();
    if train::supervise(&run, &run_dir, Some(&args.node))? {
        return Ok(());
    }
    anyhow::bail!("stopped before the run was over")
}
