//! The choice of a device by name.

use tch::{Cuda, Device};

use crate::TorchError;

/// What a device is, as far as bits are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl DeviceKind {
    /// The kind of `device`; everything that is no CUDA device counts as CPU, for we select nothing else.
    pub fn of(device: Device) -> Self {
        if device.is_cuda() {
            Self::Cuda
        } else {
            Self::Cpu
        }
    }
}

/// The device that `name` means: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda` (the first) or `cuda:N`.
///
/// CUDA devices are seen only after [`crate::load_cuda`].
///
/// # Errors
/// [`TorchError::UnknownDevice`] for other names, [`TorchError::DeviceUnavailable`] for a device that is not there.
pub fn select_device(name: &str) -> Result<Device, TorchError> {
    let devices = || {
        if Cuda::is_available() {
            Cuda::device_count()
        } else {
            0
        }
    };
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" if devices() == 0 => return Ok(Device::Cpu),
        "auto" | "cuda" => 0,
        _ => name
            .strip_prefix("cuda:")
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|digits| digits.parse::<usize>().ok())
            .ok_or_else(|| TorchError::UnknownDevice {
                given: name.to_owned(),
            })?,
    };
    let count = devices();
    if i64::try_from(index).is_ok_and(|index| index < count) {
        return Ok(Device::Cuda(index));
    }
    let reason = if count == 0 {
        "libtorch sees no CUDA device (libtorch_cuda.so not found, or no driver)".to_owned()
    } else {
        format!("libtorch sees {count} CUDA device(s), numbered from 0")
    };
    Err(TorchError::DeviceUnavailable {
        given: name.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_select_or_say_what_is_allowed() {
        assert_eq!(select_device("cpu").unwrap(), Device::Cpu);
        assert!(select_device("auto").is_ok());
        for name in ["gpu", "cuda:", "cuda:x", "cuda:+1", "CPU", ""] {
            let error = select_device(name).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("device `{name}` is not known; allowed: auto, cpu, cuda, cuda:N")
            );
        }
        let error = select_device("cuda:4096").unwrap_err();
        assert!(
            matches!(error, TorchError::DeviceUnavailable { .. }),
            "{error}"
        );
    }
}
