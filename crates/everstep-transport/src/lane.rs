//! Lanes: frames from one process to another on the same machine, through memory that both can reach.
//!
//! ```text
//! sender ── frame bytes ──▶ ring (memfd) ──▶ receiver
//!    ├──── length of the next piece ────▶│   Unix socket, which also carries the ring itself and notices the end of either process
//!    │◀─── length that is free again ────┤
//! ```
//!
//! The bytes are those of [`encode_unsummed`]; what a checksum is for on a network cannot happen to them here, and it would take a third of the
//! time. There is one copy on each side.

mod ring;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use bytes::Bytes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use self::ring::{RING_BYTES, Ring};
use crate::connection::Payload;
use crate::frame::{Frame, FrameDecoder, FrameLimits, HEADER_BYTES_MAX, encode_unsummed};

/// What is told at once: small enough for both sides to work at the same time.
const PIECE_BYTES: usize = 256 << 10;
/// What the receiver gives back at once. Each notice takes room in the socket until the sender needs it: small ones would fill it up.
const GIVEN_BACK_BYTES: usize = RING_BYTES / 4;
/// In a piece's length: the frame ends with it.
const LAST: u32 = 1 << 31;

const MAGIC: [u8; 8] = *b"EVLANE1\0";
const HELLO_BYTES: usize = 8 + 4 + 8;

/// Who opens a lane, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneHello {
    /// The sender's number in the topology.
    pub process: u32,
    /// The receiver's life; another one refuses.
    pub to_incarnation: u64,
}

impl LaneHello {
    fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.process.to_le_bytes());
        bytes[12..].copy_from_slice(&self.to_incarnation.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (process, rest) = rest.split_first_chunk()?;
        let (to_incarnation, _) = rest.split_first_chunk()?;
        (*magic == MAGIC).then_some(Self {
            process: u32::from_le_bytes(*process),
            to_incarnation: u64::from_le_bytes(*to_incarnation),
        })
    }
}

/// The sending end of a lane.
#[derive(Debug)]
pub struct LaneSender {
    ring: Ring,
    /// Bytes put into the ring, and of those the ones that were taken out.
    put: u64,
    taken: u64,
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
}

impl LaneSender {
    /// Opens a lane over a connected socket, and waits until the receiver has taken it.
    ///
    /// # Errors
    /// Also if the receiver is another life than the hello says.
    pub async fn open(socket: StdUnixStream, hello: LaneHello) -> io::Result<Self> {
        let (ring, file) = Ring::create()?;
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let ring_fd = [file.as_fd()];
        // There is room for one.
        let _ = rights.push(SendAncillaryMessage::ScmRights(&ring_fd));
        let hello = hello.to_bytes();
        // The first bytes on a socket fit into its buffer.
        let sent = sendmsg(
            &socket,
            &[IoSlice::new(&hello)],
            &mut rights,
            SendFlags::empty(),
        )?;
        if sent < hello.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        socket.set_nonblocking(true)?;
        let (mut read, write) = UnixStream::from_std(socket)?.into_split();
        if read.read_u8().await? != MAGIC[0] {
            return Err(invalid("not a lane's answer"));
        }
        Ok(Self {
            ring,
            put: 0,
            taken: 0,
            read,
            write,
        })
    }

    /// Sends one frame, after those before it; waits while the ring is full. A call that is dropped half-way leaves a lane of no use.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a header that is too long; otherwise the receiver is gone, or refused a frame.
    pub async fn send(&mut self, header: &[u8], payload: impl Into<Payload>) -> io::Result<()> {
        if header.len() > HEADER_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let Payload(mut pieces) = payload.into();
        pieces.insert(0, encode_unsummed(header, &pieces));
        let mut unsent: usize = pieces.iter().map(Bytes::len).sum();
        // What is in the ring and was not told.
        let mut untold = 0;
        for piece in &pieces {
            let mut rest = &piece[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(PIECE_BYTES - untold));
                self.wait_for_room(now.len() as u64).await?;
                self.ring.write(self.put, now);
                self.put += now.len() as u64;
                (rest, untold, unsent) = (later, untold + now.len(), unsent - now.len());
                if untold == PIECE_BYTES || unsent == 0 {
                    let last = if unsent == 0 { LAST } else { 0 };
                    let told = untold as u32 | last;
                    self.write.write_u32_le(told).await?;
                    untold = 0;
                }
            }
        }
        Ok(())
    }

    async fn wait_for_room(&mut self, bytes: u64) -> io::Result<()> {
        while self.put + bytes - self.taken > RING_BYTES as u64 {
            let free = self.read.read_u32_le().await?;
            self.taken += u64::from(free);
            if self.taken > self.put {
                return Err(invalid("more was taken out than was put in"));
            }
        }
        Ok(())
    }
}

