//! The wire format: rkyv mirrors of what actors say, validated before anything is read from them.
//!
//! A message is a prefix (magic, version, checksum) and an archived [`body::Envelope`]. Messages without tensors travel whole on the control session.
//! Messages with tensors travel as frames: the envelope is the frame's header, and the payload is raw little-endian values that are never
//! copied through an archive.
//!
//! Domain types are not archives: this module converts, so that a change inside the protocol does not change the wire unseen.
//! `tests.rs` pins the bytes of every message.

mod body;
mod convert;
mod parts;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use everstep_optim::{BlockState, FloatBuffer, Gradient, Parameters};
use everstep_protocol::policy::History;
use everstep_telemetry::TraceContext;
use rkyv::rancor;
use rkyv::util::AlignedVec;

use crate::message::{ClusterMessage, StepMessage};
use crate::topology::ActorAddress;

/// Version of this format; peers of another version are refused by the transport already.
const VERSION: u8 = 4;
const PREFIX: [u8; 4] = [b'E', b'V', b'M', VERSION];
/// Bytes of the archive's BLAKE3 that follow the prefix. An archive is read from its end, so the front part of one can be a valid
/// archive of something else; validation alone would not notice.
const CHECKSUM_BYTES: usize = 8;

/// Who says something to whom, and in which span.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Envelope {
    /// The run; other runs' messages are refused.
    pub(crate) run_id: u64,
    /// The sender.
    pub(crate) from: ActorAddress,
    /// Which life of the sender.
    pub(crate) from_incarnation: u64,
    /// The receiver.
    pub(crate) to: ActorAddress,
    /// Which life of the receiver; whatever life is there if `None`.
    pub(crate) to_incarnation: Option<u64>,
    /// The sender's span.
    pub(crate) trace: TraceContext,
}

/// A message ready to be sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Encoded {
    /// For the control session.
    Control(Bytes),
    /// For a tensor stream.
    Tensor {
        /// Prefix and envelope.
        header: Bytes,
        /// Raw little-endian values.
        payload: Bytes,
    },
}

/// Bytes that are not a message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// Not ours, or of another version.
    #[error("message has prefix {found:?}, not {PREFIX:?}")]
    Prefix {
        /// The first bytes.
        found: Vec<u8>,
    },
    /// The archive is not the one that was sent.
    #[error("message is damaged: checksum does not match")]
    Checksum,
    /// The archive does not hold together.
    #[error("message is damaged: {0}")]
    Archive(rancor::Error),
    /// A field holds what it may not.
    #[error("message field {field} holds `{value}`")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Values that do not fit.
    #[error("message payload: {0}")]
    Payload(String),
}

/// Encodes a message.
pub(crate) fn encode(envelope: &Envelope, message: ClusterMessage) -> Encoded {
    let (body, payload) = convert::to_wire(message);
    let archived = rkyv::to_bytes::<rancor::Error>(&convert::envelope_to_wire(envelope, body))
        .expect("an archive in memory cannot fail");
    let bytes = seal(&archived);
    match payload {
        None => Encoded::Control(bytes),
        Some(payload) => Encoded::Tensor {
            header: bytes,
            payload,
        },
    }
}

/// Puts prefix and checksum before an archive.
fn seal(archive: &[u8]) -> Bytes {
    [&PREFIX[..], &checksum(archive)[..], archive]
        .concat()
        .into()
}

fn checksum(archive: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&blake3::hash(archive).as_bytes()[..CHECKSUM_BYTES]);
    checksum
}

/// Decodes a message without tensors.
///
/// # Errors
/// Whatever the bytes are, [`WireError`] and never a panic.
pub(crate) fn decode_control(bytes: &[u8]) -> Result<(Envelope, ClusterMessage), WireError> {
    decode(bytes, None)
}

/// Decodes a message with tensors. `payload` must be aligned to 4 bytes.
///
/// # Errors
/// Whatever the bytes are, [`WireError`] and never a panic.
pub(crate) fn decode_tensor(
    header: &[u8],
    payload: Bytes,
) -> Result<(Envelope, ClusterMessage), WireError> {
    decode(header, Some(payload))
}

fn decode(bytes: &[u8], payload: Option<Bytes>) -> Result<(Envelope, ClusterMessage), WireError> {
    let Some(sealed) = bytes.strip_prefix(&PREFIX) else {
        return Err(WireError::Prefix {
            found: bytes[..bytes.len().min(PREFIX.len())].to_vec(),
        });
    };
    let archive = match sealed.split_first_chunk::<CHECKSUM_BYTES>() {
        Some((sent, archive)) if *sent == checksum(archive) => archive,
        _ => return Err(WireError::Checksum),
    };
    let mut aligned = AlignedVec::<16>::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    let wire =
        rkyv::from_bytes::<body::Envelope, rancor::Error>(&aligned).map_err(WireError::Archive)?;
    let extra = payload.clone();
    let (envelope, message) = convert::from_wire(wire, payload)?;
    match extra {
        Some(extra) if !has_tensors(&message) => Err(WireError::Payload(format!(
            "{} bytes with a message that has none",
            extra.len()
        ))),
        _ => Ok((envelope, message)),
    }
}

/// Whether a message travels as a frame.
fn has_tensors(message: &ClusterMessage) -> bool {
    use everstep_protocol::Message;
    matches!(
        message,
        ClusterMessage::Batch { .. }
            | ClusterMessage::Protocol(
                Message::Parameters { .. }
                    | Message::Partial { .. }
                    | Message::Replicate { .. }
                    | Message::Seed { .. }
            )
    )
}

/// The tensors of a message, as one payload.
fn payload_of(message: &StepMessage) -> Option<Bytes> {
    use everstep_protocol::Message;
    Some(match message {
        Message::Parameters { parameters, .. } => parameters.to_bytes(),
        Message::Partial { gradient, .. } | Message::Replicate { gradient, .. } => {
            gradient.values.to_bytes()
        }
        Message::Seed { state, .. } => state.parts().map(FloatBuffer::as_bytes).concat().into(),
        _ => return None,
    })
}

fn floats(bytes: Bytes) -> Result<FloatBuffer, WireError> {
    FloatBuffer::from_bytes(bytes).map_err(|error| WireError::Payload(error.to_string()))
}

fn gradient(payload: Bytes, loss_sum: f64, tokens: u64) -> Result<Gradient, WireError> {
    Ok(Gradient::new(floats(payload)?, loss_sum, tokens))
}

fn parameters(payload: Bytes, dtype: u8) -> Result<Parameters, WireError> {
    let dtype = parts::dtype_from_wire(dtype)?;
    Parameters::from_bytes(dtype, payload).map_err(|error| WireError::Payload(error.to_string()))
}

/// `lens`: values of each part.
fn state(payload: &Bytes, lens: [u32; 4], history: History) -> Result<BlockState, WireError> {
    let parts_bytes = lens.map(|len| 4 * len as usize);
    if payload.len() != parts_bytes.iter().sum::<usize>() {
        let num_bytes = payload.len();
        return Err(WireError::Payload(format!(
            "{num_bytes} bytes are not parts of {lens:?} values of float32"
        )));
    }
    let mut start = 0;
    let mut part = |index: usize| {
        let end = start + parts_bytes[index];
        let part = floats(payload.slice(start..end));
        start = end;
        part
    };
    Ok(BlockState {
        parameters: part(0)?,
        first_moment: part(1)?,
        second_moment: part(2)?,
        average: part(3)?,
        history,
    })
}
