//! A connection to one peer: its control stream, its frames, its end.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::frame::{Frame, FrameDecoder, FrameError, HEADER_BYTES_MAX, PREFIX_BYTES, encode_frame};
use crate::hello::Hello;
use crate::liveness::port_closed;
use crate::options::TransportOptions;
use crate::peers::Link;
use crate::reason::{ABANDONED, CloseReason};

/// The control stream's receiving half.
pub type BoxRead = Box<dyn AsyncRead + Unpin + Send + 'static>;
/// The control stream's sending half.
pub type BoxWrite = Box<dyn AsyncWrite + Unpin + Send + 'static>;

/// Above every frame, whose streams have priority 0.
const CONTROL_PRIORITY: i32 = 100;
/// Pieces taken from a stream at once.
const CHUNKS: usize = 32;
/// The queue's budget is counted in units of this many bytes, because a semaphore counts in 32 bits.
const BUDGET_UNIT_BYTES: usize = 4096;

/// A payload to send, in pieces that are sent one after the other and never copied here.
#[derive(Clone, Debug, Default)]
pub struct Payload(pub(crate) Vec<Bytes>);

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self(vec![bytes])
    }
}

impl From<Vec<Bytes>> for Payload {
    fn from(pieces: Vec<Bytes>) -> Self {
        Self(pieces)
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self(vec![bytes.into()])
    }
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The header is longer than [`HEADER_BYTES_MAX`].
    #[error("frame header too long: header_bytes=`{0}`, at most {HEADER_BYTES_MAX}")]
    HeaderTooLong(usize),
    /// The payload is longer than the endpoint's options allow.
    #[error("frame payload too long: payload_bytes=`{payload_bytes}`, at most {payload_bytes_max}")]
    PayloadTooLong {
        /// Its length.
        payload_bytes: usize,
        /// The limit.
        payload_bytes_max: usize,
    },
    /// The connection has ended; the frame may or may not have arrived.
    #[error("connection ended: {0}")]
    Closed(CloseReason),
}

/// Why there is no frame to receive.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The connection has ended and every frame that had arrived whole has been handed out.
    #[error("connection ended: {0}")]
    Closed(CloseReason),
}

/// A connection to one peer. Clones share it; it closes when the last clone is dropped.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

struct Inner {
    link: Link,
    peer: Hello,
    payload_bytes_max: usize,
    control: StdMutex<Option<(BoxRead, BoxWrite)>>,
    frames: Mutex<mpsc::Receiver<Queued>>,
    /// Reads frames and watches the peer's port; ends with the connection.
    _tasks: JoinSet<()>,
}

/// A received frame and its share of the queue's budget, which is given back when the frame is handed out.
struct Queued {
    frame: Frame,
    _budget: OwnedSemaphorePermit,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.link.close(CloseReason::Local);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.inner.peer)
            .field("addr", &self.addr())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Starts the connection's tasks once both hellos are accepted.
    pub(crate) fn start(
        link: Link,
        peer: Hello,
        options: &TransportOptions,
        (read, write): (RecvStream, SendStream),
    ) -> Self {
        // Fails only on a stream that is closed already, which the first use will report.
        let _ = write.set_priority(CONTROL_PRIORITY);
        let (queue, frames) = mpsc::channel(options.queue_frames);
        let mut tasks = JoinSet::new();
        tasks.spawn(read_frames(link.clone(), options.clone(), queue));
        tasks.spawn(watch(link.clone(), options.probe_interval));
        let inner = Inner {
            link,
            peer,
            payload_bytes_max: options.payload_bytes_max,
            control: StdMutex::new(Some((Box::new(read), Box::new(write)))),
            frames: Mutex::new(frames),
            _tasks: tasks,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// What the peer said of itself; its name is the one in its certificate.
    pub fn peer(&self) -> &Hello {
        &self.inner.peer
    }

    /// The peer's address.
    pub fn addr(&self) -> SocketAddr {
        self.inner.link.quinn.remote_address()
    }

    /// Smoothed round-trip time.
    pub fn rtt(&self) -> Duration {
        self.inner.link.quinn.rtt()
    }

    /// The control stream's two halves: an ordered byte stream that goes before all frames. The first call gets them,
    /// later ones get `None`. Dropping the writing half ends the stream for the peer's reader.
    pub fn control(&self) -> Option<(BoxRead, BoxWrite)> {
        self.inner
            .control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Sends one frame. Frames are independent of each other: they may overtake each other, and a lost packet of one
    /// does not hold another up.
    ///
    /// Returns when all bytes are with QUIC, which does not say that the peer has them. It waits while too many frames
    /// or bytes are under way or the peer does not take frames out of its queue.
    ///
    /// Cancel-safe: a call that is dropped half-way withdraws the frame, the peer never sees it, and the connection
    /// goes on.
    ///
    /// # Errors
    /// [`SendError`]; after `HeaderTooLong` and `PayloadTooLong` nothing was sent and the connection goes on.
    pub async fn send(&self, header: &[u8], payload: impl Into<Payload>) -> Result<(), SendError> {
        let Payload(mut pieces) = payload.into();
        if header.len() > HEADER_BYTES_MAX {
            return Err(SendError::HeaderTooLong(header.len()));
        }
        let payload_bytes = pieces.iter().map(Bytes::len).sum();
        let payload_bytes_max = self.inner.payload_bytes_max;
        if payload_bytes > payload_bytes_max {
            return Err(SendError::PayloadTooLong {
                payload_bytes,
                payload_bytes_max,
            });
        }
        pieces.insert(0, encode_frame(header, &pieces));
        let closed = |error| SendError::Closed(self.inner.link.reason(error));
        let mut stream = Outgoing {
            stream: self.inner.link.quinn.open_uni().await.map_err(closed)?,
            whole: false,
        };
        match stream.stream.write_all_chunks(&mut pieces).await {
            Ok(()) => {}
            Err(quinn::WriteError::ConnectionLost(error)) => return Err(closed(error)),
            // The peer stops a stream only to close the connection over it.
            Err(_) => return Err(SendError::Closed(self.closed().await)),
        }
        stream.whole = true;
        Ok(())
    }

    /// Receives the next frame, in the order in which frames became complete.
    ///
    /// Cancel-safe: no frame is lost when the call is dropped. Concurrent callers share the frames.
    ///
    /// # Errors
    /// [`RecvError::Closed`] after the last frame.
    pub async fn recv(&self) -> Result<Frame, RecvError> {
        match self.inner.frames.lock().await.recv().await {
            Some(queued) => Ok(queued.frame),
            None => Err(RecvError::Closed(self.closed().await)),
        }
    }

    /// Waits for the end of the connection and says why it ended. Cancel-safe; may be called any number of times.
    pub async fn closed(&self) -> CloseReason {
        self.inner.link.reason(self.inner.link.quinn.closed().await)
    }

    /// Why the connection ended, or `None` while it lives.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.inner
            .link
            .quinn
            .close_reason()
            .map(|error| self.inner.link.reason(error))
    }

    /// Closes the connection at once. Bytes still under way are lost: to be sure of the last message, have the peer
    /// answer it first.
    pub fn close(&self) {
        self.inner.link.close(CloseReason::Local);
    }
}

/// A frame's stream that is withdrawn if it is dropped before the frame is whole.
struct Outgoing {
    stream: SendStream,
    whole: bool,
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // Both fail only on a stream that has ended otherwise, and then there is nothing left to do.
        let _ = if self.whole {
            self.stream.finish()
        } else {
            self.stream.reset(VarInt::from_u32(ABANDONED))
        };
    }
}

