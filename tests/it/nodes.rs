//! Two nodes with an agent and a run directory each, certificates from `everstep certs`, and one store: as on two machines.

use std::net::{Ipv4Addr, UdpSocket};

use everstep_cluster::free_port;

use crate::machines::{self, Machine, run_dir};
use crate::support::Workbench;

const A: Machine = Machine {
    name: "a",
    host: "127.0.0.1",
    processes: &[("coordinator", "coordinator"), ("shard-a", "shard")],
    more: "",
};
const B: Machine = Machine {
    name: "b",
    host: "127.0.0.1",
    processes: &[
        ("loader", "loader"),
        ("shard-b", "shard"),
        ("worker", "worker"),
    ],
    more: "",
};

#[test]
fn two_agents_train_one_run() {
    let bench = Workbench::new();
    // Held until all are chosen, so that they differ.
    let sockets: Vec<UdpSocket> = (0..5)
        .map(|_| free_port(Ipv4Addr::LOCALHOST.into()).unwrap())
        .collect();
    let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
    let ports: Vec<u16> = sockets.iter().map(port).collect();
    drop(sockets);
    let topology = machines::prepare(&bench, &[A, B], &ports);
    let agents = ["a", "b"].map(|node| machines::start(&bench, &topology, node, &[], &[]));
    for (agent, node) in agents.into_iter().zip(["a", "b"]) {
        agent.finish(&bench, &run_dir(node));
    }
    bench.demand_undisturbed(&run_dir("a"));
}
