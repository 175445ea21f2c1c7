//! Writing and restoring a checkpoint against a plain copy of the same bytes with the same number of streams, in one run and in turn.
//!
//! ```sh
//! cargo bench -p everstep-store --bench throughput                                  # a folder below `target/`
//! cargo bench -p everstep-store --bench throughput -- file:///mnt/disk s3://bucket  # stores; `AWS_*` as for training
//! ```
//!
//! Everstep's side hashes everything on the way, twice when it writes (each block, and the object), and compares digests when it reads. The plain
//! side does neither. Files are synced on both sides after writing, and read from the disk, not from memory.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark that cannot go on should say where"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use everstep_store::{BlockState, CheckpointManifest, Digest, RunIdentity, RunStore};
use futures::StreamExt as _;
use object_store::ObjectStoreExt as _;

/// As in a run with so many shards. Two of them leave no core of a small machine for the hashes.
const STREAMS: [usize; 2] = [1, 2];
const BLOCKS_PER_STREAM: usize = 32;
/// Parameters of a block; with both moments a stream has 384 MiB.
const BLOCK_PARAMS: usize = 1 << 20;
const ROUNDS: usize = 9;
const PIECE_BYTES: usize = 8 << 20;
/// What an upload has on its way at once.
const PARTS_IN_FLIGHT: usize = 4;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let mut urls: Vec<String> = std::env::args().skip(1).collect();
    // What cargo itself adds.
    urls.retain(|argument| argument != "--bench");
    let folder = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    if urls.is_empty() {
        urls.push(format!("file://{}", folder.path().display()));
    }
    let blocks: Vec<_> = (0..STREAMS[1])
        .map(stream_of_blocks)
        .map(Arc::new)
        .collect();
    let plain: Vec<Vec<Bytes>> = blocks.iter().map(|blocks| pieces(blocks)).collect();
    for url in urls {
        for streams in STREAMS {
            runtime.block_on(measure(&url, &blocks[..streams], &plain[..streams]));
        }
    }
}

/// Values whose bytes do not repeat.
fn stream_of_blocks(stream: usize) -> Vec<BlockState> {
    let block = |k: usize| {
        let id = (stream * BLOCKS_PER_STREAM + k) as u32;
        let mut word = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(id) + 1);
        let mut values = || -> Vec<f32> {
            let mut value = || {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                (word >> 40) as f32 * 1e-9
            };
            (0..BLOCK_PARAMS).map(|_| value()).collect()
        };
        BlockState {
            block: id,
            param: values(),
            m: values(),
            v: values(),
            ..BlockState::default()
        }
    };
    (0..BLOCKS_PER_STREAM).map(block).collect()
}

#[derive(Default)]
struct Times {
    plain: Vec<f64>,
    everstep: Vec<f64>,
}

impl Times {
    fn report(&mut self, what: &str, mib: f64) {
        self.plain.sort_by(f64::total_cmp);
        self.everstep.sort_by(f64::total_cmp);
        for (name, at) in [("best", 0), ("median", self.plain.len() / 2)] {
            let (everstep, plain) = (mib / self.everstep[at], mib / self.plain[at]);
            println!(
                "  {what}, {name}: {everstep:.0} MiB/s, plain copy {plain:.0} MiB/s, ratio {:.2}",
                everstep / plain
            );
        }
    }
}

async fn measure(url: &str, blocks: &[Arc<Vec<BlockState>>], streams: &[Vec<Bytes>]) {
    let mib =
        (streams.len() * BLOCKS_PER_STREAM * 3 * BLOCK_PARAMS * 4) as f64 / f64::from(1 << 20);
    let run = format!("throughput-{}", streams.len());
    let store = RunStore::open(url, &run).unwrap();
    let identity = identity(&run);
    store.put_run("", &identity).await.unwrap();
    let folder = url.strip_prefix("file://").map(PathBuf::from);
    let (mut writes, mut reads) = (Times::default(), Times::default());
    for round in 1..=ROUNDS {
        let step = round as u64;
        let plain = async || match &folder {
            Some(folder) => write_files(folder, round, streams),
            None => write_objects(&store, streams).await,
        };
        let everstep = || write_checkpoint(&store, &identity, step, blocks);
        // Who comes second finds other caches.
        if round % 2 == 0 {
            writes.plain.push(seconds(plain()).await);
            writes.everstep.push(seconds(everstep()).await);
        } else {
            writes.everstep.push(seconds(everstep()).await);
            writes.plain.push(seconds(plain()).await);
        }
        if let Some(folder) = &folder {
            forget(folder);
        }
        let plain = async || match &folder {
            Some(folder) => read_files(folder, round, streams.len()),
            None => read_objects(&store, streams.len()).await,
        };
        reads.plain.push(seconds(plain()).await);
        reads
            .everstep
            .push(seconds(restore(&store, step, streams.len())).await);
        store.prune(1).await.unwrap();
        if let Some(folder) = &folder {
            remove_files(folder, round - 1, streams.len());
        }
    }
    println!(
        "{url}: {mib:.0} MiB, {} streams, {ROUNDS} rounds",
        streams.len()
    );
    writes.report("write", mib);
    reads.report("restore", mib);
    for stream in 0..streams.len() {
        let _ = store.objects().delete(&plain_key(stream)).await;
    }
}

