//! Tensors as plain memory: whole ranges in and out, never element by element.
//!
//! Bytes are little-endian, as on the wire and in checkpoints. Tensors are flat: an offset counts elements of the
//! contiguous memory, whatever the shape.
#![allow(unsafe_code)]

use tch::{Device, Kind, Tensor};

use crate::{Dtype, TorchError};

#[cfg(not(target_endian = "little"))]
compile_error!("tensor bytes are little-endian on the wire and are copied as they lie in memory");

/// Copies `bytes` over the elements of `target` from element `offset` on.
///
/// The bytes are elements of the tensor's own type. A CPU tensor is written by one copy of memory.
///
/// # Errors
/// [`TorchError::NotPlain`], [`TorchError::PartialElement`] or [`TorchError::OutOfRange`]; the tensor is then unchanged.
pub fn write_bytes(target: &mut Tensor, offset: usize, bytes: &[u8]) -> Result<(), TorchError> {
    let dtype = plain_dtype(target)?;
    let len = whole_elements(bytes.len(), dtype)?;
    check_range(target, offset, len)?;
    if target.device() == Device::Cpu {
        // SAFETY: the tensor is contiguous, so its elements lie in `numel` consecutive places from `data_ptr` on, and
        // the range was checked to be among them. `bytes` cannot overlap memory that libtorch allocated for us.
        unsafe {
            let start = target
                .data_ptr()
                .cast::<u8>()
                .add(offset * dtype.size_bytes());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len());
        }
    } else {
        let source = Tensor::f_from_data_size(bytes, &[len as i64], dtype.kind())?;
        flat_range(target, offset, len)?.f_copy_(&source)?;
    }
    Ok(())
}

/// Copies `values` over the elements of `target` from element `offset` on, rounded to nearest-even for bfloat16.
///
/// # Errors
/// As [`write_bytes`].
pub fn write_f32(target: &mut Tensor, offset: usize, values: &[f32]) -> Result<(), TorchError> {
    plain_dtype(target)?;
    check_range(target, offset, values.len())?;
    // SAFETY: the blob is only read, and it dies before `values` can.
    let source = unsafe { f32_blob(values.as_ptr(), values.len())? };
    let mut range = flat_range(target, offset, values.len())?;
    tch::no_grad(|| range.f_copy_(&source))?;
    Ok(())
}

/// Copies all elements of `source`, of any shape, device and layout, into `values`, widened to float32.
///
/// # Errors
/// [`TorchError::OutOfRange`] if the lengths differ.
pub fn read_f32(source: &Tensor, values: &mut [f32]) -> Result<(), TorchError> {
    into_f32(source, values, |target, source| target.f_copy_(source))
}

/// Appends all elements of `source`, of any shape, device and layout, to `values`, widened to float32.
///
/// # Errors
/// What libtorch says.
pub fn append_f32(source: &Tensor, values: &mut Vec<f32>) -> Result<(), TorchError> {
    let len = source.numel();
    values.reserve(len);
    let spare = values.spare_capacity_mut().as_mut_ptr().cast::<f32>();
    // SAFETY: the spare capacity has `len` places, is borrowed exclusively, and is only written; the blob dies before it can move.
    let mut target = unsafe { f32_blob(spare, len)? };
    tch::no_grad(|| target.f_copy_(&source.f_detach()?.f_reshape([-1])?))?;
    drop(target);
    // SAFETY: as many were just written.
    unsafe { values.set_len(values.len() + len) };
    Ok(())
}

/// Adds all elements of `source`, of any shape, device and layout, to `values` in float32.
///
/// # Errors
/// As [`read_f32`].
pub fn add_f32(source: &Tensor, values: &mut [f32]) -> Result<(), TorchError> {
    into_f32(source, values, |target, source| {
        target.f_add_(&source.f_to_device(Device::Cpu)?).map(drop)
    })
}

fn into_f32(
    source: &Tensor,
    values: &mut [f32],
    write: impl Fn(&mut Tensor, &Tensor) -> Result<(), tch::TchError>,
) -> Result<(), TorchError> {
    if source.numel() != values.len() {
        return Err(TorchError::OutOfRange {
            offset: 0,
            len: values.len(),
            elements: source.numel(),
        });
    }
    // SAFETY: the blob borrows `values`, which we hold exclusively, and dies before this function returns.
    let mut target = unsafe { f32_blob(values.as_mut_ptr(), values.len())? };
    tch::no_grad(|| write(&mut target, &source.f_detach()?.f_reshape([-1])?))?;
    Ok(())
}

/// # Safety
/// `data` must point to `len` numbers that outlive the tensor; they must be ours alone if the tensor is written.
unsafe fn f32_blob(data: *const f32, len: usize) -> Result<Tensor, TorchError> {
    // SAFETY: as the caller promises; no strides means contiguous.
    Ok(unsafe { Tensor::f_from_blob(data.cast(), &[len as i64], &[], Kind::Float, Device::Cpu)? })
}

