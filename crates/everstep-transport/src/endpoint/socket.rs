//! The UDP socket, and what of QUIC's endpoint outlives a process.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::EndpointConfig;
use quinn::crypto::{CryptoError, HmacKey};
use quinn_proto::HashedConnectionIdGenerator;
use socket2::{Domain, Protocol, Socket, Type};

use crate::options::TransportOptions;

/// Largest UDP payload there is.
const UDP_PAYLOAD_BYTES_MAX: u16 = 65_527;
/// Stateless resets and connection ids come from a secret that outlives the process: when it restarts on the same port,
/// packets for its predecessor are answered with a reset that the peer believes.
pub(super) fn endpoint_config(secret: [u8; 32]) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(ResetKey(secret)));
    let [c0, c1, c2, c3, c4, c5, c6, c7, ..] =
        blake3::derive_key("everstep-transport 1 connection ids", &secret);
    let cid_key = u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
    config
        .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)))
        .max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX)
        .expect("the constant is within QUIC's bounds");
    config
}

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        // Comparing with a `Hash` takes constant time.
        match <[u8; blake3::OUT_LEN]>::try_from(signature) {
            Ok(signature) if expected == signature => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

/// Binds the socket, asks for large buffers, and says how many bytes may be in flight on loopback.
pub(super) fn socket(addr: SocketAddr, options: &TransportOptions) -> io::Result<(Socket, u64)> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind(&addr.into())?;
    socket.set_recv_buffer_size(options.socket_buffer_bytes)?;
    socket.set_send_buffer_size(options.socket_buffer_bytes)?;
    // The kernel counts its own overhead, too: what fits is about half of what it says.
    let granted = socket.recv_buffer_size()? as u64;
    Ok((socket, options.loopback_window_bytes.min(granted / 2)))
}
