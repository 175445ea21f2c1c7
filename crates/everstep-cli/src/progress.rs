//! What `everstep train` shows while it trains: it follows the run's own logs, so that it shows the same for one process and for many.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use everstep_cluster::RunContext;
use everstep_telemetry::{Event, EventReader, MetricsLog, StepMetrics};
use indicatif::{ProgressBar, ProgressStyle};

const POLL: Duration = Duration::from_millis(100);
const PLAIN_EVERY: Duration = Duration::from_secs(2);
/// The last checkpoint may take this long before it is worth a line.
const PATIENCE: Duration = Duration::from_secs(2);

/// Shows progress from a thread of its own until it is finished.
#[derive(Debug)]
pub struct Progress {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Progress {
    /// Begins to follow `run`'s logs, from what they hold now.
    pub fn start(run: &RunContext) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let mut view = View::new(run);
        let until = over.clone();
        let thread = std::thread::spawn(move || {
            loop {
                let last = until.load(Ordering::Relaxed);
                view.poll(last);
                if last {
                    return;
                }
                std::thread::park_timeout(POLL);
            }
        });
        Self { over, thread }
    }

    /// Shows the rest and stops.
    pub fn finish(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        // The thread only prints; if it panicked, training is none the worse.
        let _ = self.thread.join();
    }
}

struct View {
    metrics: Tail,
    events: EventReader,
    num_steps: u64,
    bar: Option<ProgressBar>,
    printed: Instant,
    last: Option<StepMetrics>,
    tokens_since: u64,
    /// When the last step was committed, until its checkpoint is.
    complete: Option<Instant>,
}

impl View {
    fn new(run: &RunContext) -> Self {
        let mut events = EventReader::new(run.run_dir().events());
        // What happened before this start has been shown before.
        let _ = events.poll();
        let mut metrics = Tail::new(run.run_dir().metrics());
        let _ = metrics.poll();
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:30} step {pos}/{len}  {msg}  {elapsed}<{eta}";
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(run.num_steps()).with_style(style)
        });
        Self {
            metrics,
            events,
            num_steps: run.num_steps(),
            bar,
            printed: Instant::now(),
            last: None,
            tokens_since: 0,
            complete: None,
        }
    }

    fn poll(&mut self, last: bool) {
        for metrics in self.metrics.poll() {
            self.tokens_since += metrics.tokens;
            if metrics.step == self.num_steps {
                self.complete = Some(Instant::now());
            }
            self.last = Some(metrics);
        }
        for record in self.events.poll().unwrap_or_default() {
            if let Some(line) = line_of(&record.event) {
                self.say(&line);
            }
        }
        if !last && self.complete.is_some_and(|at| at.elapsed() >= PATIENCE) {
            self.complete = None;
            self.say("all steps are committed; the end waits for the last checkpoint");
        }
        let elapsed = self.printed.elapsed();
        let due = elapsed >= PLAIN_EVERY || last;
        // The speed is that since the last step that was shown, however long ago: steps may be slower than lines.
        let (Some(metrics), 1..) = (&self.last, self.tokens_since) else {
            return;
        };
        let message = format!("loss {:.4}  lr {:.2e}", metrics.loss, metrics.lr);
        match &self.bar {
            Some(bar) => {
                let speed = self.tokens_since as f64 / elapsed.as_secs_f64().max(1e-3);
                bar.set_position(metrics.step);
                bar.set_message(format!("{message}  {speed:.0} tokens/s"));
            }
            None if due => {
                let speed = self.tokens_since as f64 / elapsed.as_secs_f64().max(1e-3);
                let (step, steps) = (metrics.step, self.num_steps);
                self.say(&format!(
                    "step {step}/{steps}  {message}  {speed:.0} tokens/s"
                ));
            }
            None => {}
        }
        if due {
            self.printed = Instant::now();
            self.tokens_since = 0;
        }
        if last && let Some(bar) = &self.bar {
            bar.finish();
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => {
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        }
    }
}

