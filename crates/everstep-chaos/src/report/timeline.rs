//! The disturbed run as a picture: processes and their lives, faults, leaders, commits.

use std::fmt::Write as _;

use everstep_telemetry::Event;

use crate::driver::Observed;
use crate::record::{Life, Victim};
use crate::scenario::Scenario;

const LEFT: f64 = 190.0;
const PLOT: f64 = 1_150.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 64.0;
const ROW: f64 = 24.0;
const BAR: f64 = 14.0;
const COMMITS: f64 = 70.0;
/// Under the process that leads; unlike the colour of any fault.
const LEADS: &str = "#12b5cb";

/// An SVG picture.
#[must_use]
pub fn timeline(scenario: &Scenario, observed: &Observed) -> String {
    let mut out = String::new();
    draw(&mut out, scenario, observed).unwrap_or_default();
    out
}

fn colour_of_role(roles: &[String]) -> &'static str {
    match roles.first().map(String::as_str) {
        Some("coordinator") => "#7b5ea7",
        Some("loader") => "#8c8c8c",
        Some("worker") => "#4c8c6b",
        Some("shard") => "#3f74b0",
        _ => "#555555",
    }
}

fn colour_of_fault(kind: &str) -> &'static str {
    match kind {
        "kill" => "#d62728",
        "pause" => "#ff9f1c",
        "partition" | "network" => "#b5179e",
        "drain" => "#283618",
        "store_outage" | "store_slow" | "store_errors" | "damage" => "#8a5a00",
        _ => "#e36414",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn draw(out: &mut String, scenario: &Scenario, observed: &Observed) -> std::fmt::Result {
    let length = observed.seconds.max(1.0);
    let x = |at: f64| LEFT + (at / length).clamp(0.0, 1.0) * PLOT;
    // Rows in the order of the first lives, agents first, grouped by role.
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for life in &observed.lives {
        if !rows.iter().any(|(name, _)| *name == life.process) {
            rows.push((life.process.clone(), life.roles.clone()));
        }
    }
    let order = ["agent", "coordinator", "loader", "shard", "worker"];
    rows.sort_by_key(|(name, roles)| {
        let role = roles.first().map(String::as_str).unwrap_or_default();
        let place = order.iter().position(|known| *known == role);
        (place.unwrap_or(order.len()), name.clone())
    });
    rows.push(("store".to_owned(), vec!["store".to_owned()]));
    let y_of = |name: &str| {
        rows.iter()
            .position(|(row, _)| row == name)
            .map(|row| TOP + row as f64 * ROW)
    };
    let bottom = TOP + rows.len() as f64 * ROW;
    let (width, height) = (LEFT + PLOT + RIGHT, bottom + COMMITS + 44.0);
    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="#ffffff"/>
<text x="12" y="22" font-size="16" font-weight="bold">{}</text>"##,
        escape(&scenario.name)
    )?;
    let happened = observed.faults.iter().filter(|fault| fault.happened);
    writeln!(
        out,
        r##"<text x="{}" y="22" text-anchor="end" fill="#666666">{} faults, {} steps in {:.1} s</text>"##,
        LEFT + PLOT,
        happened.count(),
        observed.commits.last().map_or(0, |commit| commit.step),
        observed.seconds
    )?;
    legend(out)?;
    axis(out, length, &x, bottom)?;
    for (row, (name, _)) in rows.iter().enumerate() {
        let y = TOP + row as f64 * ROW;
        writeln!(
            out,
            r##"<text x="{}" y="{}" text-anchor="end">{}</text><line x1="{LEFT}" y1="{}" x2="{}" y2="{}" stroke="#eeeeee"/>"##,
            LEFT - 10.0,
            y + 15.0,
            escape(name),
            y + ROW,
            LEFT + PLOT,
            y + ROW
        )?;
    }
    for life in &observed.lives {
        let Some(y) = y_of(&life.process) else {
            continue;
        };
        let (from, to) = (x(life.from), x(life.to.unwrap_or(length)));
        writeln!(
            out,
            r##"<rect x="{from:.1}" y="{:.1}" width="{:.1}" height="{BAR}" rx="2" fill="{}"><title>{} pid {}: {:.1} s to {:.1} s</title></rect>"##,
            y + 5.0,
            (to - from).max(1.0),
            colour_of_role(&life.roles),
            escape(&life.process),
            life.identity.pid,
            life.from,
            life.to.unwrap_or(length),
        )?;
    }
    leaders(out, observed, length, &x, &y_of)?;
    faults(out, observed, length, &x, &y_of)?;
    commits(out, observed, length, bottom)?;
    writeln!(out, "</svg>")
}

fn legend(out: &mut String) -> std::fmt::Result {
    let entries = [
        ("kill", "#d62728"),
        ("pause", "#ff9f1c"),
        ("network", "#b5179e"),
        ("store", "#8a5a00"),
        ("inside a process", "#e36414"),
        ("drain", "#283618"),
        ("leads", LEADS),
    ];
    let mut x = LEFT;
    for (name, colour) in entries {
        writeln!(
            out,
            r##"<rect x="{x}" y="33" width="10" height="10" fill="{colour}"/><text x="{}" y="42">{name}</text>"##,
            x + 15.0
        )?;
        x += 40.0 + name.len() as f64 * 7.0;
    }
    Ok(())
}

