//! Uploads with bounded memory.

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::block::ObjectImage;

/// Size of a part, and of the biggest object that is sent in one request.
pub(crate) const PART_BYTES: u64 = 8 << 20;

/// S3 allows 10,000 parts.
const PARTS_MAX: u64 = 9_000;

/// Parts on their way at the same time: an upload holds at most one more in memory.
const PARTS_IN_FLIGHT_MAX: usize = 4;

/// Writes the object; it appears in the store only when it is complete.
///
/// Not cancel safe on S3: a dropped upload leaves its parts to the bucket's rule for incomplete multipart uploads.
pub(crate) async fn upload(
    store: &dyn ObjectStore,
    key: &Path,
    image: &ObjectImage<'_>,
) -> object_store::Result<()> {
    let mut cursor = image.cursor();
    if image.len() <= PART_BYTES {
        let bytes = cursor.next_chunk(PART_BYTES as usize).unwrap_or_default();
        return store.put(key, bytes.into()).await.map(drop);
    }
    let part_bytes = part_bytes(image.len()) as usize;
    let mut upload = store.put_multipart(key).await?;
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
    if let Err(error) = sent {
        // Parts that are still on their way would be stored after the abort.
        drop(parts);
        if let Err(abort) = upload.abort().await {
            tracing::warn!(%key, %abort, "an upload failed and its parts could not be removed");
        }
        return Err(error);
    }
    Ok(())
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
