//! The agent's side of the control sockets: who speaks is checked here, what is said goes to the agent's queue.

use std::io;

use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use super::Happening;
use crate::control::{LINE_BYTES_MAX, Notice, ProcessMessage, Reply, Request, line, socket};
use crate::rundir::RunDir;

/// Notices that may wait for a process; one that takes so many no more is not asked to.
const NOTICES: usize = 64;

/// The agent's end of a process's connection.
#[derive(Clone, Debug)]
pub(super) struct Link {
    /// Number of the connection.
    pub(super) id: u64,
    notices: mpsc::Sender<Notice>,
}

impl Link {
    /// Queues a notice; false if the process takes none.
    pub(super) fn send(&self, notice: Notice) -> bool {
        self.notices.try_send(notice).is_ok()
    }
}

/// What comes from the sockets.
#[derive(Debug)]
pub(super) enum Said {
    /// A process, checked to be the one it says.
    Hello {
        process: u32,
        incarnation: u64,
        pid: u32,
        link: Link,
    },
    /// A process that said hello.
    Message { link: u64, message: ProcessMessage },
    /// A connection ended.
    Gone { link: u64 },
    /// A user or a tool; the answer is awaited.
    Request {
        node: String,
        request: Request,
        reply: oneshot::Sender<Reply>,
    },
}

/// Listens for a node until the task is dropped; everything said goes to `queue`.
pub(super) fn listen(
    run_dir: &RunDir,
    node: &str,
    queue: mpsc::Sender<Happening>,
) -> io::Result<tokio::task::JoinHandle<()>> {
    let listener = socket::bind(&run_dir.control(node))?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let node = node.to_owned();
    Ok(tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (queue, node) = (queue.clone(), node.clone());
                    tokio::spawn(async move {
                        if let Err(error) = serve(stream, node, queue).await {
                            tracing::debug!(%error, "a connection to the control socket failed");
                        }
                    });
                }
                Err(error) => {
                    // Too many open files: waiting is better than spinning.
                    tracing::warn!(%error, "the control socket");
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
            }
        }
    }))
}

async fn serve(stream: UnixStream, node: String, queue: mpsc::Sender<Happening>) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let Some(text) = next_line(&mut reader).await? else {
        return Ok(());
    };
    match serde_json::from_slice(&text) {
        Ok(ProcessMessage::Hello {
            process,
            incarnation,
            pid,
        }) => {
            if peer.pid() != Some(pid as i32) {
                let claim = format!("pid {pid} is claimed by {:?}", peer.pid());
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, claim));
            }
            static LINKS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
            let id = LINKS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let (notices, waiting) = mpsc::channel(NOTICES);
            let link = Link { id, notices };
            let hello = Said::Hello {
                process,
                incarnation,
                pid,
                link,
            };
            say(&queue, hello).await;
            let outcome = tokio::select! {
                outcome = listen_to(&mut reader, id, &queue) => outcome,
                outcome = pass_on(waiting, &mut writer) => outcome,
            };
            say(&queue, Said::Gone { link: id }).await;
            outcome
        }
        Ok(other) => {
            let message = format!("{other:?} before hello");
            Err(io::Error::new(io::ErrorKind::InvalidData, message))
        }
        Err(_) => {
            let reply = match serde_json::from_slice(&text) {
                Ok(request) => ask(&queue, node, request).await,
                Err(error) => Reply::Refused {
                    message: format!("the request is not understood: {error}"),
                },
            };
            writer.write_all(&line(&reply)?).await
        }
    }
}

async fn listen_to(
    reader: &mut (impl AsyncBufRead + Unpin),
    link: u64,
    queue: &mpsc::Sender<Happening>,
) -> io::Result<()> {
    while let Some(text) = next_line(reader).await? {
        let message = serde_json::from_slice(&text)?;
        say(queue, Said::Message { link, message }).await;
    }
    Ok(())
}

/// Ends when the agent dropped the link.
async fn pass_on(
    mut notices: mpsc::Receiver<Notice>,
    writer: &mut OwnedWriteHalf,
) -> io::Result<()> {
    while let Some(notice) = notices.recv().await {
        writer.write_all(&line(&notice)?).await?;
    }
    Ok(())
}

async fn ask(queue: &mpsc::Sender<Happening>, node: String, request: Request) -> Reply {
    let (reply, answer) = oneshot::channel();
    let request = Said::Request {
        node,
        request,
        reply,
    };
    say(queue, request).await;
    answer.await.unwrap_or_else(|_| Reply::Refused {
        message: "the process or the agent ended before it answered".to_owned(),
    })
}

async fn say(queue: &mpsc::Sender<Happening>, said: Said) {
    // The agent is gone: so is soon this task.
    let _ = queue.send(Happening::Said(said)).await;
}

/// The next line, without its end; none at the end of the stream.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    reader
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut text)
        .await?;
    if text.is_empty() {
        return Ok(None);
    }
    if text.pop() != Some(b'\n') {
        let message = "a line is cut off or too long";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(Some(text))
}
