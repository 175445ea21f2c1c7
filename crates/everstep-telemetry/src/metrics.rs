//! The metrics log: one JSON object per committed step, in `metrics.jsonl`.
//!
//! The coordinator writes it. A step is committed once, but a coordinator that was restarted, or a run that was rolled
//! back, commits it again with the same bits: appending a step that the file has is therefore a no-op, and every step
//! stands in the file exactly once, in order.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::error::TelemetryError;
use crate::jsonl;

/// One committed step. Names and units are in [`names::metric`](crate::names::metric).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step, from 1 for the first one committed or however the run counts; it must grow.
    pub step: u64,
    /// Mean training loss per token, in nats. `null` in the file if it is not finite.
    #[serde(with = "number")]
    pub loss: f64,
    /// Global L2 norm of the gradient before clipping.
    #[serde(with = "number")]
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Tokens in the step's global batch.
    pub tokens: u64,
    /// `tokens / step_seconds`.
    pub tokens_per_second: f64,
    /// Wall time from the previous commit to this one, in seconds.
    pub step_seconds: f64,
    /// RFC 3339, UTC, milliseconds. Filled in by [`MetricsLog::append`] if empty.
    #[serde(default)]
    pub time: String,
    /// Mean loss per token on held-out text with the parameters after the step, where one was computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Of a model with experts: how many times the mean of its layer the fullest expert of all was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<f64>,
}

/// A float that JSON may not be able to hold: what is not finite is written as `null` and read as NaN.
pub(crate) mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        number.is_finite().then_some(*number).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// An open `metrics.jsonl`, to append to.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
    last_step: Option<u64>,
    /// Where the last step ends, as far as this writer knows.
    end: u64,
    /// How long the file was when that was found out: more than `end` if a crash left something torn.
    file_bytes: u64,
}

impl MetricsLog {
    /// Opens or creates the file and its folder, and finds the last step from the file's end. Others may be writing: only who appends cuts
    /// off what a crash left torn.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file cannot be opened, read or written; [`TelemetryError::Damaged`] if it has
    /// lines and none of them is a step, since it is then somebody else's file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TelemetryError> {
        let path = path.as_ref();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(TelemetryError::io("create the folder of", path))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .map_err(TelemetryError::io("open", path))?;
        let mut log = Self {
            file,
            path: path.to_path_buf(),
            last_step: None,
            end: 0,
            file_bytes: 0,
        };
        log.find_end()?;
        Ok(log)
    }

    /// Takes `last_step` and `end` from the file.
    fn find_end(&mut self) -> Result<(), TelemetryError> {
        let tail =
            jsonl::tail(&self.file, step_of).map_err(TelemetryError::io("read", &self.path))?;
        if let (None, Some(line)) = (tail.last, &tail.refused) {
            let reason = match serde_json::from_slice::<StepMetrics>(line) {
                Ok(_) => "unreadable".to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(TelemetryError::Damaged {
                path: self.path.clone(),
                line: 1,
                expected: "the metrics of a step",
                reason,
            });
        }
        self.last_step = tail.last;
        self.end = tail.end;
        self.file_bytes = tail.file_bytes;
        Ok(())
    }

    fn len(&self) -> Result<u64, TelemetryError> {
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(TelemetryError::io("read", &self.path))?;
        Ok(metadata.len())
    }

    /// Cuts off what stands behind the last step, if nobody has written since that was looked for.
    fn cut_torn_tail(&mut self) -> Result<(), TelemetryError> {
        if self.file_bytes == self.end || self.len()? != self.file_bytes {
            return Ok(());
        }
        self.file
            .set_len(self.end)
            .map_err(TelemetryError::io("cut the torn tail of", &self.path))?;
        self.file_bytes = self.end;
        Ok(())
    }

    /// The last step in the file.
    #[must_use]
    pub fn last_step(&self) -> Option<u64> {
        self.last_step
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes note of what other writers have appended since.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file cannot be read.
    pub fn refresh(&mut self) -> Result<(), TelemetryError> {
        if self.len()? == self.file_bytes {
            return Ok(());
        }
        self.find_end()
    }

    /// Appends a step, or does nothing if the file has it. Says whether it was appended.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the line could not be written whole; the file is then as before.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<bool, TelemetryError> {
        // A coordinator that was taken for dead may have written since; its steps count.
        self.refresh()?;
        if self.last_step.is_some_and(|last| metrics.step <= last) {
            return Ok(false);
        }
        let mut metrics = metrics.clone();
        if metrics.time.is_empty() {
            metrics.time = jsonl::timestamp(SystemTime::now());
        }
        let line = jsonl::line(&metrics).map_err(TelemetryError::io("append to", &self.path))?;
        self.cut_torn_tail()?;
        if let Err(error) = jsonl::write_line(&self.file, &line) {
            // If this fails too, the next `append` cuts the tail.
            let _ = self.file.set_len(self.end);
            return Err(TelemetryError::io("append to", &self.path)(error));
        }
        self.end += line.len() as u64;
        self.file_bytes = self.end;
        self.last_step = Some(metrics.step);
        Ok(true)
    }

    /// All steps of a file, in file order; none if the file does not exist. A torn tail is left out.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file exists and cannot be read; [`TelemetryError::Damaged`] if a whole line is
    /// not the metrics of a step.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<StepMetrics>, TelemetryError> {
        let path = path.as_ref();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(TelemetryError::io("read", path)(error)),
        };
        let Some(end) = bytes.iter().rposition(|&b| b == b'\n') else {
            return Ok(Vec::new());
        };
        bytes[..end]
            .split(|&b| b == b'\n')
            .enumerate()
            .map(|(index, line)| {
                serde_json::from_slice(line).map_err(|error| TelemetryError::Damaged {
                    path: path.to_path_buf(),
                    line: index + 1,
                    expected: "the metrics of a step",
                    reason: error.to_string(),
                })
            })
            .collect()
    }
}

