//! `file:///folder`: a local or mounted disk.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use url::Url;

use super::Backend;
use crate::error::{StoreError, one_line};

pub(super) fn open(url: &str, parsed: &Url, run: &str) -> Result<Backend, StoreError> {
    let root = parsed.to_file_path().map_err(|()| StoreError::BadUrl {
        url: url.to_owned(),
        reason: "a folder is written `file:///absolute/path`, with three slashes".to_owned(),
    })?;
    let refused = |reason: String| StoreError::NotWritable {
        url: url.to_owned(),
        reason,
    };
    let folder = root.join(run);
    // A commit must outlive a power cut, so files and folders are synced before a write counts.
    let store: Arc<dyn ObjectStore> = match std::fs::create_dir_all(&folder) {
        Ok(()) => {
            let local = LocalFileSystem::new_with_prefix(&folder)
                .map_err(|error| refused(one_line(&error)))?;
            Arc::new(local.with_fsync(true))
        }
        // The disk may be away for a while (a mount, a full disk). A process that starts meanwhile goes on when it is back.
        Err(error) => {
            let prefix = Path::from_absolute_path(&folder)
                .map_err(|_| refused(format!("cannot create `{}`: {error}", folder.display())))?;
            Arc::new(PrefixStore::new(
                LocalFileSystem::new().with_fsync(true),
                prefix,
            ))
        }
    };
    Ok(Backend {
        bulk: Arc::clone(&store),
        small: store,
        folder: Some(folder),
        suspicion: None,
    })
}
