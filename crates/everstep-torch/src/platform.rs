//! What a strict run records about its machine and must find again.

use std::fs;

use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{DeviceKind, library};

/// The settings that can change the bits of a gradient; part of a run's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platform {
    /// CPU or CUDA.
    pub device_kind: DeviceKind,
    /// Model of the processor, or `CUDA device N` for a GPU, whose name libtorch's C interface does not give.
    pub device_name: String,
    /// Widest vector instructions of the processor, by which libtorch and its matrix library choose kernels.
    pub instructions: String,
    /// Version of libtorch, such as `2.11.0`, without the build suffix.
    pub libtorch_version: String,
    /// Threads of one operation.
    pub threads: usize,
}

/// Two platforms that need not give the same bits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is `{found}` here and `{recorded}` in the run")]
pub struct PlatformMismatch {
    /// Which setting.
    pub field: &'static str,
    /// What the run was started with.
    pub recorded: String,
    /// What this process has.
    pub found: String,
}

impl Platform {
    /// The platform of this thread when it computes on `device`.
    pub fn current(device: Device) -> Self {
        let version = library::version();
        Self {
            device_kind: DeviceKind::of(device),
            device_name: match device {
                Device::Cuda(index) => format!("CUDA device {index}"),
                _ => processor_name(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            },
            instructions: instructions(std::env::var("ATEN_CPU_CAPABILITY").ok().as_deref())
                .to_owned(),
            libtorch_version: version.split('+').next().unwrap_or(&version).to_owned(),
            threads: usize::try_from(tch::get_num_threads()).unwrap_or(1),
        }
    }

    /// Whether `self`, the platform of this process, gives the bits of a run recorded on `recorded`.
    ///
    /// The name of the device is for people and is not compared; what its kernels depend on is.
    ///
    /// # Errors
    /// The first setting that differs.
    pub fn check_against(&self, recorded: &Self) -> Result<(), PlatformMismatch> {
        let fields = [
            (
                "device_kind",
                format!("{:?}", self.device_kind),
                format!("{:?}", recorded.device_kind),
            ),
            (
                "libtorch_version",
                self.libtorch_version.clone(),
                recorded.libtorch_version.clone(),
            ),
            (
                "instructions",
                self.instructions.clone(),
                recorded.instructions.clone(),
            ),
            (
                "threads",
                self.threads.to_string(),
                recorded.threads.to_string(),
            ),
        ];
        for (field, found, recorded) in fields {
            if found != recorded {
                return Err(PlatformMismatch {
                    field,
                    recorded,
                    found,
                });
            }
        }
        Ok(())
    }
}

fn processor_name(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or_else(
            || std::env::consts::ARCH.to_owned(),
            |(_, name)| name.trim().to_owned(),
        )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_agrees_with_itself_and_names_what_differs() {
        let here = Platform::current(Device::Cpu);
        assert_eq!(here.check_against(&here), Ok(()));
        let json = serde_json::to_string(&here).unwrap();
        assert_eq!(serde_json::from_str::<Platform>(&json).unwrap(), here);
        let other = Platform {
            libtorch_version: "1.0.0".into(),
            device_name: "other".into(),
            ..here.clone()
        };
        let error = here.check_against(&other).unwrap_err();
        assert_eq!(error.field, "libtorch_version");
        assert!(error.to_string().contains("`1.0.0` in the run"), "{error}");
        let renamed = Platform {
            device_name: "other".into(),
            ..here.clone()
        };
        assert_eq!(here.check_against(&renamed), Ok(()));
    }

    #[test]
    fn processor_names_are_read() {
        assert_eq!(
            processor_name("a : b\nmodel name\t: AMD EPYC 1\nmodel name : x\n"),
            "AMD EPYC 1"
        );
        assert_eq!(processor_name(""), std::env::consts::ARCH);
    }
}
