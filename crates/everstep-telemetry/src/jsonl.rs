//! What the two record files share: lines that are written whole, and tails that may be torn.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::SystemTime;

use serde::Serialize;

/// How much of a file's end is looked at first when its last line is searched.
const TAIL_STEP_BYTES: u64 = 64 * 1024;

/// RFC 3339, UTC, milliseconds: `2026-11-24T17:59:46.227Z`.
pub fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// `record` as one line of JSON with its newline.
///
/// `serde_json` writes an `f64` as the shortest text that reads back to the same bits, so equal numbers give equal
/// text.
pub(crate) fn line<T: Serialize>(record: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

/// Hands `line` to the kernel in one `write(2)`: with `O_APPEND` no other process's line can come in between.
pub(crate) fn write_line(mut file: &File, line: &[u8]) -> io::Result<()> {
    loop {
        match file.write(line) {
            Ok(written) if written == line.len() => return Ok(()),
            Ok(written) => {
                return Err(io::Error::new(
                    io::ErrorKind::WriteZero,
                    format!("only {written} of {} bytes were written", line.len()),
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether the file's last byte is something other than a newline.
pub(crate) fn is_torn(mut file: &File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last[0] != b'\n')
}

/// The end of a file: the last line that `accept` takes, and where it ends.
#[derive(Debug)]
pub(crate) struct Tail<T> {
    /// What `accept` made of the last good line; none if the file has no good line.
    pub(crate) last: Option<T>,
    /// The offset behind that line; 0 if there is none.
    pub(crate) end: u64,
    /// How long the file was when it was looked at; others may be writing.
    pub(crate) file_bytes: u64,
    /// The first whole line, from the end, that `accept` refused.
    pub(crate) refused: Option<Vec<u8>>,
}

/// Searches a file from its end for the last whole line that `accept` takes, reading no more than needed.
pub(crate) fn tail<T>(mut file: &File, accept: impl Fn(&[u8]) -> Option<T>) -> io::Result<Tail<T>> {
    let file_bytes = file.metadata()?.len();
    let mut window = TAIL_STEP_BYTES.min(file_bytes);
    loop {
        let start = file_bytes - window;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(window).read_to_end(&mut bytes)?;
        // Whatever stands behind the last newline is torn. Whatever stands before the first one may have begun earlier.
        let mut refused = None;
        let mut end = bytes.iter().rposition(|&b| b == b'\n');
        while let Some(newline) = end {
            let previous = bytes[..newline].iter().rposition(|&b| b == b'\n');
            let begin = match previous {
                Some(previous) => previous + 1,
                None if start == 0 => 0,
                None => break,
            };
            let text = &bytes[begin..newline];
            if let Some(last) = accept(text) {
                return Ok(Tail {
                    last: Some(last),
                    end: start + newline as u64 + 1,
                    file_bytes,
                    refused,
                });
            }
            if refused.is_none() && !text.is_empty() {
                refused = Some(text.to_vec());
            }
            end = previous;
        }
        if start == 0 {
            return Ok(Tail {
                last: None,
                end: 0,
                file_bytes,
                refused,
            });
        }
        window = (window * 4).min(file_bytes);
    }
}
