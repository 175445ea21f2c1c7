//! Leaders die, stop, and wake up too late: another one leads, and nothing of it changes a bit.

use std::fs;
use std::net::UdpSocket;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Running, Workbench, now, time_of, wait_for};

const KILLS: u64 = 6;

/// Waits for the leader of an epoch after `epoch`.
fn next_leader(running: &Running, epoch: u64) -> (String, u64) {
    let is_next = |event: &Value| event["epoch"].as_u64().unwrap() > epoch;
    let elected = running.wait_for_event("leader_elected", is_next);
    let leader = elected["process"].as_str().unwrap().to_owned();
    (leader, elected["epoch"].as_u64().unwrap())
}

/// Who leads now.
fn leader_now(bench: &Workbench) -> (String, u64) {
    let elected = bench.events("run", "leader_elected");
    let last = elected.last().unwrap();
    let leader = last["process"].as_str().unwrap().to_owned();
    (leader, last["epoch"].as_u64().unwrap())
}

fn other(coordinator: &str) -> &'static str {
    if coordinator == "coordinator-0" {
        "coordinator-1"
    } else {
        "coordinator-0"
    }
}

/// The UDP port of a process.
fn port_of(bench: &Workbench, process: &str) -> u16 {
    let text = fs::read(bench.path().join("run/topology.json")).unwrap();
    let topology: Value = serde_json::from_slice(&text).unwrap();
    let processes = topology["processes"].as_array().unwrap();
    let found = processes.iter().find(|found| found["name"] == process);
    let port = found.unwrap()["port"].as_u64().unwrap();
    u16::try_from(port).unwrap()
}

/// How many datagrams the system dropped because the socket at this local port was full.
fn num_dropped(port: u16) -> u64 {
    let local = format!(":{port:04X}");
    let sockets = fs::read_to_string("/proc/net/udp").unwrap();
    let of_port = sockets.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let is_it = columns.get(1)?.ends_with(&local);
        is_it.then(|| columns.last()?.parse::<u64>().ok())?
    });
    of_port.sum()
}

/// Fills the receive buffer of a stopped process, so that what is said to it from now on is lost, as on a machine that was suspended.
/// Otherwise the first thing it reads when it wakes up may be who leads now.
fn deafen(bench: &Workbench, process: &str) {
    let port = port_of(bench, process);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let dropped = num_dropped(port);
    wait_for("a full receive buffer", || {
        for _ in 0..256 {
            socket.send_to(&[0; 1200], ("127.0.0.1", port)).unwrap();
        }
        (num_dropped(port) > dropped).then_some(())
    });
}

#[test]
fn a_standby_leads_whenever_the_leader_is_killed() {
    let bench = Workbench::new();
    let topology = bench.cluster_with_standby("");
    let running = bench.start_slow("run", &topology, 10);
    let (mut leader, mut epoch) = next_leader(&running, 0);
    let mut lives = [("coordinator-0", 1), ("coordinator-1", 1)];
    for _ in 0..KILLS {
        // The standby is there, has joined, and follows.
        let standby = other(&leader);
        let (_, life) = *lives.iter().find(|(name, _)| *name == standby).unwrap();
        running.wait_for_event("process_started", |event| {
            event["process"] == standby && event["incarnation"] == life
        });
        running.wait_for_more_steps(10);
        assert!(running.kill(&leader), "{leader} is not there");
        let (_, life) = lives.iter_mut().find(|(name, _)| *name == leader).unwrap();
        *life += 1;
        let (next, next_epoch) = next_leader(&running, epoch);
        assert_eq!(next, standby, "{}", bench.logs("run"));
        (leader, epoch) = (next, next_epoch);
    }
    running.slow_down("worker-0", 0);
    running.slow_down("worker-1", 0);
    running.finish(&bench, "run");

    let elected = bench.events("run", "leader_elected");
    let epochs: Vec<u64> = elected
        .iter()
        .map(|event| event["epoch"].as_u64().unwrap())
        .collect();
    assert_eq!(epochs.len() as u64, KILLS + 1, "{elected:?}");
    assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
    let is_agents = |event: &&Value| event["reason"].as_str().unwrap().contains("SIGKILL");
    let lost = bench.events("run", "process_lost");
    assert_eq!(
        lost.iter().filter(is_agents).count() as u64,
        KILLS,
        "{lost:?}"
    );
    assert_eq!(bench.count("run", "rollback"), 0);
    bench.demand_undisturbed("run");
}

