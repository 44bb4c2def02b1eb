//! The session with the aggregator, for ever: connect, join, listen to instructions; and again.
//!
//! A failure here never ends the daemon and never stops work: it is said, and tried again.

use std::{future::Future, time::Duration};

use consort_common::codec::Encoding;
use consort_common::{
    tls::ConnectError,
    units::{UnixMs, duration_ms, unix_ms_now},
};
use consort_proto::{
    MESSAGE_BYTES_MAX, PROTOCOL_VERSION,
    v1::{
        Instruction, JoinRequest, JoinResponse, LeaveRequest, WaitForAssignmentRequest,
        federation_client::FederationClient,
    },
};
use tokio::sync::watch;
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use tracing::{debug, error, info, warn};

use crate::{
    backoff::{Backoff, NETWORK, REFUSED},
    link::{LinkKeeper, RoundTrip, Session, describe, request},
    supervisor::Standing,
    work::Work,
};

/// A difference between the clocks that is worth a warning, in milliseconds.
const CLOCK_SKEW_MS: u64 = 60_000;
/// How long leaving may take before the daemon ends without it.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Who joins.
#[derive(Debug, Clone)]
pub struct Member {
    /// Tells a restarted daemon from a second one.
    pub instance_id: [u8; 16],
    /// The compute device, for people.
    pub device: String,
}

/// Why there is no session, or no longer.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{}: {}", if is_refusal(.0) { "the aggregator refuses this site" } else { "cannot join" }, describe(.0))]
    Join(Status),
    #[error("lost the session: {}", describe(.0))]
    Lost(Status),
    #[error("the aggregator closed the session")]
    Closed,
    #[error("the aggregator does not know the session any more")]
    Unknown,
}

impl SessionError {
    /// Whether only a person can help, so that trying every few seconds helps nobody.
    fn needs_a_person(&self) -> bool {
        match self {
            Self::Connect(error) => matches!(
                error,
                ConnectError::NotTls { .. }
                    | ConnectError::TlsVersion { .. }
                    | ConnectError::WrongCa { .. }
                    | ConnectError::WrongName { .. }
                    | ConnectError::ServerCertificateExpired { .. }
                    | ConnectError::ServerCertificateNotYetValid { .. }
                    | ConnectError::ServerCertificate { .. }
                    | ConnectError::NotAnAggregator { .. }
                    | ConnectError::OtherFederation { .. }
                    | ConnectError::ClientCertificateRefused(_)
            ),
            Self::Join(status) | Self::Lost(status) => is_refusal(status),
            Self::Closed | Self::Unknown => false,
        }
    }
}

/// Whether the aggregator means this site, its certificate or its version.
fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::PermissionDenied
            | Code::Unauthenticated
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::Unimplemented
    )
}

/// Keeps a session open for as long as it is polled: `connect` opens connections, sessions go to `keeper`,
/// instructions to `standings`.
pub async fn keep<C, Connected>(
    connect: C,
    member: Member,
    mut keeper: LinkKeeper,
    standings: watch::Sender<Option<Standing>>,
) -> std::convert::Infallible
where
    C: Fn() -> Connected,
    Connected: Future<Output = Result<Channel, ConnectError>>,
{
    let mut backoff = Backoff::new(NETWORK);
    let mut generation = 0;
    // A new connection goes the same way as the one before.
    let round_trip = RoundTrip::default();
    loop {
        generation += 1;
        let error = match open(&connect, &member, generation, round_trip.clone()).await {
            Ok((session, instructions)) => {
                keeper.publish(Some(session));
                let error = listen(instructions, generation, &mut keeper, &standings, &mut backoff).await;
                keeper.publish(None);
                error
            }
            Err(error) => error,
        };
        let wait = if error.needs_a_person() { REFUSED } else { backoff.next(&mut rand::rng()) };
        let wait_seconds = wait.as_secs_f64();
        if error.needs_a_person() {
            error!("{error}; next try in {wait_seconds:.0} s");
        } else {
            warn!("{error}; next try in {wait_seconds:.1} s");
        }
        tokio::time::sleep(wait).await;
    }
}

async fn open<C, Connected>(
    connect: &C,
    member: &Member,
    generation: u64,
    round_trip: RoundTrip,
) -> Result<(Session, Streaming<Instruction>), SessionError>
where
    C: Fn() -> Connected,
    Connected: Future<Output = Result<Channel, ConnectError>>,
{
    let mut client = federation_client(connect().await?);
    let join = JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        software_version: env!("CARGO_PKG_VERSION").to_owned(),
        instance_id: member.instance_id.to_vec(),
        device: member.device.clone(),
        encodings: Encoding::ALL.map(|encoding| encoding.name().to_owned()).to_vec(),
    };
    let joined = client.join(request(join)).await.map_err(SessionError::Join)?.into_inner();
    greet(&joined);
    let wait = WaitForAssignmentRequest { session_id: joined.session_id.clone() };
    let instructions = client.wait_for_assignment(wait).await.map_err(SessionError::Lost)?.into_inner();
    let session = Session { id: joined.session_id, client, generation, round_trip };
    Ok((session, instructions))
}

