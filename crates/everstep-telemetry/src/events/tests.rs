//! The file's text, torn tails, and readers beside writers.

use super::*;
use std::time::{Duration, UNIX_EPOCH};

fn lost(step: u64) -> Event {
    Event::ProcessLost {
        process: "worker-1".into(),
        node: "n0".into(),
        roles: vec!["worker".into()],
        step: Some(step),
        epoch: None,
        reason: "killed by signal 9".into(),
    }
}

#[test]
fn a_line_is_what_the_contract_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/events.jsonl");
    let log = EventLog::open(&path).unwrap();
    log.append_at(
        UNIX_EPOCH + Duration::from_millis(1_795_543_187_227),
        &lost(7),
    )
    .unwrap();
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        "{\"time\":\"2026-11-24T17:59:47.227Z\",\"kind\":\"process_lost\",\"process\":\"worker-1\",\"node\":\"n0\",\
         \"roles\":[\"worker\"],\"step\":7,\"reason\":\"killed by signal 9\"}\n"
    );
    let record = EventLog::read(&path).unwrap().remove(0);
    assert_eq!(record.event, lost(7));
    assert_eq!(
        record.at(),
        Some(UNIX_EPOCH + Duration::from_millis(1_795_543_187_227))
    );
}

#[test]
fn a_tail_torn_anywhere_costs_one_event() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let log = EventLog::open(&path).unwrap();
    log.append(&lost(0)).unwrap();
    let first = std::fs::read(&path).unwrap().len();
    log.append(&lost(1)).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for cut in first..whole.len() {
        let path = folder.path().join(cut.to_string());
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert_eq!(EventLog::read(&path).unwrap().len(), 1, "cut at {cut}");
        EventLog::open(&path).unwrap().append(&lost(2)).unwrap();
        let events: Vec<Event> = EventLog::read(&path)
            .unwrap()
            .into_iter()
            .map(|record| record.event)
            .collect();
        // Cutting only the newline leaves a whole line, which ending it saves.
        let expected = if cut + 1 == whole.len() {
            vec![lost(0), lost(1), lost(2)]
        } else {
            vec![lost(0), lost(2)]
        };
        assert_eq!(events, expected, "cut at {cut}");
    }
}

#[test]
fn a_reader_follows_and_skips_what_it_does_not_know() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let mut reader = EventReader::new(&path);
    assert!(reader.poll().unwrap().is_empty());
    let log = EventLog::open(&path).unwrap();
    log.append(&lost(0)).unwrap();
    assert_eq!(reader.poll().unwrap().len(), 1);
    assert!(reader.poll().unwrap().is_empty());
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"{\"time\":\"2026-11-24T17:59:47.227Z\",\"kind\":\"of_the_future\",\"a\":1}\nnot json\n{\"ti").unwrap();
    let records = reader.poll().unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].event, Event::Unknown);
    assert_eq!(reader.num_damaged(), 1);
    file.write_all(b"me\":\"x\",\"kind\":\"checkpoint_pruned\",\"step\":3}\n")
        .unwrap();
    assert_eq!(
        reader.poll().unwrap()[0].event,
        Event::CheckpointPruned { step: 3 }
    );
}

#[test]
fn every_kind_round_trips() {
    let s = || "x".to_owned();
    let kinds = [
        Event::RunStarted {
            run: s(),
            steps: 5,
            resumed_step: None,
        },
        Event::RunFinished {
            step: 5,
            seconds: 1.5,
        },
        Event::RunStopped {
            step: 5,
            reason: s(),
        },
        Event::ProcessStarted {
            process: s(),
            node: s(),
            pid: 1,
            roles: vec![s()],
            incarnation: 0,
        },
        Event::ProcessStopped {
            process: s(),
            node: s(),
        },
        lost(3),
        Event::ProcessRestarted {
            process: s(),
            node: s(),
            pid: 1,
            restarts: 1,
            seconds: 0.1,
        },
        Event::ProcessQuarantined {
            process: s(),
            node: s(),
            restarts: 5,
            reason: s(),
        },
        Event::SlotReassigned {
            step: 1,
            epoch: 1,
            slot: 2,
            from: s(),
            reason: s(),
        },
        Event::ShardPromoted {
            process: s(),
            node: s(),
            blocks: vec![0, 2],
            step: 1,
            epoch: 1,
            view: 1,
        },
        Event::BackupSeeded {
            process: s(),
            node: s(),
            blocks: vec![0, 2],
            step: 1,
            epoch: 1,
        },
        Event::LeaderElected {
            process: s(),
            node: s(),
            epoch: 1,
            step: 0,
        },
        Event::CheckpointStarted { step: 1, epoch: 1 },
        Event::CheckpointCommitted {
            step: 1,
            epoch: 1,
            bytes: 9,
            seconds: 0.1,
        },
        Event::CheckpointAbandoned {
            step: 1,
            epoch: 1,
            reason: s(),
        },
        Event::CheckpointDamaged {
            step: 1,
            object: s(),
            reason: s(),
        },
        Event::CheckpointPruned { step: 1 },
        Event::Rollback {
            from_step: 2,
            to_step: 1,
            epoch: 1,
            reason: s(),
        },
        Event::StepSkipped {
            step: 1,
            epoch: 1,
            reason: s(),
        },
        Event::LedgerDamaged {
            process: s(),
            node: s(),
            reason: s(),
            incarnation: 1 << 31,
        },
        Event::LossSpike {
            step: 1,
            epoch: 1,
            loss: 9.5,
            mean: 2.5,
            sd: 0.1 + 0.2,
        },
        Event::Evaluation {
            step: 1,
            loss: 0.1 + 0.2,
            tokens: 3,
            seconds: 0.1,
            expert_loads: vec![vec![0.5, 1.5], vec![1.0, 1.0]],
        },
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let log = EventLog::open(&path).unwrap();
    for event in &kinds {
        log.append(event).unwrap();
    }
    let read: Vec<Event> = EventLog::read(&path)
        .unwrap()
        .into_iter()
        .map(|record| record.event)
        .collect();
    assert_eq!(read, kinds);
}
