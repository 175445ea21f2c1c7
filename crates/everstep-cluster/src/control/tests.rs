use super::*;
use crate::topology::ActorRole;

/// Outside tools speak this: a change here breaks them.
#[test]
fn requests_and_replies_as_tools_write_them() {
    let drain = Request::Drain {
        node: "a".to_owned(),
        seconds_left: Some(30),
    };
    let text = r#"{"request":"drain","node":"a","seconds_left":30}"#;
    assert_eq!(serde_json::to_string(&drain).unwrap(), text);
    assert_eq!(serde_json::from_str::<Request>(text).unwrap(), drain);
    let inject = Request::Inject {
        process: "worker-0".to_owned(),
        fault: Injection::Panic {
            role: ActorRole::Worker,
        },
    };
    let text =
        r#"{"request":"inject","process":"worker-0","fault":{"fault":"panic","role":"worker"}}"#;
    assert_eq!(serde_json::to_string(&inject).unwrap(), text);
    assert_eq!(serde_json::from_str::<Request>(text).unwrap(), inject);
    assert_eq!(
        serde_json::to_string(&Reply::Done).unwrap(),
        r#"{"reply":"done"}"#
    );
}

#[test]
fn nobody_listens() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = RunDir::new(folder.path());
    let request = Request::Drain {
        node: "a".to_owned(),
        seconds_left: None,
    };
    let error = send(&run_dir, "a", &request).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(
        error.to_string().contains("no agent of node a listens on"),
        "{error}"
    );
}

#[test]
fn a_path_may_be_longer_than_a_socket_address() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = RunDir::new(folder.path().join("x".repeat(150)));
    let listener = socket::bind(&run_dir.control("a")).unwrap();
    let agent = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut request = String::new();
        BufReader::new(&stream).read_line(&mut request).unwrap();
        (&stream).write_all(&line(&Reply::Done).unwrap()).unwrap();
        request
    });
    let request = Request::Drain {
        node: "b".to_owned(),
        seconds_left: None,
    };
    assert_eq!(send(&run_dir, "a", &request).unwrap(), Reply::Done);
    assert_eq!(
        agent.join().unwrap(),
        "{\"request\":\"drain\",\"node\":\"b\"}\n"
    );
}
