use super::*;

fn local(values: &[f32]) -> FloatBuffer {
    values.to_vec().into()
}

/// Bytes as a frame reader makes them: one allocation, frozen.
fn received(values: &[f32]) -> FloatBuffer {
    // Over-allocated, so that an aligned start always exists.
    let mut bytes = BytesMut::zeroed(values.len() * 4 + 16);
    let skip = bytes.as_ptr().align_offset(16);
    let mut bytes = bytes.split_off(skip);
    bytes.truncate(values.len() * 4);
    bytes.copy_from_slice(bytemuck::cast_slice(values));
    FloatBuffer::from_bytes(bytes.freeze()).unwrap()
}

fn misaligned(values: &[f32]) -> FloatBuffer {
    let mut bytes = BytesMut::zeroed(values.len() * 4 + 16);
    let skip = bytes.as_ptr().align_offset(16) + 1;
    let mut bytes = bytes.split_off(skip);
    bytes.truncate(values.len() * 4);
    bytes.copy_from_slice(bytemuck::cast_slice(values));
    FloatBuffer::from_bytes(bytes.freeze()).unwrap()
}

const MAKERS: [fn(&[f32]) -> FloatBuffer; 3] = [local, received, misaligned];

#[test]
fn kinds_hold_the_same_values() {
    for make in MAKERS {
        for len in [0, 1, 5] {
            let values: Vec<f32> = (0..len).map(|i| i as f32 - 1.5).collect();
            let buffer = make(&values);
            assert_eq!(buffer.as_slice(), values);
            assert_eq!(buffer.as_bytes(), bytemuck::cast_slice::<f32, u8>(&values));
            assert_eq!(buffer.to_bytes(), buffer.as_bytes());
            assert_eq!(buffer, local(&values));
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.into_vec(), values);
        }
    }
}

#[test]
fn half_an_element_is_refused() {
    let error = FloatBuffer::from_bytes(Bytes::from_static(&[0; 6])).unwrap_err();
    assert_eq!(
        error,
        BufferError::PartialElement {
            num_bytes: 6,
            element_bytes: 4
        }
    );
}

#[test]
fn bytes_share_memory() {
    let buffer = local(&[1.0, 2.0]);
    assert_eq!(buffer.to_bytes().as_ptr(), buffer.as_bytes().as_ptr());
    let back = FloatBuffer::from_bytes(buffer.to_bytes()).unwrap();
    assert_eq!(back.as_bytes().as_ptr(), buffer.as_bytes().as_ptr());
}

#[test]
fn changes_stay_with_the_changed() {
    for make in MAKERS {
        let mut changed = make(&[1.0, 2.0]);
        let kept = changed.clone();
        let sent = changed.to_bytes();
        changed.make_mut()[0] = 7.0;
        assert_eq!(changed.as_slice(), [7.0, 2.0]);
        assert_eq!(kept.as_slice(), [1.0, 2.0]);
        assert_eq!(sent, kept.as_bytes());
        let before = changed.as_slice().as_ptr();
        changed.make_mut()[1] = 8.0;
        assert_eq!(changed.as_slice().as_ptr(), before, "nobody shares it");
    }
}

#[test]
fn sums_do_not_depend_on_kind_or_sharing() {
    for make_left in MAKERS {
        for make_right in MAKERS {
            for shared in 0..4 {
                let (left, right) = (make_left(&[1.0, 2.0, 3.0]), make_right(&[0.5, -2.0, 4.0]));
                let held_left = (shared & 1 != 0).then(|| left.clone());
                let held_right = (shared & 2 != 0).then(|| right.clone());
                assert_eq!(left.add(right).as_slice(), [1.5, 0.0, 7.0]);
                assert!(held_left.is_none_or(|held| held.as_slice() == [1.0, 2.0, 3.0]));
                assert!(held_right.is_none_or(|held| held.as_slice() == [0.5, -2.0, 4.0]));
            }
        }
    }
}

#[test]
fn sums_reuse_memory_that_nobody_holds() {
    for make in MAKERS {
        let (left, right) = (make(&[1.0; 8]), make(&[2.0; 8]));
        let memory = left.as_bytes().as_ptr();
        assert_eq!(left.add(right).as_bytes().as_ptr(), memory);
        let (left, right) = (make(&[1.0; 8]), make(&[2.0; 8]));
        let (memory, held) = (right.as_bytes().as_ptr(), left.clone());
        assert_eq!(left.add(right).as_bytes().as_ptr(), memory);
        drop(held);
    }
}
