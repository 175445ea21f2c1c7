//! [`RunStore`]: one run's part of a store.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::RwLock;

use crate::backend::{self, Backend};
use crate::diagnosis::diagnosis;
use crate::error::{StoreError, io};
use crate::identity::RunIdentity;
use crate::near::Near;
use crate::sealed::{self, Unreadable};

const RUN_TOML: &str = "run.toml";
const RUN_MANIFEST: &str = "manifest.json";

/// A store that has not accepted a few bytes in this time is taken for one that refuses them.
const CHECK_DEADLINE: Duration = Duration::from_secs(15);

/// One run's part of a store: `<store>/<run>/…`.
///
/// Cheap to clone; a program that both commits and prunes a run does it with clones of one, which wait for each other. Methods need a
/// tokio runtime with I/O and time. A request that fails is repeated with jitter for some seconds; what then still fails is an error, and
/// [`StoreError::is_outage`] says whether the same call may succeed later.
#[derive(Clone)]
pub struct RunStore {
    pub(crate) backend: Backend,
    url: String,
    run: String,
    /// Commits hold it together, removals alone: a commit need not be refused because of what its own program removes meanwhile.
    pub(crate) removals: Arc<RwLock<()>>,
    /// Objects that this program has read and compared with their digests, of those that it shares.
    pub(crate) verified: Arc<Mutex<BTreeSet<String>>>,
    pub(crate) near: Option<Arc<Near>>,
}

/// What [`RunStore::put_run`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutRun {
    /// The run is new.
    Created,
    /// The run was there, with this identity; its environment may differ
    /// ([`RunIdentity::environment_differences`]).
    Existing(Box<RunIdentity>),
}

impl RunStore {
    /// Opens the part of run `run` in the store at `url`; needs no network yet.
    ///
    /// `file:///folder` is created if absent. `s3://bucket/prefix` takes credentials, region and endpoint from the
    /// usual `AWS_*` environment; a plain `http://` endpoint needs `AWS_ALLOW_HTTP=true`.
    ///
    /// # Errors
    /// [`StoreError::UnknownScheme`], [`StoreError::BadUrl`], [`StoreError::BadName`], and
    /// [`StoreError::NotWritable`] if a folder cannot be created.
    pub fn open(url: &str, run: &str) -> Result<Self, StoreError> {
        Self::open_with(url, run, &BTreeMap::new())
    }

    /// Like [`RunStore::open`], with `AWS_*` settings that override the environment.
    ///
    /// # Errors
    /// As [`RunStore::open`].
    pub fn open_with(
        url: &str,
        run: &str,
        options: &BTreeMap<String, String>,
    ) -> Result<Self, StoreError> {
        check_name("run name", run)?;
        let backend = backend::open(url, run, options)?;
        Ok(Self {
            backend,
            url: url.to_owned(),
            run: run.to_owned(),
            removals: Arc::default(),
            verified: Arc::default(),
            near: None,
        })
    }

    /// Also keeps what is written on this node, below `root`, and reads it from there first; see [`RunStore::load`]. All processes of a
    /// node may share `root`: each keeps what it wrote for its last `keep` checkpoints, by its name `process`, and reads all of it.
    #[must_use]
    pub fn with_near_copies(self, root: &std::path::Path, process: &str, keep: usize) -> Self {
        let near = (keep > 0).then(|| Arc::new(Near::new(root, process, keep)));
        Self { near, ..self }
    }

    /// A run in a store of the tests' own.
    #[cfg(test)]
    pub(crate) fn over(store: Arc<dyn ObjectStore>, run: &str) -> Self {
        Self {
            backend: Backend {
                bulk: Arc::clone(&store),
                small: store,
                folder: None,
                suspicion: None,
            },
            url: "memory:///".to_owned(),
            run: run.to_owned(),
            removals: Arc::default(),
            verified: Arc::default(),
            near: None,
        }
    }

    /// The store's URL, as given.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The run's name.
    pub fn name(&self) -> &str {
        &self.run
    }

