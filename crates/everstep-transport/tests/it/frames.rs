//! Frames and the control stream between good peers.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::Poll;

use bytes::Bytes;
use everstep_transport::{CloseReason, RecvError, SendError, TransportOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::support::{hello, pair};

/// Bytes that differ by position and seed.
fn pattern(len: usize, seed: u8) -> Bytes {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed)
        .collect::<Vec<u8>>()
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_every_size_come_back_whole_and_aligned() {
    let pair = pair(TransportOptions::default()).await;
    assert_eq!(
        (pair.at_a.peer(), pair.at_b.peer()),
        (&hello("b"), &hello("a"))
    );
    let echo = tokio::spawn(async move {
        while let Ok(frame) = pair.at_b.recv().await {
            pair.at_b.send(&frame.header, frame.payload).await.unwrap();
        }
    });
    let sizes = [
        0,
        1,
        2,
        15,
        16,
        17,
        100,
        1199,
        60_000,
        65_537,
        1 << 20,
        (4 << 20) + 3,
        64 << 20,
    ];
    for (index, &size) in sizes.iter().enumerate() {
        let payload = pattern(size, index as u8);
        let header = pattern(index * 5000, 99);
        pair.at_a.send(&header, payload.clone()).await.unwrap();
        let frame = pair.at_a.recv().await.unwrap();
        assert_eq!(frame.header, header, "{size}");
        assert!(frame.payload == payload, "payload of {size} bytes differs");
        assert!(frame.header.is_empty() || (frame.header.as_ptr() as usize).is_multiple_of(16));
        assert!(frame.payload.is_empty() || (frame.payload.as_ptr() as usize).is_multiple_of(64));
    }
    pair.at_a.close();
    echo.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_in_pieces_arrive_in_one() {
    let pair = pair(TransportOptions::default()).await;
    let pieces = vec![
        pattern(10, 1),
        Bytes::new(),
        pattern(100_000, 2),
        pattern(1, 3),
    ];
    let whole: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
    pair.at_a.send(b"h", pieces).await.unwrap();
    assert_eq!(pair.at_b.recv().await.unwrap().payload, whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn four_senders_at_once_lose_and_mix_nothing() {
    const FRAMES: u32 = 100;
    let pair = pair(TransportOptions::default()).await;
    let mut senders = JoinSet::new();
    for sender in 0..4_u32 {
        let at_a = pair.at_a.clone();
        senders.spawn(async move {
            for index in 0..FRAMES {
                let header = [sender.to_le_bytes(), index.to_le_bytes()].concat();
                let size = (index as usize * 7919) % 300_000;
                at_a.send(&header, pattern(size, (sender * FRAMES + index) as u8))
                    .await
                    .unwrap();
            }
        });
    }
    let mut seen = BTreeMap::new();
    for _ in 0..4 * FRAMES {
        let frame = pair.at_b.recv().await.unwrap();
        let (sender, index) = frame.header.split_at(4);
        let sender = u32::from_le_bytes(sender.try_into().unwrap());
        let index = u32::from_le_bytes(index.try_into().unwrap());
        let expected = pattern(
            (index as usize * 7919) % 300_000,
            (sender * FRAMES + index) as u8,
        );
        assert!(frame.payload == expected, "sender {sender}, frame {index}");
        *seen.entry((sender, index)).or_insert(0) += 1;
    }
    senders.join_all().await;
    assert_eq!(seen.len(), 4 * FRAMES as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_stream_moves_while_frames_cannot() {
    let options = TransportOptions {
        queue_frames: 2,
        queue_bytes: 1 << 20,
        ..TransportOptions::default()
    };
    let pair = pair(options).await;
    // Made before, because a task that computes for long keeps the connection's own tasks from running.
    let base = pattern((16 << 20) + 32, 0);
    let payload = |sender: u8| base.slice(usize::from(sender)..usize::from(sender) + (16 << 20));
    // Nobody takes frames out at b: the queue, the streams and the windows fill up, and the senders get stuck.
    let mut senders = JoinSet::new();
    for sender in 0..32 {
        let (at_a, payload) = (pair.at_a.clone(), payload(sender));
        senders.spawn(async move { at_a.send(&[sender], payload).await });
    }
    let (mut a_read, mut a_write) = pair.at_a.control().unwrap();
    let (mut b_read, mut b_write) = pair.at_b.control().unwrap();
    assert!(pair.at_a.control().is_none());
    let echo = tokio::spawn(async move {
        let mut buffer = [0; 8];
        while b_read.read_exact(&mut buffer).await.is_ok() {
            b_write.write_all(&buffer).await.unwrap();
        }
    });
    for round in 0..500_u64 {
        a_write.write_all(&round.to_le_bytes()).await.unwrap();
        assert_eq!(a_read.read_u64_le().await.unwrap(), round);
    }
    let stuck = senders.len();
    while senders.try_join_next().is_some() {}
    assert!(
        !senders.is_empty(),
        "all {stuck} senders finished though nobody received"
    );

    // Once somebody does, everything arrives, and control goes on in between.
    let mut seen = [false; 32];
    for round in 0..32_u64 {
        let frame = pair.at_b.recv().await.unwrap();
        assert!(frame.payload == payload(frame.header[0]));
        assert!(!std::mem::replace(
            &mut seen[usize::from(frame.header[0])],
            true
        ));
        a_write.write_all(&round.to_le_bytes()).await.unwrap();
        assert_eq!(a_read.read_u64_le().await.unwrap(), round);
    }
    for sent in senders.join_all().await {
        sent.unwrap();
    }
    drop((a_read, a_write));
    echo.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_that_is_dropped_half_way_withdraws_its_frame() {
    let pair = pair(TransportOptions::default()).await;
    // More than the windows hold, and nobody receives: the call cannot finish by itself.
    let payload = pattern(200 << 20, 1);
    let mut send = Box::pin(pair.at_a.send(b"withdrawn", payload));
    poll_fn(|cx| {
        assert!(send.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    drop(send);
    for index in 0..40_u8 {
        pair.at_a
            .send(&[index], pattern(1000, index))
            .await
            .unwrap();
        let frame = pair.at_b.recv().await.unwrap();
        assert_eq!(frame.header[..], [index]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_is_refused_before_it_is_sent() {
    let options = TransportOptions {
        payload_bytes_max: 1000,
        ..TransportOptions::default()
    };
    let pair = pair(options).await;
    let long = pair.at_a.send(&vec![0; (64 << 10) + 1], Bytes::new()).await;
    assert!(matches!(long, Err(SendError::HeaderTooLong(65_537))));
    let long = pair.at_a.send(b"", pattern(1001, 0)).await;
    assert!(matches!(
        long,
        Err(SendError::PayloadTooLong {
            payload_bytes: 1001,
            payload_bytes_max: 1000
        })
    ));
    pair.at_a
        .send(&vec![0; 64 << 10], pattern(1000, 0))
        .await
        .unwrap();
    assert_eq!(pair.at_b.recv().await.unwrap().header.len(), 64 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_end_is_told_from_a_loss() {
    let pair = pair(TransportOptions::default()).await;
    pair.at_a.close();
    assert_eq!(pair.at_a.closed().await, CloseReason::Local);
    assert_eq!(pair.at_b.closed().await, CloseReason::Peer);
    assert_eq!(pair.at_b.close_reason(), Some(CloseReason::Peer));
    assert!(!CloseReason::Peer.is_loss());
    let Err(RecvError::Closed(reason)) = pair.at_b.recv().await else {
        panic!("a frame out of nowhere")
    };
    assert_eq!(reason, CloseReason::Peer);
    assert!(matches!(
        pair.at_b.send(b"", Bytes::new()).await,
        Err(SendError::Closed(CloseReason::Peer))
    ));
    pair.b.close().await;
    assert!(pair.b.accept().await.is_none());
    pair.a.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_last_clone_closes() {
    let pair = pair(TransportOptions::default()).await;
    let clone = pair.at_a.clone();
    drop(pair.at_a);
    assert_eq!(clone.close_reason(), None);
    drop(clone);
    assert_eq!(pair.at_b.closed().await, CloseReason::Peer);
}