#[test]
fn a_leader_that_is_stopped_for_ever_is_ended_and_replaced() {
    let bench = Workbench::new();
    let topology = bench.cluster_with_standby("");
    let running = bench.start("run", Some(&topology));
    running.wait_for_step(40);
    // On a starved machine another one may lead already.
    let (leader, epoch) = leader_now(&bench);
    let stopped_at = now();
    running.signal(&leader, Signal::SIGSTOP).unwrap();
    running.finish(&bench, "run");

    let hung = bench.events("run", "process_hung");
    assert_eq!(hung.len(), 1, "{hung:?}");
    assert_eq!(hung[0]["process"], leader);
    let seconds = time_of(&hung[0]) - stopped_at;
    assert!(seconds <= 2.0, "noticed after {seconds} s");
    let mut elected = bench.events("run", "leader_elected");
    elected.retain(|event| event["epoch"].as_u64().unwrap() > epoch);
    assert_eq!(elected.len(), 1, "{elected:?}");
    assert_eq!(elected[0]["process"], other(&leader));
    let led_after = time_of(&elected[0]) - stopped_at;
    assert!(
        (0.0..=3.0).contains(&led_after),
        "another one led after {led_after} s"
    );
    assert_eq!(bench.count("run", "process_restarted"), 1);
    assert_eq!(bench.count("run", "rollback"), 0);
    bench.demand_undisturbed("run");
    eprintln!("noticed after {seconds:.2} s, another one led after {led_after:.2} s");
}

#[test]
fn an_old_leader_that_wakes_up_changes_nothing() {
    let bench = Workbench::new();
    let topology = bench.cluster_with_standby("");
    let running = bench.start_slow("run", &topology, 10);
    running.wait_for_more_steps(5);
    let (old, old_epoch) = leader_now(&bench);

    // Without its agent nobody ends a process that is stopped.
    running.signal_agent(Signal::SIGSTOP);
    let stopped_at = now();
    running.signal(&old, Signal::SIGSTOP).unwrap();
    deafen(&bench, &old);
    let (new, new_epoch) = next_leader(&running, old_epoch);
    assert_eq!(new, other(&old));
    running.wait_for_more_steps(5);
    wait_for("three seconds", || (now() > stopped_at + 3.0).then_some(()));

    // It wakes up while nobody else can speak as the leader: what it says is refused because of its epoch alone.
    running.signal(&new, Signal::SIGSTOP).unwrap();
    running.signal(&old, Signal::SIGCONT).unwrap();
    let refused = running.wait_for_event("stale_refused", |event| event["from"] == old);
    assert!(refused["epoch"].as_u64().unwrap() >= new_epoch, "{refused}");
    running.wait_for_event("leader_deposed", |event| {
        event["process"] == old && event["epoch"] == old_epoch
    });
    running.signal(&new, Signal::SIGCONT).unwrap();
    running.wait_for_more_steps(5);
    running.signal_agent(Signal::SIGCONT);
    running.slow_down("worker-0", 0);
    running.slow_down("worker-1", 0);
    running.finish(&bench, "run");

    let elected = bench.events("run", "leader_elected");
    let epochs: Vec<&Value> = elected.iter().map(|event| &event["epoch"]).collect();
    assert!(
        epochs.is_sorted_by(|a, b| a.as_u64() < b.as_u64()),
        "{epochs:?}"
    );
    assert_eq!(bench.count("run", "process_restarted"), 0);
    assert_eq!(bench.count("run", "process_lost"), 0, "nobody was gone");
    assert_eq!(bench.count("run", "rollback"), 0);
    bench.demand_undisturbed("run");
    let refusals = bench.count("run", "stale_refused");
    eprintln!("{refusals} refused what the old leader said; epochs {epochs:?}");
}

