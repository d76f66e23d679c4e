//! The source's connections to the destination: the first, and the one that tells it that the VM runs on here.

use std::sync::Arc;

use migration_proto::MigrationId;
use migration_proto::wire::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::channel::{self, SourceChannels};
use super::identity::{HostIdentity, HostKey};
use super::source::Command;
use super::ticket::Ticket;
use super::transport::{Close, Endpoint, Link};
use super::{MigrateError, limits};

/// The first connection, unless the operator changes their mind.
pub(super) async fn open(
    ticket: &Ticket,
    host: &Arc<HostIdentity>,
    commands: &mut mpsc::Receiver<Command>,
) -> Result<(Endpoint, Link, SourceChannels), MigrateError> {
    let connecting = async {
        let (endpoint, link) = Endpoint::open(ticket, host).await?;
        let channels = channel::open_source(&link).await?;
        Ok((endpoint, link, channels))
    };
    tokio::select! {
        connected = connecting => connected,
        Some(Command::Cancel) = commands.recv() => Err(MigrateError::Cancelled),
    }
}

/// Tells a destination that may be holding the VM that it is not to run it. Tries for [`limits::NOTIFY_TIMEOUT`]; a
/// destination that does not hear it goes on holding, and its operator is told so there.
pub(super) async fn tell_abort(
    endpoint: Endpoint,
    address: std::net::SocketAddr,
    key: Option<HostKey>,
    migration: MigrationId,
) {
    let message = Message::Abort { migration, reason: "the VM runs on at the source".to_owned() };
    let once = async || {
        let link = endpoint.connect(address, key).await?;
        let mut channels = channel::open_source(&link).await?;
        channels.control.send(migration_proto::wire::encode(&message).into()).await?;
        channels.control.flush().await?;
        link.close(Close::Done, "said");
        Ok::<(), MigrateError>(())
    };
    let trying = async {
        while let Err(error) = once().await {
            tracing::warn!(%error, "the destination cannot be told that the VM runs on here; trying again");
            tokio::time::sleep(limits::NOTIFY_PAUSE).await;
        }
    };
    if timeout(limits::NOTIFY_TIMEOUT, trying).await.is_err() {
        tracing::warn!(%address, "the destination was not told that the VM runs on here: if it holds the VM, `vmm resolve --let-go` there");
    }
    endpoint.settle().await;
}
