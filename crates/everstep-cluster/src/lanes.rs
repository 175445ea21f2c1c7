//! Lanes between the processes of a node: who opens one, and who takes it. Without one, frames go over QUIC, as between nodes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use everstep_transport::{FrameLimits, Hello, LaneHello, LaneReceiver, LaneSender};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::control::socket;
use crate::process::ProcessContext;

/// After a lane could not be taken.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Opens a lane to a peer that has just connected, if it is on this node.
pub(crate) async fn open(context: &ProcessContext, peer: &Hello) -> Option<LaneSender> {
    let processes = &context.run.topology.processes;
    if !context.run.config.cluster.shared_memory
        || processes[peer.process as usize].node != processes[context.process as usize].node
    {
        return None;
    }
    let hello = LaneHello {
        process: context.process,
        to_incarnation: peer.incarnation,
    };
    let opened = async {
        let socket = socket::connect(&context.run_dir.lane(&peer.name))?;
        LaneSender::open(socket, hello).await
    };
    match opened.await {
        Ok(lane) => {
            tracing::info!(peer = peer.name, "frames go through shared memory");
            Some(lane)
        }
        Err(error) => {
            tracing::warn!(%error, peer = peer.name, "no shared memory with this process: its frames go over QUIC");
            None
        }
    }
}

/// Takes lanes from the processes of this node.
pub(crate) async fn accept(context: Arc<ProcessContext>) {
    if !context.run.config.cluster.shared_memory {
        return std::future::pending().await;
    }
    let listener = match listen(&context) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "no lanes can be taken: frames from this node's processes come over QUIC");
            return std::future::pending().await;
        }
    };
    let mut lanes = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    lanes.spawn(serve(context.clone(), socket));
                }
                Err(error) => {
                    // Too many open files: waiting is better than spinning.
                    tracing::warn!(%error, "a lane could not be taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = lanes.join_next(), if !lanes.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a lane's task died");
                }
            }
        }
    }
}

fn listen(context: &ProcessContext) -> io::Result<UnixListener> {
    let name = &context.run.topology.processes[context.process as usize].name;
    let listener = socket::bind(&context.run_dir.lane(name))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Hands on what comes over a lane until it ends.
async fn serve(context: Arc<ProcessContext>, socket: UnixStream) {
    let received = async {
        let mut lane =
            LaneReceiver::accept(socket, context.incarnation, FrameLimits::default()).await?;
        let peer = context
            .run
            .topology
            .processes
            .get(lane.from().process as usize);
        let peer = peer.map_or("?", |peer| &peer.name);
        while let Some(frame) = lane.recv().await? {
            context.router.receive_frame(peer, frame);
        }
        io::Result::Ok(())
    };
    if let Err(error) = received.await {
        tracing::info!(%error, "a lane ended");
    }
}
