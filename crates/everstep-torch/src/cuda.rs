//! Loads libtorch's CUDA side at start if the machine has it, so that one binary runs everywhere.
#![allow(unsafe_code)]

use std::env;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::library;

const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// What [`load_cuda`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaLoad {
    /// The library is loaded; devices are there if the driver finds any.
    Loaded {
        /// What was given to the loader: a bare name or a path.
        from: PathBuf,
        /// Number of CUDA devices that libtorch sees.
        devices: usize,
    },
    /// There is no CUDA side here; only the CPU can be used.
    NotFound,
    /// There is one and it does not load.
    Failed {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
}

/// Loads `libtorch_cuda.so` if it is found: by name (the loader's search path), in `$LIBTORCH/lib`, or beside the
/// loaded `libtorch_cpu.so`. Call it once, at start, before any tensor exists.
pub fn load_cuda() -> CudaLoad {
    let mut failed = None;
    match open(Path::new(CUDA_LIBRARY)) {
        Ok(()) => return loaded(PathBuf::from(CUDA_LIBRARY)),
        // The loader names the file that is missing: if that is another one, ours was found and does not load.
        Err(reason) if !reason.starts_with(CUDA_LIBRARY) => {
            let path = PathBuf::from(CUDA_LIBRARY);
            failed = Some(CudaLoad::Failed { path, reason });
        }
        Err(_) => {}
    }
    for path in candidates(
        env::var_os("LIBTORCH").map(PathBuf::from),
        library::folder(),
    ) {
        match open(&path) {
            Ok(()) => return loaded(path),
            Err(reason) => failed = failed.or(Some(CudaLoad::Failed { path, reason })),
        }
    }
    failed.unwrap_or(CudaLoad::NotFound)
}

fn loaded(from: PathBuf) -> CudaLoad {
    let devices = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    CudaLoad::Loaded { from, devices }
}

/// Files that exist, in the order in which they are tried.
fn candidates(libtorch: Option<PathBuf>, beside: Option<PathBuf>) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = libtorch
        .map(|root| root.join("lib"))
        .into_iter()
        .chain(beside)
        .map(|folder| folder.join(CUDA_LIBRARY))
        .filter(|file| file.is_file())
        .collect();
    files.dedup();
    files
}

fn open(path: &Path) -> Result<(), String> {
    // SAFETY: loading runs the initialisers of libtorch's own CUDA library, which register its kernels with the
    // libtorch_cpu that this process already uses. The handle is never closed, so no code is unloaded under us.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    match library {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_existing_files_are_tried_once_each() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib");
        std::fs::create_dir(&lib).unwrap();
        let both = || candidates(Some(root.path().to_path_buf()), Some(lib.clone()));
        assert!(both().is_empty());
        std::fs::write(lib.join(CUDA_LIBRARY), b"no library").unwrap();
        assert_eq!(both(), vec![lib.join(CUDA_LIBRARY)]);
        assert!(open(&both()[0]).is_err());
    }
}