    /// The run's objects as they lie there, by their keys inside the run, for tools that look at them or break them. Nothing that is read
    /// here is verified.
    pub fn objects(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.backend.bulk)
    }

    /// Writes, reads back and deletes a small object; call it once at start.
    ///
    /// # Errors
    /// [`StoreError::NotWritable`] with one reason, after 15 seconds at most.
    pub async fn check_writable(&self) -> Result<(), StoreError> {
        let key = Path::from(format!("check-{}", nonce()));
        let contents = Bytes::from(nonce());
        let store = &self.backend.small;
        let check = async {
            self.demand_folder("write")
                .map_err(|error| object_store::Error::Generic {
                    store: "folder",
                    source: error.into(),
                })?;
            store.put(&key, contents.clone().into()).await?;
            let read = store.get(&key).await?.bytes().await?;
            store.delete(&key).await?;
            Ok::<bool, object_store::Error>(read == contents)
        };
        let reason = match tokio::time::timeout(CHECK_DEADLINE, check).await {
            Ok(Ok(true)) => return Ok(()),
            Ok(Ok(false)) => "what was written did not come back the same".to_owned(),
            // Writing needs no object to be there, only the folder.
            Ok(Err(error @ object_store::Error::NotFound { .. }))
                if self.backend.folder.is_some() =>
            {
                format!("the folder does not exist: {}", diagnosis(&error))
            }
            Ok(Err(error)) => diagnosis(&error),
            Err(_) => format!("no answer within {} seconds", CHECK_DEADLINE.as_secs()),
        };
        let reason = match self.backend.suspicion {
            Some(suspicion) => format!("{suspicion}: {reason}"),
            None => reason,
        };
        Err(StoreError::NotWritable {
            url: self.url.clone(),
            reason,
        })
    }

    /// Creates the run, or makes sure that the one that is there is the same.
    ///
    /// `run_toml` is kept for people as it was when the run was created.
    ///
    /// # Errors
    /// [`StoreError::RunMismatch`] if another run has this name; nothing is written then.
    pub async fn put_run(
        &self,
        run_toml: &str,
        identity: &RunIdentity,
    ) -> Result<PutRun, StoreError> {
        if identity.run != self.run {
            return Err(StoreError::BadName {
                what: "run name in the identity",
                name: identity.run.clone(),
            });
        }
        if let Some(existing) = self.run().await? {
            return self.same_run(identity, existing);
        }
        self.put(RUN_TOML, run_toml.to_owned().into()).await?;
        if self
            .create(RUN_MANIFEST, sealed::seal(identity).into())
            .await?
        {
            return Ok(PutRun::Created);
        }
        // Somebody else was faster, or our own request was repeated after its answer got lost.
        let existing = self.existing_run().await?;
        self.same_run(identity, existing)
    }

    /// Whether the run, if it was created, is the one that `identity` says.
    ///
    /// # Errors
    /// [`StoreError::RunMismatch`] with what differs.
    pub async fn check_run(&self, identity: &RunIdentity) -> Result<(), StoreError> {
        match self.run().await? {
            Some(existing) => self.same_run(identity, existing).map(|_| ()),
            None => Ok(()),
        }
    }

    fn same_run(
        &self,
        identity: &RunIdentity,
        existing: RunIdentity,
    ) -> Result<PutRun, StoreError> {
        let differences = identity.differences(&existing);
        if differences.is_empty() {
            return Ok(PutRun::Existing(Box::new(existing)));
        }
        Err(StoreError::RunMismatch {
            run: self.run.clone(),
            differences,
        })
    }

    /// The run's identity; `None` if it was never created.
    ///
    /// # Errors
    /// [`StoreError::Document`] if `manifest.json` is damaged.
    pub async fn run(&self) -> Result<Option<RunIdentity>, StoreError> {
        self.document(RUN_MANIFEST).await
    }

    /// The run's identity.
    ///
    /// # Errors
    /// [`StoreError::NoRun`] if it was never created.
    pub async fn existing_run(&self) -> Result<RunIdentity, StoreError> {
        self.run().await?.ok_or_else(|| self.no_run())
    }

    fn no_run(&self) -> StoreError {
        StoreError::NoRun {
            url: self.url.clone(),
            run: self.run.clone(),
        }
    }

    /// The run file as it was when the run was created.
    ///
    /// # Errors
    /// [`StoreError::Document`] if it is not UTF-8.
    pub async fn run_toml(&self) -> Result<Option<String>, StoreError> {
        let Some(bytes) = self.get(RUN_TOML).await? else {
            return Ok(None);
        };
        let text = String::from_utf8(bytes.into()).map_err(|_| StoreError::Document {
            key: RUN_TOML.to_owned(),
            reason: "is not UTF-8".to_owned(),
        })?;
        Ok(Some(text))
    }

    /// Asks the store for next to nothing: whether it answers, and still has the run.
    ///
    /// # Errors
    /// [`StoreError::Io`] or [`StoreError::NoRun`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        let found = self.small().head(&Path::from(RUN_MANIFEST)).await;
        self.demand_folder("read")?;
        match found {
            Ok(_) => Ok(()),
            Err(object_store::Error::NotFound { .. }) => Err(self.no_run()),
            Err(error) => Err(io("read", RUN_MANIFEST)(error)),
        }
    }

    /// For blocks.
    pub(crate) fn bulk(&self) -> &dyn ObjectStore {
        self.backend.bulk.as_ref()
    }

    /// For everything small.
    pub(crate) fn small(&self) -> &dyn ObjectStore {
        self.backend.small.as_ref()
    }

    /// In a folder that is away (a disk that is not mounted, say) nothing is found. That must not be taken for the truth.
    pub(crate) fn demand_folder(&self, operation: &'static str) -> Result<(), StoreError> {
        let Some(folder) = &self.backend.folder else {
            return Ok(());
        };
        let reason = match std::fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => return Ok(()),
            Ok(_) => std::io::Error::from(std::io::ErrorKind::NotADirectory),
            Err(error) => error,
        };
        Err(io(operation, folder.display())(
            object_store::Error::Generic {
                store: "folder",
                source: reason.into(),
            },
        ))
    }

    pub(crate) async fn get(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        let read = async { self.small().get(&Path::from(key)).await?.bytes().await };
        match read.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => {
                self.demand_folder("read")?;
                Ok(None)
            }
            Err(error) => Err(io("read", key)(error)),
        }
    }

    pub(crate) async fn document<T: Serialize + DeserializeOwned>(
        &self,
        key: &str,
    ) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.get(key).await? else {
            return Ok(None);
        };
        let document = sealed::unseal(&bytes).map_err(|error| match error {
            Unreadable::Newer { version, known } => StoreError::NewerVersion {
                key: key.to_owned(),
                version,
                known,
            },
            Unreadable::Damaged(reason) => StoreError::Document {
                key: key.to_owned(),
                reason,
            },
        })?;
        Ok(Some(document))
    }

    pub(crate) async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.small()
            .put(&Path::from(key), bytes.into())
            .await
            .map(drop)
            .map_err(io("write", key))
    }

    /// Creates `key`; `false` if it is there already, be it from our own request that was repeated after its answer
    /// got lost. So a caller must look at what is there before it takes itself for the loser.
    pub(crate) async fn create(&self, key: &str, bytes: Bytes) -> Result<bool, StoreError> {
        let options = PutOptions::from(PutMode::Create);
        match self
            .small()
            .put_opts(&Path::from(key), bytes.into(), options)
            .await
        {
            Ok(_) => Ok(true),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok(false),
            Err(error) => Err(io("create", key)(error)),
        }
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match self.small().delete(&Path::from(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(io("delete", key)(error)),
        }
    }
}

impl fmt::Debug for RunStore {
    // The clients hold credentials, which do not belong into a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunStore")
            .field("url", &self.url)
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

/// Allows what is safe in every file system, URL and shell, and cannot leave its folder.
pub(crate) fn check_name(what: &'static str, name: &str) -> Result<(), StoreError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    let first = name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    if first && name.len() <= 64 && name.chars().all(allowed) {
        return Ok(());
    }
    Err(StoreError::BadName {
        what,
        name: name.to_owned(),
    })
}

/// A name that nobody else uses; the standard library seeds its hash maps with the system's randomness.
pub(crate) fn nonce() -> String {
    let random = || RandomState::new().hash_one(std::process::id());
    format!("{:016x}{:016x}", random(), random())
}
