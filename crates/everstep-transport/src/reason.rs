//! Why a connection was refused or ended.

use quinn::{ConnectionError, VarInt};

use crate::frame::FrameError;

/// Application close codes. Part of the wire protocol: never reused, never renumbered.
const CLOSED: u32 = 0;
const BAD_FRAME: u32 = 1;
const SUPERSEDED: u32 = 2;
const REFUSED_BASE: u32 = 16;
/// Reset code of a frame's stream whose sender gave up half-way.
pub(crate) const ABANDONED: u32 = 3;
/// Longest reason text that is sent.
const REASON_BYTES_MAX: usize = 256;

/// The ground of a [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The hello is not one.
    Malformed,
    /// Another version of the wire protocol.
    WireVersion,
    /// Another run.
    RunId,
    /// The name in the hello is not the one in the certificate, or not the one that was dialled.
    Name,
    /// A newer incarnation of the same process is connected.
    Stale,
    /// Both sides dialled at the same time and the other connection is kept.
    Duplicate,
}

/// Why one side did not accept the other's hello.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// The ground.
    pub kind: RefusalKind,
    /// One line for people.
    pub text: String,
}

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// This side closed it.
    #[error("closed here")]
    Local,
    /// The peer closed it in good order.
    #[error("closed by the peer")]
    Peer,
    /// The peer was silent for the idle time-out.
    #[error("the peer has been silent for too long")]
    TimedOut,
    /// No process holds the peer's port any more.
    #[error("the peer's process is gone")]
    Gone,
    /// The peer's process has been replaced by a new one.
    #[error("the peer's process has restarted")]
    Restarted,
    /// A newer connection to the same peer took this one's place.
    #[error("a newer connection to the peer took over")]
    Superseded,
    /// The peer sent a bad frame.
    #[error("the peer sent a bad frame: {0}")]
    BadFrame(#[from] FrameError),
    /// The peer says that it got a bad frame from this side.
    #[error("the peer got a bad frame: {0}")]
    BadFrameSent(String),
    /// One side refused the other's hello.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// One side did not accept the other's certificate.
    #[error("certificate not accepted: {0}")]
    Certificate(String),
    /// QUIC itself failed.
    #[error("transport: {0}")]
    Transport(String),
}

impl CloseReason {
    /// Whether this means that the peer's process died, froze or became unreachable (as opposed to an orderly end).
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::TimedOut | Self::Gone | Self::Restarted)
    }

    /// The close code and text that tell the peer.
    pub(crate) fn to_wire(&self) -> (VarInt, String) {
        let (code, text) = match self {
            Self::BadFrame(error) => (BAD_FRAME, error.to_string()),
            Self::Superseded | Self::Restarted => (SUPERSEDED, String::new()),
            Self::Refused(refusal) => (REFUSED_BASE + refusal.kind.ordinal(), refusal.text.clone()),
            _ => (CLOSED, String::new()),
        };
        let end = (0..=text.len().min(REASON_BYTES_MAX))
            .rev()
            .find(|&end| text.is_char_boundary(end))
            .unwrap_or(0);
        (VarInt::from_u32(code), text[..end].to_owned())
    }
}

impl From<ConnectionError> for CloseReason {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::LocallyClosed => Self::Local,
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::Reset => Self::Restarted,
            ConnectionError::ApplicationClosed(close) => {
                let text = String::from_utf8_lossy(&close.reason).into_owned();
                match u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX) {
                    CLOSED => Self::Peer,
                    BAD_FRAME => Self::BadFrameSent(text),
                    SUPERSEDED => Self::Superseded,
                    code => match code
                        .checked_sub(REFUSED_BASE)
                        .and_then(RefusalKind::from_ordinal)
                    {
                        Some(kind) => Self::Refused(Refusal { kind, text }),
                        None => Self::Transport(format!(
                            "closed by the peer with unknown code `{code}`: {text}"
                        )),
                    },
                }
            }
            ConnectionError::ConnectionClosed(close) if is_certificate(close.error_code.into()) => {
                Self::Certificate(format!("the peer says: {close}"))
            }
            ConnectionError::TransportError(error) if is_certificate(error.code.into()) => {
                Self::Certificate(error.to_string())
            }
            other => Self::Transport(other.to_string()),
        }
    }
}

/// Whether a QUIC error code carries a TLS alert about certificates.
fn is_certificate(code: u64) -> bool {
    // bad_certificate to unknown_ca, access_denied, decrypt_error, certificate_required (RFC 8446, 6.2).
    matches!(code.checked_sub(0x100), Some(42..=49 | 51 | 116))
}

impl RefusalKind {
    const ALL: [Self; 6] = [
        Self::Malformed,
        Self::WireVersion,
        Self::RunId,
        Self::Name,
        Self::Stale,
        Self::Duplicate,
    ];

    fn ordinal(self) -> u32 {
        self as u32
    }

    fn from_ordinal(ordinal: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.ordinal() == ordinal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_cross_the_wire_with_kind_and_text() {
        for (ordinal, kind) in RefusalKind::ALL.into_iter().enumerate() {
            assert_eq!(kind.ordinal(), ordinal as u32);
            let reason = CloseReason::Refused(Refusal {
                kind,
                text: "why".to_owned(),
            });
            let (error_code, text) = reason.to_wire();
            let seen = quinn::ApplicationClose {
                error_code,
                reason: text.into(),
            };
            assert_eq!(
                CloseReason::from(ConnectionError::ApplicationClosed(seen)),
                reason
            );
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let kind = RefusalKind::Name;
        let (_, text) = CloseReason::Refused(Refusal {
            kind,
            text: "ä".repeat(500),
        })
        .to_wire();
        assert_eq!(text, "ä".repeat(128));
    }

    #[test]
    fn unknown_codes_are_no_panic() {
        let seen = quinn::ApplicationClose {
            error_code: VarInt::MAX,
            reason: vec![0xff].into(),
        };
        assert!(matches!(
            CloseReason::from(ConnectionError::ApplicationClosed(seen)),
            CloseReason::Transport(_)
        ));
    }
}
