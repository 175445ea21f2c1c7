//! What can be set on an endpoint, and the two QUIC profiles made from it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::congestion::LoopbackWindow;
use crate::frame::FrameLimits;

/// Datagram size on loopback, whose MTU is 65,536; one big datagram costs one system call. Measured: see `benches/`.
const LOOPBACK_DATAGRAM_BYTES: u16 = 60_000;
/// After losses that look as if big datagrams did not get through, they are tried again this soon.
const MTU_COOLDOWN: Duration = Duration::from_secs(1);
/// Flow-control window of one stream.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// First guess of the round trip. quinn's 333 ms makes a lost first packet cost a second.
const INITIAL_RTT: Duration = Duration::from_millis(50);

/// Time-outs and limits of an [`Endpoint`](crate::Endpoint). The defaults suit processes on one machine or one LAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportOptions {
    /// An idle connection sends a ping this often. Default 250 ms.
    pub keep_alive: Duration,
    /// A peer that was silent for this long is lost. Default 1.5 s.
    pub idle_timeout: Duration,
    /// How often the kernel is asked whether a peer on this machine still has its port. Default 100 ms.
    pub probe_interval: Duration,
    /// Longest time from the first packet to the peer's hello. Default 3 s.
    pub handshake_timeout: Duration,
    /// Largest payload that is sent or accepted. Default 256 MiB.
    pub payload_bytes_max: usize,
    /// Frames in flight per direction and connection; more wait. Default 16.
    pub streams_max: u32,
    /// Received frames that wait for [`recv`](crate::Connection::recv), per connection. Default 16.
    pub queue_frames: usize,
    /// Payload bytes being received or waiting for [`recv`](crate::Connection::recv), per connection. Default 512 MiB.
    /// One frame is always let through, however large.
    pub queue_bytes: usize,
    /// Kernel buffer asked for per socket and direction; the system may grant less. Default 4 MiB.
    pub socket_buffer_bytes: usize,
    /// Congestion window on loopback for as long as nothing is lost there. Default 1 MiB.
    /// It is lowered to half the granted socket buffer.
    pub loopback_window_bytes: u64,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_millis(250),
            idle_timeout: Duration::from_millis(1500),
            probe_interval: Duration::from_millis(100),
            handshake_timeout: Duration::from_secs(3),
            payload_bytes_max: 256 << 20,
            streams_max: 16,
            queue_frames: 16,
            queue_bytes: 512 << 20,
            socket_buffer_bytes: 4 << 20,
            loopback_window_bytes: 1 << 20,
        }
    }
}

impl TransportOptions {
    pub(crate) fn frame_limits(&self) -> FrameLimits {
        FrameLimits {
            payload_bytes_max: self.payload_bytes_max,
            ..FrameLimits::default()
        }
    }

    /// What of the options cannot work, as one line.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        if IdleTimeout::try_from(self.idle_timeout).is_err() {
            Some("idle_timeout is too long")
        } else if self.keep_alive >= self.idle_timeout {
            Some("keep_alive must be shorter than idle_timeout")
        } else if self.probe_interval.is_zero() {
            Some("probe_interval must not be zero")
        } else if self.streams_max == 0 || self.streams_max > 1024 {
            Some("streams_max must be in 1..=1024")
        } else if self.queue_frames == 0 {
            Some("queue_frames must not be zero")
        } else {
            None
        }
    }

    /// The QUIC settings towards `peer`.
    pub(crate) fn quic(&self, peer: SocketAddr, window_bytes: u64) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
        config
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(IdleTimeout::try_from(self.idle_timeout).ok())
            .initial_rtt(INITIAL_RTT)
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(self.streams_max))
            .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
            // Streams that wait for queue space hold received bytes, and quinn announces new room only in steps of an
            // eighth of the window. The connection's window is large enough for all streams to be full, or they would
            // starve the one frame whose end everybody waits for.
            .receive_window(streams_window(self.streams_max))
            // What is limited is a stream, not the connection, or frames could lock the control stream out. It costs
            // no memory: QUIC holds references to the payloads.
            .send_window(streams_window(self.streams_max).into_inner())
            // Without fairness quinn finishes a started stream before it looks at priorities.
            .send_fairness(true)
            .datagram_receive_buffer_size(None);
        if peer.ip().to_canonical().is_loopback() {
            // Not `min_mtu` as well: quinn would pad its handshake packets to that and overrun their length field.
            let mut discovery = MtuDiscoveryConfig::default();
            discovery
                .upper_bound(LOOPBACK_DATAGRAM_BYTES)
                .black_hole_cooldown(MTU_COOLDOWN);
            config
                .initial_mtu(LOOPBACK_DATAGRAM_BYTES)
                .mtu_discovery_config(Some(discovery))
                .enable_segmentation_offload(false)
                .congestion_controller_factory(Arc::new(LoopbackWindow { window_bytes }));
        }
        Arc::new(config)
    }
}

/// Twice what all streams together can hold.
fn streams_window(streams_max: u32) -> VarInt {
    VarInt::from_u64(2 * u64::from(STREAM_WINDOW_BYTES) * (u64::from(streams_max) + 1))
        .unwrap_or(VarInt::MAX)
}
