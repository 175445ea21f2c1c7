//! A file without a name that has the form of an object from its first byte on: where it lies on the file system of a `file://` store, it
//! becomes the object by getting a name, and nothing is read and written again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;

use crate::block::{BlockSource, ObjectImage, Part};
use crate::digest::{BlockHasher, Digest, HASH_BYTES};
use crate::direct::DirectWriter;

const VALUE_BYTES: usize = size_of::<f32>();

/// Where blocks wait to be stored. It is gone as soon as nobody has it open, also if this process is killed.
#[derive(Debug)]
pub struct ObjectFile {
    file: Arc<File>,
    header: Vec<u8>,
    /// A file that had a name once gets none again.
    can_be_named: bool,
}

impl ObjectFile {
    /// A file in `dir` for the object that holds `blocks` of `step`, ascending, with room for all of it.
    ///
    /// # Errors
    /// The disk fails or is full.
    pub fn create<B: BlockSource>(
        dir: &Path,
        step: u64,
        blocks: &[B],
    ) -> io::Result<ObjectFileWriter> {
        std::fs::create_dir_all(dir)?;
        let image = ObjectImage::new(step, blocks.iter().collect());
        let (file, can_be_named) = nameless(dir)?;
        let file = Arc::new(file);
        let mut writer = DirectWriter::new(file.clone(), image.len())?;
        let header = image.into_header();
        writer.write_all(&header)?;
        let end = header.len() as u64;
        let object = Arc::new(Self {
            file,
            header,
            can_be_named,
        });
        Ok(ObjectFileWriter {
            object,
            writer,
            end,
        })
    }

    /// What stands before the parts.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header
    }

    /// Makes it the file `path`, on the disk with everything that was written; `false` if that is impossible, because `path` is on
    /// another file system or the file had a name.
    pub(crate) fn link(&self, path: &Path) -> io::Result<bool> {
        if !self.can_be_named {
            return Ok(false);
        }
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(io::ErrorKind::AlreadyExists.into()),
            // Other file systems; systems without /proc, or that forbid it.
            Err(error) => {
                let error = io::Error::from(error);
                tracing::debug!(%error, path = %path.display(), "written again, since it cannot be linked");
                return Ok(false);
            }
        }
        let synced = self.file.sync_all();
        if synced.is_err() {
            let _ = std::fs::remove_file(path);
        }
        synced.map(|()| true)
    }
}

