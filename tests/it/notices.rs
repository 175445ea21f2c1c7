//! Machines that are about to be taken away, told by signals and by servers that speak as the providers' do; processes that cannot live.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use everstep_cluster::{RunDir, free_port};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::machines::{self, Machine, run_dir};
use crate::support::{Running, Workbench, now, time_of};

/// Seconds that each notice leaves.
const SECONDS_LEFT: u64 = 6;

const STAYS: Machine = Machine {
    name: "stays",
    host: "127.0.0.1",
    processes: &[
        ("coordinator", "coordinator"),
        ("loader", "loader"),
        ("shard-0", "shard"),
        ("shard-1", "shard"),
        ("worker-0", "worker"),
    ],
    more: "",
};

fn leaves(
    name: &'static str,
    worker: &'static [(&'static str, &'static str)],
    more: &'static str,
) -> Machine {
    Machine {
        name,
        host: "127.0.0.1",
        processes: worker,
        more,
    }
}

/// Answers requests as a metadata service until the test ends: what comes after `HTTP/1.1`, for a request line.
fn serve(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let line = lines.next().unwrap_or_default();
                lines.take_while(|line| !line.is_empty()).for_each(drop);
                let _ = write!(&stream, "HTTP/1.1 {}", answer(&line));
            });
        }
    });
    format!("http://{address}")
}

