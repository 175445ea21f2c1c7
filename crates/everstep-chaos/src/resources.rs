//! Whether processes grow: memory, threads and file descriptors over their lives.

use serde::Serialize;

use crate::process::Usage;
use crate::record::Life;

/// What a process does in its first minute is warming up.
const WARM_UP_SECONDS: f64 = 60.0;

/// Shorter lives say nothing about growth.
const LIFE_SECONDS_MIN: f64 = 180.0;

/// Flat memory grows by at most this share from the first quarter of a life to its last, and this much more.
const MEMORY_GROWTH_MAX: f64 = 0.10;
const MEMORY_SLACK_BYTES: f64 = 16.0 * 1024.0 * 1024.0;

/// Flat counts of threads and file descriptors grow by at most so many.
const COUNT_GROWTH_MAX: f64 = 4.0;

/// One quantity over one life.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Growth {
    /// First sample after warming up.
    pub first: f64,
    /// Last sample.
    pub last: f64,
    /// Largest sample.
    pub max: f64,
    /// By least squares.
    pub slope_per_hour: f64,
    /// Median of the last quarter of the samples less that of the first quarter.
    pub rise: f64,
}

/// One life of a process that was long enough.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LifeReport {
    /// Name of the process.
    pub process: String,
    /// Process id.
    pub pid: i32,
    /// How long it was watched after warming up.
    pub seconds: f64,
    /// Resident memory, in bytes.
    pub rss_bytes: Growth,
    /// Threads.
    pub threads: Growth,
    /// Open file descriptors.
    pub descriptors: Growth,
    /// Whether all three are flat.
    pub flat: bool,
}

/// Reports on all lives that were long enough.
#[must_use]
pub fn lives(lives: &[Life]) -> Vec<LifeReport> {
    lives.iter().filter_map(life).collect()
}

fn life(life: &Life) -> Option<LifeReport> {
    let samples: Vec<&(f64, Usage)> = life
        .usage
        .iter()
        .filter(|(at, _)| at - life.from >= WARM_UP_SECONDS)
        .collect();
    let (begin, end) = (samples.first()?.0, samples.last()?.0);
    if end - life.from < LIFE_SECONDS_MIN {
        return None;
    }
    let growth = |quantity: fn(&Usage) -> u64| {
        let points: Vec<(f64, f64)> = samples
            .iter()
            .map(|(at, usage)| (*at, quantity(usage) as f64))
            .collect();
        growth(&points)
    };
    let rss_bytes = growth(|usage| usage.rss_bytes)?;
    let threads = growth(|usage| usage.threads)?;
    let descriptors = growth(|usage| usage.descriptors)?;
    let flat = rss_bytes.rise
        <= (rss_bytes.last - rss_bytes.rise).max(0.0) * MEMORY_GROWTH_MAX + MEMORY_SLACK_BYTES
        && threads.rise <= COUNT_GROWTH_MAX
        && descriptors.rise <= COUNT_GROWTH_MAX;
    Some(LifeReport {
        process: life.process.clone(),
        pid: life.identity.pid,
        seconds: end - begin,
        rss_bytes,
        threads,
        descriptors,
        flat,
    })
}

fn growth(points: &[(f64, f64)]) -> Option<Growth> {
    let (first, last) = (points.first()?.1, points.last()?.1);
    let max = points.iter().map(|point| point.1).fold(first, f64::max);
    let count = points.len() as f64;
    let mean_x = points.iter().map(|point| point.0).sum::<f64>() / count;
    let mean_y = points.iter().map(|point| point.1).sum::<f64>() / count;
    let covariance: f64 = points
        .iter()
        .map(|(x, y)| (x - mean_x) * (y - mean_y))
        .sum();
    let variance: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let slope = if variance > 0.0 {
        covariance / variance
    } else {
        0.0
    };
    let quarter = (points.len() / 4).max(1);
    let median = |part: &[(f64, f64)]| {
        let mut values: Vec<f64> = part.iter().map(|point| point.1).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Some(Growth {
        first,
        last,
        max,
        slope_per_hour: slope * 3_600.0,
        rise: median(&points[points.len() - quarter..]) - median(&points[..quarter]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Identity;

    fn with_descriptors(count: impl Fn(u64) -> u64) -> Life {
        let usage = (0..600)
            .map(|second| {
                let usage = Usage {
                    rss_bytes: 200 << 20,
                    threads: 20,
                    descriptors: count(second),
                };
                (second as f64, usage)
            })
            .collect();
        Life {
            process: "w".into(),
            node: "n".into(),
            roles: vec![],
            identity: Identity {
                pid: 1,
                started_ticks: 1,
            },
            from: 0.0,
            to: None,
            usage,
        }
    }

    #[test]
    fn a_leak_is_told_from_warming_up_and_from_noise() {
        let warm = with_descriptors(|second| second.min(50) + second % 3);
        assert!(lives(&[warm])[0].flat);
        let leak = with_descriptors(|second| 30 + second / 20);
        let report = &lives(&[leak])[0];
        assert!(!report.flat);
        assert!((report.descriptors.slope_per_hour - 180.0).abs() < 5.0);
    }

    #[test]
    fn a_short_life_says_nothing() {
        let mut short = with_descriptors(|_| 30);
        short.usage.truncate(100);
        assert!(lives(&[short]).is_empty());
    }
}
