//! Provisioning libtorch: a link to an installed one, or the CPU side of PyTorch's wheel.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::process;
use crate::python::Python;
use crate::setup::Options;
use crate::workspace::Workspace;

/// What tch 0.24 is made for.
const VERSION: &str = "2.11.0";

/// A release on the Python package index that libtorch is taken from.
#[derive(Debug, Clone, Copy)]
struct Wheel {
    requirement: &'static str,
    /// How the file's name begins; the rest names the platform.
    file_prefix: &'static str,
    /// Pinned where the platform was tried; elsewhere pip's own check has to do.
    sha256_x86_64: &'static str,
}

/// The torch wheel, and the two small CUDA libraries that its `libtorch_cpu.so` is linked against.
const WHEELS: [Wheel; 3] = [
    Wheel {
        requirement: "torch==2.11.0",
        file_prefix: "torch-2.11.0-",
        sha256_x86_64: "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
    },
    Wheel {
        requirement: "nvidia-cuda-runtime==13.0.96",
        file_prefix: "nvidia_cuda_runtime-13.0.96-",
        sha256_x86_64: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    },
    Wheel {
        requirement: "nvidia-cuda-cupti==13.0.85",
        file_prefix: "nvidia_cuda_cupti-13.0.85-",
        sha256_x86_64: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    },
];

/// The wheels are the same libtorch for every Python, so one is fixed and any python3 can fetch it.
const WHEEL_PYTHON: [&str; 6] = [
    "--implementation",
    "cp",
    "--python-version",
    "3.11",
    "--abi",
    "cp311",
];

/// Oldest C libraries that a wheel may ask for, newest first; pip does not add the older ones by itself.
const WHEEL_PLATFORMS: [&str; 4] = [
    "manylinux_2_28",
    "manylinux_2_25",
    "manylinux_2_17",
    "manylinux2014",
];

/// Takes the CPU side out of the wheels; a zip reader in Rust would be one more thing to build before set-up.
const UNPACK: &str = "crates/xtask/src/unpack.py";

/// Finds an installed PyTorch without the seconds that importing it takes.
const FIND_INSTALLED: &str = "import importlib.util, os
spec = importlib.util.find_spec('torch')
print(os.path.dirname(spec.origin) if spec and spec.origin else '')";

/// Puts libtorch into `third_party/libtorch`, or leaves it as it is if it is there.
///
/// # Errors
/// One line that says what is missing on this machine and how to get it.
pub(crate) fn provision(workspace: &Workspace, options: &Options) -> Result<()> {
    let target = workspace.libtorch();
    if let Some(installed) = workspace
        .libtorch_of_user()
        .filter(|_| !options.ignore_installed)
    {
        ensure_usable(&installed).with_context(|| format!("LIBTORCH={}", installed.display()))?;
        return link(workspace, &installed, "LIBTORCH");
    }
    if ensure_usable(&target).is_ok() && !(options.ignore_installed && is_link(&target)) {
        println!("libtorch {VERSION}: in {}", target.display());
        return Ok(());
    }
    if !options.ignore_installed
        && options.wheel_dir.is_none()
        && let Some(installed) = installed_pytorch()
    {
        return link(workspace, &installed, "the installed PyTorch");
    }
    from_wheels(workspace, options.wheel_dir.as_deref())
}

/// Whether a folder is libtorch of the right version, and if not, why.
fn ensure_usable(folder: &Path) -> Result<()> {
    for file in [
        "lib/libtorch.so",
        "lib/libtorch_cpu.so",
        "lib/libc10.so",
        "include/torch/csrc/api/include/torch/torch.h",
    ] {
        ensure!(folder.join(file).exists(), "it has no {file}");
    }
    let version = version_of(folder)
        .context("it has neither build-version nor version.py, so its version is unknown")?;
    let release = version.split('+').next().unwrap_or_default();
    ensure!(
        release == VERSION,
        "it is version {version}, but {VERSION} is needed"
    );
    Ok(())
}

/// The version that a libtorch folder or a PyTorch package names.
fn version_of(folder: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(folder.join("build-version")) {
        return Some(text.trim().to_owned());
    }
    let text = fs::read_to_string(folder.join("version.py")).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    Some(line.split(['\'', '"']).nth(1)?.to_owned())
}

