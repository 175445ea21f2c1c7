//! Binding and connecting, whatever the length of the path: a socket's address holds 108 bytes, a run directory's path may be longer.
//!
//! Both go through the open folder, as `/proc/self/fd/<number>/<name>`.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Listens at `path`. Whoever binds knows that it is the only one, so a socket that is there is a dead one's.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // Whoever can connect can end processes: the folder is for the owner only.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_folder, short) = short(path)?;
    UnixListener::bind(short)
}

/// Connects to whoever listens at `path`.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let (_folder, short) = short(path)?;
    UnixStream::connect(short)
}

/// A short name of `path`, valid as long as the folder is open.
fn short(path: &Path) -> io::Result<(File, PathBuf)> {
    let folder = File::open(path.parent().unwrap_or(Path::new(".")))?;
    let name = path.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd")
        .join(folder.as_raw_fd().to_string())
        .join(name);
    Ok((folder, short))
}
