//! Small JSON documents that carry a version and the digest of their own body.
//!
//! `{"version": 1, "blake3": "…", "body": {…}}`, indented for people; the digest is that of the body's compact JSON
//! with the fields in declaration order.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

const VERSION: u32 = 1;

#[derive(Serialize)]
struct Out<'a, T> {
    version: u32,
    blake3: Digest,
    body: &'a T,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct In<T> {
    #[serde(rename = "version")]
    _version: u32,
    blake3: Digest,
    body: T,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Why a document cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// A newer program wrote it.
    Newer {
        /// Its version.
        version: u32,
        /// The newest version that this program reads.
        known: u32,
    },
    /// Its bytes are not what was written; one line.
    Damaged(String),
}

/// The digest that [`seal_in`] writes for `body`. From version 2 on the version enters the digest, so that no document passes for one of
/// another version.
pub(crate) fn digest_in<T: Serialize>(version: u32, body: &T) -> Digest {
    let json =
        serde_json::to_vec(body).expect("our documents hold only strings, integers and maps");
    if version == 1 {
        return Digest::of(&json);
    }
    Digest::of(&[&version.to_le_bytes()[..], &json].concat())
}

/// Writes a document.
pub(crate) fn seal<T: Serialize>(body: &T) -> Vec<u8> {
    seal_in(VERSION, body)
}

/// Writes a document of a version.
pub(crate) fn seal_in<T: Serialize>(version: u32, body: &T) -> Vec<u8> {
    let out = Out {
        version,
        blake3: digest_in(version, body),
        body,
    };
    let mut bytes = serde_json::to_vec_pretty(&out)
        .expect("our documents hold only strings, integers and maps");
    bytes.push(b'\n');
    bytes
}

/// Reads a document.
pub(crate) fn unseal<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    unseal_to(VERSION, bytes).map(|(_, body)| body)
}

/// Reads a document of any version up to `known`, which comes back with it.
pub(crate) fn unseal_to<T: Serialize + DeserializeOwned>(
    known: u32,
    bytes: &[u8],
) -> Result<(u32, T), Unreadable> {
    let damaged = |reason: String| Unreadable::Damaged(reason);
    let Version { version } = serde_json::from_slice(bytes)
        .map_err(|error| damaged(format!("not valid JSON: {error}")))?;
    let document: Result<In<T>, _> = serde_json::from_slice(bytes);
    if version == 0 || version > known {
        // A document that verifies as one of ours is ours, with a version that was damaged.
        let ours = |document: &In<T>| {
            (1..=known).any(|version| digest_in(version, &document.body) == document.blake3)
        };
        if version == 0 || document.as_ref().is_ok_and(ours) {
            return Err(damaged(format!("version {version} is not its version")));
        }
        return Err(Unreadable::Newer { version, known });
    }
    let document = document.map_err(|error| damaged(error.to_string()))?;
    let found = digest_in(version, &document.body);
    if found != document.blake3 {
        return Err(damaged(format!(
            "body has BLAKE3 {found}, the document says {}",
            document.blake3
        )));
    }
    // White space and escapes mean nothing and are damage all the same: what changed one byte may change more.
    if seal_in(version, &document.body) != bytes {
        return Err(damaged(
            "its bytes differ from those that were written, though not in meaning".to_owned(),
        ));
    }
    Ok((version, document.body))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_changed_byte_is_damage() {
        type Body = BTreeMap<String, u64>;
        let body: Body = [("steps".into(), 12), ("tokens".into(), 99)].into();
        for version in [1, 2] {
            let bytes = seal_in(version, &body);
            let read = |bytes: &[u8]| unseal_to::<Body>(2, bytes);
            assert_eq!(read(&bytes), Ok((version, body.clone())));
            for at in 0..bytes.len() {
                for other in (0..=255).filter(|other| *other != bytes[at]) {
                    let mut damaged = bytes.clone();
                    damaged[at] = other;
                    let read = read(&damaged);
                    assert!(
                        matches!(read, Err(Unreadable::Damaged(_))),
                        "byte {at} is {other}: {read:?}"
                    );
                }
            }
            for len in 0..bytes.len() {
                assert!(matches!(read(&bytes[..len]), Err(Unreadable::Damaged(_))));
            }
        }
    }

    #[test]
    fn a_newer_version_is_told_from_a_damaged_one() {
        let newer = seal_in(7, &1u64);
        let error = Unreadable::Newer {
            version: 7,
            known: 1,
        };
        assert_eq!(unseal::<u64>(&newer), Err(error.clone()));
        // Its body may hold what this program has never heard of.
        assert_eq!(unseal::<String>(&newer), Err(error));
    }
}
