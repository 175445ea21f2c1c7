//! Where the libtorch of this process lies and which version it is.

use std::fs;
use std::path::{Path, PathBuf};

/// The version that tch is built against; its build script refuses others.
const BUILT_FOR: &str = "2.11.0";

/// Folder of the loaded `libtorch_cpu.so`, from the process's own memory map.
pub(crate) fn folder() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    folder_in_maps(&maps)
}

fn folder_in_maps(maps: &str) -> Option<PathBuf> {
    // The sixth column is the path; it is the only one that starts with a slash and may contain spaces.
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name == "libtorch_cpu.so")
        })
        .and_then(Path::parent)
        .map(Path::to_path_buf)
}

/// Version of the loaded libtorch, such as `2.11.0+cu130`.
///
/// Read from the files beside the library (`build-version` of a libtorch folder, `version.py` of a PyTorch package);
/// without them, the version that this binary was built against.
pub(crate) fn version() -> String {
    folder()
        .and_then(|lib| version_beside(lib.parent()?))
        .unwrap_or_else(|| BUILT_FOR.to_owned())
}

fn version_beside(root: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(root.join("build-version")) {
        return Some(text.trim().to_owned()).filter(|version| !version.is_empty());
    }
    let text = fs::read_to_string(root.join("version.py")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("__version__ = "))
        .map(|version| version.trim().trim_matches(['\'', '"']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_names_the_folder_even_with_spaces() {
        let maps = "7f00-7f01 r-xp 0 fe:00 1 /lib/libc.so.6\n7f02-7f03 r--p 0 fe:00 2   /opt/my torch/lib/libtorch_cpu.so\n";
        assert_eq!(
            folder_in_maps(maps).unwrap(),
            Path::new("/opt/my torch/lib")
        );
        assert_eq!(folder_in_maps("7f00-7f01 rw-p 0 00:00 0 [heap]\n"), None);
    }

    #[test]
    fn both_kinds_of_install_tell_their_version() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(version_beside(root.path()), None);
        fs::write(
            root.path().join("version.py"),
            "from x import y\n__version__ = '2.11.0+cu130'\n",
        )
        .unwrap();
        assert_eq!(version_beside(root.path()).unwrap(), "2.11.0+cu130");
        fs::write(root.path().join("build-version"), "2.11.0\n").unwrap();
        assert_eq!(version_beside(root.path()).unwrap(), "2.11.0");
    }

    #[test]
    fn this_process_runs_the_version_it_was_built_for() {
        // Any call makes the linker keep and load the library.
        assert!(tch::get_num_threads() > 0);
        assert!(folder().is_some());
        assert!(version().starts_with(BUILT_FOR), "{}", version());
    }
}