/// The package folder of a PyTorch of the right version that python3 would import, if there is one.
fn installed_pytorch() -> Option<PathBuf> {
    let text = process::output(Command::new("python3").args(["-c", FIND_INSTALLED])).ok()?;
    let folder = PathBuf::from(text.trim());
    ensure_usable(&folder).is_ok().then_some(folder)
}

/// Whether `third_party/libtorch` only points somewhere else.
fn is_link(target: &Path) -> bool {
    target.join("lib").is_symlink()
}

/// Makes `third_party/libtorch` point at `installed`.
///
/// The folders are linked whole: the libraries find their neighbours relative to where they lie, through the link.
fn link(workspace: &Workspace, installed: &Path, what: &str) -> Result<()> {
    let installed = fs::canonicalize(installed)
        .with_context(|| format!("cannot read {}", installed.display()))?;
    let target = workspace.libtorch();
    if fs::read_link(target.join("lib")).is_ok_and(|to| to == installed.join("lib"))
        && ensure_usable(&target).is_ok()
    {
        println!("libtorch {VERSION}: {what} in {}", installed.display());
        return Ok(());
    }
    let staging = Staging::new(workspace)?;
    for folder in ["lib", "include"] {
        std::os::unix::fs::symlink(installed.join(folder), staging.path.join(folder))?;
    }
    let version = version_of(&installed).unwrap_or_else(|| VERSION.to_owned());
    fs::write(staging.path.join("build-version"), version)?;
    staging.check_that_it_loads()?;
    staging.put_in_place(&target)?;
    println!(
        "libtorch {VERSION}: linked to {what} in {}",
        installed.display()
    );
    Ok(())
}

/// Fetches the wheels if they are not in `wheel_dir` and takes the CPU side out of them.
fn from_wheels(workspace: &Workspace, wheel_dir: Option<&Path>) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "set-up knows the wheels of Linux only; install libtorch {VERSION} yourself and set LIBTORCH to its folder"
    );
    if !process::is_there("gcc") {
        bail!(
            "gcc is missing: building needs it (Debian and Ubuntu: `apt install g++`, Fedora: `dnf install gcc-c++`)"
        );
    }
    let machine = Python::of_machine()?;
    let pinned = cfg!(target_arch = "x86_64");
    if !pinned {
        println!(
            "note: the wheels of {} were never tried with Everstep; their digests are checked by pip alone",
            std::env::consts::ARCH
        );
    }
    let cache = wheel_dir.map_or_else(|| workspace.third_party().join("cache"), Path::to_path_buf);
    if WHEELS.iter().any(|wheel| find(&cache, wheel).is_none()) {
        ensure!(
            wheel_dir.is_none(),
            "{} does not hold all of: {}",
            cache.display(),
            requirements()
        );
        download(workspace, &cache, pinned)?;
    }

    let staging = Staging::new(workspace)?;
    println!("taking libtorch's CPU side out of the wheels");
    let mut unpack = machine.command();
    unpack.arg(workspace.root().join(UNPACK)).arg(&staging.path);
    for wheel in &WHEELS {
        let file = find(&cache, wheel)
            .with_context(|| format!("pip did not leave {}* behind", wheel.file_prefix))?;
        unpack
            .arg(file)
            .arg(if pinned { wheel.sha256_x86_64 } else { "-" });
    }
    if let Err(error) = process::output(&mut unpack) {
        if wheel_dir.is_none() {
            // What is in the cache is damaged; the next call starts with an empty one.
            fs::remove_dir_all(&cache).ok();
        }
        return Err(error.context("cannot unpack the wheels; run `cargo xtask setup` again"));
    }
    link_stub(&staging.path.join("lib"))?;
    fs::write(staging.path.join("build-version"), VERSION)?;
    ensure_usable(&staging.path)?;
    staging.check_that_it_loads()?;
    staging.put_in_place(&workspace.libtorch())?;
    if wheel_dir.is_none() {
        fs::remove_dir_all(&cache).ok();
    }
    println!("libtorch {VERSION}: in {}", workspace.libtorch().display());
    Ok(())
}

