//! Two nodes in network namespaces of their own, with a wire between them that is cut, or thin.
//!
//! Nothing of it touches the machine's own network: both ends of the wire are in the namespaces, which go with the processes that hold them.

use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::machines::{self, Machine, run_dir};
use crate::support::{Running, Workbench, now, time_of, wait_for};

const A: Machine = Machine {
    name: "a",
    host: "10.77.0.1",
    processes: &[
        ("coordinator", "coordinator"),
        ("loader-a", "loader"),
        ("shard-a", "shard"),
        ("worker-0", "worker"),
    ],
    more: "",
};
const B: Machine = Machine {
    name: "b",
    host: "10.77.0.2",
    processes: &[
        ("loader-b", "loader"),
        ("shard-b", "shard"),
        ("worker-1", "worker"),
    ],
    more: "",
};
/// The same with a coordinator that may lead when it hears no other.
const B_THAT_CAN_LEAD: Machine = Machine {
    processes: &[
        ("coordinator-b", "coordinator"),
        ("loader-b", "loader"),
        ("shard-b", "shard"),
        ("worker-1", "worker"),
    ],
    ..B
};
const PORTS: [u16; 8] = [7001, 7002, 7003, 7004, 7005, 7006, 7007, 7008];

/// A network namespace, held by a process that ends with the test.
struct Namespace {
    holder: Child,
}

