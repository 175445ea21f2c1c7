//! QUIC transport: mutual TLS, framed tensor streams, rkyv headers.