/// A new file without a name, and whether it can get one.
fn nameless(dir: &Path) -> io::Result<(File, bool)> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(dir, flags, Mode::from_raw_mode(0o666)) {
        return Ok((file.into(), true));
    }
    // Some file systems cannot do that, and others say why they fail.
    let path = dir.join(format!("snapshot-{}", crate::run_store::nonce()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok((file, false))
}

/// Writes the blocks of an [`ObjectFile`], in their order.
#[derive(Debug)]
pub struct ObjectFileWriter {
    object: Arc<ObjectFile>,
    writer: DirectWriter,
    end: u64,
}

impl ObjectFileWriter {
    /// Appends a block, which can be read from the file once that is finished.
    ///
    /// # Errors
    /// The disk fails, or the block cannot be read.
    pub fn write<B: BlockSource>(&mut self, block: &B) -> io::Result<FileBlock> {
        let (begin, mut hasher, mut read) = (self.end, BlockHasher::default(), Vec::new());
        for part in Part::ALL {
            let len = block.len(part);
            let hasher = hasher.begin(part, len);
            for start in (0..len).step_by(HASH_BYTES / VALUE_BYTES) {
                let values = start..len.min(start + HASH_BYTES / VALUE_BYTES);
                let bytes = match block.memory(part) {
                    Some(bytes) => &bytes[VALUE_BYTES * values.start..VALUE_BYTES * values.end],
                    None => {
                        read.clear();
                        block.read(part, values, &mut read)?;
                        &read
                    }
                };
                // While they are in the processor's cache.
                hasher.update(bytes);
                self.writer.write_all(bytes)?;
                self.end += bytes.len() as u64;
            }
        }
        Ok(FileBlock {
            object: self.object.clone(),
            begin,
            lens: Part::ALL.map(|part| block.len(part)),
            digests: hasher.finalize(),
        })
    }

    /// Nothing can be read before.
    ///
    /// # Errors
    /// The disk fails.
    pub fn finish(self) -> io::Result<()> {
        self.writer.finish()
    }
}

/// The values of a block in an [`ObjectFile`].
#[derive(Debug)]
pub struct FileBlock {
    object: Arc<ObjectFile>,
    /// Where its parts begin, in bytes.
    begin: u64,
    lens: [usize; 4],
    /// Taken of the memory that was written, so that a file that a disk spoils is not taken for the truth.
    digests: [Digest; 2],
}

impl FileBlock {
    /// The file.
    pub(crate) fn object(&self) -> &Arc<ObjectFile> {
        &self.object
    }

    /// Where in the file its parts begin, in bytes.
    pub(crate) fn begin(&self) -> u64 {
        self.begin
    }

    /// [`BlockSource::len`].
    pub fn len(&self, part: Part) -> usize {
        self.lens[part as usize]
    }

    /// [`BlockSource::digests`].
    pub fn digests(&self) -> [Digest; 2] {
        self.digests
    }

    /// [`BlockSource::read`].
    ///
    /// # Errors
    /// The disk fails, or the file was never finished.
    pub fn read(&self, part: Part, values: Range<usize>, bytes: &mut Vec<u8>) -> io::Result<()> {
        let before: usize = self.lens[..part as usize].iter().sum();
        let at = self.begin + (VALUE_BYTES * (before + values.start)) as u64;
        let old_len = bytes.len();
        bytes.resize(old_len + VALUE_BYTES * values.len(), 0);
        self.object.file.read_exact_at(&mut bytes[old_len..], at)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::{BlockState, CheckpointManifest, RunIdentity, RunStore};

    const NUM_BLOCKS: u32 = 3;

    /// A block that waits in a file.
    struct Waiting(u32, FileBlock);

    impl BlockSource for Waiting {
        fn block(&self) -> u32 {
            self.0
        }

        fn len(&self, part: Part) -> usize {
            self.1.len(part)
        }

        fn read(&self, part: Part, values: Range<usize>, bytes: &mut Vec<u8>) -> io::Result<()> {
            self.1.read(part, values, bytes)
        }

        fn digests(&self) -> Option<[Digest; 2]> {
            Some(self.1.digests())
        }

        fn in_file(&self) -> Option<&FileBlock> {
            Some(&self.1)
        }

        fn extra(&self) -> &str {
            ""
        }
    }

    fn states(value: f32) -> Vec<BlockState> {
        let block = |block| BlockState {
            block,
            // Neither of them fills the disk's blocks.
            param: vec![value + block as f32; 300_001],
            m: vec![value; 300_001],
            v: vec![-value; 7],
            ..BlockState::default()
        };
        (0..NUM_BLOCKS).map(block).collect()
    }

    fn wait_in(dir: &Path, step: u64, states: &[BlockState]) -> Vec<Waiting> {
        let mut writer = ObjectFile::create(dir, step, states).unwrap();
        let mut write = |state: &BlockState| Waiting(state.block, writer.write(state).unwrap());
        let waiting = states.iter().map(&mut write).collect();
        writer.finish().unwrap();
        waiting
    }

    /// Stores and commits `blocks`, and gives the links of each object.
    async fn commit(store: &RunStore, folder: &Path, step: u64, blocks: &[Waiting]) -> Vec<u64> {
        let identity = RunIdentity::any();
        // As a writer does whose first answer got lost.
        store.put_changed(step, "w", blocks).await.unwrap();
        let objects = store.put_changed(step, "w", blocks).await.unwrap();
        let links = objects.iter().map(|object| {
            let file = fs::metadata(folder.join("r").join(&object.key)).unwrap();
            assert_eq!(file.len(), object.bytes);
            file.nlink()
        });
        let links = links.collect();
        let manifest =
            CheckpointManifest::new(step, &identity, NUM_BLOCKS, objects, BTreeMap::new());
        let manifest = manifest.unwrap();
        store.commit(&manifest).await.unwrap();
        assert_eq!(store.verify_objects(&manifest).await.unwrap(), []);
        links
    }

    fn inodes(dir: &Path) -> Vec<u64> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                found.extend(inodes(&entry.path()));
            } else {
                assert!(!entry.file_name().to_str().unwrap().contains('#'));
                found.push(metadata.ino());
            }
        }
        found
    }

    #[tokio::test]
    async fn on_the_same_disk_it_becomes_the_object_and_elsewhere_it_is_copied() {
        // Beside the sources: what is below /tmp is memory in some places, and /dev/shm always.
        let here = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
        for (snapshots, is_linked) in [(here.path(), true), (elsewhere.path(), false)] {
            let bucket = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let url = format!("file://{}", bucket.path().display());
            let store = RunStore::open(&url, "r").unwrap();
            store.put_run("", &RunIdentity::any()).await.unwrap();
            let dir = snapshots.join("snapshots");

            let waiting = wait_in(&dir, 5, &states(1.0));
            let file = waiting[0].1.object().file.metadata().unwrap();
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "no file has a name");
            assert_eq!(commit(&store, bucket.path(), 5, &waiting).await, [1]);
            let is_found = inodes(bucket.path()).contains(&file.ino());
            assert_eq!(is_found, is_linked);

            // Of the next checkpoint one block is new, so that its file is not the object.
            let mut next = states(1.0);
            next[1].param[9] = 7.0;
            let waiting = wait_in(&dir, 6, &next);
            let links = commit(&store, bucket.path(), 6, &waiting).await;
            assert_eq!(links, [1, 1]);
            let ids: Vec<u32> = (0..NUM_BLOCKS).collect();
            let loaded = |step| store.load(step, &ids);
            assert_eq!(loaded(5).await.unwrap().states, states(1.0));
            assert_eq!(loaded(6).await.unwrap().states, next);
        }
    }
}
