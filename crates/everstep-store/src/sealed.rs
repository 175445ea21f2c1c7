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

/// The digest that [`seal`] writes for `body`.
pub(crate) fn digest_of<T: Serialize>(body: &T) -> Digest {
    Digest::of(
        &serde_json::to_vec(body).expect("our documents hold only strings, integers and maps"),
    )
}

/// Writes a document.
pub(crate) fn seal<T: Serialize>(body: &T) -> Vec<u8> {
    let out = Out {
        version: VERSION,
        blake3: digest_of(body),
        body,
    };
    let mut bytes = serde_json::to_vec_pretty(&out)
        .expect("our documents hold only strings, integers and maps");
    bytes.push(b'\n');
    bytes
}

/// Reads a document; the error says in one line what is wrong.
pub(crate) fn unseal<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let Version { version } =
        serde_json::from_slice(bytes).map_err(|error| format!("not valid JSON: {error}"))?;
    if version != VERSION {
        return Err(format!(
            "version is {version}, this program reads {VERSION}"
        ));
    }
    let document: In<T> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let found = digest_of(&document.body);
    if found != document.blake3 {
        return Err(format!(
            "body has BLAKE3 {found}, the document says {}",
            document.blake3
        ));
    }
    Ok(document.body)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_flipped_byte_is_noticed_or_harmless() {
        let body: BTreeMap<String, u64> = [("steps".into(), 12), ("tokens".into(), 99)].into();
        let bytes = seal(&body);
        assert_eq!(unseal::<BTreeMap<String, u64>>(&bytes).unwrap(), body);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                if let Ok(read) = unseal::<BTreeMap<String, u64>>(&damaged) {
                    assert_eq!(read, body, "byte {at} bit {bit}");
                }
            }
        }
        for len in 0..bytes.len() - 1 {
            assert!(unseal::<BTreeMap<String, u64>>(&bytes[..len]).is_err());
        }
    }

    #[test]
    fn other_versions_are_named() {
        let text = String::from_utf8(seal(&1u64))
            .unwrap()
            .replacen("1", "7", 1);
        assert_eq!(
            unseal::<u64>(text.as_bytes()).unwrap_err(),
            "version is 7, this program reads 1"
        );
    }
}
