//! Which crate may know which: the arrows of ARCHITECTURE.md, checked against what cargo resolves.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process;
use crate::workspace::Workspace;

/// What one crate of the workspace may depend on.
#[derive(Debug)]
struct Rule {
    name: &'static str,
    /// The crates of this workspace that it may use.
    may_use: &'static [&'static str],
    /// Whether libtorch may be reached from it, directly or not.
    torch: bool,
    /// Whether it may use crates from outside the workspace at all.
    external: bool,
}

/// Every crate, lowest first. A crate that is not listed fails the check: the list is the map.
const RULES: &[Rule] = &[
    Rule {
        name: "everstep-protocol",
        may_use: &[],
        torch: false,
        external: false,
    },
    Rule {
        name: "everstep-sim",
        may_use: &["everstep-protocol"],
        torch: false,
        external: false,
    },
    Rule {
        name: "everstep-optim",
        may_use: &["everstep-protocol"],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-telemetry",
        may_use: &["everstep-protocol"],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-transport",
        may_use: &["everstep-protocol", "everstep-telemetry"],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-store",
        may_use: &["everstep-protocol", "everstep-optim"],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-data",
        may_use: &["everstep-protocol"],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-torch",
        may_use: &["everstep-protocol"],
        torch: true,
        external: true,
    },
    Rule {
        name: "everstep-spec",
        may_use: &["everstep-protocol", "everstep-optim"],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-model",
        may_use: &[
            "everstep-protocol",
            "everstep-torch",
            "everstep-optim",
            "everstep-spec",
        ],
        torch: true,
        external: true,
    },
    Rule {
        name: "everstep-train",
        may_use: &[
            "everstep-protocol",
            "everstep-optim",
            "everstep-spec",
            "everstep-data",
        ],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-compute",
        may_use: &[
            "everstep-protocol",
            "everstep-optim",
            "everstep-data",
            "everstep-train",
            "everstep-torch",
            "everstep-model",
        ],
        torch: true,
        external: true,
    },
    Rule {
        name: "everstep-cluster",
        may_use: &[
            "everstep-protocol",
            "everstep-optim",
            "everstep-telemetry",
            "everstep-transport",
            "everstep-store",
            "everstep-data",
            "everstep-spec",
            "everstep-train",
        ],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-chaos",
        may_use: &[
            "everstep-protocol",
            "everstep-sim",
            "everstep-telemetry",
            "everstep-store",
            "everstep-train",
            "everstep-cluster",
        ],
        torch: false,
        external: true,
    },
    Rule {
        name: "everstep-cli",
        may_use: &[
            "everstep-chaos",
            "everstep-protocol",
            "everstep-optim",
            "everstep-telemetry",
            "everstep-transport",
            "everstep-store",
            "everstep-data",
            "everstep-spec",
            "everstep-model",
            "everstep-compute",
            "everstep-train",
            "everstep-cluster",
        ],
        torch: true,
        external: true,
    },
    Rule {
        name: "xtask",
        may_use: &["everstep-protocol", "everstep-sim"],
        torch: false,
        external: true,
    },
];

/// The only crate that may name ractor and its companions.
const KNOWS_RACTOR: &str = "everstep-cluster";

/// One package as cargo resolves it: the names it needs to be built, tests aside.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// Checks every crate against its rule.
///
/// # Errors
/// All arrows that point the wrong way, one a line.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let text = process::output(process::cargo(workspace).args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
    ]))?;
    let metadata = serde_json::from_str(&text).context("cargo metadata gave no JSON")?;
    let (members, graph) = read(&metadata).context("cargo metadata has an unknown form")?;
    let wrong = violations(&members, &graph);
    if !wrong.is_empty() {
        bail!(
            "the crates' dependencies break the rules in crates/xtask/src/architecture.rs:\n{}",
            wrong.join("\n")
        );
    }
    println!("{} crates, every arrow as allowed", members.len());
    Ok(())
}