/// The receiving end of a lane.
#[derive(Debug)]
pub struct LaneReceiver {
    from: LaneHello,
    ring: Ring,
    taken: u64,
    /// Of that, what the sender was not told.
    kept: usize,
    limits: FrameLimits,
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
}

impl LaneReceiver {
    /// Takes a lane that was opened to this life.
    ///
    /// # Errors
    /// Whatever comes over `socket` is no lane, or is for another life.
    pub async fn accept(
        socket: UnixStream,
        incarnation: u64,
        limits: FrameLimits,
    ) -> io::Result<Self> {
        let mut bytes = [0; HELLO_BYTES];
        let ring = loop {
            socket.readable().await?;
            match socket.try_io(Interest::READABLE, || receive_hello(&socket, &mut bytes)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => break received?,
            }
        };
        let ring = ring.ok_or_else(|| invalid("no ring came with the hello"))?;
        let from = LaneHello::from_bytes(&bytes).ok_or_else(|| invalid("not a lane"))?;
        if from.to_incarnation != incarnation {
            return Err(invalid("the lane is for another life"));
        }
        let (read, mut write) = socket.into_split();
        write.write_u8(MAGIC[0]).await?;
        Ok(Self {
            from,
            ring: Ring::open(ring)?,
            taken: 0,
            kept: 0,
            limits,
            read,
            write,
        })
    }

    /// Who opened it.
    pub fn from(&self) -> LaneHello {
        self.from
    }

    /// Receives the next frame; `None` when the sender has ended the lane. A call that is dropped half-way leaves a lane of no use.
    ///
    /// # Errors
    /// The sender is gone in the middle of a frame, or what came is no frame.
    pub async fn recv(&mut self) -> io::Result<Option<Frame>> {
        let mut decoder = FrameDecoder::unsummed(self.limits);
        let mut is_first = true;
        loop {
            let told = match self.read.read_u32_le().await {
                // Reset: the sender was told of room that it did not wait for.
                Err(error)
                    if is_first
                        && matches!(
                            error.kind(),
                            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                        ) =>
                {
                    return Ok(None);
                }
                told => told?,
            };
            is_first = false;
            let bytes = (told & !LAST) as usize;
            if bytes > RING_BYTES {
                return Err(invalid("a piece is longer than the ring"));
            }
            self.take(bytes, &mut decoder)?;
            self.kept += bytes;
            if self.kept >= GIVEN_BACK_BYTES {
                // A sender that has ended needs no room; what it told is still here.
                let _ = self.write.write_u32_le(self.kept as u32).await;
                self.kept = 0;
            }
            if told & LAST != 0 {
                return decoder.finish().map(Some).map_err(invalid);
            }
        }
    }

    /// Moves the next bytes of the ring into the frame.
    fn take(&mut self, bytes: usize, decoder: &mut FrameDecoder) -> io::Result<()> {
        let end = self.taken + bytes as u64;
        while self.taken < end {
            let piece = self.ring.read(self.taken, (end - self.taken) as usize);
            decoder.push(piece).map_err(invalid)?;
            self.taken += piece.len() as u64;
        }
        Ok(())
    }
}

/// The bytes that a lane begins with, and the ring that came with them.
fn receive_hello(
    socket: &UnixStream,
    bytes: &mut [u8; HELLO_BYTES],
) -> io::Result<Option<OwnedFd>> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(bytes)],
        &mut rights,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes < HELLO_BYTES {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let ring = rights.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(ring)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests;
