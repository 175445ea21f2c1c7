//! What a strict run records about its machine and must find again.

use tch::Device;

use crate::{DeviceKind, library};

/// What of machine and library the bits of a gradient depend on; part of a run's manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// CPU or CUDA.
    pub device_kind: DeviceKind,
    /// Widest vector instructions of the processor, by which libtorch and its matrix library choose kernels.
    pub instructions: String,
    /// Version of libtorch, such as `2.11.0`, without the build suffix.
    pub libtorch_version: String,
}

impl Platform {
    /// Of a process that computes on `device`.
    pub fn current(device: Device) -> Self {
        let version = library::version();
        Self {
            device_kind: DeviceKind::of(device),
            instructions: instructions(std::env::var("ATEN_CPU_CAPABILITY").ok().as_deref())
                .to_owned(),
            libtorch_version: version.split('+').next().unwrap_or(&version).to_owned(),
        }
    }
}

/// The level that libtorch chooses: what the processor has, or less if `ATEN_CPU_CAPABILITY` asks for less. The
/// matrix library does not follow that variable, but chooses by the processor alone.
fn instructions(asked: Option<&str>) -> &'static str {
    let detected = detected_instructions();
    match (asked, detected) {
        (Some("default"), _) => "default",
        (Some("avx2"), "avx512" | "avx512_bf16") => "avx2",
        _ => detected,
    }
}

#[cfg(target_arch = "x86_64")]
fn detected_instructions() -> &'static str {
    if std::arch::is_x86_feature_detected!("avx512bf16") {
        "avx512_bf16"
    } else if std::arch::is_x86_feature_detected!("avx512f") {
        "avx512"
    } else if std::arch::is_x86_feature_detected!("avx2") {
        "avx2"
    } else {
        "default"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detected_instructions() -> &'static str {
    std::env::consts::ARCH
}
