//! Throughput and latency of frames between two endpoints of one process over loopback, and the speed of the checksum.
#![allow(missing_docs)]

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use everstep_transport::{
    ClusterCa, Connection, Endpoint, FrameLimits, Hello, Identity, LaneHello, LaneReceiver,
    LaneSender, TransportOptions, encode_frame,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// Frames that the sender keeps under way.
const IN_FLIGHT: u64 = 4;

fn endpoint(dir: &std::path::Path, name: &str) -> Endpoint {
    let identity = Identity::load(dir, name).expect("just issued");
    let hello = Hello {
        run_id: 1,
        process: 0,
        name: name.to_owned(),
        incarnation: 1,
    };
    let addr: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    Endpoint::bind(addr, &identity, hello, TransportOptions::default()).expect("a free port")
}

async fn pair() -> (Connection, Connection, [Endpoint; 2]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let ca = ClusterCa::create(dir.path()).expect("an empty folder");
    ca.issue("a", dir.path()).expect("a good name");
    ca.issue("b", dir.path()).expect("a good name");
    let (a, b) = (endpoint(dir.path(), "a"), endpoint(dir.path(), "b"));
    let addr = b.local_addr().expect("bound");
    let (dialled, accepted) = tokio::join!(a.connect(addr, "b"), b.accept());
    (
        dialled.expect("both are good"),
        accepted.expect("open"),
        [a, b],
    )
}

async fn pump(from: &Connection, to: &Connection, payload: &Bytes, frames: u64) {
    let send = async {
        let mut tasks = tokio::task::JoinSet::new();
        for lane in 0..IN_FLIGHT.min(frames) {
            let (from, payload) = (from.clone(), payload.clone());
            let share = frames / IN_FLIGHT + u64::from(lane < frames % IN_FLIGHT);
            tasks.spawn(async move {
                for _ in 0..share {
                    from.send(b"header", payload.clone()).await.expect("open");
                }
            });
        }
        tasks.join_all().await;
    };
    let receive = async {
        for _ in 0..frames {
            black_box(to.recv().await.expect("open"));
        }
    };
    tokio::join!(send, receive);
}

fn frames(c: &mut Criterion) {
    let runtime = Runtime::new().expect("threads");
    let (a, b, _endpoints) = runtime.block_on(pair());

    let mut group = c.benchmark_group("frames");
    for mib in [4_u64, 64] {
        let payload = Bytes::from(vec![1_u8; (mib << 20) as usize]);
        group.throughput(Throughput::Bytes(mib << 20));
        group.bench_function(format!("{mib} MiB"), |bencher| {
            bencher.iter_custom(|frames| {
                let start = Instant::now();
                runtime.block_on(pump(&a, &b, &payload, frames));
                start.elapsed()
            });
        });
    }
    group.throughput(Throughput::Elements(1));
    let small = Bytes::from_static(&[7; 100]);
    group.bench_function("100 B round trip", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                let ((), ()) = tokio::join!(
                    async {
                        a.send(b"ping", small.clone()).await.expect("open");
                        a.recv().await.expect("open");
                    },
                    async {
                        let ping = b.recv().await.expect("open");
                        b.send(b"pong", ping.payload).await.expect("open");
                    }
                );
            });
        });
    });
    let (mut a_read, mut a_write) = a.control().expect("first");
    let (mut b_read, mut b_write) = b.control().expect("first");
    let mut control = |bencher: &mut criterion::Bencher<'_>| {
        bencher.iter(|| {
            runtime.block_on(async {
                let mut buffer = [0; 100];
                let mut answer = [0; 100];
                tokio::join!(
                    async {
                        a_write.write_all(&small).await.expect("open");
                        a_read.read_exact(&mut answer).await.expect("open");
                    },
                    async {
                        b_read.read_exact(&mut buffer).await.expect("open");
                        b_write.write_all(&buffer).await.expect("open");
                    }
                );
            });
        });
    };
    group.bench_function("100 B control round trip", &mut control);
    let (from, to, payload) = (a.clone(), b.clone(), Bytes::from(vec![1_u8; 16 << 20]));
    let load = runtime.spawn(async move {
        loop {
            pump(&from, &to, &payload, 16).await;
        }
    });
    group.bench_function(
        "100 B control round trip, 16 MiB frames flowing",
        &mut control,
    );
    load.abort();
    group.finish();

    drop((a, b));
    lanes(c);

    let payload = [Bytes::from(vec![1_u8; 4 << 20])];
    let mut group = c.benchmark_group("checksum of 4 MiB");
    group.throughput(Throughput::Bytes(4 << 20));
    group.bench_function("CRC-32, used", |bencher| {
        bencher.iter(|| encode_frame(b"header", &payload))
    });
    group.bench_function("BLAKE3, for comparison", |bencher| {
        bencher.iter(|| blake3::hash(&payload[0]))
    });
    group.finish();
}

/// Shared memory, of which each side has a runtime as each process would, against one `memcpy` of the same bytes into fresh memory, which is
/// the least that a receiver needs.
fn lanes(c: &mut Criterion) {
    let [ours, theirs] = [(); 2].map(|()| {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(1).enable_all();
        runtime.build().expect("threads")
    });
    let mut group = c.benchmark_group("shared memory");
    for mib in [4_u64, 64] {
        let payload = Bytes::from(vec![1_u8; (mib << 20) as usize]);
        group.throughput(Throughput::Bytes(mib << 20));
        group.bench_function(format!("{mib} MiB"), |bencher| {
            bencher.iter_custom(|frames| {
                let (from, to) = std::os::unix::net::UnixStream::pair().expect("sockets");
                let hello = LaneHello {
                    process: 0,
                    to_incarnation: 2,
                };
                let payload = payload.clone();
                let sent = ours.spawn(async move {
                    let mut sender = LaneSender::open(from, hello).await.expect("taken");
                    let start = Instant::now();
                    for _ in 0..frames {
                        let sent = sender.send(b"header", payload.clone()).await;
                        sent.expect("open");
                    }
                    start
                });
                theirs
                    .block_on(theirs.spawn(async move {
                        to.set_nonblocking(true).expect("a socket");
                        let to = tokio::net::UnixStream::from_std(to).expect("a socket");
                        let limits = FrameLimits::default();
                        let mut receiver = LaneReceiver::accept(to, 2, limits).await.expect("open");
                        for _ in 0..frames {
                            black_box(receiver.recv().await.expect("open"));
                        }
                        sent.await.expect("no panic").elapsed()
                    }))
                    .expect("no panic")
            });
        });
        group.bench_function(format!("memcpy of {mib} MiB"), |bencher| {
            bencher.iter(|| payload.to_vec());
        });
        let mut target = payload.to_vec();
        group.bench_function(format!("memcpy of {mib} MiB, same memory"), |bencher| {
            bencher.iter(|| target.copy_from_slice(black_box(&payload)));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = frames
}
criterion_main!(benches);
