//! The memory of a lane, as both sides see it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};

/// Size of a ring: used over and over again, it should stay in the processor's cache.
pub(super) const RING_BYTES: usize = 2 << 20;
/// Nobody can take the memory away from under the other side.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A ring that is mapped into this process.
#[derive(Debug)]
pub(super) struct Ring(MmapRaw);

impl Ring {
    /// A new one, and what the other side needs to see it.
    pub(super) fn create() -> io::Result<(Self, File)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("everstep-lane", flags)?);
        file.set_len(RING_BYTES as u64)?;
        fcntl_add_seals(&file, SEALS)?;
        Ok((Self::map(&file)?, file))
    }

    /// The one that the other side has created.
    ///
    /// # Errors
    /// It is none: too small, or able to become so.
    pub(super) fn open(file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        if !fcntl_get_seals(&file)?.contains(SEALS) || file.metadata()?.len() != RING_BYTES as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Self::map(&file)
    }

    fn map(file: &File) -> io::Result<Self> {
        MmapOptions::new().len(RING_BYTES).map_raw(file).map(Self)
    }

    /// Copies `bytes` to position `at` of an endless stream of bytes.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let at = (at % RING_BYTES as u64) as usize;
        let (now, wrapped) = bytes.split_at(bytes.len().min(RING_BYTES - at));
        assert!(
            wrapped.len() <= RING_BYTES,
            "pieces are shorter than the ring"
        );
        #[allow(
            unsafe_code,
            reason = "memory that another process sees can only be reached by a pointer"
        )]
        // SAFETY: `now` ends at the end of the mapping at the latest, `wrapped` is no longer than it, and neither is part of it. The other
        // process only reads what it was told of.
        unsafe {
            let ring = self.0.as_mut_ptr();
            ring.add(at)
                .copy_from_nonoverlapping(now.as_ptr(), now.len());
            ring.copy_from_nonoverlapping(wrapped.as_ptr(), wrapped.len());
        }
    }

    /// The `bytes` bytes at position `at`, or as many of them as stand in one piece.
    pub(super) fn read(&self, at: u64, bytes: usize) -> &[u8] {
        let at = (at % RING_BYTES as u64) as usize;
        let len = bytes.min(RING_BYTES - at);
        #[allow(
            unsafe_code,
            reason = "memory that another process sees can only be reached by a pointer"
        )]
        // SAFETY: it lies in the mapping, whose memory stays for as long as the mapping, because it is sealed. The other process, which is
        // this program too, leaves alone what was not given back; any value of the bytes is a value.
        unsafe {
            std::slice::from_raw_parts(self.0.as_ptr().add(at), len)
        }
    }
}