#[test]
fn workers_compute_what_they_hold_while_nobody_leads() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start_slow("run", &topology, 100);
    running.wait_for_more_steps(2);
    // Nobody starts the only coordinator again before its agent goes on.
    running.signal_agent(Signal::SIGSTOP);
    let slots = || running.slots("worker-0") + running.slots("worker-1");
    let begun = slots();
    wait_for("a slot of the next step", || {
        (slots() > begun).then_some(())
    });
    assert!(running.kill("coordinator"));
    let leaderless_at = slots();
    let committed_at = bench.numbers("run").len();
    // Most of the open step's eight slots were leased and not computed yet.
    wait_for("slots without a leader", || {
        (slots() >= leaderless_at + 2).then_some(())
    });
    assert_eq!(bench.numbers("run").len(), committed_at);
    let computed = slots() - leaderless_at;
    running.signal_agent(Signal::SIGCONT);
    running.wait_for_more_steps(1);
    running.slow_down("worker-0", 0);
    running.slow_down("worker-1", 0);
    running.finish(&bench, "run");

    let elected = bench.events("run", "leader_elected");
    assert_eq!(elected.len(), 2, "{elected:?}");
    // Whoever leads next asks what the workers hold.
    let is_given_away = |event: &&Value| event["reason"] == "its holder is gone";
    let reassigned = bench.events("run", "slot_reassigned");
    assert_eq!(reassigned.iter().filter(is_given_away).count(), 0);
    assert_eq!(bench.count("run", "rollback"), 0);
    bench.demand_undisturbed("run");
    eprintln!("{computed} slots were computed while nobody led");
}

#[test]
fn a_worker_that_wakes_up_after_twenty_seconds_is_refused_and_joins_anew() {
    const STOPPED_SECONDS: f64 = 20.0;
    let bench = Workbench::new();
    let topology = bench.cluster_with_standby("[agent]\nstopped_seconds = 60\n");
    let running = bench.start_slow("run", &topology, 40);
    running.wait_for_more_steps(2);
    let stopped_at = now();
    let pid = running.signal("worker-0", Signal::SIGSTOP).unwrap();
    let hung = running.wait_for_event("process_hung", |event| event["process"] == "worker-0");
    let noticed = time_of(&hung) - stopped_at;
    assert!(noticed <= 2.0, "noticed after {noticed} s");
    let status = running.status();
    let processes = status["processes"].as_array().unwrap();
    let worker = processes
        .iter()
        .find(|process| process["name"] == "worker-0");
    assert_eq!(worker.unwrap()["state"], "hung", "{status}");
    // The others do its work.
    running.wait_for_more_steps(10);
    wait_for("twenty seconds", || {
        (now() > stopped_at + STOPPED_SECONDS).then_some(())
    });
    let slots_before = running.slots("worker-0");
    running.signal("worker-0", Signal::SIGCONT).unwrap();
    let refused = running.wait_for_event("stale_refused", |event| event["from"] == "worker-0");
    let woke = running.wait_for_event("process_woke", |event| event["process"] == "worker-0");
    let seconds = woke["seconds"].as_f64().unwrap();
    assert!(
        (STOPPED_SECONDS - 1.0..STOPPED_SECONDS + 2.0).contains(&seconds),
        "{woke}"
    );
    wait_for("work for the worker that came back", || {
        (running.slots("worker-0") > slots_before).then_some(())
    });
    assert!(
        running
            .processes()
            .contains(&("worker-0".to_owned(), Some(pid)))
    );
    running.slow_down("worker-0", 0);
    running.slow_down("worker-1", 0);
    running.finish(&bench, "run");

    assert_eq!(bench.count("run", "process_hung"), 1);
    assert_eq!(bench.count("run", "process_restarted"), 0);
    assert_eq!(bench.count("run", "rollback"), 0);
    assert_eq!(bench.count("run", "leader_elected"), 1);
    bench.demand_undisturbed("run");
    eprintln!("noticed after {noticed:.2} s; {}", refused["reason"]);
}