impl Namespace {
    fn new() -> Result<Self, String> {
        // Reads until the test ends, whatever ends it.
        let holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let namespace = Self { holder };
        let own = std::fs::read_link("/proc/self/ns/net").map_err(|error| error.to_string())?;
        let theirs = format!("/proc/{}/ns/net", namespace.holder.id());
        wait_for("a network namespace", || {
            let is_other = match std::fs::read_link(&theirs) {
                Ok(theirs) => theirs != own,
                // It ended: the kernel refused.
                Err(_) => true,
            };
            is_other.then_some(())
        });
        namespace.run(&["ip", "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    fn pid(&self) -> String {
        self.holder.id().to_string()
    }

    /// What a command line must begin with to run here.
    fn within(&self) -> Vec<String> {
        let words = ["nsenter", "--target", &self.pid(), "--net"];
        words.map(str::to_owned).to_vec()
    }

    fn output(&self, command: &[&str]) -> Result<Output, String> {
        let within = self.within();
        let output = Command::new(&within[0])
            .args(&within[1..])
            .args(command)
            .output();
        output.map_err(|error| format!("nsenter: {error}"))
    }

    /// Runs a command here, which must succeed.
    fn run(&self, command: &[&str]) -> Result<Vec<u8>, String> {
        let output = self.output(command)?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            let error = String::from_utf8_lossy(&output.stderr);
            Err(format!("{}: {}", command.join(" "), error.trim()))
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Two namespaces and the wire between them.
struct Wire {
    ends: [Namespace; 2],
}

/// What the queue at one end of the wire has counted.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    bytes: u64,
    drops: u64,
    overlimits: u64,
}

impl Wire {
    fn new() -> Result<Self, String> {
        let ends = [Namespace::new()?, Namespace::new()?];
        let far = ends[1].pid();
        ends[0].run(&[
            "ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", &far,
        ])?;
        for (end, machine) in ends.iter().zip([A, B]) {
            let address = format!("{}/24", machine.host);
            end.run(&["ip", "addr", "add", &address, "dev", "wire"])?;
            end.run(&["ip", "link", "set", "wire", "up"])?;
        }
        Ok(Self { ends })
    }

    /// The wire, or the reason why this machine cannot have one.
    fn lay() -> Option<Self> {
        match Self::new() {
            Ok(wire) => Some(wire),
            Err(reason) => {
                eprintln!(
                    "skipped: this kernel refuses network namespaces, or lacks their tools: {reason}"
                );
                None
            }
        }
    }

    /// Replaces what each end does with packets that it sends.
    fn queue(&self, kind: &[&str]) {
        for end in &self.ends {
            let command = [&["tc", "qdisc", "replace", "dev", "wire", "root"], kind].concat();
            end.run(&command).unwrap();
        }
    }

    fn unqueue(&self) {
        for end in &self.ends {
            end.run(&["tc", "qdisc", "delete", "dev", "wire", "root"])
                .unwrap();
        }
    }

    fn counted(&self) -> [Counted; 2] {
        self.ends.each_ref().map(|end| {
            let text = end
                .run(&["tc", "-s", "-j", "qdisc", "show", "dev", "wire"])
                .unwrap();
            let queues: Value = serde_json::from_slice(&text).unwrap();
            let number = |field: &str| queues[0][field].as_u64().unwrap_or(0);
            Counted {
                bytes: number("bytes"),
                drops: number("drops"),
                overlimits: number("overlimits"),
            }
        })
    }
}

const NODES: [&str; 2] = ["a", "b"];

/// Agents on both ends of the wire, once ten steps are committed.
fn start(bench: &Workbench, wire: &Wire, far: Machine) -> [Running; 2] {
    let topology = machines::prepare(bench, &[A, far], &PORTS);
    let start = |node: &str, end: usize| {
        machines::start(bench, &topology, node, &wire.ends[end].within(), &[])
    };
    let agents = [start("a", 0), start("b", 1)];
    // Each node logs what it committed while it led, and a slow machine may change leaders.
    wait_for("ten steps", || {
        (agents.iter().map(Running::num_logged).sum::<u64>() >= 10).then_some(())
    });
    agents
}

/// Which of the nodes leads, and the epoch.
fn leading(bench: &Workbench) -> (usize, u64) {
    let elected = |node: usize| {
        let events = bench.events(&run_dir(NODES[node]), "leader_elected");
        let epochs = events.iter().map(|event| event["epoch"].as_u64().unwrap());
        (epochs.max().unwrap_or(0), node)
    };
    let (epoch, node) = [0, 1].map(elected).into_iter().max().unwrap();
    (node, epoch)
}

fn lost(bench: &Workbench, node: &str) -> Vec<(String, f64)> {
    let lost = bench.events(&run_dir(node), "process_lost");
    let lost = lost.iter();
    lost.map(|event| {
        (
            event["process"].as_str().unwrap().to_owned(),
            time_of(event),
        )
    })
    .collect()
}

#[test]
fn a_partition_that_heals_changes_no_bit() {
    const SECONDS: f64 = 3.0;
    let bench = Workbench::new();
    let Some(wire) = Wire::lay() else {
        return;
    };
    let agents = start(&bench, &wire, B);
    for (agent, worker) in agents.iter().zip(["worker-0", "worker-1"]) {
        agent.slow_down(worker, 10);
    }
    // The far shard holds its blocks again, and the far worker computes.
    let wait_until_whole = |since: f64| {
        let is_back = |event: &Value| event["process"] == "shard-b" && time_of(event) > since;
        agents[0].wait_for_event("backup_seeded", is_back);
        let slots = agents[1].slots("worker-1");
        wait_for("work for the worker that came back", || {
            (agents[1].slots("worker-1") > slots + 4).then_some(())
        });
    };
    // Cut twice: packets vanish, and then the interface itself goes down.
    let cut_at = now();
    wire.queue(&["blackhole"]);
    wait_for("the partition", || (now() > cut_at + SECONDS).then_some(()));
    let dropped = wire.counted().map(|end| end.drops);
    wire.unqueue();
    wait_until_whole(now());
    let [end, _] = &wire.ends;
    let down_at = now();
    end.run(&["ip", "link", "set", "wire", "down"]).unwrap();
    wait_for("the partition", || {
        (now() > down_at + SECONDS).then_some(())
    });
    end.run(&["ip", "link", "set", "wire", "up"]).unwrap();
    wait_until_whole(now());
    for (agent, worker) in agents.iter().zip(["worker-0", "worker-1"]) {
        agent.slow_down(worker, 0);
    }
    let [a, b] = agents;
    a.finish(&bench, &run_dir("a"));
    b.finish(&bench, &run_dir("b"));

    assert!(dropped.iter().all(|drops| *drops > 0), "{dropped:?}");
    // The leader gives up what it cannot reach, once per partition, and only then.
    let lost_by_leader = lost(&bench, "a");
    for partition in [cut_at, down_at] {
        let mut names: Vec<&str> = lost_by_leader
            .iter()
            .filter(|(_, at)| (partition..partition + SECONDS + 1.0).contains(at))
            .map(|(name, _)| name.as_str())
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["shard-b", "worker-1"], "{lost_by_leader:?}");
    }
    assert_eq!(lost_by_leader.len(), 4, "{lost_by_leader:?}");
    // The agents, which can see their processes, saw none of them die.
    assert_eq!(lost(&bench, "b"), []);
    for node in NODES {
        assert_eq!(bench.count(&run_dir(node), "process_hung"), 0);
        assert_eq!(bench.count(&run_dir(node), "process_restarted"), 0);
        assert_eq!(bench.count(&run_dir(node), "rollback"), 0);
    }
    assert_eq!(bench.count(&run_dir("a"), "leader_elected"), 1);
    bench.demand_undisturbed(&run_dir("a"));
    eprintln!("packets dropped at the two ends: {dropped:?}");
}

#[test]
fn a_leader_on_each_side_of_a_partition_changes_no_bit() {
    const SECONDS: f64 = 3.0;
    let bench = Workbench::new();
    let Some(wire) = Wire::lay() else {
        return;
    };
    let agents = start(&bench, &wire, B_THAT_CAN_LEAD);
    for (agent, worker) in agents.iter().zip(["worker-0", "worker-1"]) {
        agent.slow_down(worker, 20);
    }
    let (near, epoch) = leading(&bench);
    let far = 1 - near;
    let cut_at = now();
    wire.queue(&["blackhole"]);
    // The near one leads on with what it has; the far one takes the next epoch, since it hears nobody.
    let elected = agents[far].wait_for_event("leader_elected", |event| {
        event["epoch"].as_u64() > Some(epoch)
    });
    agents[near].wait_for_more_steps(1);
    wait_for("the partition", || (now() > cut_at + SECONDS).then_some(()));
    let dropped = wire.counted().map(|end| end.drops);
    wire.unqueue();
    agents[near].wait_for_event("leader_deposed", |event| {
        event["by"].as_u64() >= elected["epoch"].as_u64()
    });
    for (agent, worker) in agents.iter().zip(["worker-0", "worker-1"]) {
        agent.slow_down(worker, 0);
    }
    let [a, b] = agents;
    a.finish(&bench, &run_dir("a"));
    b.finish(&bench, &run_dir("b"));

    assert!(dropped.iter().all(|drops| *drops > 0), "{dropped:?}");
    let mut epochs: Vec<u64> = Vec::new();
    for node in NODES {
        assert_eq!(bench.count(&run_dir(node), "process_hung"), 0);
        assert_eq!(bench.count(&run_dir(node), "process_restarted"), 0);
        assert_eq!(bench.count(&run_dir(node), "rollback"), 0);
        let elected = bench.events(&run_dir(node), "leader_elected");
        epochs.extend(elected.iter().map(|event| event["epoch"].as_u64().unwrap()));
        bench.demand_undisturbed_digest(&run_dir(node));
    }
    // Each epoch has one leader. What they logged, each on its own node, is one line of numbers.
    let count = epochs.len();
    epochs.sort_unstable();
    epochs.dedup();
    assert!(count >= 2 && epochs.len() == count, "{epochs:?}");
    let mut numbers = bench.numbers(&run_dir("a"));
    numbers.extend(bench.numbers(&run_dir("b")));
    numbers.sort();
    numbers.dedup();
    bench.demand_undisturbed_numbers(&numbers);
    eprintln!("epochs {epochs:?}; packets dropped at the two ends: {dropped:?}");
}

#[test]
fn a_thin_wire_is_not_taken_for_a_death() {
    let bench = Workbench::new();
    let Some(wire) = Wire::lay() else {
        return;
    };
    let [a, b] = start(&bench, &wire, B);
    wire.queue(&["tbf", "rate", "10mbit", "burst", "32kb", "latency", "200ms"]);
    let (begun, first) = (now(), wire.counted());
    a.wait_for_more_steps(20);
    let (seconds, last) = (now() - begun, wire.counted());
    wire.unqueue();
    a.finish(&bench, &run_dir("a"));
    b.finish(&bench, &run_dir("b"));

    let mbit = |end: usize| (last[end].bytes - first[end].bytes) as f64 * 8e-6 / seconds;
    eprintln!(
        "20 steps in {seconds:.1} s over 10 Mbit/s: {:.2} Mbit/s to b, {:.2} Mbit/s to a, {} and {} packets held back",
        mbit(0),
        mbit(1),
        last[0].overlimits,
        last[1].overlimits
    );
    assert!(mbit(0).max(mbit(1)) < 10.5, "the wire was not thin");
    assert!(
        last[0].overlimits + last[1].overlimits > 0,
        "the wire was thick enough"
    );
    for node in NODES {
        assert_eq!(lost(&bench, node), []);
        assert_eq!(bench.count(&run_dir(node), "process_hung"), 0);
    }
    assert_eq!(bench.count(&run_dir("a"), "leader_elected"), 1);
    bench.demand_undisturbed(&run_dir("a"));
}