/// The step of a line that is a step's metrics.
fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<StepMetrics>(line)
        .ok()
        .map(|metrics| metrics.step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn row(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            loss: 0.1 + 0.2 + step as f64,
            grad_norm: 1.0 / 3.0,
            lr: 1e-3,
            tokens: 4096,
            tokens_per_second: 8192.0,
            step_seconds: 0.5,
            time: "2026-11-24T17:59:47.227Z".into(),
            validation_loss: None,
            expert_load: None,
        }
    }

    #[test]
    fn a_line_is_what_the_contract_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        assert_eq!(log.last_step(), None);
        assert!(log.append(&row(0)).unwrap());
        assert!(
            log.append(&StepMetrics {
                loss: f64::NAN,
                validation_loss: Some(1.5),
                expert_load: Some(1.25),
                ..row(1)
            })
            .unwrap()
        );
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":0,\"loss\":0.30000000000000004,\"grad_norm\":0.3333333333333333,\"lr\":0.001,\"tokens\":4096,\
             \"tokens_per_second\":8192.0,\"step_seconds\":0.5,\"time\":\"2026-11-24T17:59:47.227Z\"}\n\
             {\"step\":1,\"loss\":null,\"grad_norm\":0.3333333333333333,\"lr\":0.001,\"tokens\":4096,\
             \"tokens_per_second\":8192.0,\"step_seconds\":0.5,\"time\":\"2026-11-24T17:59:47.227Z\",\
             \"validation_loss\":1.5,\"expert_load\":1.25}\n"
        );
        let rows = MetricsLog::read(&path).unwrap();
        assert_eq!(rows[0], row(0));
        assert!(rows[1].loss.is_nan());
    }

    #[test]
    fn a_replayed_step_is_a_no_op() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        for step in 0..5 {
            log.append(&row(step)).unwrap();
        }
        let mut successor = MetricsLog::open(&path).unwrap();
        assert_eq!(successor.last_step(), Some(4));
        successor.refresh().unwrap();
        assert_eq!(successor.last_step(), Some(4));
        assert!(!successor.append(&row(3)).unwrap());
        assert!(successor.append(&row(5)).unwrap());
        // The predecessor, thawed, sees that its step is there.
        assert!(!log.append(&row(5)).unwrap());
        assert!(log.append(&row(6)).unwrap());
        let steps: Vec<u64> = MetricsLog::read(&path)
            .unwrap()
            .iter()
            .map(|row| row.step)
            .collect();
        assert_eq!(steps, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_tail_torn_anywhere_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        let mut ends = vec![0];
        for step in 0..3 {
            log.append(&row(step)).unwrap();
            ends.push(std::fs::metadata(&path).unwrap().len() as usize);
        }
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            for garbage in [&b""[..], b"\0\0\0\0", b"{\"step\":9"] {
                // A new file each time: some file systems flush one that is cut and written again.
                let path = folder.path().join(format!("{cut}-{}", garbage.len()));
                std::fs::write(&path, [&whole[..cut], garbage].concat()).unwrap();
                let kept = ends.iter().rposition(|&end| end <= cut).unwrap();
                let mut log = MetricsLog::open(&path).unwrap();
                assert_eq!(
                    log.last_step(),
                    kept.checked_sub(1).map(|step| step as u64),
                    "cut at {cut}"
                );
                log.append(&row(7)).unwrap();
                let bytes = std::fs::read(&path).unwrap();
                assert_eq!(bytes[..ends[kept]], whole[..ends[kept]], "cut at {cut}");
                assert_eq!(MetricsLog::read(&path).unwrap().len(), kept + 1);
            }
        }
    }

    #[test]
    fn a_long_file_is_read_from_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        for step in 0..1000 {
            log.append(&row(step)).unwrap();
        }
        let end = std::fs::metadata(&path).unwrap().len();
        // A torn tail that is longer than the first look at the file's end.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&vec![0; 100_000]).unwrap();
        let mut log = MetricsLog::open(&path).unwrap();
        assert_eq!(log.last_step(), Some(999));
        log.append(&row(1000)).unwrap();
        let line = jsonl::line(&row(1000)).unwrap();
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert_eq!(bytes, end + line.len() as u64);
    }

    /// An agent, or a standby, that starts while the leader writes once cut the line that was just written.
    #[test]
    fn who_opens_the_file_takes_no_line_from_who_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        let is_written = std::sync::atomic::AtomicBool::new(false);
        let opened = std::thread::scope(|scope| {
            let opening = scope.spawn(|| {
                let mut opened = 0;
                while !is_written.load(std::sync::atomic::Ordering::Relaxed) {
                    MetricsLog::open(&path).unwrap();
                    opened += 1;
                }
                opened
            });
            for step in 0..20_000 {
                assert!(log.append(&row(step)).unwrap());
            }
            is_written.store(true, std::sync::atomic::Ordering::Relaxed);
            opening.join().unwrap()
        });
        assert!(opened > 0);
        assert_eq!(MetricsLog::read(&path).unwrap().len(), 20_000);
    }

    #[test]
    fn a_foreign_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "dear diary\n").unwrap();
        let error = MetricsLog::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("metrics.jsonl: line 1 is not the metrics of a step"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "dear diary\n");
    }
}
