//! The tier between memory and the store: what the processes of a node have written lately, in files of that node.
//!
//! A file holds the very bytes of an object and is only ever read at the places that a committed manifest names, and compared with its
//! digests. So nothing has to be synced, sealed or cleaned after a crash: what does not verify is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tokio::io::AsyncWriteExt as _;

use crate::block::{BlockSource, ObjectImage};

/// Bytes written at once.
const PIECE_BYTES: usize = 1 << 20;
/// What the name of a file ends with until it is whole.
const UNFINISHED: &str = ".unfinished";

/// The files of one node.
#[derive(Debug)]
pub(crate) struct Near {
    root: PathBuf,
    /// Where this process writes.
    own: PathBuf,
    keep: usize,
    /// The objects of each checkpoint that this process took part in, the newest ones.
    kept: Mutex<BTreeMap<u64, BTreeSet<String>>>,
}

impl Near {
    /// Files below `root`, which all processes of a node share; this one's lie in the folder `process`, and are those of its last `keep`
    /// checkpoints, and of those before a restart until there are so many again.
    pub(crate) fn new(root: &Path, process: &str, keep: usize) -> Self {
        Self {
            root: root.to_owned(),
            own: root.join(process),
            keep,
            kept: Mutex::default(),
        }
    }

    /// Keeps an object of a checkpoint of `step`. A disk that fails or is full costs the copy and nothing else.
    pub(crate) async fn write<B: BlockSource>(
        &self,
        step: u64,
        key: &str,
        image: &ObjectImage<'_, B>,
    ) {
        let name = file_name(key);
        let path = self.own.join(&name);
        // Noted first: another part of the checkpoint may be done meanwhile, and removes what nobody knows of.
        self.note(step, [name.clone()]);
        if tokio::fs::try_exists(&path).await.unwrap_or(false) {
            return;
        }
        let unfinished = self.own.join(name + UNFINISHED);
        if let Err(error) = self.write_to(&path, &unfinished, image).await {
            let path = path.display();
            tracing::warn!(%error, %path, "no copy of a checkpoint's object could be kept on this node");
            let _ = tokio::fs::remove_file(&unfinished).await;
        }
    }

    async fn write_to<B: BlockSource>(
        &self,
        path: &Path,
        unfinished: &Path,
        image: &ObjectImage<'_, B>,
    ) -> io::Result<()> {
        tokio::fs::create_dir_all(&self.own).await?;
        let mut file = tokio::fs::File::create(unfinished).await?;
        let (mut cursor, mut piece) = (image.cursor(), Vec::new());
        while cursor.next_chunk(PIECE_BYTES, &mut piece)? {
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        tokio::fs::rename(unfinished, path).await
    }

    /// Notes that a checkpoint of `step` consists of the objects `keys`, as far as this process is concerned, and removes what is too old.
    pub(crate) fn keep<'a>(&self, step: u64, keys: impl Iterator<Item = &'a str>) {
        let kept = self.note(step, keys.map(file_name));
        if kept.len() < self.keep {
            return;
        }
        let Ok(files) = self.own.read_dir() else {
            return;
        };
        for file in files.flatten() {
            let name = file.file_name();
            let name = name.to_string_lossy();
            let name = name.strip_suffix(UNFINISHED).unwrap_or(&name);
            if !kept.values().any(|names| names.contains(name)) {
                let _ = std::fs::remove_file(file.path());
            }
        }
    }

    /// Adds to what is kept of a step, and gives what is kept of each.
    fn note(
        &self,
        step: u64,
        names: impl IntoIterator<Item = String>,
    ) -> BTreeMap<u64, BTreeSet<String>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.entry(step).or_default().extend(names);
        while kept.len() > self.keep {
            kept.pop_first();
        }
        kept.clone()
    }

    /// An object, if some process of this node has kept it; unverified.
    pub(crate) fn open(&self, key: &str) -> Option<File> {
        let name = file_name(key);
        let folders = self.root.read_dir().ok()?.flatten();
        folders
            .filter_map(|folder| File::open(folder.path().join(&name)).ok())
            .next()
    }
}

