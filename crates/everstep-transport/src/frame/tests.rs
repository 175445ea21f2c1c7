use proptest::prelude::*;

use super::*;

const LIMITS: FrameLimits = FrameLimits {
    header_bytes_max: 1 << 10,
    payload_bytes_max: 1 << 20,
};

fn bytes_of(header: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut all = encode_frame(header, &[Bytes::copy_from_slice(payload)]).to_vec();
    all.extend_from_slice(payload);
    all
}

fn decode(pieces: &[&[u8]]) -> Result<Frame, FrameError> {
    let mut decoder = FrameDecoder::new(LIMITS);
    for piece in pieces {
        decoder.push(piece)?;
    }
    decoder.finish()
}

#[test]
fn golden_bytes() {
    let frame = bytes_of(b"head", b"payload!");
    let expected: &[u8] = &[
        0x45, 0x56, 0x46, 0x31, 1, 0, 0, 0, 4, 0, 0, 0, 156, 245, 189, 241, 8, 0, 0, 0, 0, 0, 0,
        0, //
        b'h', b'e', b'a', b'd', b'p', b'a', b'y', b'l', b'o', b'a', b'd', b'!',
    ];
    assert_eq!(
        frame, expected,
        "the frame format is part of the wire protocol"
    );
}

#[test]
fn limits_are_checked_before_anything_is_allocated() {
    let mut long_header = bytes_of(b"h", b"p");
    long_header[8..12].copy_from_slice(&(1025_u32).to_le_bytes());
    assert_eq!(
        decode(&[&long_header]),
        Err(FrameError::HeaderTooLong(1025))
    );
    let mut long_payload = bytes_of(b"h", b"p");
    long_payload[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(
        decode(&[&long_payload]),
        Err(FrameError::PayloadTooLong {
            payload_bytes: u64::MAX,
            ..
        })
    ));
}

#[test]
fn other_formats_are_told_apart() {
    let mut version = bytes_of(b"h", b"p");
    version[4] = 2;
    assert_eq!(decode(&[&version]), Err(FrameError::Version(2)));
    let mut reserved = bytes_of(b"h", b"p");
    reserved[6] = 1;
    assert_eq!(decode(&[&reserved]), Err(FrameError::Reserved(1)));
    assert_eq!(
        decode(&[b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"]),
        Err(FrameError::Magic(*b"GET "))
    );
    let mut trailing = bytes_of(b"h", b"p");
    trailing.push(0);
    assert_eq!(decode(&[&trailing]), Err(FrameError::Trailing));
}

proptest! {
    #[test]
    fn any_split_gives_the_frame_back_aligned(
        header in proptest::collection::vec(any::<u8>(), 0..200),
        payload in proptest::collection::vec(any::<u8>(), 0..5000),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let all = bytes_of(&header, &payload);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(all.len() + 1)).collect();
        cuts.extend([0, all.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &all[cut[0]..cut[1]]).collect();
        let frame = decode(&pieces).unwrap();
        prop_assert_eq!(&frame.header[..], &header[..]);
        prop_assert_eq!(&frame.payload[..], &payload[..]);
        prop_assert!(frame.header.is_empty() || (frame.header.as_ptr() as usize).is_multiple_of(HEADER_ALIGN));
        prop_assert!(frame.payload.is_empty() || (frame.payload.as_ptr() as usize).is_multiple_of(PAYLOAD_ALIGN));
    }

    #[test]
    fn truncated_frames_are_refused(payload in proptest::collection::vec(any::<u8>(), 0..500), at in any::<prop::sample::Index>()) {
        let all = bytes_of(b"header", &payload);
        let cut = at.index(all.len());
        let refused = matches!(decode(&[&all[..cut]]), Err(FrameError::Truncated { .. }));
        prop_assert!(refused);
    }

    #[test]
    fn one_changed_bit_is_refused(payload in proptest::collection::vec(any::<u8>(), 0..500), at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut all = bytes_of(b"header", &payload);
        let at = at.index(all.len());
        all[at] ^= 1 << bit;
        prop_assert!(decode(&[&all]).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), keep_magic in any::<bool>()) {
        let mut bytes = bytes;
        if keep_magic && bytes.len() > 8 {
            bytes[..8].copy_from_slice(&[0x45, 0x56, 0x46, 0x31, 1, 0, 0, 0]);
        }
        prop_assert!(decode(&[&bytes]).is_err());
    }
}