fn ok(body: &str) -> String {
    format!("200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn missing() -> String {
    "404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned()
}

fn end() -> SystemTime {
    SystemTime::now() + Duration::from_secs(SECONDS_LEFT)
}

fn aws(is_due: Arc<AtomicBool>) -> String {
    serve(move |line| match line.split(' ').nth(1) {
        Some("/latest/api/token") => ok("token"),
        Some("/latest/meta-data/spot/instance-action") if is_due.load(Ordering::Relaxed) => {
            let time = humantime::format_rfc3339_seconds(end());
            ok(&format!(r#"{{"action": "terminate", "time": "{time}"}}"#))
        }
        _ => missing(),
    })
}

fn gcp(is_due: Arc<AtomicBool>) -> String {
    serve(move |line| {
        let path = line.split(' ').nth(1).unwrap_or_default();
        let is_preempted = path.contains("/preempted") && is_due.load(Ordering::Relaxed);
        let body = match (path.contains("/preempted"), is_preempted) {
            (true, true) => "TRUE",
            (true, false) => "FALSE",
            (false, _) => "NONE",
        };
        let tag = u8::from(is_preempted);
        format!(
            "200 OK\r\nETag: {tag}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    })
}

fn azure(is_due: Arc<AtomicBool>) -> String {
    serve(move |line| match line.split([' ', '?']).nth(1) {
        Some("/metadata/instance/compute/name") => ok("vm-7"),
        _ if is_due.load(Ordering::Relaxed) => {
            let time = httpdate::fmt_http_date(end());
            ok(&format!(
                r#"{{"DocumentIncarnation": 2, "Events": [{{"EventId": "1", "EventType": "Preempt", "ResourceType": "VirtualMachine",
                    "Resources": ["vm-7"], "EventStatus": "Scheduled", "NotBefore": "{time}"}}]}}"#
            ))
        }
        _ => ok(r#"{"DocumentIncarnation": 1, "Events": []}"#),
    })
}

#[test]
fn nodes_that_get_notice_are_gone_in_time_and_change_no_bit() {
    let bench = Workbench::new();
    let nodes = [
        ("term", "sigterm"),
        ("spot", "aws"),
        ("preemptible", "gcp"),
        ("scaleset", "azure"),
    ];
    let machines = [
        STAYS,
        leaves("term", &[("worker-1", "worker")], ""),
        leaves("spot", &[("worker-2", "worker")], "preemption = [\"aws\"]"),
        leaves(
            "preemptible",
            &[("worker-3", "worker")],
            "preemption = [\"gcp\"]",
        ),
        leaves(
            "scaleset",
            &[("worker-4", "worker")],
            "preemption = [\"azure\"]",
        ),
    ];
    // Held until all are chosen, so that they differ.
    let sockets: Vec<UdpSocket> = (0..9)
        .map(|_| free_port(Ipv4Addr::LOCALHOST.into()).unwrap())
        .collect();
    let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
    let ports: Vec<u16> = sockets.iter().map(port).collect();
    drop(sockets);
    let topology = machines::prepare(&bench, &machines, &ports);

    let is_due = Arc::new(AtomicBool::new(false));
    let endpoint = |node: &str| match node {
        "spot" => Some(aws(is_due.clone())),
        "preemptible" => Some(gcp(is_due.clone())),
        "scaleset" => Some(azure(is_due.clone())),
        _ => None,
    };
    let start = |node: &str| {
        let mut arguments = vec!["--grace".to_owned(), SECONDS_LEFT.to_string()];
        if let Some(endpoint) = endpoint(node) {
            arguments.extend(["--preemption-endpoint".to_owned(), endpoint]);
        }
        machines::start(&bench, &topology, node, &[], &arguments)
    };
    let stays = start("stays");
    let agents = nodes.map(|(node, _)| start(node));
    stays.wait_for_step(10);
    stays.slow_down("worker-0", 40);
    for (index, agent) in agents.iter().enumerate() {
        agent.slow_down(&format!("worker-{}", index + 1), 40);
    }

    is_due.store(true, Ordering::Relaxed);
    agents[0].signal_agent(Signal::SIGTERM);
    let leave = |node: &str, source: &str, agent: Running| {
        let notice = agent.wait_for_event("preemption_notice", |event| event["node"] == node);
        assert_eq!(notice["source"], source);
        let seconds_left = notice["seconds_left"].as_u64().unwrap();
        if source == "gcp" {
            // Compute Engine leaves half a minute, and says no more than that it has begun.
            assert_eq!(seconds_left, 30);
        } else {
            assert!((1..=SECONDS_LEFT).contains(&seconds_left), "{notice}");
        }
        let status = agent.end();
        let took = now() - time_of(&notice);
        assert!(took <= seconds_left as f64, "{node} left after {took:.1} s");
        assert!(status.success(), "{node}: {status}");
        eprintln!("{node}: {source} left {seconds_left} s; gone after {took:.1} s, {status}");
    };
    std::thread::scope(|scope| {
        let mut leaving = Vec::new();
        for ((node, source), agent) in nodes.into_iter().zip(agents) {
            let leave = &leave;
            leaving.push(scope.spawn(move || leave(node, source, agent)));
        }
        let last = leaving.remove(2);
        for left in leaving {
            left.join().unwrap();
        }
        stays.slow_down("worker-0", 0);
        last.join().unwrap();
    });
    stays.finish(&bench, &run_dir("stays"));
    for (node, _) in nodes {
        assert_eq!(bench.count(&run_dir(node), "preemption_notice"), 1);
        assert_eq!(bench.count(&run_dir(node), "process_restarted"), 0);
    }
    assert_eq!(bench.count(&run_dir("stays"), "rollback"), 0);
    bench.demand_undisturbed(&run_dir("stays"));
}

/// A process can no longer write down that it lives: where its file should be is a folder.
fn spoil(bench: &Workbench, process: &str) {
    let run_dir = RunDir::new(bench.path().join("run"));
    let life = run_dir.status().join(format!("life-{process}.json"));
    fs::remove_file(&life).unwrap();
    fs::create_dir(&life).unwrap();
}

/// The agent's events of one process, by kind.
fn of_process(bench: &Workbench, kind: &str, process: &str) -> Vec<Value> {
    let mut events = bench.events("run", kind);
    events.retain(|event| event["process"] == process);
    events
}

#[test]
fn a_crash_loop_ends_with_one_clear_line_and_never_spins() {
    const DEATHS: usize = 4;
    let bench = Workbench::new();
    let topology = bench.cluster_with_standby(&format!("[agent]\ncrash_loop_deaths = {DEATHS}\n"));
    let running = bench.start_slow("run", &topology, 20);
    spoil(&bench, "worker-1");
    assert!(running.kill("worker-1"));
    // Others do its work: it stays down, and training goes on.
    running.wait_for_event("process_quarantined", |event| {
        event["process"] == "worker-1"
    });
    let restarts = of_process(&bench, "process_restarted", "worker-1");
    // Once at once, since it was killed from outside; then it died by itself, and waited 50, 100, 200 and 400 ms.
    assert_eq!(restarts.len(), DEATHS + 1, "{restarts:?}");
    let waited: Vec<f64> = restarts
        .iter()
        .map(|event| event["seconds"].as_f64().unwrap())
        .collect();
    for (waited, least) in waited.iter().zip([0.0, 0.05, 0.1, 0.2, 0.4]) {
        assert!(*waited >= least, "{waited:?}");
    }
    let status = running.status();
    let processes = status["processes"].as_array().unwrap();
    let state = |name: &str| {
        let process = processes.iter().find(|process| process["name"] == name);
        process.unwrap()["state"].clone()
    };
    assert_eq!(state("worker-1"), "quarantined", "{status}");
    assert_eq!(state("worker-0"), "running", "{status}");
    running.wait_for_more_steps(5);

    // Nobody can do this one's work: the node gives up, and says so once.
    spoil(&bench, "loader");
    assert!(running.kill("loader"));
    assert_eq!(running.end().code(), Some(1));
    let error = fs::read_to_string(bench.path().join("run.stderr")).unwrap();
    let errors: Vec<&str> = error
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{error}");
    let expected = format!(
        "error: process loader died {} times in a row right after its start, and no other process can do its work; see ",
        DEATHS + 1
    );
    assert!(errors[0].starts_with(&expected), "{}", errors[0]);
    assert_eq!(
        of_process(&bench, "process_restarted", "loader").len(),
        DEATHS + 1
    );
}
