use super::*;

const HELLO: LaneHello = LaneHello {
    process: 3,
    to_incarnation: 9,
};

async fn lane() -> (LaneSender, LaneReceiver) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let theirs = UnixStream::from_std(theirs).unwrap();
    let (sender, receiver) = tokio::join!(
        LaneSender::open(ours, HELLO),
        LaneReceiver::accept(theirs, HELLO.to_incarnation, FrameLimits::default())
    );
    (sender.unwrap(), receiver.unwrap())
}

fn payload(len: usize) -> Bytes {
    (0..len).map(|k| (k % 249) as u8).collect()
}

#[tokio::test]
async fn frames_of_any_length_arrive_in_order() {
    let (mut sender, mut receiver) = lane().await;
    assert_eq!(receiver.from(), HELLO);
    // Below, at and above a piece and the ring, so that it wraps at all sorts of places.
    let lens = [
        0,
        1,
        PIECE_BYTES - 1,
        PIECE_BYTES,
        3 * PIECE_BYTES + 5,
        RING_BYTES + 3,
        100,
        40 << 20,
    ];
    let sending = async {
        for len in lens {
            let bytes = payload(len);
            let pieces = vec![bytes.slice(..len / 3), bytes.slice(len / 3..)];
            let header = format!("{len} bytes");
            sender.send(header.as_bytes(), pieces).await.unwrap();
        }
        drop(sender);
    };
    let receiving = async {
        for len in lens {
            let frame = receiver.recv().await.unwrap().unwrap();
            assert_eq!(frame.header, format!("{len} bytes"));
            assert!(frame.payload == payload(len), "{len}");
        }
        assert_eq!(receiver.recv().await.unwrap(), None);
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn many_small_frames_need_no_sender_that_goes_on() {
    const NUM_FRAMES: u32 = 10_000;
    let (mut sender, mut receiver) = lane().await;
    let sending = async {
        for number in 0..NUM_FRAMES {
            sender
                .send(&number.to_le_bytes(), Bytes::new())
                .await
                .unwrap();
        }
        // The lane stays open, and nobody uses it.
    };
    let receiving = async {
        for number in 0..NUM_FRAMES {
            let frame = receiver.recv().await.unwrap().unwrap();
            assert_eq!(frame.header, number.to_le_bytes()[..]);
        }
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn a_sender_that_dies_within_a_frame_leaves_no_frame() {
    let (mut sender, mut receiver) = lane().await;
    // More than the ring holds, so it cannot be done before anything is taken out.
    let bytes = payload(2 * RING_BYTES);
    let sent = tokio::select! {
        biased;
        sent = sender.send(b"h", bytes) => Some(sent),
        () = std::future::ready(()) => None,
    };
    assert!(sent.is_none());
    drop(sender);
    let error = receiver.recv().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_receiver_that_dies_is_noticed() {
    let (mut sender, receiver) = lane().await;
    drop(receiver);
    sender
        .send(b"h", payload(2 * RING_BYTES))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn a_ring_that_changed_is_a_frame_that_is_refused() {
    // In the magic, and in the payload's length.
    for place in [0, 17] {
        let (mut sender, mut receiver) = lane().await;
        sender.send(b"h", payload(5000)).await.unwrap();
        sender.ring.write(place, b"x");
        receiver.recv().await.unwrap_err();
    }
}

#[test]
fn memory_that_could_go_away_is_no_ring() {
    let (_, sealed) = Ring::create().unwrap();
    sealed.set_len(10).unwrap_err();
    Ring::open(sealed.into()).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(RING_BYTES as u64).unwrap();
    Ring::open(file.into()).unwrap_err();
}

#[tokio::test]
async fn nobody_else_is_let_in() {
    let accept = async |hello: Vec<u8>| {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        io::Write::write_all(&mut &ours, &hello).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let theirs = UnixStream::from_std(theirs).unwrap();
        LaneReceiver::accept(theirs, 9, FrameLimits::default()).await
    };
    for hello in [HELLO.to_bytes().to_vec(), vec![0; HELLO_BYTES], vec![0; 3]] {
        accept(hello).await.unwrap_err();
    }
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let theirs = UnixStream::from_std(theirs).unwrap();
    let (sender, receiver) = tokio::join!(
        LaneSender::open(ours, HELLO),
        LaneReceiver::accept(theirs, 10, FrameLimits::default())
    );
    assert!(sender.is_err() && receiver.is_err());
}
