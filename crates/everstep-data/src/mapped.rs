//! A file as bytes in memory. The only module of this crate with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{DataError, IoContext};

/// Maps `path` for reading.
pub(crate) fn map(path: &Path) -> Result<Mmap, DataError> {
    let file = File::open(path).at("open", path)?;
    // SAFETY: the map is read-only, and the files of a prepared dataset are never written in place: preparing
    // writes a new folder and renames it. Another program that truncates the file would end this process with
    // SIGBUS, which the supervision tree treats as any other crash; it cannot corrupt memory.
    unsafe { Mmap::map(&file) }.at("map", path)
}
