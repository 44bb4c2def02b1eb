//! Start, serve, stop: the listener, the services, the signals.

use std::time::Duration;

use anyhow::Context;
use consort_common::{
    atomic_file::write_atomically,
    identity::Role,
    tls::{self, Credentials, IncomingLimits},
};
use consort_proto::{MESSAGE_BYTES_MAX, v1};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    config::Config,
    driver::Driver,
    service::{FederationService, OperatorService},
};

/// How long open calls may take to end once the aggregator was told to stop.
const GRACE: Duration = Duration::from_secs(10);
/// Concurrent calls on one connection.
const STREAMS_MAX: u32 = 256;

/// Serves until SIGTERM or SIGINT, then ends the open streams and returns once all durable work is done.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let credentials = Credentials::load(&config.tls)?.require_role(Role::Aggregator)?;
    for warning in credentials.warnings() {
        tracing::warn!("{warning}");
    }
    std::fs::create_dir_all(&config.state_directory)
        .with_context(|| format!("cannot create the state directory {}", config.state_directory.display()))?;
    let stopping = CancellationToken::new();
    let driver = Driver::open(&config, credentials.federation().as_str(), stopping.clone()).await?;

    let listener = TcpListener::bind(&config.listen)
        .await
        .with_context(|| format!("cannot listen on {}; is another aggregator running?", config.listen))?;
    let address = listener.local_addr()?;
    write_atomically(&config.state_directory.join("listening"), address.to_string().as_bytes())?;
    let incoming = tls::incoming(listener, tls::server_config(&credentials), IncomingLimits::default());
    tracing::info!(%address, identity = %credentials.identity(), version = env!("CARGO_PKG_VERSION"), "listening");

    let (health_reporter, health) = tonic_health::server::health_reporter();
    let federation = v1::federation_server::FederationServer::new(FederationService::new(driver.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let operator = v1::operator_server::OperatorServer::new(OperatorService::new(driver.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    health_reporter.set_serving::<v1::federation_server::FederationServer<FederationService>>().await;
    health_reporter.set_serving::<v1::operator_server::OperatorServer<OperatorService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .build_v1()?;

    let server = Server::builder()
        .http2_keepalive_interval(Some(tls::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(tls::KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(tls::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(tls::CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(health)
        .add_service(reflection)
        .add_service(federation)
        .add_service(operator)
        .serve_with_incoming_shutdown(incoming, stopping.clone().cancelled_owned());
    tokio::spawn(stop_on_signal(stopping.clone()));

    let mut server = std::pin::pin!(server);
    tokio::select! {
        result = &mut server => result?,
        () = grace_after(&stopping) => tracing::warn!("open calls did not end within {} s; closing", GRACE.as_secs()),
    }
    driver.close().await;
    tracing::info!("stopped");
    Ok(())
}

async fn grace_after(stopping: &CancellationToken) {
    stopping.cancelled().await;
    tokio::time::sleep(GRACE).await;
}

/// The first signal stops gracefully, the second at once. Nothing is lost either way.
async fn stop_on_signal(stopping: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot listen for signals; stop the aggregator with SIGKILL (nothing is lost)");
        return;
    };
    let mut wait = async || tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () };
    wait().await;
    tracing::info!("stopping: no new calls; open ones are ended");
    stopping.cancel();
    wait().await;
    std::process::exit(130);
}
