use std::path::{Path, PathBuf};

use super::*;

/// What strikes only outside the protocol, and what is said of it.
const NOT_SIMULATED: [(&str, &str); 2] = [
    ("kill-agent", "the simulator has no agents"),
    ("non-finite", "the simulator knows no non_finite"),
];

fn files(folders: &[&str]) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../chaos");
    let entries = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(root.join(folder)).unwrap());
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Simulates a shipped scenario; none if it cannot be, with the right error.
fn simulated(file: &Path, seed: u64) -> Option<SimulationReport> {
    let scenario = Scenario::read(file).unwrap();
    let known = NOT_SIMULATED
        .iter()
        .find(|(name, _)| *name == scenario.name);
    match (simulate(&scenario, seed, &[]), known) {
        (Ok(report), None) => Some(report),
        (Err(error), Some((_, part))) => {
            let error = error.to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{error}");
            assert!(error.contains(".toml: "), "{error}");
            None
        }
        (result, _) => panic!("{}: {result:?}", scenario.name),
    }
}

#[test]
fn every_fast_scenario_ends_in_the_undisturbed_digest() {
    let files = files(&["fast"]);
    let mut num_simulated = 0;
    for file in &files {
        for seed in 0..5 {
            let Some(report) = simulated(file, seed) else {
                break;
            };
            assert!(report.passed, "seed {seed}: {}", report.table());
            assert!(report.faults_injected > 0);
            assert_eq!(report.digest_equal, Some(true));
            num_simulated += usize::from(seed == 0);
        }
    }
    assert_eq!(num_simulated, files.len() - NOT_SIMULATED.len());
}

#[test]
fn long_scenarios_and_storms_are_shortened() {
    for file in files(&["slow", "rare"]) {
        for seed in 0..2 {
            let report = simulated(&file, seed).unwrap();
            assert!(report.passed, "seed {seed}: {}", report.table());
            assert!(report.steps <= 2_000);
            assert!(report.faults_injected >= report.faults_planned);
        }
    }
}

#[test]
fn the_same_seed_is_the_same_run_and_another_draws_anew() {
    let file = files(&["slow"])
        .into_iter()
        .find(|file| file.ends_with("storm-300.toml"))
        .unwrap();
    let run = |seed| simulated(&file, seed).unwrap().table();
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}
