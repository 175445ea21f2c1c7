//! Files that are valid, and mistakes that are named.
#![allow(clippy::unwrap_used)]
use super::*;

fn error(text: &str) -> String {
    Topology::parse(text, Path::new("t.toml"))
        .unwrap_err()
        .to_string()
}

#[test]
fn shipped_topologies_are_valid() {
    let laptop = Topology::laptop(1);
    assert!(laptop.is_single_process());
    let cluster = Topology::read(Path::new("../../topology/local-cluster.toml")).unwrap();
    assert_eq!(cluster.processes.len(), 7);
    assert_eq!(cluster.count(ActorRole::Worker), 3);
    assert_eq!(
        cluster.process_of(ActorAddress {
            role: ActorRole::Worker,
            index: 2
        }),
        Some(6)
    );
    assert_eq!(cluster.processes[6].name, "worker-2");
}

#[test]
fn ports_are_resolved_and_differ() {
    let mut cluster = Topology::read(Path::new("../../topology/local-cluster.toml")).unwrap();
    cluster.resolve_ports(|_| true).unwrap();
    let ports: BTreeSet<u16> = cluster
        .processes
        .iter()
        .map(|process| process.port)
        .collect();
    assert_eq!(ports.len(), 7);
    assert!(!ports.contains(&0));
}

#[test]
fn mistakes_are_named() {
    let node = "[[node]]\nname = \"a\"\n";
    assert!(
        error("nodes = 1").contains("unknown field `nodes`"),
        "{}",
        error("nodes = 1")
    );
    let wrong_node = error(&format!(
        "{node}[[process]]\nname = \"p\"\nnode = \"b\"\nroles = [\"worker\"]\n"
    ));
    assert_eq!(
        wrong_node,
        "t.toml: process.node of \"p\": there is no node \"b\"; nodes are: a"
    );
    let missing_role = error(&format!(
        "{node}[[process]]\nname = \"p\"\nnode = \"a\"\nroles = [\"worker\"]\n"
    ));
    assert_eq!(
        missing_role,
        "t.toml: process.roles: no process has the role coordinator"
    );
    let replicas = error(&format!(
        "{node}[[process]]\nname = \"p\"\nnode = \"a\"\nroles = [\"worker\", \"coordinator\", \"loader\", \"shard\"]\n[cluster]\nreplication = 2\n"
    ));
    assert!(
        replicas.contains("cluster.replication: 2 replicas need as many shards"),
        "{replicas}"
    );
}

#[test]
fn routes_lead_another_way() {
    let all = "roles = [\"worker\", \"coordinator\", \"loader\", \"shard\"]\n";
    let process =
        |name: &str| format!("[[process]]\nname = \"{name}\"\nnode = \"a\"\nport = 7000\n{all}");
    let route = |from: &str, to: &str| {
        format!("[[route]]\nfrom = \"{from}\"\nto = \"{to}\"\nvia = \"127.0.0.1:9\"\n")
    };
    let base = format!(
        "[[node]]\nname = \"a\"\n{}{}{}",
        process("p"),
        process("q"),
        process("r")
    );
    let text = format!("{base}{}", route("r", "p"));
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    assert_eq!(topology.dial_address(2, 0).unwrap().port(), 9);
    assert_eq!(topology.dial_address(2, 1).unwrap().port(), 7000);
    let again = topology.to_toml().unwrap();
    assert_eq!(
        Topology::parse(&again, Path::new("t.toml")).unwrap(),
        topology
    );
    assert_eq!(
        error(&format!("{base}{}", route("p", "r"))),
        "t.toml: route: p does not dial r; of each pair the later process in the file dials"
    );
    assert_eq!(
        error(&format!("{base}{}", route("r", "x"))),
        "t.toml: route: there is no process \"x\""
    );
    assert_eq!(
        error(&format!("{base}{0}{0}", route("r", "p"))),
        "t.toml: route: r to p is given twice"
    );
}

#[test]
fn agents_are_told_what_to_look_for() {
    let shipped = include_str!("../../../../topology/local-cluster.toml");
    let parse = |node: &str, rest: &str| {
        let node = format!("name = \"local\"\n{node}\n");
        let text = shipped.replacen("name = \"local\"", &node, 1);
        Topology::parse(&format!("{text}\n{rest}"), Path::new("t.toml"))
    };
    let agent = "[agent]\nstopped_seconds = 30\ncrash_loop_deaths = 4\n";
    let topology = parse("preemption = [\"aws\", \"gcp\"]", agent).unwrap();
    assert_eq!(topology.agent.stopped_seconds, Some(30.0));
    let sources = vec![PreemptionSource::Aws, PreemptionSource::Gcp];
    assert_eq!(topology.preemption["local"], sources);
    let again = Topology::parse(&topology.to_toml().unwrap(), Path::new("t.toml")).unwrap();
    assert_eq!(again, topology);
    let error = |node, rest| parse(node, rest).unwrap_err().to_string();
    assert_eq!(
        error("preemption = [\"ec2\"]", ""),
        "t.toml: node.preemption of \"local\": \"ec2\" is not known; allowed: aws, gcp, azure"
    );
    assert_eq!(
        error("", "[agent]\nstopped_seconds = 0"),
        "t.toml: agent.stopped_seconds: must be 0.1 to 86400"
    );
    assert_eq!(
        error("", "[agent]\ncrash_loop_deaths = 0"),
        "t.toml: agent.crash_loop_deaths: must be 1 to 1000"
    );
}

#[test]
fn a_port_in_use_is_named() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut laptop = Topology::laptop(1);
    laptop.processes[0].port = socket.local_addr().unwrap().port();
    let message = laptop.resolve_ports(|_| true).unwrap_err().to_string();
    assert!(
        message.contains("process.port of \"everstep\"") && message.contains("free UDP port"),
        "{message}"
    );
}
