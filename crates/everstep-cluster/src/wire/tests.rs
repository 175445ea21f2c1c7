use std::fmt::Write as _;
use std::sync::Arc;

use everstep_data::TokenBatch;
use everstep_optim::ComputeDtype;
use everstep_protocol::policy::History;
use everstep_protocol::{
    BlockStatus, Decision, Digest, Epoch, EvaluationSums, GradientReport, Lineage, Member, Message,
    Placement, Repair, Role, SlotRange, Status, Step, Task, Testimony, View, ViewId,
};

use super::*;
use crate::topology::ActorRole;

/// One line per message: its name, its archive and its payload in hexadecimal. Lines are added, never changed.
const GOLDEN: &str = include_str!("golden-4.txt");

fn envelope() -> Envelope {
    Envelope {
        run_id: 7,
        from: ActorAddress {
            role: ActorRole::Worker,
            index: 1,
        },
        from_incarnation: 65_537,
        to: ActorAddress {
            role: ActorRole::Coordinator,
            index: 0,
        },
        to_incarnation: None,
        trace: TraceContext {
            trace_id: [1; 16],
            span_id: [2; 8],
            flags: 1,
        },
    }
}

fn member(role: Role, index: u32) -> Member {
    Member {
        role,
        index,
        incarnation: 5,
    }
}

