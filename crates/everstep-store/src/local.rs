//! Blocks in files of this machine, for `file://` and for what a node keeps: written while the disk already writes, and read straight into the
//! memory where they stay.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::block::{BlockSource, BlockState, ObjectImage};
use crate::direct::DirectWriter;
use crate::manifest::BlockEntry;
use crate::object_file::ObjectFile;
use crate::upload::{Buffers, PART_BYTES};

/// Parts that wait for the disk.
const PARTS_WAITING_MAX: usize = 3;

/// What the writer is told.
enum Message {
    Part(Vec<u8>),
    /// All parts were sent: without it, the file is given up.
    End,
}

/// Writes the object `key` below `folder`, where it appears only when it is complete and on the disk.
///
/// A dropped write leaves no file, and one that was killed a file with `#` in its name, as object_store's own do.
pub(crate) async fn write<B: BlockSource>(
    folder: &Path,
    key: &str,
    image: &ObjectImage<'_, B>,
) -> io::Result<()> {
    let (folder, path, len) = (folder.to_owned(), folder.join(key), image.len());
    if let Some(file) = image.file().cloned() {
        let (folder, path) = (folder.clone(), path.clone());
        let linked = tokio::task::spawn_blocking(move || link(&folder, &path, &file));
        if linked.await.expect("linking a file does not panic")? {
            return Ok(());
        }
    }
    let (parts, received) = mpsc::channel(PARTS_WAITING_MAX);
    let buffers = Buffers::default();
    let home = buffers.clone();
    let writer =
        tokio::task::spawn_blocking(move || write_parts(&folder, &path, len, received, &home));
    let mut cursor = image.cursor();
    let mut part = buffers.take();
    while cursor.next_chunk(PART_BYTES as usize, &mut part)? {
        // A writer that failed says why below.
        if parts.send(Message::Part(part)).await.is_err() {
            break;
        }
        part = buffers.take();
    }
    let _ = parts.send(Message::End).await;
    writer.await.expect("writing a file does not panic")
}

fn write_parts(
    folder: &Path,
    path: &Path,
    len: u64,
    mut parts: mpsc::Receiver<Message>,
    buffers: &Buffers,
) -> io::Result<()> {
    let parent = path.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent)?;
    let (file, staged) = stage(path, |staged| File::create_new(staged))?;
    let file = Arc::new(file);
    let mut write = || -> io::Result<bool> {
        let mut writer = DirectWriter::new(file.clone(), len)?;
        while let Some(message) = parts.blocking_recv() {
            let Message::Part(part) = message else {
                writer.finish()?;
                file.sync_all()?;
                std::fs::rename(&staged, path)?;
                return Ok(true);
            };
            writer.write_all(&part)?;
            buffers.give(part);
        }
        Ok(false)
    };
    let written = write();
    if !matches!(written, Ok(true)) {
        // What cannot be removed is collected with what killed writers leave.
        let _ = std::fs::remove_file(&staged);
        return written.map(drop);
    }
    sync_folders(folder, parent)
}

/// Makes a file that waits on this machine the object; `false` if it lies elsewhere.
fn link(folder: &Path, path: &Path, file: &ObjectFile) -> io::Result<bool> {
    let parent = path.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent)?;
    let (linked, staged) = stage(path, |staged| file.link(staged))?;
    if linked {
        std::fs::rename(&staged, path)?;
        // A second attempt finds both names to be one file, which leaves the old one.
        let _ = std::fs::remove_file(&staged);
        sync_folders(folder, parent)?;
    }
    Ok(linked)
}

/// Those from `parent` up to `folder`: they may be new as well.
fn sync_folders(folder: &Path, parent: &Path) -> io::Result<()> {
    for ancestor in parent.ancestors() {
        File::open(ancestor)?.sync_all()?;
        if ancestor == folder {
            break;
        }
    }
    Ok(())
}

/// Creates something beside `path`, with the name that object_store gives to what is not complete, which its lists leave out.
fn stage<T>(path: &Path, create: impl Fn(&Path) -> io::Result<T>) -> io::Result<(T, PathBuf)> {
    let mut number = 0u64;
    loop {
        number += 1;
        let mut staged = path.as_os_str().to_owned();
        staged.push(format!("#{number}"));
        let staged = PathBuf::from(staged);
        match create(&staged) {
            Ok(created) => return Ok((created, staged)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads a block; nothing of it is verified.
///
/// # Errors
/// Also if the file is shorter than the entry claims, for which no memory is taken then.
pub(crate) fn read_block(file: &File, entry: &BlockEntry) -> io::Result<BlockState> {
    let end = entry.end().ok_or(io::ErrorKind::UnexpectedEof)?;
    if end > file.metadata()?.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut at = entry.offset;
    let mut part = |len: u64| {
        let mut values = vec![0.0; len as usize];
        file.read_exact_at(bytemuck::cast_slice_mut(&mut values), at)?;
        at += 4 * len;
        io::Result::Ok(values)
    };
    Ok(BlockState {
        block: entry.block,
        param: part(entry.param_len)?,
        m: part(entry.m_len)?,
        v: part(entry.v_len)?,
        ema: part(entry.ema_len)?,
        extra: entry.extra.clone(),
    })
}
