//! Typed, checked values over sled; see the parent module for the files.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::LedgerError;

const VALUE_VERSION: u8 = 1;
const CHECK_BYTES: usize = 16;
const GENERATION: &str = "generation";

/// A few kilobytes of values need no cache to speak of; sled's default is 1 GiB.
const CACHE_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct Database {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` after a panic inside sled, whose state cannot be trusted then.
    sled: Option<sled::Db>,
    generation: u64,
    /// Keeps the folder ours; released by the system when the process ends, however it ends.
    _lock: File,
}

impl Database {
    pub(super) fn open(dir: &Path) -> Result<Self, LedgerError> {
        let io = |source| LedgerError::Io {
            dir: dir.to_owned(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(io)?;
        let lock = lock(dir)?;
        let known = read_generation(dir)?;
        let config = sled::Config::new()
            .path(dir.join("db"))
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::LowSpace)
            // Writes are flushed by hand before they are relied on; a background thread could panic unseen.
            .flush_every_ms(None);
        let sled = guard(dir, || config.open())?;
        let database = Self {
            dir: dir.to_owned(),
            state: Mutex::new(State {
                sled: Some(sled),
                generation: 0,
                _lock: lock,
            }),
        };
        let generation = database.read(GENERATION)?.unwrap_or(0);
        match known {
            Some(known) if generation < known => {
                return Err(database.corrupt(format!(
                    "it is at write {generation} and had acknowledged write {known}"
                )));
            }
            // The very first write may have ended between sled and the file.
            None if generation > 1 => {
                return Err(database.corrupt("the file `generation` is missing".to_owned()));
            }
            _ => {}
        }
        database
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .generation = generation;
        Ok(database)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn read<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, LedgerError> {
        let bytes = self.with(|state| state.run(&self.dir, |sled| sled.get(key)))?;
        bytes.map(|bytes| self.decode(key, &bytes)).transpose()
    }

    /// Every value whose key starts with `prefix`, by the rest of the key.
    pub(super) fn read_all<T: DeserializeOwned>(
        &self,
        prefix: &str,
    ) -> Result<BTreeMap<String, T>, LedgerError> {
        let pairs = self.with(|state| {
            state.run(&self.dir, |sled| {
                sled.scan_prefix(prefix)
                    .collect::<sled::Result<Vec<(sled::IVec, sled::IVec)>>>()
            })
        })?;
        let mut values = BTreeMap::new();
        for (key, bytes) in pairs {
            let key = std::str::from_utf8(&key)
                .map_err(|_| self.corrupt("a key is not UTF-8".to_owned()))?;
            let value = self.decode(key, &bytes)?;
            values.insert(
                key.get(prefix.len()..).unwrap_or_default().to_owned(),
                value,
            );
        }
        Ok(values)
    }

    /// Replaces a value by what `change` makes of it, and returns the new one once it is on disk.
    pub(super) fn update<T: Serialize + DeserializeOwned>(
        &self,
        key: &str,
        change: impl FnOnce(Option<T>) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        self.with(|state| {
            let old = state.run(&self.dir, |sled| sled.get(key))?;
            let old = old.map(|bytes| self.decode(key, &bytes)).transpose()?;
            let value = change(old)?;
            let generation = state.generation + 1;
            let mut batch = sled::Batch::default();
            batch.insert(key, encode(key, &value));
            batch.insert(GENERATION, encode(GENERATION, &generation));
            state.run(&self.dir, |sled| {
                sled.apply_batch(batch)?;
                sled.flush()
            })?;
            let io = |source| LedgerError::Io {
                dir: self.dir.clone(),
                source,
            };
            // sled syncs the range that it wrote, which does not include the file's length.
            File::open(self.dir.join("db").join("db"))
                .and_then(|file| file.sync_all())
                .map_err(io)?;
            write_generation(&self.dir, generation).map_err(io)?;
            state.generation = generation;
            Ok(value)
        })
    }

    fn with<T>(
        &self,
        operation: impl FnOnce(&mut State) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        // A panic of ours leaves nothing half done in memory: sled's batch is atomic and generation is set last.
        operation(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn decode<T: DeserializeOwned>(&self, key: &str, bytes: &[u8]) -> Result<T, LedgerError> {
        let damaged = |what: &str| self.corrupt(format!("value `{key}` {what}"));
        let (&version, rest) = bytes.split_first().ok_or_else(|| damaged("is empty"))?;
        if version != VALUE_VERSION {
            return Err(damaged(&format!(
                "has version {version}, this program reads {VALUE_VERSION}"
            )));
        }
        let (check, payload) = rest
            .split_at_checked(CHECK_BYTES)
            .ok_or_else(|| damaged("is cut off"))?;
        if check != check_of(key, payload) {
            return Err(damaged("does not match its check sum"));
        }
        serde_json::from_slice(payload)
            .map_err(|error| damaged(&format!("cannot be read: {error}")))
    }

    fn corrupt(&self, reason: String) -> LedgerError {
        LedgerError::Corrupt {
            dir: self.dir.clone(),
            reason,
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(sled) = state.sled.take() {
            // sled works on while it is closed, and panics if its file has become unusable meanwhile.
            if catch_unwind(AssertUnwindSafe(|| drop(sled))).is_err() {
                tracing::warn!(dir = %self.dir.display(), "the ledger's database failed while it was closed");
            }
        }
    }
}

impl State {
    fn run<T>(
        &mut self,
        dir: &Path,
        operation: impl FnOnce(&sled::Db) -> sled::Result<T>,
    ) -> Result<T, LedgerError> {
        let Some(sled) = &self.sled else {
            return Err(LedgerError::Corrupt {
                dir: dir.to_owned(),
                reason: "it failed before".to_owned(),
            });
        };
        let result = guard(dir, || operation(sled));
        if matches!(result, Err(LedgerError::Corrupt { .. })) {
            // Its destructor would go on with a broken state; the process that gets this error is about to end anyway.
            std::mem::forget(self.sled.take());
        }
        result
    }
}

/// Turns sled's errors and panics into ours.
fn guard<T>(dir: &Path, operation: impl FnOnce() -> sled::Result<T>) -> Result<T, LedgerError> {
    let corrupt = |reason: String| LedgerError::Corrupt {
        dir: dir.to_owned(),
        reason,
    };
    match catch_unwind(AssertUnwindSafe(operation)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(source))) => Err(LedgerError::Io {
            dir: dir.to_owned(),
            source,
        }),
        Ok(Err(error)) => Err(corrupt(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("unknown panic");
            Err(corrupt(format!(
                "sled gave up: {}",
                text.lines().next().unwrap_or_default()
            )))
        }
    }
}

fn encode<T: Serialize>(key: &str, value: &T) -> Vec<u8> {
    let payload =
        serde_json::to_vec(value).expect("ledger values hold only strings, integers and maps");
    let mut bytes = vec![VALUE_VERSION];
    bytes.extend(check_of(key, &payload));
    bytes.extend(payload);
    bytes
}

fn check_of(key: &str, payload: &[u8]) -> [u8; CHECK_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key.as_bytes());
    hasher.update(payload);
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..CHECK_BYTES]);
    check
}

fn lock(dir: &Path) -> Result<File, LedgerError> {
    let io = |source| LedgerError::Io {
        dir: dir.to_owned(),
        source,
    };
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.take(20).read_to_string(&mut holder);
            let holder = if holder.trim().is_empty() {
                "?"
            } else {
                holder.trim()
            };
            return Err(LedgerError::InUse {
                dir: dir.to_owned(),
                holder: holder.to_owned(),
            });
        }
        Err(TryLockError::Error(source)) => return Err(io(source)),
    }
    // Only for the error message of whoever comes second.
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io)?;
    Ok(file)
}

fn read_generation(dir: &Path) -> Result<Option<u64>, LedgerError> {
    match std::fs::read_to_string(dir.join(GENERATION)) {
        Ok(text) => {
            let corrupt = || LedgerError::Corrupt {
                dir: dir.to_owned(),
                reason: "the file `generation` cannot be read".to_owned(),
            };
            let (number, check) = text.trim_end().split_once(' ').ok_or_else(corrupt)?;
            let generation = number.parse().map_err(|_| corrupt())?;
            if generation_line(generation) != text || check.is_empty() {
                return Err(corrupt());
            }
            Ok(Some(generation))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(LedgerError::Corrupt {
                dir: dir.to_owned(),
                reason: "the file `generation` is not text".to_owned(),
            })
        }
        Err(source) => Err(LedgerError::Io {
            dir: dir.to_owned(),
            source,
        }),
    }
}

fn generation_line(generation: u64) -> String {
    let check = blake3::hash(generation.to_string().as_bytes()).to_hex();
    format!("{generation} {}\n", &check[..CHECK_BYTES])
}

/// A new file in place of the old one, so that a crash leaves one of the two.
fn write_generation(dir: &Path, generation: u64) -> std::io::Result<()> {
    let (new, path) = (dir.join("generation.new"), dir.join(GENERATION));
    let mut file = File::create(&new)?;
    file.write_all(generation_line(generation).as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, &path)?;
    File::open(dir)?.sync_all()
}
