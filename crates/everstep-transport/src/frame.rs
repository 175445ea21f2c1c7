//! Frames: an opaque header and an opaque payload with a checksum, one per unidirectional stream.
//!
//! ```text
//! offset  0  magic          "EVF1"
//!         4  version        u16
//!         6  reserved       u16, zero
//!         8  header length  u32
//!        12  checksum       u32, CRC-32 of the two lengths, the header and the payload
//!        16  payload length u64
//!        24  header bytes, payload bytes, end of stream
//! ```
//!
//! All integers are little-endian. TLS already protects the bytes on the wire; the checksum is for what happens before
//! and after it (memory, and our own mistakes), so a hardware-speed CRC is enough: it ran at 23 GB/s where BLAKE3 ran
//! at 3 (see `benches/`). Decoding is pure, so that it can be tested without sockets.

use bytes::Bytes;
use rkyv::util::AlignedVec;

/// Longest header.
pub const HEADER_BYTES_MAX: usize = 64 << 10;
/// Length of the fixed part in front of the header.
pub(crate) const PREFIX_BYTES: usize = 24;

const MAGIC: [u8; 4] = *b"EVF1";
const VERSION: u16 = 1;
/// Headers are rkyv archives, whose widest field is 16 bytes.
const HEADER_ALIGN: usize = 16;
/// Payloads are reinterpreted as numbers; a cache line suits every element type and vector register.
const PAYLOAD_ALIGN: usize = 64;

/// One received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The sender's header, aligned to 16 bytes.
    pub header: Bytes,
    /// The sender's payload in one piece, aligned to 64 bytes.
    pub payload: Bytes,
}

/// What is wrong with received frame bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream does not start with a frame.
    #[error("not a frame: magic=`{0:02x?}`")]
    Magic([u8; 4]),
    /// Another version of the frame format.
    #[error("frame version `{0}`, this process speaks `{VERSION}`")]
    Version(u16),
    /// The reserved field is in use.
    #[error("reserved frame field is not zero: reserved=`{0}`")]
    Reserved(u16),
    /// The header is longer than [`HEADER_BYTES_MAX`].
    #[error("frame header too long: header_bytes=`{0}`, at most {HEADER_BYTES_MAX}")]
    HeaderTooLong(u32),
    /// The payload is longer than this process accepts.
    #[error("frame payload too long: payload_bytes=`{payload_bytes}`, at most {payload_bytes_max}")]
    PayloadTooLong {
        /// Length that the sender announced.
        payload_bytes: u64,
        /// The limit.
        payload_bytes_max: usize,
    },
    /// The stream ended inside the frame.
    #[error("frame ended early: got_bytes=`{got_bytes}`, expected_bytes=`{expected_bytes}`")]
    Truncated {
        /// Bytes that came.
        got_bytes: u64,
        /// Bytes of the whole frame, or of the prefix if not even that came.
        expected_bytes: u64,
    },
    /// The stream goes on after the frame.
    #[error("bytes after the end of the frame")]
    Trailing,
    /// The bytes are not those that were sent.
    #[error("frame checksum does not match: computed=`{computed:08x}`, sent=`{sent:08x}`")]
    Checksum {
        /// Checksum of what was received.
        computed: u32,
        /// Checksum in the frame.
        sent: u32,
    },
}

/// What a [`FrameDecoder`] accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// Longest header, at most [`HEADER_BYTES_MAX`].
    pub header_bytes_max: usize,
    /// Longest payload.
    pub payload_bytes_max: usize,
}

impl Default for FrameLimits {
    /// [`HEADER_BYTES_MAX`] and 256 MiB.
    fn default() -> Self {
        Self {
            header_bytes_max: HEADER_BYTES_MAX,
            payload_bytes_max: 256 << 20,
        }
    }
}

/// Takes a frame's bytes in pieces of any size.
#[derive(Debug)]
pub struct FrameDecoder {
    limits: FrameLimits,
    is_summed: bool,
    prefix: [u8; PREFIX_BYTES],
    prefix_bytes: usize,
    body: Option<Body>,
}

#[derive(Debug)]
struct Body {
    header_bytes: usize,
    payload_bytes: usize,
    /// What was sent and what was computed so far; a lane has none.
    checksum: Option<(u32, crc32fast::Hasher)>,
    header: AlignedVec<HEADER_ALIGN>,
    payload: AlignedVec<PAYLOAD_ALIGN>,
}

impl FrameDecoder {
    /// A decoder at the start of a frame.
    pub fn new(limits: FrameLimits) -> Self {
        Self {
            limits,
            is_summed: true,
            prefix: [0; PREFIX_BYTES],
            prefix_bytes: 0,
            body: None,
        }
    }

    /// For frames of [`encode_unsummed`].
    pub(crate) fn unsummed(limits: FrameLimits) -> Self {
        Self {
            is_summed: false,
            ..Self::new(limits)
        }
    }