/// At least one message of every kind, and every form of the parts that have several.
fn samples() -> Vec<(&'static str, ClusterMessage)> {
    let (epoch, lineage, step, version) = (Epoch(3), Lineage(2), Step(41), Step(42));
    let view = ViewId { epoch, number: 9 };
    let range = SlotRange { start: 4, end: 8 };
    let history = History {
        num_losses: 5,
        loss_mean: 2.25,
        loss_variance: 0.125,
        num_skipped: 1,
    };
    let report = GradientReport {
        squared_norm: 0.5,
        finite: true,
        loss_sum: 1.25,
        tokens: 6,
        load_excess: 0.75,
        history,
    };
    let decision = Decision {
        apply: true,
        scale: 0.25,
        gradient_norm: 1.5,
        loss: 2.5,
        tokens: 6,
        load_excess: 1.5,
        is_spike: false,
        history,
    };
    let gradient = || Gradient::new(vec![1.0_f32, -2.0], 1.25, 6);
    let placement = Placement {
        primary: member(Role::Shard, 0),
        backups: vec![member(Role::Shard, 1)],
        joining: vec![member(Role::Shard, 2)],
    };
    let whole_view = View {
        epoch,
        number: 9,
        leader: member(Role::Coordinator, 0),
        lineage,
        restored_from: Step(40),
        repair: Some(Repair {
            from: step,
            recompute: false,
        }),
        quarantined: vec![member(Role::Worker, 2)],
        placements: vec![placement],
    };
    let blocks = vec![
        BlockStatus {
            block: 0,
            version,
            last: Some(report),
            reduced: None,
        },
        BlockStatus {
            block: 1,
            version,
            last: None,
            reduced: Some(report),
        },
    ];
    let digest = Digest([1, 2]);
    let testimonies = || {
        vec![Testimony {
            slot: 4,
            worker: member(Role::Worker, 1),
            digest,
        }]
    };
    let shard = Status::Shard {
        lineage,
        blocks,
        quarantined: vec![member(Role::Worker, 2)],
    };
    let worker = Status::Worker {
        lineage,
        step,
        held: vec![range],
    };
    let state = BlockState {
        first_moment: vec![3.0_f32].into(),
        second_moment: vec![4.0_f32].into(),
        average: vec![5.0_f32, 6.0].into(),
        parameters: vec![2.0_f32].into(),
        history,
    };
    let wide = FloatBuffer::from(vec![1.0_f32, -2.0]);
    let parameters = |dtype| Message::Parameters {
        version,
        block: 1,
        parameters: Parameters::from_master(&wide, dtype),
    };
    let protocol: Vec<(&'static str, StepMessage)> = vec![
        ("announce", Message::Announce { epoch }),
        (
            "hello_shard",
            Message::Hello {
                epoch,
                status: shard,
            },
        ),
        (
            "hello_worker",
            Message::Hello {
                epoch,
                status: worker,
            },
        ),
        ("expelled", Message::Expelled { epoch }),
        ("view", Message::View(whole_view)),
        ("view_ready", Message::ViewReady { view }),
        (
            "lease",
            Message::Lease {
                epoch,
                lineage,
                step,
                tasks: vec![
                    Task::Slot(3),
                    Task::Evaluate(1),
                    Task::Audit { slot: 3, run: 2 },
                ],
            },
        ),
        ("delivered", Message::Delivered { view, step, range }),
        (
            "evaluated",
            Message::Evaluated {
                step,
                chunk: 1,
                sums: EvaluationSums {
                    loss_sum: 1.25,
                    tokens: 6,
                    expert_choices: vec![9, 3],
                },
            },
        ),
        (
            "reduced",
            Message::Reduced {
                view,
                step,
                block: 1,
                report,
                testimonies: testimonies(),
            },
        ),
        (
            "decide",
            Message::Decide {
                view,
                lineage,
                step,
                decision,
                snapshot: true,
            },
        ),
        ("applied", Message::Applied { lineage, step }),
        (
            "snapshot",
            Message::Snapshot {
                epoch,
                version,
                blocks: vec![0, 1],
            },
        ),
        (
            "stored",
            Message::Stored {
                version,
                blocks: vec![0, 1],
                object: b"object".to_vec(),
            },
        ),
        ("finish", Message::Finish { epoch }),
        (
            "pull",
            Message::Pull {
                version,
                blocks: vec![0, 1],
            },
        ),
        ("parameters_float32", parameters(ComputeDtype::Float32)),
        ("parameters_bfloat16", parameters(ComputeDtype::Bfloat16)),
        (
            "partial",
            Message::Partial {
                lineage,
                step,
                range,
                block: 1,
                gradient: gradient(),
                digests: vec![(4, digest)],
            },
        ),
        (
            "partial_ack",
            Message::PartialAck {
                lineage,
                step,
                range,
                block: 1,
            },
        ),
        (
            "replicate",
            Message::Replicate {
                lineage,
                step,
                block: 1,
                gradient: gradient(),
                testimonies: testimonies(),
            },
        ),
        (
            "replicate_ack",
            Message::ReplicateAck {
                lineage,
                step,
                block: 1,
                testimonies: testimonies(),
            },
        ),
        ("seed_request", Message::SeedRequest { lineage, block: 1 }),
        (
            "seed",
            Message::Seed {
                lineage,
                block: 1,
                version,
                last: Some(report),
                state,
            },
        ),
        (
            "seeded",
            Message::Seeded {
                lineage,
                block: 1,
                version,
            },
        ),
    ];
    let audited = Message::Audited {
        step,
        slot: 4,
        run: 1,
        digest,
    };
    let batch = TokenBatch {
        inputs: vec![10, 11],
        targets: vec![11, 12],
        rows: 1,
        columns: 2,
    };
    let mut samples: Vec<_> = protocol
        .into_iter()
        .map(|(name, message)| (name, ClusterMessage::Protocol(message)))
        .collect();
    samples.push(("audited", ClusterMessage::Protocol(audited)));
    let reason = "3 steps in a row".to_owned();
    samples.push(("failed", ClusterMessage::Failed { reason }));
    samples.push((
        "batch_request",
        ClusterMessage::BatchRequest {
            step,
            task: Task::Slot(3),
        },
    ));
    samples.push((
        "batch",
        ClusterMessage::Batch {
            step,
            task: Task::Evaluate(1),
            batch: Arc::new(batch),
        },
    ));
    samples.push((
        "drain",
        ClusterMessage::Drain {
            processes: vec![(1, 2), (3, 1)],
            seconds_left: Some(30),
        },
    ));
    samples.push(("released", ClusterMessage::Released));
    samples
}

fn decode_any(encoded: &Encoded) -> Result<(Envelope, ClusterMessage), WireError> {
    match encoded {
        Encoded::Control(bytes) => decode_control(bytes),
        Encoded::Tensor { header, payload } => decode_tensor(header, payload.clone()),
    }
}

