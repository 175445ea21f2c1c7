use super::*;

const FILE: &str = r#"
name = "two"
workload = { run = "examples/demo.toml", topology = "topology/local-cluster.toml" }
fault = [
    { kind = "kill", role = "worker", after_step = 1 },
    { kind = "pause", target = "any", seconds = 2, after_step = 2, repeat = 3, every_steps = 5 },
]
check = { faults = 4 }
"#;

/// A path in the repository, so that the files which the scenario names are found.
fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../chaos/fast/two.toml")
}

fn read(change: impl Fn(String) -> String) -> Result<Scenario, ScenarioError> {
    Scenario::parse(&change(FILE.to_owned()), &path())
}

fn wrong(from: &str, to: &str) -> String {
    let error = read(|text| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    })
    .and_then(|scenario| scenario.topology().map(drop))
    .unwrap_err()
    .to_string();
    assert!(error.contains("two.toml"), "{error}");
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn a_file_is_read_and_repetitions_are_counted() {
    let scenario = read(|text| text).unwrap();
    scenario.topology().unwrap();
    assert_eq!(scenario.num_planned(), 4);
    let steps: Vec<u64> = scenario
        .faults
        .iter()
        .map(|fault| fault.moment.after_step)
        .collect();
    assert_eq!(steps, [1, 2, 7, 12]);
    assert_eq!(scenario.kinds()["pause any"], 3);
    assert!(!scenario.injects());
}

#[test]
fn mistakes_are_named_in_one_line() {
    for (from, to, parts) in [
        ("\"two\"", "\"three\"", &["name", "three"][..]),
        (
            "\"kill\"",
            "\"kil\"",
            &["fault 1: kind", "kil", "store_outage"],
        ),
        ("\"worker\"", "\"boss\"", &["boss", "coordinator"]),
        (
            "role = \"worker\"",
            "role = \"worker\", index = 3",
            &["fault 1", "worker 3", "0 to 2"],
        ),
        (
            "role = \"worker\"",
            "process = \"w\"",
            &["fault 1", "\"w\"", "worker-2"],
        ),
        (
            "role = \"worker\"",
            "node = \"n\"",
            &["fault 1", "\"n\"", "local"],
        ),
        (
            "role = \"worker\"",
            "target = \"leader-and-successor\"",
            &["fault 1", "second coordinator"],
        ),
        (
            "role = \"worker\"",
            "target = \"boss\"",
            &["fault 1: target", "boss", "leader"],
        ),
        (
            "role = \"worker\", ",
            "",
            &["fault 1: target", "exactly one of"],
        ),
        (
            "\"worker\", after_step = 1",
            "\"worker\"",
            &["fault 1: after_step", "missing"],
        ),
        (
            "\"worker\"",
            "\"worker\", seconds = 1",
            &["fault 1: seconds", "kill"],
        ),
        (
            "\"worker\"",
            "\"worker\", second = 1",
            &["unknown field", "second"],
        ),
        (
            "seconds = 2",
            "seconds = -2",
            &["fault 2: seconds", "above 0"],
        ),
        (
            "\"kill\", role = \"worker\"",
            "\"store_errors\", seconds = 1, status = 404",
            &["fault 1: status", "404", "429"],
        ),
        (", every_steps = 5", "", &["fault 2: repeat", "every_steps"]),
        ("faults = 4", "faults = 5", &["check.faults", "at most 4"]),
        ("faults = 4", "fault = 4", &["unknown field", "fault"]),
        ("demo.toml", "none.toml", &["workload.run", "none.toml"]),
        (
            "local-cluster.toml",
            "laptop.toml",
            &["fault 1", "one process"],
        ),
    ] {
        let error = wrong(from, to);
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }
}

/// Every scenario of the repository.
pub(crate) fn registry() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../chaos");
    let mut files: Vec<PathBuf> = ["fast", "slow", "rare"]
        .iter()
        .flat_map(|folder| std::fs::read_dir(root.join(folder)).into_iter().flatten())
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

#[test]
fn every_scenario_of_the_repository_is_right_and_can_fail() {
    let files = registry();
    assert!(!files.is_empty());
    for file in files {
        assert_eq!(file.extension().unwrap_or_default(), "toml", "{file:?}");
        let scenario = Scenario::read(&file).unwrap_or_else(|error| panic!("{error}"));
        scenario
            .topology()
            .unwrap_or_else(|error| panic!("{error}"));
        let demanded = scenario.check.faults.unwrap_or(scenario.num_planned());
        assert!(demanded > 0, "{file:?} can pass without a fault");
    }
}
