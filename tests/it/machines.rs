//! Nodes as on machines of their own: each with an agent, a run directory and certificates, all with one store.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::support::{Running, Workbench, everstep};

/// A node to be, and what runs on it.
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    /// Address of its processes.
    pub(crate) host: &'static str,
    /// Names and roles of its processes; a port each is added to `first_port`.
    pub(crate) processes: &'static [(&'static str, &'static str)],
    /// More lines of its part of the topology file.
    pub(crate) more: &'static str,
}

/// Writes the topology of these machines, with every block on two shards, and certificates. Of `ports` each process gets one.
pub(crate) fn prepare(bench: &Workbench, machines: &[Machine], ports: &[u16]) -> PathBuf {
    let mut topology = String::new();
    for Machine {
        name, host, more, ..
    } in machines
    {
        writeln!(
            topology,
            "[[node]]\nname = \"{name}\"\nhost = \"{host}\"\n{more}"
        )
        .unwrap();
    }
    let processes = machines.iter().flat_map(|machine| {
        let processes = machine.processes.iter();
        processes.map(|(process, role)| (machine.name, *process, *role))
    });
    for ((node, process, role), port) in processes.zip(ports) {
        writeln!(
            topology,
            "[[process]]\nname = \"{process}\"\nnode = \"{node}\"\nroles = [\"{role}\"]\nport = {port}\n"
        )
        .unwrap();
    }
    topology += "[cluster]\nreplication = 2\n";
    let file = bench.path().join("machines.toml");
    fs::write(&file, topology).unwrap();
    let made = everstep()
        .arg("certs")
        .arg("--topology")
        .arg(&file)
        .arg("--out")
        .arg(bench.path().join("certs"))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{error}");
    file
}

/// Where the agent of a node works.
pub(crate) fn run_dir(node: &str) -> String {
    format!("node-{node}")
}

/// Starts the agent of a node; `within` is what its command line is the end of, and `arguments` are added to it.
pub(crate) fn start(
    bench: &Workbench,
    topology: &PathBuf,
    node: &str,
    within: &[String],
    arguments: &[String],
) -> Running {
    let run_dir = bench.path().join(run_dir(node));
    let tls = run_dir.join("tls");
    fs::create_dir_all(&tls).unwrap();
    for entry in fs::read_dir(bench.path().join("certs")).unwrap().flatten() {
        if entry.file_name() != "ca.key" {
            fs::copy(entry.path(), tls.join(entry.file_name())).unwrap();
        }
    }
    let agent = everstep();
    let mut command = match within.split_first() {
        Some((program, rest)) => {
            let mut command = Command::new(program);
            command.args(rest).arg(agent.get_program());
            for (name, value) in agent.get_envs() {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            command
        }
        None => agent,
    };
    let store = bench.path().join("store");
    command
        .arg("node")
        .arg(bench.run_file())
        .arg("--topology")
        .arg(topology)
        .args(["--node", node])
        .arg("--run-dir")
        .arg(&run_dir)
        .args(["--set", "chaos.allow=true"])
        .args([
            "--set",
            &format!("run.store=\"file://{}\"", store.display()),
        ])
        .args(arguments);
    bench.start_node(node, command)
}
