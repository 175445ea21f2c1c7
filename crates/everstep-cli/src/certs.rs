//! `everstep certs`: the cluster's authority and a certificate for each process.

use everstep_cluster::Topology;
use everstep_transport::ClusterCa;

use crate::args::CertsArgs;
use crate::user;

pub(crate) fn run(args: CertsArgs) -> anyhow::Result<()> {
    let topology = Topology::read(&args.topology).map_err(user)?;
    let ca = ClusterCa::load_or_create(&args.out).map_err(user)?;
    for process in &topology.processes {
        ca.issue(&process.name, &args.out).map_err(user)?;
    }
    everstep_cluster::make_session_secret(&args.out)
        .map_err(|error| user(format!("{}: {error}", args.out.display())))?;
    eprintln!(
        "{} certificates in {}; keep ca.key off the nodes",
        topology.processes.len(),
        args.out.display()
    );
    Ok(())
}