fn axis(out: &mut String, length: f64, x: &dyn Fn(f64) -> f64, bottom: f64) -> std::fmt::Result {
    let steps = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];
    let step = steps
        .into_iter()
        .find(|step| length / step <= 14.0)
        .unwrap_or(1_200.0);
    let mut at = 0.0;
    while at <= length {
        let label = if step >= 60.0 {
            format!("{} min", (at / 60.0).round())
        } else {
            format!("{at} s")
        };
        writeln!(
            out,
            r##"<line x1="{0:.1}" y1="{TOP}" x2="{0:.1}" y2="{1}" stroke="#dddddd"/><text x="{0:.1}" y="{2}" text-anchor="middle" fill="#666666">{label}</text>"##,
            x(at),
            bottom + COMMITS,
            bottom + COMMITS + 18.0
        )?;
        at += step;
    }
    Ok(())
}

/// A line under the process that leads, from its election to the next.
fn leaders(
    out: &mut String,
    observed: &Observed,
    length: f64,
    x: &dyn Fn(f64) -> f64,
    y_of: &dyn Fn(&str) -> Option<f64>,
) -> std::fmt::Result {
    let elected: Vec<(f64, &str, u64)> = observed
        .events
        .iter()
        .filter_map(|(at, record)| match &record.event {
            Event::LeaderElected { process, epoch, .. } => Some((*at, process.as_str(), *epoch)),
            _ => None,
        })
        .collect();
    for (index, (at, process, epoch)) in elected.iter().enumerate() {
        // Nobody leads beyond death.
        let own = |life: &&Life| life.process == *process && life.from <= *at;
        let death = observed.lives.iter().rev().find(own);
        let death = death.and_then(|life| life.to).unwrap_or(length);
        let until = elected.get(index + 1).map_or(length, |next| next.0);
        let until = until.min(death.max(*at));
        let Some(y) = y_of(process) else { continue };
        let (from, to) = (x(*at), x(until));
        writeln!(
            out,
            r##"<rect x="{from:.1}" y="{:.1}" width="{:.1}" height="4" fill="{LEADS}"><title>{} leads in epoch {epoch}</title></rect>"##,
            y + 5.0 + BAR - 1.0,
            (to - from).max(1.0),
            escape(process)
        )?;
    }
    Ok(())
}

fn faults(
    out: &mut String,
    observed: &Observed,
    length: f64,
    x: &dyn Fn(f64) -> f64,
    y_of: &dyn Fn(&str) -> Option<f64>,
) -> std::fmt::Result {
    for fault in observed.faults.iter().filter(|fault| fault.happened) {
        let colour = colour_of_fault(&fault.kind);
        let title = format!("{} at {:.2} s, step {}", fault.label, fault.at, fault.step);
        let until = fault.until.unwrap_or(match fault.kind.as_str() {
            "pause" => length,
            _ => fault.at,
        });
        // A bad link outlives a process; a stop does not.
        let end = |victim: &Victim| {
            let mut lives = observed.lives.iter();
            let death = lives.find(|life| life.identity == victim.identity);
            match death.and_then(|life| life.to) {
                Some(death) if fault.network.is_none() => until.min(death),
                _ => until,
            }
        };
        let places: Vec<(f64, f64, f64)> = if fault.victims.is_empty() {
            let place = y_of("store").map(|y| (fault.at, until, y));
            place.into_iter().collect()
        } else {
            let victims = fault.victims.iter();
            victims
                .filter_map(|victim| Some((victim.at, end(victim), y_of(&victim.process)?)))
                .collect()
        };
        for (at, until, y) in places {
            if fault.kind != "kill" {
                writeln!(
                    out,
                    r##"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{BAR}" fill="{colour}" fill-opacity="0.55"/>"##,
                    x(at),
                    y + 5.0,
                    (x(until) - x(at)).max(1.5)
                )?;
            }
            let (cx, cy) = (x(at), y + 5.0);
            writeln!(
                out,
                r##"<path d="M {:.1} {:.1} L {:.1} {:.1} L {cx:.1} {:.1} Z" fill="{colour}" stroke="#ffffff" stroke-width="0.7"><title>{}</title></path>"##,
                cx - 5.0,
                cy - 5.0,
                cx + 5.0,
                cy - 5.0,
                cy + 5.0,
                escape(&title)
            )?;
        }
    }
    Ok(())
}

/// Commits per second along the bottom; gaps are white.
fn commits(out: &mut String, observed: &Observed, length: f64, bottom: f64) -> std::fmt::Result {
    let num_bins = 500.min((length * 4.0) as usize).max(20);
    let mut bins = vec![0u32; num_bins];
    for commit in &observed.commits {
        let bin = (commit.at / length * num_bins as f64).max(0.0) as usize;
        bins[bin.min(num_bins - 1)] += 1;
    }
    let most = f64::from(bins.iter().copied().max().unwrap_or(0).max(1));
    let per_second = most * num_bins as f64 / length;
    let width = PLOT / num_bins as f64;
    writeln!(
        out,
        r##"<text x="{0}" y="{1}" text-anchor="end">commits per second</text><text x="{0}" y="{2}" text-anchor="end" fill="#666666">most: {per_second:.1}</text>"##,
        LEFT - 10.0,
        bottom + COMMITS - 14.0,
        bottom + COMMITS,
    )?;
    for (bin, count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = f64::from(*count) / most * (COMMITS - 12.0);
        writeln!(
            out,
            r##"<rect x="{:.1}" y="{:.1}" width="{:.2}" height="{height:.1}" fill="#4a4a4a"/>"##,
            LEFT + bin as f64 * width,
            bottom + COMMITS - height,
            width.max(0.6)
        )?;
    }
    Ok(())
}