fn identity(run: &str) -> RunIdentity {
    let digest = Digest::of(b"throughput");
    RunIdentity {
        run: run.to_owned(),
        seed: 1,
        configuration: digest,
        dataset: digest,
        tokenizer: digest,
        layout: digest,
        determinism: "strict".to_owned(),
        environment: BTreeMap::new(),
    }
}

async fn seconds(work: impl Future<Output = ()>) -> f64 {
    let begin = Instant::now();
    work.await;
    begin.elapsed().max(Duration::from_micros(1)).as_secs_f64()
}

/// The little-endian bytes of a block, as both sides send them.
fn bytes_of(block: &BlockState) -> impl Iterator<Item = u8> {
    let parts = [&block.param, &block.m, &block.v];
    parts
        .into_iter()
        .flatten()
        .flat_map(|value| value.to_le_bytes())
}

/// A stream's bytes in pieces; made before the clock starts.
fn pieces(blocks: &[BlockState]) -> Vec<Bytes> {
    let bytes: Bytes = blocks.iter().flat_map(bytes_of).collect::<Vec<u8>>().into();
    (0..bytes.len())
        .step_by(PIECE_BYTES)
        .map(|from| bytes.slice(from..bytes.len().min(from + PIECE_BYTES)))
        .collect()
}

fn plain_file(folder: &Path, round: usize, stream: usize) -> PathBuf {
    folder.join(format!("plain-{round}-{stream}"))
}

/// As with checkpoints, the one before goes when the next one is there: both sides write where the disk has nothing yet.
fn remove_files(folder: &Path, round: usize, streams: usize) {
    for stream in 0..streams {
        let _ = std::fs::remove_file(plain_file(folder, round, stream));
    }
}

fn plain_key(stream: usize) -> object_store::path::Path {
    format!("plain-{stream}").into()
}

fn write_files(folder: &Path, round: usize, streams: &[Vec<Bytes>]) {
    std::thread::scope(|scope| {
        for (stream, pieces) in streams.iter().enumerate() {
            scope.spawn(move || {
                let mut file = File::create(plain_file(folder, round, stream)).unwrap();
                for piece in pieces {
                    file.write_all(piece).unwrap();
                }
                file.sync_all().unwrap();
            });
        }
    });
}

fn read_files(folder: &Path, round: usize, streams: usize) {
    std::thread::scope(|scope| {
        for stream in 0..streams {
            scope.spawn(move || {
                let mut bytes = Vec::new();
                let mut file = File::open(plain_file(folder, round, stream)).unwrap();
                file.read_to_end(&mut bytes).unwrap();
                std::hint::black_box(bytes);
            });
        }
    });
}

async fn write_objects(store: &RunStore, streams: &[Vec<Bytes>]) {
    let write = async |(stream, pieces): (usize, &Vec<Bytes>)| {
        let mut upload = store
            .objects()
            .put_multipart(&plain_key(stream))
            .await
            .unwrap();
        let parts: Vec<_> = pieces
            .iter()
            .map(|piece| upload.put_part(piece.clone().into()))
            .collect();
        let parts: Vec<_> = futures::stream::iter(parts)
            .buffered(PARTS_IN_FLIGHT)
            .collect()
            .await;
        parts.into_iter().for_each(Result::unwrap);
        upload.complete().await.unwrap();
    };
    futures::future::join_all(streams.iter().enumerate().map(write)).await;
}

async fn read_objects(store: &RunStore, streams: usize) {
    let read = async |stream| {
        let object = store.objects().get(&plain_key(stream)).await.unwrap();
        std::hint::black_box(object.bytes().await.unwrap());
    };
    futures::future::join_all((0..streams).map(read)).await;
}

/// As a run does it: every shard writes its blocks, each in its own task, then the coordinator commits.
async fn write_checkpoint(
    store: &RunStore,
    identity: &RunIdentity,
    step: u64,
    blocks: &[Arc<Vec<BlockState>>],
) {
    let writers = blocks.iter().enumerate().map(|(stream, blocks)| {
        let (store, blocks) = (store.clone(), Arc::clone(blocks));
        tokio::spawn(async move {
            store
                .put_blocks(step, &format!("shard-{stream}"), &blocks)
                .await
                .unwrap()
        })
    });
    let objects = futures::future::try_join_all(writers).await.unwrap();
    let manifest = {
        let num_blocks = (blocks.len() * BLOCKS_PER_STREAM) as u32;
        CheckpointManifest::new(step, identity, num_blocks, objects, BTreeMap::new()).unwrap()
    };
    store.commit(&manifest).await.unwrap();
}

async fn restore(store: &RunStore, step: u64, streams: usize) {
    let readers = (0..streams).map(|stream| {
        let store = store.clone();
        tokio::spawn(async move {
            let first = (stream * BLOCKS_PER_STREAM) as u32;
            let blocks: Vec<u32> = (first..first + BLOCKS_PER_STREAM as u32).collect();
            std::hint::black_box(store.load_blocks(step, &blocks).await.unwrap());
        })
    });
    for reader in futures::future::join_all(readers).await {
        reader.unwrap();
    }
}

/// The next read of what lies in `folder` comes from the disk.
fn forget(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            forget(&path);
        } else {
            let file = File::open(path).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
    }
}
