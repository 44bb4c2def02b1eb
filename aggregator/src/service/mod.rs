//! The gRPC services: translate, authorise, call the driver. No decisions are made here.

mod broadcast;
mod download;
mod federation;
mod operator;
mod places;
mod received;
mod start;
mod upload;

use std::time::Duration;

use consort_common::{
    identity::{Identity, Role},
    ids::{Digest, RunName, SiteName},
    tls::{PeerInfo, peer_identity},
};
use tokio::{task::spawn_blocking, time::timeout};
use tonic::{Request, Status, Streaming};

pub use self::{federation::FederationService, operator::OperatorService};
use crate::driver::DriverError;

/// Who is calling, from the certificate of the connection and from nothing else.
///
/// # Errors
/// PERMISSION_DENIED if the certificate's role or federation is not the one that this service is for.
fn caller<T>(request: &Request<T>, federation: &str, role: Role) -> Result<SiteName, Status> {
    let peer = request.extensions().get::<PeerInfo>();
    let peer = peer.ok_or_else(|| Status::unauthenticated("the connection has no client certificate"))?;
    let identity = peer_identity(peer).map_err(|error| Status::unauthenticated(error.to_string()))?;
    authorise(identity, federation, role)
}

fn authorise(identity: Identity, federation: &str, role: Role) -> Result<SiteName, Status> {
    if identity.federation.as_str() != federation {
        return Err(Status::permission_denied(format!(
            "{identity} belongs to another federation; this aggregator serves {federation}"
        )));
    }
    if identity.role != role {
        return Err(Status::permission_denied(format!(
            "{identity} may not call this service: it is for the role {role}; use a certificate issued with `consort pki issue {role} NAME`"
        )));
    }
    Ok(identity.name)
}

fn run_name(text: &str) -> Result<RunName, Status> {
    text.parse().map_err(|error| Status::invalid_argument(format!("run: {error}")))
}

fn digest(what: &str, bytes: &[u8]) -> Result<Digest, Status> {
    Digest::try_from(bytes).map_err(|error| Status::invalid_argument(format!("{what}: {error}")))
}

/// The next message of an inbound stream, or CANCELLED once the sender has been silent for `stall`: only
/// silence is cut, never slowness.
async fn next_message<T>(stream: &mut Streaming<T>, stall: Duration) -> Result<Option<T>, Status> {
    timeout(stall, stream.message()).await.map_err(|_| {
        Status::cancelled(format!("nothing was received for {} s; reconnect and resume", stall.as_secs()))
    })?
}

/// Work of an upload that waits for the disk.
async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<DriverError> + Send + 'static,
{
    let result = spawn_blocking(work).await;
    let result = result
        .map_err(|_| Status::internal("the aggregator failed while it stored the chunk; see its log"))?;
    result.map_err(|error| Status::from(error.into()))
}
