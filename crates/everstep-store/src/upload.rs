//! Uploads with bounded memory.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, UploadPart};
use tokio::runtime::Handle;

use crate::block::{BlockSource, ObjectImage};
use crate::digest::{self, Digest};

/// Size of a part, and of the biggest object that is sent in one request.
pub(crate) const PART_BYTES: u64 = 8 << 20;

/// S3 allows 10,000 parts.
const PARTS_MAX: u64 = 9_000;

/// Parts on their way at the same time: an upload holds at most one more in memory.
const PARTS_IN_FLIGHT_MAX: usize = 4;

/// What failed is often a store that is away: its parts are removed when it is back, if that is within some minutes.
const ABORT_ATTEMPTS: u32 = 20;
const ABORT_PAUSE: Duration = Duration::from_secs(10);

/// Writes the object, which appears in the store only when it is complete, and gives its digest.
///
/// A dropped upload leaves no object; its parts are removed in the background.
pub(crate) async fn upload<B: BlockSource>(
    store: &Arc<dyn ObjectStore>,
    key: &Path,
    image: &ObjectImage<'_, B>,
) -> object_store::Result<Digest> {
    let mut cursor = image.cursor();
    let mut hasher = blake3::Hasher::new();
    let unread = |error: std::io::Error| object_store::Error::Generic {
        store: "block",
        source: error.into(),
    };
    if image.len() <= PART_BYTES {
        let bytes = cursor.next_chunk(PART_BYTES as usize).map_err(unread)?;
        let bytes = bytes.unwrap_or_default();
        digest::update(&mut hasher, &bytes).await;
        store.put(key, bytes.into()).await?;
        return Ok(hasher.finalize().into());
    }
    let mut upload = PartUpload::begin(store, key, image.len(), PARTS_IN_FLIGHT_MAX).await?;
    while let Some(part) = cursor.next_chunk(upload.part_bytes).map_err(unread)? {
        digest::update(&mut hasher, &part).await;
        upload.push(part).await?;
    }
    upload.complete().await?;
    Ok(hasher.finalize().into())
}

/// A multipart upload. Dropped before it is complete, it leaves no object; its parts are removed in the background.
pub(crate) struct PartUpload {
    // First, since parts that are still on their way would be stored after the abort.
    parts: FuturesUnordered<UploadPart>,
    guard: AbortOnDrop,
    pending: Vec<u8>,
    part_bytes: usize,
    in_flight_max: usize,
}

impl PartUpload {
    /// Begins an upload of `bytes` bytes, of which it holds `in_flight_max` parts and one more in memory.
    pub(crate) async fn begin(
        store: &Arc<dyn ObjectStore>,
        key: &Path,
        bytes: u64,
        in_flight_max: usize,
    ) -> object_store::Result<Self> {
        let upload = store.put_multipart(key).await?;
        Ok(Self {
            parts: FuturesUnordered::new(),
            guard: AbortOnDrop {
                upload: Some(upload),
                key: key.clone(),
            },
            pending: Vec::new(),
            part_bytes: part_bytes(bytes) as usize,
            in_flight_max,
        })
    }

    /// Takes the next bytes, and waits if too many are on their way.
    pub(crate) async fn push(&mut self, bytes: Vec<u8>) -> object_store::Result<()> {
        if self.pending.is_empty() {
            self.pending = bytes;
        } else {
            self.pending.extend_from_slice(&bytes);
        }
        while self.pending.len() >= self.part_bytes {
            let rest = self.pending.split_off(self.part_bytes);
            let part = std::mem::replace(&mut self.pending, rest);
            self.send(part).await?;
        }
        Ok(())
    }

    async fn send(&mut self, part: Vec<u8>) -> object_store::Result<()> {
        if self.parts.len() >= self.in_flight_max {
            self.parts.next().await.transpose()?;
        }
        if let Some(upload) = &mut self.guard.upload {
            self.parts.push(upload.put_part(part.into()));
        }
        Ok(())
    }

    /// Waits for all parts and makes the object appear.
    pub(crate) async fn complete(mut self) -> object_store::Result<()> {
        let rest = std::mem::take(&mut self.pending);
        if !rest.is_empty() {
            self.send(rest).await?;
        }
        while self.parts.next().await.transpose()?.is_some() {}
        if let Some(upload) = &mut self.guard.upload {
            upload.complete().await?;
        }
        self.guard.upload = None;
        Ok(())
    }
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
