//! Writing files past the page cache. Copying into the cache, and collecting from it what nobody reads again, costs the system several
//! times what the disk itself asks of it, and a checkpoint's writer shares its cores with training.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// Bytes written at once.
const PIECE_BYTES: usize = 1 << 20;
/// What every disk takes, in memory and in the file.
const ALIGNMENT: usize = 4096;

/// Writes a new file from front to back: directly where the file system can, and through the page cache elsewhere.
#[derive(Debug)]
pub(crate) struct DirectWriter {
    file: Arc<File>,
    is_direct: bool,
    /// Where the next piece goes.
    at: u64,
    memory: Vec<u8>,
    /// Where in `memory` the piece begins.
    aligned: usize,
    filled: usize,
}

impl DirectWriter {
    /// Begins a file of `len` bytes, which are reserved.
    ///
    /// # Errors
    /// The disk fails or has no room for it.
    pub(crate) fn new(file: Arc<File>, len: u64) -> io::Result<Self> {
        if len > 0 {
            match fallocate(&*file, FallocateFlags::empty(), 0, len) {
                // Not everywhere can it be done.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let memory = vec![0; PIECE_BYTES + ALIGNMENT];
        let aligned = memory.as_ptr().align_offset(ALIGNMENT);
        let is_direct = set_direct(&file, true).is_ok();
        Ok(Self {
            file,
            is_direct,
            at: 0,
            memory,
            aligned,
            filled: 0,
        })
    }

    pub(crate) fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_BYTES - self.filled));
            let begin = self.aligned + self.filled;
            self.memory[begin..begin + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == PIECE_BYTES {
                self.write_piece()?;
            }
        }
        Ok(())
    }

    fn write_piece(&mut self) -> io::Result<()> {
        let piece = self.aligned..self.aligned + self.filled;
        let written = self.file.write_all_at(&self.memory[piece.clone()], self.at);
        let refused = |error: &io::Error| error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
        if self.is_direct && written.as_ref().is_err_and(refused) {
            // A disk that wants more than `ALIGNMENT`.
            self.leave_direct()?;
            self.file.write_all_at(&self.memory[piece], self.at)?;
        } else {
            written?;
        }
        if let (false, Some(len)) = (self.is_direct, NonZeroU64::new(self.filled as u64)) {
            // The disk begins now and not at the end; and memory is not filled with what nobody reads again.
            fadvise(&*self.file, self.at, Some(len), Advice::DontNeed)?;
        }
        self.at += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes what is left, which has no block's length. From then on, the file is read and written as any other.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.leave_direct()?;
        self.write_piece()
    }

    fn leave_direct(&mut self) -> io::Result<()> {
        if self.is_direct {
            set_direct(&self.file, false)?;
            self.is_direct = false;
        }
        Ok(())
    }
}

fn set_direct(file: &File, direct: bool) -> rustix::io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, direct);
    fcntl_setfl(file, flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_any_length_hold_what_was_written_in_any_pieces() {
        // Beside the sources: what is below /tmp is memory in some places.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for len in [
            0,
            1,
            4095,
            4096,
            PIECE_BYTES,
            PIECE_BYTES + 1,
            3 * PIECE_BYTES + 777,
        ] {
            let bytes: Vec<u8> = (0..len).map(|k| (k % 251) as u8).collect();
            let path = dir.path().join(len.to_string());
            let file = Arc::new(File::create(&path).unwrap());
            let mut writer = DirectWriter::new(file, len as u64).unwrap();
            for piece in bytes.chunks(100_003) {
                writer.write_all(piece).unwrap();
            }
            writer.finish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{len}");
        }
    }

    #[test]
    fn a_disk_without_room_says_so_before_anything_is_written() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let error = DirectWriter::new(file.clone(), 1 << 50).unwrap_err();
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::FileTooLarge];
        assert!(full.contains(&error.kind()), "{error}");
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
