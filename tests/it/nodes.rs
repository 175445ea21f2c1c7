//! Two nodes with an agent and a run directory each, certificates from `everstep certs`, and one store: as on two machines.

use std::fs;
use std::net::UdpSocket;
use std::process::Stdio;

use crate::support::{Workbench, everstep};

#[test]
fn two_agents_train_one_run() {
    let bench = Workbench::new();
    bench.train_to_the_end("laptop", None);

    // Held until all are chosen, so that they differ.
    let sockets: Vec<UdpSocket> = (0..5)
        .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
        .collect();
    let ports: Vec<u16> = sockets
        .iter()
        .map(|socket| socket.local_addr().unwrap().port())
        .collect();
    drop(sockets);
    let process = |name: &str, node: &str, role: &str, port: u16| {
        format!(
            "[[process]]\nname = \"{name}\"\nnode = \"{node}\"\nroles = [\"{role}\"]\nport = {port}\n\n"
        )
    };
    let mut topology = "[[node]]\nname = \"a\"\n\n[[node]]\nname = \"b\"\n\n".to_owned();
    topology += &process("coordinator", "a", "coordinator", ports[0]);
    topology += &process("shard-a", "a", "shard", ports[1]);
    topology += &process("loader", "b", "loader", ports[2]);
    topology += &process("shard-b", "b", "shard", ports[3]);
    topology += &process("worker", "b", "worker", ports[4]);
    topology += "[cluster]\nreplication = 2\n";
    let file = bench.path().join("two-nodes.toml");
    fs::write(&file, topology).unwrap();

    let certs = bench.path().join("certs");
    let made = everstep()
        .arg("certs")
        .arg("--topology")
        .arg(&file)
        .arg("--out")
        .arg(&certs)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let store = format!(
        "run.store=\"file://{}\"",
        bench.path().join("store").display()
    );
    let agents: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|node| {
            let run_dir = bench.path().join(format!("node-{node}"));
            let tls = run_dir.join("tls");
            fs::create_dir_all(&tls).unwrap();
            for entry in fs::read_dir(&certs).unwrap().flatten() {
                if entry.file_name() != "ca.key" {
                    fs::copy(entry.path(), tls.join(entry.file_name())).unwrap();
                }
            }
            let mut command = everstep();
            command
                .arg("node")
                .arg(bench.run_file())
                .arg("--topology")
                .arg(&file)
                .args(["--node", node]);
            command
                .arg("--run-dir")
                .arg(&run_dir)
                .args(["--set", &store]);
            command
                .stdin(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for agent in agents {
        let output = agent.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{error}\n{}\n{}",
            bench.logs("node-a"),
            bench.logs("node-b")
        );
    }
    assert_eq!(bench.digest("node-a", None), bench.digest("laptop", None));
    assert_eq!(bench.numbers("node-a"), bench.numbers("laptop"));
}