/// A client with the protocol's message size.
pub fn federation_client(channel: Channel) -> FederationClient<Channel> {
    FederationClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

fn greet(joined: &JoinResponse) {
    info!(
        "joined federation {} as site {} (aggregator {})",
        joined.federation, joined.site, joined.software_version
    );
    let skew_ms = clock_skew_ms(unix_ms_now(), joined.server_time_unix_ms);
    if skew_ms > CLOCK_SKEW_MS {
        warn!(
            "this machine's clock and the aggregator's differ by {}: certificates fail when clocks are wrong; \
             check that both keep time by NTP",
            duration_ms(skew_ms)
        );
    }
}

/// Difference between two clocks, whichever is ahead.
pub fn clock_skew_ms(ours: UnixMs, theirs: UnixMs) -> u64 {
    ours.abs_diff(theirs)
}

/// Passes instructions on until the session ends.
async fn listen(
    mut instructions: Streaming<Instruction>,
    generation: u64,
    keeper: &mut LinkKeeper,
    standings: &watch::Sender<Option<Standing>>,
    backoff: &mut Backoff,
) -> SessionError {
    loop {
        let instruction = tokio::select! {
            instruction = instructions.message() => instruction,
            () = keeper.refused(generation) => return SessionError::Unknown,
        };
        match instruction {
            Ok(Some(instruction)) => {
                backoff.reset();
                follow(instruction, generation, standings);
            }
            Ok(None) => return SessionError::Closed,
            Err(status) if status.code() == Code::Aborted => return SessionError::Unknown,
            Err(status) => return SessionError::Lost(status),
        }
    }
}

fn follow(instruction: Instruction, generation: u64, standings: &watch::Sender<Option<Standing>>) {
    let work = match Work::parse(instruction) {
        Ok(Ok(work)) => {
            debug!("instructed: {work}");
            Some(work)
        }
        Ok(Err(reason)) => {
            info!("nothing to do: {reason}");
            None
        }
        Err(error) => {
            error!("{error}");
            None
        }
    };
    standings.send_replace(Some(Standing { generation, work }));
}

/// Tells the aggregator that this site goes; best effort.
pub async fn leave(mut session: Session, reason: &str) {
    let mut leave = Request::new(LeaveRequest { session_id: session.id, reason: reason.to_owned() });
    leave.set_timeout(LEAVE_TIMEOUT);
    if let Err(status) = session.client.leave(leave).await {
        debug!("could not say goodbye: {}", describe(&status));
    }
}

#[cfg(test)]
mod tests {
    use consort_proto::v1::{Idle, instruction::Task};

    use super::*;
    use crate::{
        fake::{Fake, State},
        link::link,
    };

    fn member() -> Member {
        Member { instance_id: [7; 16], device: "cpu".to_owned() }
    }

    fn idle() -> Instruction {
        Instruction { task: Some(Task::Idle(Idle { reason: "nothing".to_owned() })) }
    }

    /// Keeps a session with `fake` until instructions of `sessions` sessions have come.
    async fn until_sessions(fake: &Fake, sessions: u64) {
        let channel = fake.serve();
        let (_link, keeper) = link();
        let (standings, mut heard) = watch::channel(None);
        let connect = || std::future::ready(Ok(channel.clone()));
        let wanted = heard.wait_for(|standing: &Option<Standing>| {
            standing.as_ref().is_some_and(|standing| standing.generation >= sessions)
        });
        tokio::select! {
            never = keep(connect, member(), keeper, standings) => match never {},
            heard = async { wanted.await.map(drop) } => heard.unwrap(),
        }
    }

    #[tokio::test]
    async fn a_session_that_breaks_is_opened_again() {
        let fake = Fake::new(State { instruction: Some(idle()), ..State::default() });
        let ender = fake.clone();
        // Every session but the last is closed as soon as it is open.
        let closing = tokio::spawn(async move {
            loop {
                ender.state().sessions.clear();
                tokio::task::yield_now().await;
            }
        });
        until_sessions(&fake, 3).await;
        closing.abort();
        assert!(fake.state().joins >= 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_site_asks_again_once_a_minute_and_joins_when_it_may() {
        let refusals = [Status::permission_denied("not a site"), Status::already_exists("two of one name")];
        let fake =
            Fake::new(State { instruction: Some(idle()), refusals: refusals.into(), ..State::default() });
        let began = tokio::time::Instant::now();
        until_sessions(&fake, 3).await;
        assert_eq!(fake.state().joins, 3);
        assert!(began.elapsed() >= 2 * REFUSED, "{:?}", began.elapsed());
    }

    #[test]
    fn what_only_a_person_can_mend_is_told_from_what_passes() {
        for (error, expected) in [
            (SessionError::Join(Status::unavailable("")), false),
            (SessionError::Join(Status::already_exists("")), true),
            (SessionError::Lost(Status::unknown("broken pipe")), false),
            (SessionError::Connect(ConnectError::WrongCa { address: String::new() }), true),
            (SessionError::Connect(ConnectError::Silent { address: String::new() }), false),
            (SessionError::Closed, false),
        ] {
            assert_eq!(error.needs_a_person(), expected, "{error}");
        }
    }

    #[test]
    fn clocks_differ_either_way() {
        assert_eq!([clock_skew_ms(5, 9), clock_skew_ms(9, 5)], [4, 4]);
    }
}
