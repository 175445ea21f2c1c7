//! Uploads with bounded memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, UploadPart};
use tokio::runtime::Handle;

use crate::block::{BlockSource, ObjectImage};

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
pub(crate) async fn upload<B: BlockSource>(
    store: &Arc<dyn ObjectStore>,
    key: &Path,
    image: &ObjectImage<'_, B>,
) -> object_store::Result<()> {
    let (mut cursor, buffers) = (image.cursor(), Buffers::default());
    let unread = |error: std::io::Error| object_store::Error::Generic {
        store: "block",
        source: error.into(),
    };
    if image.len() <= PART_BYTES {
        let mut bytes = Vec::new();
        cursor
            .next_chunk(PART_BYTES as usize, &mut bytes)
            .map_err(unread)?;
        return store.put(key, bytes.into()).await.map(drop);
    }
    let mut upload = PartUpload::begin(store, key, image.len(), PARTS_IN_FLIGHT_MAX).await?;
    let mut part = buffers.take();
    while cursor
        .next_chunk(upload.part_bytes, &mut part)
        .map_err(unread)?
    {
        upload.send(buffers.lend(part)).await?;
        part = buffers.take();
    }
    upload.complete().await
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
            self.send(part.into()).await?;
        }
        Ok(())
    }

    /// Sends a part, after those that were pushed; all but the last have the size of a part.
    async fn send(&mut self, part: Bytes) -> object_store::Result<()> {
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
            self.send(rest.into()).await?;
        }
        while self.parts.next().await.transpose()?.is_some() {}
        if let Some(upload) = &mut self.guard.upload {
            upload.complete().await?;
        }
        self.guard.upload = None;
        Ok(())
    }
}

/// Memory of parts that is used again: fresh memory costs the system more than all that is done with it here.
#[derive(Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    fn all(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take(&self) -> Vec<u8> {
        self.all().pop().unwrap_or_default()
    }

    pub(crate) fn give(&self, buffer: Vec<u8>) {
        self.all().push(buffer);
    }

    /// Bytes whose memory comes back when the last of them is dropped.
    fn lend(&self, bytes: Vec<u8>) -> Bytes {
        let home = self.clone();
        Bytes::from_owner(Lent { bytes, home })
    }
}

struct Lent {
    bytes: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.give(std::mem::take(&mut self.bytes));
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
