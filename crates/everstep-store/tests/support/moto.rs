//! A real S3 server process: `moto_server`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Python needs a second or two to start; a busy machine needs more.
const START_DEADLINE: Duration = Duration::from_secs(120);

pub(crate) const INSTALL: &str = "`moto_server` is missing, which the S3 tests need: run `cargo xtask setup --tests`, or \
    `pip install 'moto[server]'` (EVERSTEP_MOTO_SERVER may name the program)";

/// Its threads take turns only when one waits. Otherwise two that create an object at once now and then both succeed, since it looks and
/// then writes, and everstep rightly refuses such a store.
const IN_TURN: &str =
    "import sys; sys.setswitchinterval(1000); from moto.server import main; main(sys.argv[1:])";

/// `EVERSTEP_MOTO_SERVER`, else the one that the set-up installs, else the one on the path.
fn program() -> Command {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../third_party/venv/bin/python3");
    match std::env::var_os("EVERSTEP_MOTO_SERVER") {
        Some(program) => Command::new(program),
        None if python.exists() => {
            let mut command = Command::new(python);
            command.args(["-c", IN_TURN]);
            command
        }
        None => Command::new("moto_server"),
    }
}

/// A running server; killed when dropped.
pub(crate) struct Moto {
    child: Child,
    pub(crate) port: u16,
}

impl Moto {
    pub(crate) fn start() -> Self {
        Self::spawn(program())
    }

    /// One that takes the first request from anybody, and then none: it knows nobody's keys.
    #[allow(dead_code, reason = "not every test program needs it")]
    pub(crate) fn start_strict() -> Self {
        let mut program = program();
        program.env("INITIAL_NO_AUTH_ACTION_COUNT", "1");
        Self::spawn(program)
    }

    fn spawn(mut program: Command) -> Self {
        let mut child = program
            // Port 0: the system picks a free one, and the server says which.
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{INSTALL} ({error})"));
        let (sender, ports) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        // The thread goes on reading until the server ends, so that the server never blocks on a full pipe.
        std::thread::spawn(move || {
            let mut output = String::new();
            for line in lines.map_while(Result::ok) {
                if let Some(port) = line.split("Running on http://127.0.0.1:").nth(1) {
                    let _ = sender.send(Ok(port.trim().parse().unwrap()));
                } else if output.len() < 4096 {
                    output += &line;
                    output.push('\n');
                }
            }
            let _ = sender.send(Err(output));
        });
        match ports.recv_timeout(START_DEADLINE) {
            Ok(Ok(port)) => Self { child, port },
            Ok(Err(output)) => panic!("{INSTALL}; it ended with:\n{output}"),
            Err(_) => {
                let _ = child.kill();
                panic!(
                    "moto_server did not listen within {} seconds",
                    START_DEADLINE.as_secs()
                );
            }
        }
    }

    pub(crate) fn create_bucket(&self, name: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let host = format!("127.0.0.1:{}", self.port);
        write!(
            stream,
            "PUT /{name} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// What a user would put into the environment.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        environment(self.port)
    }
}

pub(crate) fn environment(port: u16) -> BTreeMap<String, String> {
    let pairs = [
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