fn flat_range(tensor: &Tensor, offset: usize, len: usize) -> Result<Tensor, TorchError> {
    Ok(tensor
        .f_detach()?
        .f_view([-1])?
        .f_narrow(0, offset as i64, len as i64)?)
}

fn plain_dtype(tensor: &Tensor) -> Result<Dtype, TorchError> {
    let dtype = Dtype::from_kind(tensor.f_kind()?).ok_or(TorchError::NotPlain)?;
    if tensor.is_contiguous() {
        Ok(dtype)
    } else {
        Err(TorchError::NotPlain)
    }
}

fn whole_elements(bytes: usize, dtype: Dtype) -> Result<usize, TorchError> {
    if bytes.is_multiple_of(dtype.size_bytes()) {
        Ok(bytes / dtype.size_bytes())
    } else {
        Err(TorchError::PartialElement { bytes, dtype })
    }
}

fn check_range(tensor: &Tensor, offset: usize, len: usize) -> Result<(), TorchError> {
    let elements = tensor.numel();
    match offset.checked_add(len) {
        Some(end) if end <= elements => Ok(()),
        _ => Err(TorchError::OutOfRange {
            offset,
            len,
            elements,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements of a tensor, from `offset` on, as they are.
    fn read_bytes(source: &Tensor, offset: usize, bytes: &mut [u8]) -> Result<(), TorchError> {
        let len = whole_elements(bytes.len(), plain_dtype(source)?)?;
        flat_range(source, offset, len)?.f_copy_data_u8(bytes, len)?;
        Ok(())
    }

    #[test]
    fn float32_goes_in_and_out_by_range() {
        let mut tensor = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        let bytes: Vec<u8> = [1.5f32, -2.0]
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        write_bytes(&mut tensor, 3, &bytes).unwrap();
        let mut values = [9.0; 6];
        read_f32(&tensor, &mut values).unwrap();
        assert_eq!(values, [0.0, 0.0, 0.0, 1.5, -2.0, 0.0]);
        let mut back = [0u8; 8];
        read_bytes(&tensor, 3, &mut back).unwrap();
        assert_eq!(back[..], bytes[..]);
        add_f32(&tensor, &mut values).unwrap();
        assert_eq!(values, [0.0, 0.0, 0.0, 3.0, -4.0, 0.0]);
        let mut grown = vec![7.0];
        append_f32(&tensor.tr(), &mut grown).unwrap();
        append_f32(&Tensor::zeros([0], (Kind::Float, Device::Cpu)), &mut grown).unwrap();
        assert_eq!(grown, [7.0, 0.0, 1.5, 0.0, -2.0, 0.0, 0.0]);
    }

    #[test]
    fn bfloat16_is_rounded_to_nearest_even() {
        let mut tensor = Tensor::zeros([3], (Kind::BFloat16, Device::Cpu));
        // 1 + 2^-8 lies half-way between two bfloat16 numbers; the even one is 1.
        write_f32(&mut tensor, 0, &[1.0 + f32::powi(2.0, -8), 3.0, -0.5]).unwrap();
        let mut bytes = [0u8; 6];
        read_bytes(&tensor, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [0x80, 0x3f, 0x40, 0x40, 0x00, 0xbf]);
        write_bytes(&mut tensor, 2, &[0x80, 0x40]).unwrap();
        let mut values = [0.0; 3];
        read_f32(&tensor, &mut values).unwrap();
        assert_eq!(values, [1.0, 3.0, 4.0]);
    }

    #[test]
    fn views_share_what_is_written() {
        let mut flat = Tensor::zeros([6], (Kind::Float, Device::Cpu));
        let leaf = flat
            .narrow(0, 2, 4)
            .view([2, 2])
            .detach()
            .set_requires_grad(true);
        write_f32(&mut flat, 2, &[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(leaf.double_value(&[1, 0]), 3.0);
    }

    #[test]
    fn ranges_and_layouts_are_checked() {
        let mut tensor = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        assert!(matches!(
            write_bytes(&mut tensor, 5, &[0; 8]),
            Err(TorchError::OutOfRange { .. })
        ));
        assert!(matches!(
            write_bytes(&mut tensor, usize::MAX, &[0; 8]),
            Err(TorchError::OutOfRange { .. })
        ));
        assert!(matches!(
            write_bytes(&mut tensor, 0, &[0; 3]),
            Err(TorchError::PartialElement { .. })
        ));
        assert!(matches!(
            write_bytes(&mut tensor.transpose(0, 1), 0, &[0; 4]),
            Err(TorchError::NotPlain)
        ));
        assert!(matches!(
            read_f32(&tensor, &mut [0.0; 5]),
            Err(TorchError::OutOfRange { .. })
        ));
        let mut counts = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
        assert!(matches!(
            write_bytes(&mut counts, 0, &[0; 8]),
            Err(TorchError::NotPlain)
        ));
    }
}