/// Closes the connection when the peer's process is gone.
async fn watch(link: Link, probe_interval: Duration) {
    let gone = async {
        // The handshake has just shown that somebody is there.
        tokio::time::sleep(probe_interval).await;
        port_closed(link.quinn.remote_address(), probe_interval).await;
    };
    tokio::select! {
        _ = link.quinn.closed() => {}
        () = gone => link.close(CloseReason::Gone),
    }
}

/// Accepts streams while the queue has room and reads one frame from each.
async fn read_frames(link: Link, options: TransportOptions, queue: mpsc::Sender<Queued>) {
    let budget_units = units(options.queue_bytes).max(1);
    let budget = Arc::new(Semaphore::new(budget_units as usize));
    let mut readers = JoinSet::new();
    loop {
        // Room first: a stream that is not accepted keeps the peer's credit, which is what slows it down.
        let Ok(room) = queue.clone().reserve_owned().await else {
            return;
        };
        let Ok(stream) = link.quinn.accept_uni().await else {
            break;
        };
        let (link, options, budget) = (link.clone(), options.clone(), Arc::clone(&budget));
        readers.spawn(async move {
            match read_frame(stream, &options, budget, budget_units).await {
                Ok(queued) => {
                    room.send(queued);
                }
                Err(ReadFailure::Withdrawn) => tracing::trace!("the peer withdrew a frame"),
                Err(ReadFailure::Bad(error)) => {
                    tracing::warn!(peer = %link.quinn.remote_address(), %error, "bad frame, closing the connection");
                    link.close(CloseReason::BadFrame(error));
                }
            }
        });
        while readers.try_join_next().is_some() {}
    }
    // What had arrived whole before the end is still handed out.
    while readers.join_next().await.is_some() {}
}

enum ReadFailure {
    Bad(FrameError),
    Withdrawn,
}

impl From<FrameError> for ReadFailure {
    fn from(error: FrameError) -> Self {
        Self::Bad(error)
    }
}

async fn read_frame(
    mut stream: RecvStream,
    options: &TransportOptions,
    budget: Arc<Semaphore>,
    budget_units: u32,
) -> Result<Queued, ReadFailure> {
    let mut decoder = FrameDecoder::new(options.frame_limits());
    let payload_bytes = loop {
        // Not a byte more than the prefix, so that the payload waits in QUIC's window and not in our memory.
        match stream.read_chunk(PREFIX_BYTES, true).await {
            Ok(Some(chunk)) => decoder.push(&chunk.bytes)?,
            Ok(None) => {
                return Err(decoder
                    .finish()
                    .err()
                    .unwrap_or(FrameError::Trailing)
                    .into());
            }
            Err(_) => return Err(ReadFailure::Withdrawn),
        }
        if let Some(payload_bytes) = decoder.payload_bytes() {
            break payload_bytes;
        }
    };
    let share = units(payload_bytes).min(budget_units);
    let budget = budget
        .acquire_many_owned(share)
        .await
        .map_err(|_| ReadFailure::Withdrawn)?;
    let mut chunks: [Bytes; CHUNKS] = std::array::from_fn(|_| Bytes::new());
    loop {
        match stream.read_chunks(&mut chunks).await {
            Ok(Some(count)) => {
                for chunk in &mut chunks[..count] {
                    decoder.push(&std::mem::take(chunk))?;
                }
            }
            Ok(None) => {
                return Ok(Queued {
                    frame: decoder.finish()?,
                    _budget: budget,
                });
            }
            Err(_) => return Err(ReadFailure::Withdrawn),
        }
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
