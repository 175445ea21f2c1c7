//! `everstep drain`.

use std::fs;

use everstep_cluster::control::{self, Reply, Request};
use everstep_cluster::{RunDir, Topology};

use crate::args::DrainArgs;
use crate::user;

pub(crate) fn run(args: DrainArgs) -> anyhow::Result<()> {
    let run_dir = RunDir::new(&args.run_dir);
    let file = run_dir.topology();
    let missing = |error: &dyn std::fmt::Display| user(format!("{}: {error}", file.display()));
    let topology: Topology =
        serde_json::from_slice(&fs::read(&file).map_err(|error| missing(&error))?)
            .map_err(|error| missing(&error))?;
    let mut nodes = topology.nodes();
    if !nodes.contains(&args.node) {
        return Err(user(format!(
            "there is no node {}; nodes are: {}",
            args.node,
            nodes.join(", ")
        )));
    }
    // Any agent can pass it on; the node's own may be on another machine.
    nodes.sort_by_key(|node| *node != args.node);
    let request = Request::Drain {
        node: args.node.clone(),
        seconds_left: args.seconds_left,
    };
    let mut complaint = None;
    for node in &nodes {
        match control::send(&run_dir, node, &request) {
            Ok(Reply::Done) => {
                eprintln!("node {} is being drained", args.node);
                return Ok(());
            }
            Ok(Reply::Refused { message }) => return Err(user(message)),
            Err(error) => {
                complaint.get_or_insert(error);
            }
        }
    }
    let complaint = complaint.map_or_else(String::new, |error| error.to_string());
    Err(user(complaint))
}