/// The workspace's members and the names of everybody's normal and build dependencies.
fn read(metadata: &Value) -> Option<(BTreeSet<String>, Graph)> {
    let mut names = BTreeMap::new();
    for package in metadata["packages"].as_array()? {
        names.insert(package["id"].as_str()?, package["name"].as_str()?);
    }
    let member = |id: &Value| names.get(id.as_str()?).map(|name| (*name).to_owned());
    let members = metadata["workspace_members"]
        .as_array()?
        .iter()
        .map(member)
        .collect::<Option<_>>()?;
    let mut graph = Graph::new();
    for node in metadata["resolve"]["nodes"].as_array()? {
        // Several versions of one package share an entry: what matters is who is reached, not through which version.
        let needs = graph
            .entry((*names.get(node["id"].as_str()?)?).to_owned())
            .or_default();
        for dependency in node["deps"].as_array()? {
            let for_tests_only = dependency["dep_kinds"]
                .as_array()?
                .iter()
                .all(|kind| kind["kind"] == "dev");
            if !for_tests_only {
                needs.insert((*names.get(dependency["pkg"].as_str()?)?).to_owned());
            }
        }
    }
    Some((members, graph))
}

fn violations(members: &BTreeSet<String>, graph: &Graph) -> Vec<String> {
    let mut wrong = Vec::new();
    for member in members {
        let Some(rule) = RULES.iter().find(|rule| rule.name == member) else {
            wrong.push(format!("{member} has no rule: add one"));
            continue;
        };
        for need in graph.get(member).into_iter().flatten() {
            if members.contains(need) {
                if !rule.may_use.contains(&need.as_str()) {
                    wrong.push(format!("{member} may not use {need}"));
                }
            } else if !rule.external {
                wrong.push(format!("{member} may use std only, but uses {need}"));
            } else if need.starts_with("ractor") && member != KNOWS_RACTOR {
                wrong.push(format!(
                    "only {KNOWS_RACTOR} may use {need}, but {member} does"
                ));
            }
        }
        if !rule.torch && reaches(graph, member, "torch-sys") {
            wrong.push(format!(
                "{member} must build without libtorch, but reaches torch-sys"
            ));
        }
    }
    wrong
}

/// Whether `from` needs `to`, directly or through others.
fn reaches(graph: &Graph, from: &str, to: &str) -> bool {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop() {
        if name == to {
            return true;
        }
        if seen.insert(name) {
            open.extend(graph.get(name).into_iter().flatten().map(String::as_str));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(edges: &[(&str, &[&str])]) -> Graph {
        edges
            .iter()
            .map(|(from, to)| {
                (
                    (*from).to_owned(),
                    to.iter().map(|name| (*name).to_owned()).collect(),
                )
            })
            .collect()
    }

    fn wrong(edges: &[(&str, &[&str])], members: &[&str]) -> Vec<String> {
        violations(
            &members.iter().map(|name| (*name).to_owned()).collect(),
            &graph(edges),
        )
    }

    #[test]
    fn arrows_that_point_up_are_found() {
        let found = wrong(
            &[
                ("everstep-protocol", &["everstep-sim", "rand"]),
                ("everstep-sim", &[]),
            ],
            &["everstep-protocol", "everstep-sim"],
        );
        assert_eq!(
            found,
            [
                "everstep-protocol may not use everstep-sim",
                "everstep-protocol may use std only, but uses rand"
            ]
        );
    }

    #[test]
    fn libtorch_is_found_behind_other_crates() {
        let found = wrong(
            &[("everstep-data", &["tokens"]), ("tokens", &["torch-sys"])],
            &["everstep-data"],
        );
        assert_eq!(
            found,
            ["everstep-data must build without libtorch, but reaches torch-sys"]
        );
    }

    #[test]
    fn ractor_and_unknown_crates_are_found() {
        let found = wrong(
            &[("everstep-store", &["ractor_cluster"]), ("new", &[])],
            &["everstep-store", "new"],
        );
        assert_eq!(
            found,
            [
                "only everstep-cluster may use ractor_cluster, but everstep-store does",
                "new has no rule: add one"
            ]
        );
    }

    #[test]
    fn dependencies_of_tests_alone_do_not_count() {
        let metadata = serde_json::json!({
            "packages": [{"id": "a 1", "name": "a"}, {"id": "b 1", "name": "b"}, {"id": "c 1", "name": "c"}],
            "workspace_members": ["a 1"],
            "resolve": {"nodes": [{"id": "a 1", "deps": [
                {"pkg": "b 1", "dep_kinds": [{"kind": "dev"}]},
                {"pkg": "c 1", "dep_kinds": [{"kind": "dev"}, {"kind": null}]},
            ]}]},
        });
        let (members, found) = read(&metadata).unwrap();
        assert_eq!(members.len(), 1);
        assert_eq!(found, graph(&[("a", &["c"])]));
    }
}
