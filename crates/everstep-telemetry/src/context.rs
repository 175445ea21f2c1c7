//! Trace contexts that ride in message headers, so that one trace spans processes.
//!
//! A sender puts [`TraceContext::current`] into the header of its message; the receiver opens its span and lets the
//! context [adopt](TraceContext::adopt) it before entering it.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Where in which trace a message was sent: W3C trace context without the vendor state.
///
/// All zero means "no trace": spans are not exported, or there is no current span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TraceContext {
    /// The trace's id, big-endian as W3C writes it.
    pub trace_id: [u8; 16],
    /// The id of the span that sent the message.
    pub span_id: [u8; 8],
    /// W3C trace flags: bit 0 says that the trace is sampled.
    pub flags: u8,
}

/// The size of [`TraceContext::to_bytes`].
pub const TRACE_CONTEXT_BYTES: usize = 25;

impl TraceContext {
    /// The context of the current `tracing` span; zero when there is none or spans are not exported.
    ///
    /// This starts the span for OpenTelemetry, so its parent cannot be changed any more.
    #[must_use]
    pub fn current() -> Self {
        Self::of(&tracing::Span::current())
    }

    /// The context of `span`; zero when it is disabled or spans are not exported.
    #[must_use]
    pub fn of(span: &tracing::Span) -> Self {
        let context = span.context();
        let span = context.span();
        let span = span.span_context();
        if !span.is_valid() {
            return Self::default();
        }
        Self {
            trace_id: span.trace_id().to_bytes(),
            span_id: span.span_id().to_bytes(),
            flags: span.trace_flags().to_u8(),
        }
    }

    /// Whether this names a span.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.trace_id != [0; 16] && self.span_id != [0; 8]
    }

    /// Makes the sender's span the parent of `span`.
    ///
    /// Call it right after creating `span`, before entering it or reading its context: a span that has started keeps
    /// its parent. Does nothing for a zero context or when spans are not exported.
    pub fn adopt(&self, span: &tracing::Span) {
        if !self.is_valid() {
            return;
        }
        let remote = SpanContext::new(
            TraceId::from_bytes(self.trace_id),
            SpanId::from_bytes(self.span_id),
            TraceFlags::new(self.flags),
            true,
            TraceState::default(),
        );
        let parent = opentelemetry::Context::new().with_remote_span_context(remote);
        // A failure means that there is nothing to connect: the span is filtered out, or has a parent already.
        let _ = span.set_parent(parent);
    }

    /// Trace id, span id, flags.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; TRACE_CONTEXT_BYTES] {
        let mut bytes = [0; TRACE_CONTEXT_BYTES];
        bytes[..16].copy_from_slice(&self.trace_id);
        bytes[16..24].copy_from_slice(&self.span_id);
        bytes[24] = self.flags;
        bytes
    }

    /// The inverse of [`to_bytes`](Self::to_bytes); every value is allowed.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; TRACE_CONTEXT_BYTES]) -> Self {
        let mut context = Self {
            flags: bytes[24],
            ..Self::default()
        };
        context.trace_id.copy_from_slice(&bytes[..16]);
        context.span_id.copy_from_slice(&bytes[16..24]);
        context
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip() {
        let context = TraceContext {
            trace_id: [7; 16],
            span_id: [9; 8],
            flags: 1,
        };
        assert_eq!(TraceContext::from_bytes(&context.to_bytes()), context);
        assert!(context.is_valid());
    }

    #[test]
    fn without_a_layer_the_context_is_zero_and_adopting_is_harmless() {
        assert_eq!(TraceContext::current(), TraceContext::default());
        let span = tracing::info_span!("step");
        TraceContext {
            trace_id: [1; 16],
            span_id: [1; 8],
            flags: 1,
        }
        .adopt(&span);
        assert_eq!(TraceContext::of(&span), TraceContext::default());
    }
}
