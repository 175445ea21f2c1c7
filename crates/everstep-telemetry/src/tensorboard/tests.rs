//! The reference bytes were written by the Python package `tensorboard` 2.21 (`RecordWriter` around `event_pb2.Event`).

use std::time::Duration;

use super::*;

const REFERENCE: &str = "1800000000000000a37f4b22090000d02474c1da411a0d627261696e2e4576656e743a324e1a1ea4\
    2600000000000000734fe300090000e02474c1da4110ac022a180a0b0a046c6f737315000020400a090a026c72156f12833ab2609970";

fn events() -> [EventProto; 2] {
    let value = |tag: &str, value: f32| ValueProto {
        tag: tag.to_owned(),
        simple_value: Some(value),
    };
    [
        EventProto {
            wall_time: 1_795_543_187.25,
            file_version: Some("brain.Event:2".to_owned()),
            ..EventProto::default()
        },
        EventProto {
            wall_time: 1_795_543_187.5,
            step: 300,
            file_version: None,
            summary: Some(SummaryProto {
                value: vec![value("loss", 2.5), value("lr", 0.001)],
            }),
        },
    ]
}

/// Takes a file apart into its payloads, verifying every checksum.
fn payloads(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut payloads = Vec::new();
    while !bytes.is_empty() {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(word(8), masked_crc32c(&bytes[..8]));
        let payload = &bytes[12..12 + length];
        assert_eq!(word(12 + length), masked_crc32c(payload));
        payloads.push(payload.to_vec());
        bytes = &bytes[16 + length..];
    }
    payloads
}

#[test]
fn the_checksum_is_castagnolis() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn records_are_byte_for_byte_those_of_tensorboard() {
    let written: Vec<u8> = events()
        .iter()
        .flat_map(|event| frame(&event.encode_to_vec()))
        .collect();
    let hex: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, REFERENCE);
    let read: Vec<EventProto> = payloads(&written)
        .iter()
        .map(|payload| EventProto::decode(payload.as_slice()).unwrap())
        .collect();
    assert_eq!(read, events());
}

#[test]
fn a_step_is_one_record_of_its_curves() {
    let folder = tempfile::tempdir().unwrap();
    let board = TensorBoard::create(folder.path().join("tensorboard"), "node 0/a").unwrap();
    let again = TensorBoard::create(folder.path().join("tensorboard"), "node 0/a").unwrap();
    assert_ne!(board.path(), again.path());
    let name = board.path().file_name().unwrap().to_str().unwrap();
    assert!(
        name.starts_with("events.out.tfevents.") && name.contains(".node_0_a."),
        "{name}"
    );
    let metrics = StepMetrics {
        step: 12,
        loss: 3.25,
        grad_norm: 0.5,
        lr: 0.25,
        tokens: 64,
        tokens_per_second: 128.0,
        step_seconds: 0.5,
        time: "2026-11-24T17:59:47.250Z".into(),
        validation_loss: Some(4.0),
        expert_load: Some(1.5),
    };
    board.step(&metrics).unwrap();
    board
        .scalars(13, UNIX_EPOCH + Duration::from_secs(5), &[("extra", 1.0)])
        .unwrap();
    let payloads = payloads(&std::fs::read(board.path()).unwrap());
    let event = |index: usize| EventProto::decode(payloads[index].as_slice()).unwrap();
    assert_eq!(event(0).file_version.as_deref(), Some("brain.Event:2"));
    assert_eq!((event(1).step, event(1).wall_time), (12, 1_795_543_187.25));
    let values: Vec<(String, f32)> = event(1)
        .summary
        .unwrap()
        .value
        .into_iter()
        .map(|value| (value.tag, value.simple_value.unwrap()))
        .collect();
    let expected = [
        ("loss", 3.25),
        ("grad_norm", 0.5),
        ("lr", 0.25),
        ("tokens_per_second", 128.0),
        ("validation_loss", 4.0),
        ("expert_load", 1.5),
    ];
    assert_eq!(values, expected.map(|(tag, value)| (tag.to_owned(), value)));
    assert_eq!((event(2).step, event(2).wall_time), (13, 5.0));
}