    /// The payload's length, once enough has been pushed to know it. Nothing is allocated for the payload before
    /// payload bytes are pushed.
    pub fn payload_bytes(&self) -> Option<usize> {
        self.body.as_ref().map(|body| body.payload_bytes)
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`FrameError`] as soon as the bytes cannot be a frame within the limits; the decoder is of no use then.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), FrameError> {
        if self.body.is_none() {
            let taken = bytes.len().min(PREFIX_BYTES - self.prefix_bytes);
            let (prefix, rest) = bytes.split_at(taken);
            self.prefix[self.prefix_bytes..self.prefix_bytes + taken].copy_from_slice(prefix);
            self.prefix_bytes += taken;
            bytes = rest;
            if self.prefix_bytes < PREFIX_BYTES {
                return Ok(());
            }
            self.body = Some(Body::parse(&self.prefix, self.limits, self.is_summed)?);
        }
        match &mut self.body {
            Some(body) => body.push(bytes),
            None => Ok(()),
        }
    }

    /// Ends the frame: all bytes have been pushed.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] or [`FrameError::Checksum`].
    pub fn finish(self) -> Result<Frame, FrameError> {
        let Some(body) = self.body else {
            return Err(FrameError::Truncated {
                got_bytes: self.prefix_bytes as u64,
                expected_bytes: PREFIX_BYTES as u64,
            });
        };
        body.finish()
    }
}

impl Body {
    fn parse(
        prefix: &[u8; PREFIX_BYTES],
        limits: FrameLimits,
        is_summed: bool,
    ) -> Result<Self, FrameError> {
        let [
            m0,
            m1,
            m2,
            m3,
            v0,
            v1,
            r0,
            r1,
            h0,
            h1,
            h2,
            h3,
            c0,
            c1,
            c2,
            c3,
            payload_bytes @ ..,
        ] = *prefix;
        let magic = [m0, m1, m2, m3];
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let reserved = u16::from_le_bytes([r0, r1]);
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        let header_bytes = u32::from_le_bytes([h0, h1, h2, h3]);
        if header_bytes as usize > limits.header_bytes_max.min(HEADER_BYTES_MAX) {
            return Err(FrameError::HeaderTooLong(header_bytes));
        }
        let payload_bytes = u64::from_le_bytes(payload_bytes);
        if payload_bytes > limits.payload_bytes_max as u64 {
            return Err(FrameError::PayloadTooLong {
                payload_bytes,
                payload_bytes_max: limits.payload_bytes_max,
            });
        }
        Ok(Self {
            header_bytes: header_bytes as usize,
            payload_bytes: payload_bytes as usize,
            checksum: is_summed.then(|| {
                let sent = u32::from_le_bytes([c0, c1, c2, c3]);
                (sent, lengths_crc(header_bytes, payload_bytes))
            }),
            header: AlignedVec::new(),
            payload: AlignedVec::new(),
        })
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<(), FrameError> {
        if self.header.len() < self.header_bytes {
            let (header, rest) =
                bytes.split_at(bytes.len().min(self.header_bytes - self.header.len()));
            self.sum(header);
            self.header.extend_from_slice(header);
            bytes = rest;
        }
        if bytes.len() > self.payload_bytes - self.payload.len() {
            return Err(FrameError::Trailing);
        }
        if !bytes.is_empty() {
            if self.payload.is_empty() {
                self.payload = AlignedVec::with_capacity(self.payload_bytes);
            }
            // Summed while the piece is still in the cache.
            self.sum(bytes);
            self.payload.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn sum(&mut self, bytes: &[u8]) {
        if let Some((_, crc)) = &mut self.checksum {
            crc.update(bytes);
        }
    }

    fn finish(self) -> Result<Frame, FrameError> {
        if self.header.len() < self.header_bytes || self.payload.len() < self.payload_bytes {
            return Err(FrameError::Truncated {
                got_bytes: (PREFIX_BYTES + self.header.len() + self.payload.len()) as u64,
                expected_bytes: (PREFIX_BYTES + self.header_bytes + self.payload_bytes) as u64,
            });
        }
        if let Some((sent, crc)) = self.checksum {
            let computed = crc.finalize();
            if computed != sent {
                return Err(FrameError::Checksum { computed, sent });
            }
        }
        Ok(Frame {
            header: Bytes::from_owner(self.header),
            payload: Bytes::from_owner(self.payload),
        })
    }
}

/// The prefix and the header of a frame in one buffer; the payload's pieces follow it on the stream.
///
/// The checksum is computed over all of them here. The caller keeps to the limits; a frame beyond those of the
/// receiver is refused there.
///
/// # Panics
/// If the header is longer than `u32` can say.
pub fn encode_frame(header: &[u8], payload: &[Bytes]) -> Bytes {
    let mut crc = lengths_crc(header_len(header), payload_len(payload));
    crc.update(header);
    for piece in payload {
        crc.update(piece);
    }
    encode(header, payload, crc.finalize())
}

/// [`encode_frame`] without the checksum.
pub(crate) fn encode_unsummed(header: &[u8], payload: &[Bytes]) -> Bytes {
    encode(header, payload, 0)
}

fn header_len(header: &[u8]) -> u32 {
    u32::try_from(header.len()).expect("the caller has checked the header's length")
}

fn payload_len(payload: &[Bytes]) -> u64 {
    payload.iter().map(|piece| piece.len() as u64).sum()
}

fn encode(header: &[u8], payload: &[Bytes], checksum: u32) -> Bytes {
    let mut out = Vec::with_capacity(PREFIX_BYTES + header.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&0_u16.to_le_bytes());
    out.extend_from_slice(&header_len(header).to_le_bytes());
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(&payload_len(payload).to_le_bytes());
    out.extend_from_slice(header);
    out.into()
}

/// The checksum starts with the lengths, so that a byte moved between header and payload is noticed.
fn lengths_crc(header_bytes: u32, payload_bytes: u64) -> crc32fast::Hasher {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header_bytes.to_le_bytes());
    crc.update(&payload_bytes.to_le_bytes());
    crc
}

#[cfg(test)]
mod tests;