fn header_of(encoded: &Encoded) -> &Bytes {
    match encoded {
        Encoded::Control(header) | Encoded::Tensor { header, .. } => header,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn golden_line(name: &str, encoded: &Encoded) -> String {
    let payload = match encoded {
        Encoded::Control(_) => "-".to_owned(),
        Encoded::Tensor { payload, .. } => hex(payload),
    };
    format!("{name} {} {payload}", hex(header_of(encoded)))
}

#[test]
fn every_message_comes_back_as_it_was() {
    for (name, message) in samples() {
        let encoded = encode(&envelope(), message.clone());
        let (seen_envelope, seen) =
            decode_any(&encoded).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(seen_envelope, envelope());
        // The second encoding compares the numbers bit by bit, the text everything else.
        assert_eq!(encode(&envelope(), seen.clone()), encoded, "{name}");
        if matches!(encoded, Encoded::Control(_)) {
            assert_eq!(format!("{seen:?}"), format!("{message:?}"));
        }
    }
}

#[test]
fn every_message_has_the_bytes_it_always_had() {
    let lines: Vec<String> = samples()
        .into_iter()
        .map(|(name, message)| golden_line(name, &encode(&envelope(), message)))
        .collect();
    let text = lines.join("\n") + "\n";
    assert!(
        text == GOLDEN,
        "the wire format changed; if that is meant, raise VERSION and keep this as golden-<version>.txt:\n{text}"
    );
}

#[test]
fn payloads_are_raw_little_endian_numbers() {
    let gradient = Gradient::new(vec![1.0_f32, -2.0], 0.0, 1);
    let message = Message::Replicate {
        lineage: Lineage(1),
        step: Step(1),
        block: 0,
        gradient,
        testimonies: Vec::new(),
    };
    let Encoded::Tensor { payload, .. } = encode(&envelope(), ClusterMessage::Protocol(message))
    else {
        panic!("no tensor")
    };
    assert_eq!(
        payload,
        [1.0_f32.to_le_bytes(), (-2.0_f32).to_le_bytes()].concat()
    );
}

#[test]
fn damaged_messages_are_refused() {
    assert!(matches!(decode_control(b""), Err(WireError::Prefix { .. })));
    assert!(matches!(
        decode_control(b"EVM\x01rest"),
        Err(WireError::Prefix { .. })
    ));
    for (name, message) in samples() {
        let encoded = encode(&envelope(), message);
        let header = header_of(&encoded);
        let decode = |bytes: &[u8]| match &encoded {
            Encoded::Control(_) => decode_control(bytes),
            Encoded::Tensor { payload, .. } => decode_tensor(bytes, payload.clone()),
        };
        for len in 0..header.len() {
            assert!(decode(&header[..len]).is_err(), "{name}, cut at {len}");
        }
        for at in 0..header.len() {
            let mut changed = header.to_vec();
            changed[at] ^= 1 << (at % 8);
            assert!(decode(&changed).is_err(), "{name}, changed at {at}");
            // A peer that means harm makes the checksum right: the archive may then say something else, or nothing, but never panic.
            if let Some(archive) = changed.get(PREFIX.len() + CHECKSUM_BYTES..) {
                let _ = decode(&seal(archive));
                let _ = decode(&seal(&archive[..archive.len() / 2]));
            }
        }
    }
}

#[test]
fn payloads_must_fit_their_message() {
    for (name, message) in samples() {
        match encode(&envelope(), message) {
            Encoded::Control(header) => {
                let extra = decode_tensor(&header, Bytes::from_static(&[0; 8]));
                assert!(
                    matches!(extra, Err(WireError::Payload(_))),
                    "{name} took a payload"
                );
            }
            Encoded::Tensor { header, payload } => {
                assert!(
                    matches!(decode_control(&header), Err(WireError::Payload(_))),
                    "{name} took no payload"
                );
                let odd = payload.slice(..payload.len() - 1);
                assert!(
                    matches!(decode_tensor(&header, odd), Err(WireError::Payload(_))),
                    "{name} took half a number"
                );
            }
        }
    }
}

#[test]
fn fields_with_impossible_values_are_refused() {
    let ack = |range| {
        let message = Message::PartialAck {
            lineage: Lineage(1),
            step: Step(1),
            range,
            block: 0,
        };
        decode_any(&encode(&envelope(), ClusterMessage::Protocol(message)))
    };
    assert!(ack(SlotRange { start: 1, end: 2 }).is_ok());
    assert!(matches!(
        ack(SlotRange { start: 2, end: 2 }),
        Err(WireError::Field {
            field: "range.end",
            value: 2
        })
    ));
}
