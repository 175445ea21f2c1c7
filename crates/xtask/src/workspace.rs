//! Where things are in the checkout.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The checkout that this binary was started from.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// Finds the checkout: cargo names this crate's folder at run time, and the crate lies two levels down.
    pub(crate) fn locate() -> Result<Self> {
        let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest_dir
            .ancestors()
            .nth(2)
            .context("this crate must lie in crates/xtask of a checkout")?;
        Ok(Self {
            root: root.to_path_buf(),
        })
    }

    /// The folder of the root `Cargo.toml`.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// What set-up fetches; never committed.
    pub(crate) fn third_party(&self) -> PathBuf {
        self.root.join("third_party")
    }

    /// Where `.cargo/config.toml` tells every build to look for libtorch.
    pub(crate) fn libtorch(&self) -> PathBuf {
        self.third_party().join("libtorch")
    }

    /// The Python environment that set-up owns; the user's own is never written to.
    pub(crate) fn venv(&self) -> PathBuf {
        self.third_party().join("venv")
    }

    /// The Python environment that [`crate::transformers`] compares with.
    pub(crate) fn transformers(&self) -> PathBuf {
        self.third_party().join("transformers")
    }

    /// Where cargo puts what it builds.
    pub(crate) fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }

    /// `LIBTORCH` as the user set it: the value that `.cargo/config.toml` injects does not count.
    pub(crate) fn libtorch_of_user(&self) -> Option<PathBuf> {
        let value = PathBuf::from(std::env::var_os("LIBTORCH").filter(|value| !value.is_empty())?);
        (value != self.libtorch()).then_some(value)
    }
}
