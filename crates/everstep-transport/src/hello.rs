//! The first bytes on the control stream: who speaks, and for which run.

use quinn::{ReadExactError, RecvStream, SendStream, WriteError};
use rkyv::rancor;
use rkyv::util::AlignedVec;

use crate::reason::{Refusal, RefusalKind};

/// Version of everything that crosses the wire. Peers of another version are refused.
pub const WIRE_VERSION: u32 = 1;

const MAGIC: [u8; 4] = *b"EVST";
const PREFIX_BYTES: usize = 12;
const BODY_BYTES_MAX: usize = 1024;

/// What a process says of itself when a connection opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The run; processes of different runs refuse each other.
    pub run_id: u64,
    /// The process's number in the topology.
    pub process: u32,
    /// The process's name, equal to the one in its certificate.
    pub name: String,
    /// Grows with every start of this process.
    pub incarnation: u64,
}

/// A hello that could not be read or is not acceptable.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The peer's hello is not acceptable here.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The stream ended inside the hello.
    #[error("the peer ended its hello early")]
    Early,
    /// The connection broke.
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
}

/// The archived form. The prefix is outside of it, so that another version is told from rubbish whatever its layout.
#[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
struct Body {
    run_id: u64,
    incarnation: u64,
    process: u32,
    name: String,
}

impl Hello {
    /// Magic, wire version, length, archive.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = Body {
            run_id: self.run_id,
            incarnation: self.incarnation,
            process: self.process,
            name: self.name.clone(),
        };
        let body = rkyv::to_bytes::<rancor::Error>(&body)
            .expect("archiving into memory has no way to fail");
        assert!(
            body.len() <= BODY_BYTES_MAX,
            "process names are checked to be short"
        );
        let mut out = Vec::with_capacity(PREFIX_BYTES + body.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&WIRE_VERSION.to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&body);
        out
    }

    /// Checks the prefix and gives the length of the archive that follows it.
    pub(crate) fn decode_prefix(prefix: [u8; PREFIX_BYTES]) -> Result<usize, Refusal> {
        let [m0, m1, m2, m3, v0, v1, v2, v3, body_bytes @ ..] = prefix;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(malformed("not an Everstep hello"));
        }
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != WIRE_VERSION {
            let text = format!("wire version `{version}`, this process speaks `{WIRE_VERSION}`");
            return Err(Refusal {
                kind: RefusalKind::WireVersion,
                text,
            });
        }
        match u32::from_le_bytes(body_bytes) as usize {
            body_bytes if body_bytes <= BODY_BYTES_MAX => Ok(body_bytes),
            body_bytes => Err(malformed(&format!(
                "hello too long: `{body_bytes}` bytes, at most {BODY_BYTES_MAX}"
            ))),
        }
    }

    /// Validates the archive.
    pub(crate) fn decode_body(body: &[u8]) -> Result<Self, Refusal> {
        let mut aligned = AlignedVec::<16>::with_capacity(body.len());
        aligned.extend_from_slice(body);
        let Body {
            run_id,
            incarnation,
            process,
            name,
        } = rkyv::from_bytes::<Body, rancor::Error>(&aligned)
            .map_err(|error| malformed(&format!("hello not readable: {error}")))?;
        Ok(Self {
            run_id,
            process,
            name,
            incarnation,
        })
    }

    /// Refuses a peer of another run.
    pub(crate) fn check_run(&self, ours: &Self) -> Result<(), Refusal> {
        if self.run_id == ours.run_id {
            return Ok(());
        }
        let text = format!(
            "run `{:016x}`, this process belongs to run `{:016x}`",
            self.run_id, ours.run_id
        );
        Err(Refusal {
            kind: RefusalKind::RunId,
            text,
        })
    }
}

/// Reads and validates the peer's hello.
pub(crate) async fn read_hello(stream: &mut RecvStream) -> Result<Hello, HelloError> {
    let mut prefix = [0; PREFIX_BYTES];
    stream.read_exact(&mut prefix).await.map_err(read_failed)?;
    let mut body = vec![0; Hello::decode_prefix(prefix)?];
    stream.read_exact(&mut body).await.map_err(read_failed)?;
    Ok(Hello::decode_body(&body)?)
}

/// Says hello.
pub(crate) async fn write_hello(stream: &mut SendStream, hello: &Hello) -> Result<(), HelloError> {
    stream
        .write_all(&hello.encode())
        .await
        .map_err(|error| match error {
            WriteError::ConnectionLost(error) => HelloError::Connection(error),
            WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                HelloError::Early
            }
        })
}

fn read_failed(error: ReadExactError) -> HelloError {
    match error {
        ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => {
            HelloError::Connection(error)
        }
        ReadExactError::ReadError(_) | ReadExactError::FinishedEarly(_) => HelloError::Early,
    }
}

fn malformed(text: &str) -> Refusal {
    Refusal {
        kind: RefusalKind::Malformed,
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello {
            run_id: 0x0102_0304_0506_0708,
            process: 9,
            name: "worker-3".to_owned(),
            incarnation: 11,
        }
    }

    fn decode(bytes: &[u8]) -> Result<Hello, Refusal> {
        let Some((prefix, body)) = bytes.split_first_chunk() else {
            return Err(malformed("short"));
        };
        let body_bytes = Hello::decode_prefix(*prefix)?;
        Hello::decode_body(body.get(..body_bytes).unwrap_or(body))
    }

    #[test]
    fn golden_bytes() {
        let expected: &[u8] = &[
            b'E', b'V', b'S', b'T', 1, 0, 0, 0, 32, 0, 0, 0, // prefix
            8, 7, 6, 5, 4, 3, 2, 1, 11, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0,
            0, // run, incarnation, process
            b'w', b'o', b'r', b'k', b'e', b'r', b'-', b'3', 0, 0, 0, 0, // name, padding
        ];
        assert_eq!(
            hello().encode(),
            expected,
            "the hello is part of the wire protocol"
        );
        assert_eq!(decode(expected).unwrap(), hello());
    }

    #[test]
    fn another_version_is_told_from_rubbish() {
        let mut bytes = hello().encode();
        bytes[4] = 2;
        assert_eq!(decode(&bytes).unwrap_err().kind, RefusalKind::WireVersion);
        bytes[0] = 0;
        assert_eq!(decode(&bytes).unwrap_err().kind, RefusalKind::Malformed);
    }

    proptest! {
        #[test]
        fn round_trip(run_id: u64, process: u32, incarnation: u64, name in "[a-z][a-z0-9-]{0,62}") {
            let hello = Hello { run_id, process, name, incarnation };
            prop_assert_eq!(decode(&hello.encode()).unwrap(), hello);
        }

        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Hello::decode_body(&body);
        }

        #[test]
        fn truncated_or_flipped_hellos_never_panic(cut in 0..44_usize, at in 12..44_usize, bit in 0..8_u8) {
            let mut bytes = hello().encode();
            bytes[at] ^= 1 << bit;
            let _ = decode(&bytes);
            let _ = decode(&bytes[..cut]);
        }
    }
}
