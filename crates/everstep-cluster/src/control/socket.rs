//! Binding and connecting, whatever the length of the path: a socket's address holds 108 bytes, a run directory's path may be longer.
//!
//! Both go through the open folder, as `/proc/self/fd/<number>/<node>.sock`.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::rundir::RunDir;

/// Listens for node `node`. Whoever binds holds the node's lock, so a socket that is there is a dead agent's.
pub(crate) fn bind(run_dir: &RunDir, node: &str) -> io::Result<UnixListener> {
    let path = run_dir.control(node);
    let folder = path.parent().unwrap_or(Path::new("."));
    // Whoever can connect can end processes: the folder is for the owner only.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_folder, short) = short(&path)?;
    UnixListener::bind(short)
}

/// Connects to the agent of `node`.
pub(crate) fn connect(run_dir: &RunDir, node: &str) -> io::Result<UnixStream> {
    let (_folder, short) = short(&run_dir.control(node))?;
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
