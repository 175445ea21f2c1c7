//! Real server processes: `moto_server` and `s3rver` speak S3, `azurite-blob` speaks Azure Blob Storage. Each is killed when dropped.

#![allow(dead_code, reason = "not every test program needs every server")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// They need a second or two to start; a busy machine needs more.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// Where the set-up puts them.
const THIRD_PARTY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../third_party");

fn third_party(path: &str) -> Option<PathBuf> {
    let path = Path::new(THIRD_PARTY).join(path);
    path.exists().then_some(path)
}

/// A running server on a port that the system picked.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts it, and reads its port off the line that has `marker` before it.
    fn start(mut command: Command, marker: &'static str) -> Self {
        let name = format!("{command:?}");
        let missing = |why: &str| -> ! {
            panic!(
                "{name} is needed by the tests of stores; `cargo xtask setup --tests` installs it: {why}"
            )
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| missing(&error.to_string()));
        // From here on it is ended whatever happens.
        let mut server = Self { child, port: 0 };
        let (sender, lines) = mpsc::channel();
        let streams: [Box<dyn Read + Send>; 2] = [
            Box::new(server.child.stdout.take().unwrap()),
            Box::new(server.child.stderr.take().unwrap()),
        ];
        for stream in streams {
            let sender = sender.clone();
            // The thread goes on reading until the server ends, so that the server never blocks on a full pipe.
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let _ = sender.send(line);
                }
            });
        }
        drop(sender);
        let mut said = String::new();
        loop {
            match lines.recv_timeout(START_DEADLINE) {
                Ok(line) => {
                    if let Some((_, port)) = line.split_once(marker) {
                        server.port = port.trim().parse().unwrap();
                        return server;
                    }
                    said += &line;
                    said.push('\n');
                }
                Err(_) => missing(&said),
            }
        }
    }

    /// One plain request; the answer with its head.
    fn request(&self, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let host = format!("127.0.0.1:{}", self.port);
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a user of S3 would put into the environment.
pub(crate) fn environment(port: u16) -> BTreeMap<String, String> {
    environment_with_key(port, "test")
}

fn environment_with_key(port: u16, key: &str) -> BTreeMap<String, String> {
    let pairs = [
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_ACCESS_KEY_ID", key.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", key.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

/// An S3 server that honours create-if-absent.
pub(crate) struct Moto {
    server: Server,
    pub(crate) port: u16,
}

/// Its threads take turns only when one waits. Otherwise two that create an object at once now and then both succeed, since it looks and
/// then writes, and everstep rightly refuses such a store.
const IN_TURN: &str =
    "import sys; sys.setswitchinterval(1000); from moto.server import main; main(sys.argv[1:])";

impl Moto {
    pub(crate) fn start() -> Self {
        Self::spawn(Self::program())
    }

    /// One that takes the first request from anybody, and then none: it knows nobody's keys.
    pub(crate) fn start_strict() -> Self {
        let mut program = Self::program();
        program.env("INITIAL_NO_AUTH_ACTION_COUNT", "1");
        Self::spawn(program)
    }

    /// `EVERSTEP_MOTO_SERVER`, else the one that the set-up installs, else the one on the path.
    fn program() -> Command {
        if let Some(program) = std::env::var_os("EVERSTEP_MOTO_SERVER") {
            return Command::new(program);
        }
        let Some(python) = third_party("venv/bin/python3") else {
            return Command::new("moto_server");
        };
        let mut command = Command::new(python);
        command.args(["-c", IN_TURN]);
        command
    }

    fn spawn(mut program: Command) -> Self {
        program.args(["-H", "127.0.0.1", "-p", "0"]);
        let server = Server::start(program, "Running on http://127.0.0.1:");
        let port = server.port;
        Self { server, port }
    }

    pub(crate) fn create_bucket(&self, name: &str) {
        let answer = self.server.request("PUT", &format!("/{name}"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        environment(self.port)
    }
}

fn node_program() -> Command {
    Command::new(third_party("venv/bin/node").unwrap_or_else(|| "node".into()))
}

fn node(script: &str) -> Command {
    let mut command = node_program();
    command.arg(Path::new(THIRD_PARTY).join("npm/node_modules").join(script));
    command
}

/// Another S3 server, which ignores the condition of a conditional write: the second writer replaces what the first one wrote.
pub(crate) struct S3rver {
    server: Server,
    pub(crate) port: u16,
}

impl S3rver {
    /// With its objects in `folder`, and an empty bucket.
    pub(crate) fn start(folder: &Path, bucket: &str) -> Self {
        let mut command = node("s3rver/bin/s3rver.js");
        command.arg("--directory").arg(folder);
        command.args(["--address", "127.0.0.1", "--port", "0"]);
        command.args(["--configure-bucket", bucket]);
        let server = Server::start(command, "listening on 127.0.0.1:");
        let port = server.port;
        Self { server, port }
    }

    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        Self::environment_at(self.port)
    }

    /// It knows one pair of keys.
    pub(crate) fn environment_at(port: u16) -> BTreeMap<String, String> {
        environment_with_key(port, "S3RVER")
    }
}

const CREATE_CONTAINER: &str = r#"
const [endpoint, key, name] = process.argv.slice(1);
const account = new URL(endpoint).pathname.slice(1);
const headers = { "x-ms-date": new Date().toUTCString(), "x-ms-version": "2021-08-06" };
const signed = Object.entries(headers).map(([header, value]) => `${header}:${value}\n`).join("");
const text = "PUT" + "\n".repeat(12) + signed + `/${account}/${account}/${name}\nrestype:container`;
const hmac = require("crypto").createHmac("sha256", Buffer.from(key, "base64")).update(text).digest("base64");
headers.authorization = `SharedKey ${account}:${hmac}`;
fetch(`${endpoint}/${name}?restype=container`, { method: "PUT", headers }).then(async (answer) => {
    if (answer.status != 201) throw new Error(await answer.text());
});
"#;

/// Azure's own emulator of its blob storage.
pub(crate) struct Azurite {
    server: Server,
}

impl Azurite {
    const ACCOUNT: &str = "tests";
    /// `test` in base64, which this server is told to accept.
    const KEY: &str = "dGVzdA==";

    /// With its blobs in `folder`.
    pub(crate) fn start(folder: &Path) -> Self {
        let mut command = node("azurite/dist/src/blob/main.js");
        command.env(
            "AZURITE_ACCOUNTS",
            format!("{}:{}", Self::ACCOUNT, Self::KEY),
        );
        command.arg("--location").arg(folder);
        command.args(["--blobHost", "127.0.0.1", "--blobPort", "0"]);
        command.args(["--skipApiVersionCheck", "--disableTelemetry"]);
        let server = Server::start(command, "successfully listens on http://127.0.0.1:");
        Self { server }
    }

    /// By a signed request: <https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key>.
    pub(crate) fn create_container(&self, name: &str) {
        let mut command = node_program();
        command.args(["-e", CREATE_CONTAINER, &self.endpoint(), Self::KEY, name]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}/{}", self.server.port, Self::ACCOUNT)
    }

    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let pairs = [
            ("AZURE_ENDPOINT", self.endpoint()),
            ("AZURE_ALLOW_HTTP", "true".to_owned()),
            ("AZURE_STORAGE_ACCOUNT_NAME", Self::ACCOUNT.to_owned()),
            ("AZURE_STORAGE_ACCOUNT_KEY", Self::KEY.to_owned()),
        ];
        pairs.map(|(key, value)| (key.to_owned(), value)).into()
    }
}