/// Events that a person at the terminal wants to see.
pub(crate) fn line_of(event: &Event) -> Option<String> {
    Some(match event {
        Event::Evaluation { step, loss, .. } => format!("step {step}: validation loss {loss:.4}"),
        Event::ProcessLost {
            process, reason, ..
        } => format!("{process} is lost ({reason})"),
        Event::ProcessHung {
            process, reason, ..
        } => format!("{process} is hung ({reason})"),
        Event::ProcessWoke {
            process, seconds, ..
        } => format!("{process} goes on after {seconds:.1} s"),
        Event::LeaderDeposed {
            process, epoch, by, ..
        } => format!("{process}, the leader of epoch {epoch}, steps down for epoch {by}"),
        Event::ProcessRestarted {
            process, seconds, ..
        } => format!("{process} started again after {seconds:.2} s"),
        Event::ShardPromoted {
            process,
            blocks,
            step,
            ..
        } => {
            format!(
                "step {step}: {process} is now primary of {} more blocks",
                blocks.len()
            )
        }
        Event::BackupSeeded {
            process,
            blocks,
            step,
            ..
        } => {
            format!("step {step}: {process} holds {} blocks again", blocks.len())
        }
        Event::LeaderElected { process, epoch, .. } => format!("{process} leads in epoch {epoch}"),
        Event::Recovered {
            cause,
            process,
            step,
            noticed_seconds,
            seconds,
            slots_recomputed,
            steps_recomputed,
            ..
        } => {
            let noticed = noticed_seconds.map_or_else(String::new, |seconds| {
                format!("noticed after {seconds:.2} s, ")
            });
            format!(
                "step {step}: recovered from the loss of {cause} {process}: {noticed}training after {seconds:.2} s, \
                 {slots_recomputed} slots and {steps_recomputed} steps computed again"
            )
        }
        Event::Rollback {
            from_step, to_step, ..
        } => format!(
            "state was lost: back from step {from_step} to the checkpoint of step {to_step}"
        ),
        Event::CheckpointCommitted { step, .. } => format!("step {step}: checkpoint committed"),
        Event::CheckpointAbandoned { step, reason, .. } => {
            format!("step {step}: checkpoint abandoned ({reason})")
        }
        Event::StateRestored {
            process,
            step,
            blocks,
            local_blocks,
        } if *local_blocks > 0 => format!(
            "{process}: {local_blocks} of {blocks} blocks of step {step} restored from its own disk"
        ),
        Event::CheckpointDamaged { object, reason, .. } => {
            format!("checkpoint object {object} is damaged: {reason}")
        }
        Event::StoreUnreachable { reason, .. } => {
            format!("the store does not answer; training goes on and checkpoints wait ({reason})")
        }
        Event::StoreBack {
            seconds, lag_steps, ..
        } => format!(
            "the store is back after {seconds:.1} s; the last checkpoint is {lag_steps} steps behind"
        ),
        Event::LedgerDamaged {
            process, reason, ..
        } => format!("{process}: its ledger is damaged and was set aside ({reason})"),
        Event::LossSpike {
            step,
            loss,
            mean,
            sd,
            ..
        } => format!("step {step}: loss {loss:.4} is a spike (mean {mean:.4}, deviation {sd:.4})"),
        Event::StepSkipped { step, reason, .. } => format!("step {step} skipped: {reason}"),
        _ => return None,
    })
}

/// Follows `metrics.jsonl` without reading it twice.
struct Tail {
    path: PathBuf,
    reader: Option<BufReader<File>>,
    partial: String,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            reader: None,
            partial: String::new(),
        }
    }

    fn poll(&mut self) -> Vec<StepMetrics> {
        if self.reader.is_none() {
            self.reader = File::open(&self.path).ok().map(BufReader::new);
        }
        let Some(reader) = &mut self.reader else {
            return Vec::new();
        };
        let mut metrics = Vec::new();
        while let Ok(bytes) = reader.read_line(&mut self.partial) {
            if bytes == 0 || !self.partial.ends_with('\n') {
                break;
            }
            metrics.extend(serde_json::from_str::<StepMetrics>(&self.partial));
            self.partial.clear();
        }
        metrics
    }
}

/// The run in a few lines.
pub fn summary(run: &RunContext, elapsed: Duration) -> anyhow::Result<()> {
    let metrics = MetricsLog::read(run.run_dir().metrics())?;
    let events = EventReader::new(run.run_dir().events()).poll()?;
    let evaluation = events.iter().rev().find_map(|record| match record.event {
        Event::Evaluation { step, loss, .. } => Some((step, loss)),
        _ => None,
    });
    let mut err = std::io::stderr().lock();
    if let Some(last) = metrics.last() {
        writeln!(
            err,
            "finished: {} steps, last training loss {:.4}",
            last.step, last.loss
        )?;
        let mut seconds: Vec<f64> = metrics.iter().map(|step| step.step_seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        writeln!(
            err,
            "{:.0} tokens/s (median step {:.1} ms), {:.1} s in all",
            last.tokens as f64 / median,
            median * 1e3,
            elapsed.as_secs_f64()
        )?;
    }
    if let Some((step, loss)) = evaluation {
        writeln!(err, "validation loss at step {step}: {loss:.4}")?;
    }
    for line in everstep_cluster::goodput(run.run_dir())?.table() {
        writeln!(err, "{line}")?;
    }
    writeln!(err, "run directory: {}", run.run_dir().path().display())?;
    Ok(())
}
