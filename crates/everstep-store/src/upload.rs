//! Uploads with bounded memory.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt};
use tokio::runtime::Handle;

use crate::block::ObjectImage;

/// Size of a part, and of the biggest object that is sent in one request.
pub(crate) const PART_BYTES: u64 = 8 << 20;

/// S3 allows 10,000 parts.
const PARTS_MAX: u64 = 9_000;

/// Parts on their way at the same time: an upload holds at most one more in memory.
const PARTS_IN_FLIGHT_MAX: usize = 4;

/// What failed is often a store that is away: its parts are removed when it is back, if that is within some minutes.
const ABORT_ATTEMPTS: u32 = 20;
const ABORT_PAUSE: Duration = Duration::from_secs(10);

/// Writes the object; it appears in the store only when it is complete.
///
/// A dropped upload leaves no object; its parts are removed in the background.
pub(crate) async fn upload(
    store: &Arc<dyn ObjectStore>,
    key: &Path,
    image: &ObjectImage<'_>,
) -> object_store::Result<()> {
    let mut cursor = image.cursor();
    if image.len() <= PART_BYTES {
        let bytes = cursor.next_chunk(PART_BYTES as usize).unwrap_or_default();
        return store.put(key, bytes.into()).await.map(drop);
    }
    let part_bytes = part_bytes(image.len()) as usize;
    let mut guard = AbortOnDrop {
        upload: Some(store.put_multipart(key).await?),
        key: key.clone(),
    };
    let Some(upload) = &mut guard.upload else {
        return Ok(());
    };
    let mut parts = FuturesUnordered::new();
    let sent: object_store::Result<()> = async {
        while let Some(part) = cursor.next_chunk(part_bytes) {
            if parts.len() >= PARTS_IN_FLIGHT_MAX {
                parts.next().await.transpose()?;
            }
            parts.push(upload.put_part(part.into()));
        }
        while parts.next().await.transpose()?.is_some() {}
        upload.complete().await.map(drop)
    }
    .await;
    // Parts that are still on their way would be stored after the abort.
    drop(parts);
    if sent.is_ok() {
        guard.upload = None;
    }
    sent
}

/// Removes the parts of an upload that failed or was given up.
struct AbortOnDrop {
    upload: Option<Box<dyn MultipartUpload>>,
    key: Path,
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        let (Some(mut upload), Ok(runtime)) = (self.upload.take(), Handle::try_current()) else {
            return;
        };
        let key = self.key.clone();
        runtime.spawn(async move {
            for _ in 0..ABORT_ATTEMPTS {
                let Err(error) = upload.abort().await else {
                    return;
                };
                tracing::debug!(%key, %error, "the parts of an upload could not be removed now");
                tokio::time::sleep(ABORT_PAUSE).await;
            }
            tracing::warn!(%key, "an upload was given up and its parts could not be removed");
        });
    }
}

/// All parts but the last have this size: some servers insist on equal parts.
fn part_bytes(total: u64) -> u64 {
    let mebibytes = total.div_ceil(PARTS_MAX).div_ceil(1 << 20);
    PART_BYTES.max(mebibytes << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_never_exceed_what_s3_allows() {
        assert_eq!(part_bytes(PART_BYTES + 1), PART_BYTES);
        for total in [1u64 << 30, 100 << 30, 1 << 40, 5 << 40] {
            assert!(total.div_ceil(part_bytes(total)) <= PARTS_MAX);
            assert_eq!(part_bytes(total) % (1 << 20), 0);
        }
    }
}
