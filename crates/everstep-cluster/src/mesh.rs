//! The transport actor: one QUIC endpoint, one connection per peer process, redialled for as long as the process lives.
//!
//! Of each pair, the process with the higher number dials. A connection carries a control session (`session`) and tensor frames; between processes
//! of one node, frames go through lanes of shared memory (`lanes`) for as long as the connection lives.

use std::sync::Arc;
use std::time::Duration;

use everstep_transport::{Connection, Endpoint};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::task::JoinSet;

use crate::lanes;
use crate::process::ProcessContext;
use crate::session::Sessions;

const REDIAL_FIRST: Duration = Duration::from_millis(20);
const REDIAL_MAX: Duration = Duration::from_millis(200);

/// Owns the endpoint's tasks; a task that ends by panic takes the actor with it, and the supervisor starts it again.
pub(crate) struct Mesh;

/// What the mesh needs.
#[derive(Clone, Debug)]
pub(crate) struct MeshArguments {
    /// The process it belongs to.
    pub(crate) context: Arc<ProcessContext>,
    /// The bound endpoint.
    pub(crate) endpoint: Endpoint,
    /// Control sessions.
    pub(crate) sessions: Sessions,
}

/// The mesh takes no messages but the notice that one of its tasks ended.
#[derive(Debug)]
pub(crate) enum MeshMessage {
    /// Looks whether a task died.
    Check,
}

impl Actor for Mesh {
    type Msg = MeshMessage;
    type State = JoinSet<()>;
    type Arguments = MeshArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<MeshMessage>,
        arguments: MeshArguments,
    ) -> Result<JoinSet<()>, ActorProcessingErr> {
        let mut tasks = JoinSet::new();
        let me = arguments.context.process;
        tasks.spawn(accept(arguments.clone()));
        tasks.spawn(lanes::accept(arguments.context.clone()));
        for peer in 0..me {
            tasks.spawn(dial(arguments.clone(), peer));
        }
        myself.send_interval(Duration::from_millis(500), || MeshMessage::Check);
        Ok(tasks)
    }

    async fn handle(
        &self,
        _myself: ActorRef<MeshMessage>,
        _message: MeshMessage,
        tasks: &mut JoinSet<()>,
    ) -> Result<(), ActorProcessingErr> {
        match tasks.try_join_next() {
            Some(Err(error)) => Err(format!("a transport task died: {error}").into()),
            Some(Ok(())) => Err("the QUIC endpoint is closed".into()),
            None => Ok(()),
        }
    }
}

async fn accept(arguments: MeshArguments) {
    // Connections are served beside each other; they end with this set when the actor stops.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = arguments.endpoint.accept() => match accepted {
                Some(connection) => {
                    connections.spawn(serve(arguments.clone(), connection, true));
                }
                None => return,
            },
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a connection's task died");
                }
            }
        }
    }
}

async fn dial(arguments: MeshArguments, peer: u32) {
    let name = arguments.context.run.topology.processes[peer as usize]
        .name
        .clone();
    let mut wait = REDIAL_FIRST;
    loop {
        let Some(address) = arguments
            .context
            .run
            .topology
            .dial_address(arguments.context.process, peer)
        else {
            tracing::warn!(peer = name, "the peer's host has no address now");
            tokio::time::sleep(REDIAL_MAX).await;
            continue;
        };
        match arguments.endpoint.connect(address, &name).await {
            Ok(connection) => {
                wait = REDIAL_FIRST;
                serve(arguments.clone(), connection, false).await;
            }
            Err(error) => {
                tracing::debug!(%error, peer = name, "dialling failed");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(REDIAL_MAX);
            }
        }
    }
}

/// Serves a connection until it ends.
async fn serve(arguments: MeshArguments, connection: Connection, is_server: bool) {
    let context = &arguments.context;
    let peer = connection.peer().clone();
    let known = context.run.topology.processes.get(peer.process as usize);
    if known.is_none_or(|process| process.name != peer.name) {
        tracing::warn!(
            peer = peer.name,
            number = peer.process,
            "a peer that the topology does not know was refused"
        );
        connection.close();
        return;
    }
    if let Some(halves) = connection.control() {
        arguments.sessions.open(
            format!("{}#{}", peer.name, peer.incarnation),
            halves,
            is_server,
        );
    }
    let (link, mut queue) = context.router.peer_up(peer.process, peer.incarnation);
    tracing::info!(
        peer = peer.name,
        incarnation = peer.incarnation,
        "connected"
    );
    let sending = async {
        let mut lane = lanes::open(context, &peer).await;
        while let Some(frame) = queue.recv().await {
            let sent = match &mut lane {
                Some(lane) => {
                    let sent = lane.send(&frame.header, frame.payload).await;
                    sent.map_err(|error| format!("the lane ended: {error}"))
                }
                None => {
                    let sent = connection.send(&frame.header, frame.payload).await;
                    sent.map_err(|error| error.to_string())
                }
            };
            if let Err(reason) = sent {
                return reason;
            }
        }
        "replaced by a newer connection".to_owned()
    };
    let receiving = async {
        loop {
            match connection.recv().await {
                Ok(frame) => context.router.receive_frame(&peer.name, frame),
                Err(error) => return error.to_string(),
            }
        }
    };
    let reason = tokio::select! {
        reason = sending => reason,
        reason = receiving => reason,
        reason = connection.closed() => reason.to_string(),
    };
    connection.close();
    tracing::info!(
        peer = peer.name,
        incarnation = peer.incarnation,
        reason,
        "disconnected"
    );
    context.router.link_down(peer.process, link);
}
