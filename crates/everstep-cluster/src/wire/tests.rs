use super::*;
use crate::topology::ActorRole;
use everstep_protocol::{Epoch, Message};

fn envelope() -> Envelope {
    Envelope {
        run_id: 7,
        from: ActorAddress { role: ActorRole::Worker, index: 1 },
        from_incarnation: 65_537,
        to: ActorAddress { role: ActorRole::Coordinator, index: 0 },
        to_incarnation: None,
        trace: TraceContext { trace_id: [1; 16], span_id: [2; 8], flags: 1 },
    }
}

#[test]
fn rubbish_is_refused_without_a_panic() {
    assert!(matches!(decode_control(b""), Err(WireError::Prefix { .. })));
    assert!(matches!(decode_control(b"EVM\x02rest"), Err(WireError::Prefix { .. })));
    let Encoded::Control(good) = encode(&envelope(), ClusterMessage::Protocol(Message::Finish { epoch: Epoch(3) })) else { panic!() };
    for len in 0..good.len() {
        assert!(decode_control(&good[..len]).is_err(), "{len}");
    }
}
