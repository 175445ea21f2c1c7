use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::Identity;

fn mode(file: &Path) -> u32 {
    fs::metadata(file).unwrap().permissions().mode() & 0o777
}

#[test]
fn issues_identities_that_load_and_keys_that_only_the_owner_reads() {
    let (ca_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    ClusterCa::create(ca_dir.path()).unwrap();
    let ca = ClusterCa::load(ca_dir.path()).unwrap();
    ca.issue("worker-0", dir.path()).unwrap();
    ca.issue("worker-0", dir.path()).unwrap();
    ClusterCa::load_or_create(ca_dir.path())
        .unwrap()
        .issue("shard-1", dir.path())
        .unwrap();
    assert_eq!(
        Identity::load(dir.path(), "worker-0").unwrap().name(),
        "worker-0"
    );
    assert_eq!(
        Identity::load(dir.path(), "shard-1").unwrap().name(),
        "shard-1"
    );
    assert_eq!(mode(&ca_dir.path().join("ca.key")), 0o600);
    assert_eq!(mode(&dir.path().join("worker-0.key")), 0o600);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        5,
        "no temporary files are left"
    );
}

#[test]
fn a_second_ca_is_not_made_over_the_first() {
    let dir = tempfile::tempdir().unwrap();
    ClusterCa::create(dir.path()).unwrap();
    assert!(matches!(
        ClusterCa::create(dir.path()),
        Err(CertError::Exists { .. })
    ));
}

#[test]
fn errors_name_the_file_and_what_is_wrong() {
    let (one, two, dir) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let (ca, other) = (
        ClusterCa::create(one.path()).unwrap(),
        ClusterCa::create(two.path()).unwrap(),
    );
    let path = |name: &str| dir.path().join(name);
    let load = |name: &str| Identity::load(dir.path(), name).unwrap_err();

    assert!(matches!(load("a"), CertError::Missing { file } if file == path("ca.pem")));
    ca.issue("a", dir.path()).unwrap();
    assert!(matches!(load("b"), CertError::Missing { file } if file == path("b.pem")));

    fs::copy(path("a.pem"), path("b.pem")).unwrap();
    fs::copy(path("a.key"), path("b.key")).unwrap();
    assert!(matches!(load("b"), CertError::WrongName { file, .. } if file == path("b.pem")));

    ca.issue("c", dir.path()).unwrap();
    fs::copy(path("a.key"), path("c.key")).unwrap();
    assert!(matches!(load("c"), CertError::KeyMismatch { key, .. } if key == path("c.key")));

    fs::write(path("c.key"), "garbage").unwrap();
    assert!(matches!(load("c"), CertError::NotPem { file, .. } if file == path("c.key")));
    fs::write(path("c.pem"), "garbage").unwrap();
    assert!(matches!(load("c"), CertError::NotPem { file, .. } if file == path("c.pem")));

    other.issue("d", dir.path()).unwrap();
    fs::copy(one.path().join("ca.pem"), path("ca.pem")).unwrap();
    let error = load("d");
    assert!(
        matches!(&error, CertError::NotSigned { file, .. } if *file == path("d.pem")),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains("d.pem: not signed by the cluster CA in "),
        "{error}"
    );

    fs::copy(two.path().join("ca.key"), one.path().join("ca.key")).unwrap();
    assert!(matches!(
        ClusterCa::load(one.path()),
        Err(CertError::KeyMismatch { .. })
    ));
    fs::write(one.path().join("ca.pem"), "garbage").unwrap();
    assert!(matches!(
        ClusterCa::load(one.path()),
        Err(CertError::NotPem { .. })
    ));
}

#[test]
fn names_that_are_no_label_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = ClusterCa::create(dir.path()).unwrap();
    for name in [
        "",
        "A",
        "a.b",
        "../a",
        "a-",
        "0a",
        "a b",
        "ä",
        &"a".repeat(64),
    ] {
        assert!(
            matches!(ca.issue(name, dir.path()), Err(CertError::BadName { .. })),
            "{name:?}"
        );
    }
    ca.issue(&"a".repeat(63), dir.path()).unwrap();
}
