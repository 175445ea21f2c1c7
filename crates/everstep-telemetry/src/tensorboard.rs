//! TensorBoard event files with the run's curves, in `DIR/tensorboard/`.
//!
//! The format is TFRecord framing (length, masked CRC-32C, payload, masked CRC-32C) around `tensorflow.Event` protocol
//! buffers; only the few fields that scalars need are declared here. The crates that write such files pull in an old
//! protocol buffer stack or image codecs for it.
//!
//! A restarted coordinator opens a new file beside the old ones, as TensorBoard expects, and TensorBoard itself skips
//! a record that a crash left torn at a file's end.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::TelemetryError;
use crate::jsonl;
use crate::metrics::StepMetrics;
use crate::names::metric;

/// `tensorflow.Event`, as far as scalars need it.
#[derive(Clone, PartialEq, Message)]
struct EventProto {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    /// In a file's first event: `brain.Event:2`.
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<SummaryProto>,
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct SummaryProto {
    #[prost(message, repeated, tag = "1")]
    value: Vec<ValueProto>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct ValueProto {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An open event file, to write scalars to.
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// Creates a new event file in `folder` (and the folder). `node` becomes part of its name.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file cannot be created.
    pub fn create(folder: impl AsRef<Path>, node: &str) -> Result<Self, TelemetryError> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(TelemetryError::io("create", folder))?;
        let seconds = unix_seconds(SystemTime::now());
        let node: String = node
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '-' {
                    c
                } else {
                    '_'
                }
            })
            .collect();
        let mut number = 0;
        loop {
            let name = format!(
                "events.out.tfevents.{}.{node}.{}.{number}",
                seconds as u64,
                std::process::id()
            );
            let path = folder.join(name);
            match OpenOptions::new().append(true).create_new(true).open(&path) {
                Ok(file) => {
                    let board = Self { file, path };
                    board.write(&EventProto {
                        wall_time: seconds,
                        file_version: Some("brain.Event:2".to_owned()),
                        ..EventProto::default()
                    })?;
                    return Ok(board);
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(TelemetryError::io("create", &path)(error)),
            }
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the curves' points of a committed step, at its `time` (now, if that is empty): loss, gradient norm,
    /// learning rate, tokens per second, the validation loss where there is one, and the balance of experts.
    ///
    /// Call it for the steps that [`MetricsLog::append`](crate::MetricsLog::append) really appended.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the record cannot be written.
    pub fn step(&self, metrics: &StepMetrics) -> Result<(), TelemetryError> {
        let time = humantime::parse_rfc3339(&metrics.time).unwrap_or_else(|_| SystemTime::now());
        let mut scalars = vec![
            (metric::LOSS.name, metrics.loss),
            (metric::GRAD_NORM.name, metrics.grad_norm),
            (metric::LR.name, metrics.lr),
            (metric::TOKENS_PER_SECOND.name, metrics.tokens_per_second),
        ];
        if let Some(loss) = metrics.validation_loss {
            scalars.push((metric::VALIDATION_LOSS.name, loss));
        }
        if let Some(load) = metrics.expert_load {
            scalars.push((metric::EXPERT_LOAD.name, load));
        }
        self.scalars(metrics.step, time, &scalars)
    }

    /// Writes one point of each of the given curves `(tag, value)`.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the record cannot be written.
    pub fn scalars(
        &self,
        step: u64,
        time: SystemTime,
        scalars: &[(&str, f64)],
    ) -> Result<(), TelemetryError> {
        let value = scalars
            .iter()
            .map(|&(tag, value)| ValueProto {
                tag: tag.to_owned(),
                simple_value: Some(value as f32),
            })
            .collect();
        self.write(&EventProto {
            wall_time: unix_seconds(time),
            step: step as i64,
            file_version: None,
            summary: Some(SummaryProto { value }),
        })
    }

    fn write(&self, event: &EventProto) -> Result<(), TelemetryError> {
        jsonl::write_line(&self.file, &frame(&event.encode_to_vec()))
            .map_err(TelemetryError::io("append to", &self.path))
    }
}

/// Seconds since 1970; 0 before.
fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// A TFRecord: length (u64), its masked checksum, payload, its masked checksum; all little-endian.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_crc32c(payload).to_le_bytes());
    record
}

/// TFRecord's checksum: CRC-32C, rotated and offset so that a checksum of data with checksums in it is no worse.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bytewise; records are some hundred bytes per step.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut crc = index as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 {
                    (crc >> 1) ^ 0x82f6_3b78
                } else {
                    crc >> 1
                };
                bit += 1;
            }
            table[index] = crc;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, &byte| {
        (crc >> 8) ^ TABLE[((crc ^ u32::from(byte)) & 0xff) as usize]
    })
}

#[cfg(test)]
mod tests;