/// The file of `wheel` in `folder`, if it is there.
fn find(folder: &Path, wheel: &Wheel) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(wheel.file_prefix) && name.ends_with(".whl")
    })
}

/// The wheels, as one would ask pip for them.
fn requirements() -> String {
    WHEELS.map(|wheel| wheel.requirement).join(", ")
}

/// Lets pip fetch the wheels; pip knows the index, its mirrors, proxies and certificates, and checks the digests.
fn download(workspace: &Workspace, cache: &Path, pinned: bool) -> Result<()> {
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    // The environment's pip may be newer than the machine's, and then resumes downloads; either one will do.
    let python = Python::of_workspace(workspace).or_else(|_| Python::of_machine())?;
    let list = cache.join("requirements.txt");
    let lines = WHEELS.map(|wheel| {
        let hash = if pinned {
            format!(" --hash=sha256:{}", wheel.sha256_x86_64)
        } else {
            String::new()
        };
        format!("{}{hash}\n", wheel.requirement)
    });
    fs::write(&list, lines.concat()).with_context(|| format!("cannot write {}", list.display()))?;
    println!("fetching libtorch {VERSION} (about 545 MB, once)");
    let mut command = python.pip();
    command
        .args(["download", "--no-deps", "--only-binary=:all:"])
        .args(WHEEL_PYTHON);
    for platform in WHEEL_PLATFORMS {
        command
            .arg("--platform")
            .arg(format!("{platform}_{}", std::env::consts::ARCH));
    }
    if pinned {
        command.arg("--require-hashes");
    }
    command
        .args(python.retry_options())
        .arg("--requirement")
        .arg(&list)
        .arg("--dest")
        .arg(cache);
    process::run(&mut command).context(
        "pip could not fetch libtorch. Is the Python package index (or your mirror of it) reachable? \
         Running `cargo xtask setup` again goes on with what is missing; \
         `cargo xtask setup --wheel-dir DIR` takes wheels that you fetched elsewhere",
    )
}

/// Links the `libtorch.so` that tch asks for. The wheel's own would pull in all of CUDA.
fn link_stub(lib: &Path) -> Result<()> {
    let mut child = Command::new("gcc")
        .args(["-shared", "-fPIC", "-x", "c", "-", "-o"])
        .arg(lib.join("libtorch.so"))
        .args([
            "-Wl,-soname,libtorch.so",
            "-Wl,-rpath,$ORIGIN",
            "-Wl,--no-as-needed",
            "-L",
        ])
        .arg(lib)
        .args(["-ltorch_cpu", "-lc10"])
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start gcc")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(b"extern int everstep_libtorch_stub;\n")
            .context("cannot write to gcc")?;
    }
    let status = child.wait()?;
    ensure!(
        status.success(),
        "gcc could not link a stub libtorch.so: {status}"
    );
    Ok(())
}

/// A folder beside the final one; what is not put in place is removed again.
#[derive(Debug)]
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn new(workspace: &Workspace) -> Result<Self> {
        let path = workspace
            .third_party()
            .join(format!("libtorch.new-{}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Loads the libraries in a process of its own, so that a missing neighbour shows here and not in a test.
    fn check_that_it_loads(&self) -> Result<()> {
        if !process::is_there("python3") {
            return Ok(());
        }
        let code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])";
        process::output(
            Command::new("python3")
                .args(["-c", code])
                .arg(self.path.join("lib/libtorch.so")),
        )
        .map(drop)
        .context("this libtorch does not load on this machine")
    }

    /// Takes the place of `target` by renaming, so that no one ever sees half of it.
    fn put_in_place(&self, target: &Path) -> Result<()> {
        let old = self.path.with_extension("old");
        if target.symlink_metadata().is_ok() {
            fs::rename(target, &old)
                .with_context(|| format!("cannot move {} aside", target.display()))?;
        }
        fs::rename(&self.path, target)
            .with_context(|| format!("cannot create {}", target.display()))?;
        if old.exists() {
            fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove; a failure here only leaves a folder behind.
        fs::remove_dir_all(&self.path).ok();
    }
}