/// A key has no other place for folders than its `/`.
fn file_name(key: &str) -> String {
    key.replace('/', "-")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use object_store::ObjectStoreExt as _;
    use tempfile::TempDir;

    use crate::{BlockState, CheckpointManifest, Loaded, RunIdentity, RunStore};

    const NUM_BLOCKS: u32 = 4;

    /// A bucket and a node's disk.
    struct Bench {
        dir: TempDir,
        identity: RunIdentity,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                dir: tempfile::tempdir().unwrap(),
                identity: RunIdentity::any(),
            }
        }

        /// One life of a process.
        async fn process(&self, name: &str, keep: usize) -> RunStore {
            let bucket = self.dir.path().join("bucket");
            let store = RunStore::open(&format!("file://{}", bucket.display()), "r").unwrap();
            store.put_run("", &self.identity).await.unwrap();
            store.with_near_copies(&self.dir.path().join("node"), name, keep)
        }

        async fn commit(&self, store: &RunStore, step: u64, state: &[BlockState]) {
            let objects = store.put_changed(step, "w", state).await.unwrap();
            let manifest =
                CheckpointManifest::new(step, &self.identity, NUM_BLOCKS, objects, BTreeMap::new());
            store.commit(&manifest.unwrap()).await.unwrap();
        }

        fn copies(&self, process: &str) -> Vec<PathBuf> {
            let folder = self.dir.path().join("node").join(process);
            let mut files: Vec<PathBuf> = fs::read_dir(folder)
                .map(|files| files.map(|file| file.unwrap().path()).collect())
                .unwrap_or_default();
            files.sort();
            files
        }

        /// The steps whose objects a process has kept.
        fn steps(&self, process: &str) -> Vec<String> {
            let step = |path: &PathBuf| {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                name.split('-')
                    .nth(1)
                    .unwrap()
                    .trim_start_matches('0')
                    .to_owned()
            };
            self.copies(process).iter().map(step).collect()
        }
    }

    use super::*;

    fn state(value: f32) -> Vec<BlockState> {
        let block = |block| BlockState {
            block,
            param: vec![value + block as f32; 300],
            m: vec![value; 300],
            v: vec![-value; 300],
            extra: format!("{value}"),
            ..BlockState::default()
        };
        (0..NUM_BLOCKS).map(block).collect()
    }

    async fn load(store: &RunStore, step: u64) -> Loaded {
        let all: Vec<u32> = (0..NUM_BLOCKS).collect();
        store.load(step, &all).await.unwrap()
    }

    #[tokio::test]
    async fn what_a_node_has_is_not_asked_of_the_store() {
        let bench = Bench::new();
        let writer = bench.process("shard-0", 1).await;
        bench.commit(&writer, 5, &state(1.0)).await;
        let manifest = writer.load_manifest(5).await.unwrap();
        for object in &manifest.objects {
            let key = object.key.as_str().into();
            writer.objects().delete(&key).await.unwrap();
        }
        // Another process of the node finds it too, and one that keeps nothing does not.
        for reader in ["shard-0", "shard-1"] {
            let loaded = load(&bench.process(reader, 1).await, 5).await;
            assert_eq!((loaded.states, loaded.num_near), (state(1.0), 4));
        }
        let without = bench.process("shard-0", 0).await;
        without.load(5, &[0]).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_copy_that_does_not_verify_is_not_used() {
        type Damage = fn(&Path);
        // How many of four blocks are left.
        let damages: [(&str, usize, Damage); 4] = [
            ("a bit flipped", 3, |path| {
                let mut bytes = fs::read(path).unwrap();
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
                fs::write(path, bytes).unwrap();
            }),
            ("cut short", 1, |path| {
                let len = fs::metadata(path).unwrap().len();
                let file = File::options().write(true).open(path).unwrap();
                file.set_len(len / 2).unwrap();
            }),
            ("a folder", 0, |path| {
                fs::remove_file(path).unwrap();
                fs::create_dir(path).unwrap();
            }),
            ("gone", 0, |path| fs::remove_file(path).unwrap()),
        ];
        for (what, left, damage) in damages {
            let bench = Bench::new();
            let store = bench.process("shard-0", 1).await;
            bench.commit(&store, 5, &state(1.0)).await;
            assert_eq!(load(&store, 5).await.num_near, 4);
            bench.copies("shard-0").iter().for_each(|path| damage(path));
            let loaded = load(&store, 5).await;
            assert_eq!(
                (loaded.states, loaded.num_near),
                (state(1.0), left),
                "{what}"
            );
        }
    }

    #[tokio::test]
    async fn the_newest_are_kept_and_what_they_share() {
        let bench = Bench::new();
        let store = bench.process("shard-0", 2).await;
        for step in 1..=4 {
            bench.commit(&store, step, &state(step as f32)).await;
        }
        assert_eq!(bench.steps("shard-0"), ["3", "4"]);
        // Nothing changes any more.
        for step in 5..=9 {
            bench.commit(&store, step, &state(4.0)).await;
        }
        assert_eq!(bench.steps("shard-0"), ["4"]);
        assert_eq!(load(&store, 9).await.num_near, 4);
        // A restart forgets nothing at once.
        let store = bench.process("shard-0", 2).await;
        bench.commit(&store, 10, &state(10.0)).await;
        assert_eq!(bench.steps("shard-0"), ["10", "4"]);
        bench.commit(&store, 11, &state(11.0)).await;
        assert_eq!(bench.steps("shard-0"), ["10", "11"]);
    }

    #[tokio::test]
    async fn a_part_that_is_done_leaves_the_one_on_its_way() {
        let bench = Bench::new();
        let store = bench.process("shard-0", 1).await;
        let near = store.near.clone().unwrap();
        let state = state(1.0);
        let image = ObjectImage::new(5, state.iter().collect());
        near.write(5, "checkpoints/5/blocks-one.st", &image).await;
        fs::write(near.own.join("checkpoints-5-blocks-one.st.unfinished"), "").unwrap();
        near.keep(5, ["checkpoints/5/blocks-other.st"].into_iter());
        assert_eq!(bench.copies("shard-0").len(), 2);
        near.keep(6, ["checkpoints/6/blocks-one.st"].into_iter());
        assert_eq!(bench.copies("shard-0").len(), 0);
    }

    #[tokio::test]
    async fn a_disk_that_takes_nothing_costs_nothing_else() {
        let bench = Bench::new();
        fs::write(bench.dir.path().join("node"), "no folder").unwrap();
        let store = bench.process("shard-0", 1).await;
        bench.commit(&store, 5, &state(1.0)).await;
        let loaded = load(&store, 5).await;
        assert_eq!((loaded.states, loaded.num_near), (state(1.0), 0));
    }
}
