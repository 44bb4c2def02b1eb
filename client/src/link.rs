//! The session as the rest of the daemon sees it: there is one, or there will be one again.
//!
//! The session loop opens sessions and publishes them here; everybody else makes calls through
//! [`Link::call`], which waits for a session and repeats what failed for a passing reason. A lost
//! connection thus delays work and never ends it.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use consort_proto::v1::federation_client::FederationClient;
use tokio::sync::watch;
use tonic::{Code, Request, Status, transport::Channel};
use tracing::{debug, warn};

use crate::backoff::{Backoff, NETWORK};

/// How long one call without a stream may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// An open session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Names the session in calls.
    pub id: Vec<u8>,
    /// Calls; cheap to clone.
    pub client: FederationClient<Channel>,
    /// Counts the sessions of this process.
    pub generation: u64,
    /// How far away the aggregator is.
    pub round_trip: RoundTrip,
}

/// The least time that a small call took: a little more than the connection's round trip.
#[derive(Debug, Clone, Default)]
pub struct RoundTrip {
    /// Microseconds, rounded up; 0: not known yet.
    least: Arc<AtomicU64>,
}

impl RoundTrip {
    /// A small call, to which the aggregator has nothing to look up, took so long.
    pub fn took(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).saturating_add(1);
        let shorter = |least: u64| (least == 0 || micros < least).then_some(micros);
        // Refused when it is not shorter.
        let _ = self.least.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shorter);
    }

    /// None until a call was answered.
    pub fn least(&self) -> Option<Duration> {
        Some(self.least.load(Ordering::Relaxed)).filter(|least| *least > 0).map(Duration::from_micros)
    }
}

/// Hands out the current session.
#[derive(Debug, Clone)]
pub struct Link {
    sessions: watch::Receiver<Option<Session>>,
    stale: watch::Sender<u64>,
}

/// The session loop's end of a [`Link`].
#[derive(Debug)]
pub struct LinkKeeper {
    sessions: watch::Sender<Option<Session>>,
    stale: watch::Receiver<u64>,
}

/// What a failed call means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Passing: the same call can succeed later.
    Repeat,
    /// The aggregator does not know the session (any more): join, then repeat.
    Rejoin,
    /// The same call fails again.
    Final,
}

fn verdict(code: Code) -> Verdict {
    match code {
        Code::Aborted => Verdict::Rejoin,
        // Unknown and Internal are also what a connection that broke in the middle of a call looks like.
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Cancelled
        | Code::Unknown
        | Code::Internal
        | Code::DataLoss => Verdict::Repeat,
        _ => Verdict::Final,
    }
}

/// A link without a session, and the end that provides them.
pub fn link() -> (Link, LinkKeeper) {
    let (sessions_sender, sessions) = watch::channel(None);
    let (stale, stale_receiver) = watch::channel(0);
    (Link { sessions, stale }, LinkKeeper { sessions: sessions_sender, stale: stale_receiver })
}

impl LinkKeeper {
    /// From now on calls use this session; with none they wait.
    pub fn publish(&self, session: Option<Session>) {
        self.sessions.send_replace(session);
    }

    /// Returns when a call was told that the session of this generation is unknown.
    pub async fn refused(&mut self, generation: u64) {
        // Without any link left there is nobody who could be refused.
        if self.stale.wait_for(|stale| *stale >= generation).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Link {
    /// The session, once there is one.
    async fn session(&self) -> Session {
        let mut sessions = self.sessions.clone();
        loop {
            if let Ok(session) = sessions.wait_for(Option::is_some).await
                && let Some(session) = session.clone()
            {
                return session;
            }
            // The session loop has ended: the daemon is shutting down and will drop this call.
            std::future::pending::<()>().await;
        }
    }

    /// The session, if there is one now.
    pub fn current(&self) -> Option<Session> {
        self.sessions.borrow().clone()
    }

    /// Calls until it succeeds or fails for good; `what` names the call in the log. Dropping the future
    /// gives up. The waits between tries grow only while they fail over one session: a connection that broke
    /// and came back says nothing about the next try, and a long transfer may lose several.
    ///
    /// # Errors
    /// The status of a call whose repetition would fail as well.
    pub async fn call<T, F, Answer>(&self, what: &str, mut call: F) -> Result<T, Status>
    where
        F: FnMut(Session) -> Answer,
        Answer: Future<Output = Result<T, Status>>,
    {
        let mut backoff = Backoff::new(NETWORK);
        let mut last_failed = None;
        loop {
            let session = self.session().await;
            let generation = session.generation;
            let status = match call(session).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            match verdict(status.code()) {
                Verdict::Final => return Err(status),
                Verdict::Rejoin => {
                    debug!("{what}: the session is unknown to the aggregator");
                    self.stale.send_if_modified(|stale| {
                        let newer = *stale < generation;
                        *stale = generation.max(*stale);
                        newer
                    });
                    self.successor(generation).await;
                }
                Verdict::Repeat => {
                    if last_failed.replace(generation) != Some(generation) {
                        backoff.reset();
                    }
                    let wait = backoff.next(&mut rand::rng());
                    warn!("{what} failed ({}); next try in {:.1} s", describe(&status), wait.as_secs_f64());
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// Waits until the session is another one.
    async fn successor(&self, generation: u64) {
        let newer = |session: &Option<Session>| session.as_ref().is_some_and(|s| s.generation > generation);
        if self.sessions.clone().wait_for(newer).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A request that must be answered within a minute.
pub fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// A status in words: the connection's own reason where there is one, else the aggregator's sentence.
pub fn describe(status: &Status) -> String {
    if let Some(reason) = consort_common::tls::explain(status) {
        return reason.to_string();
    }
    // A status that was made of a broken connection says why only in its innermost cause.
    let mut cause = std::error::Error::source(status);
    while let Some(inner) = cause.and_then(std::error::Error::source) {
        cause = Some(inner);
    }
    // h2 keeps no typed cause. rustls's words for this one are a page of advice to authors of servers.
    let broken = |cause: &(dyn std::error::Error + 'static)| cause.to_string().contains("close_notify");
    match (status.message(), cause) {
        (_, Some(cause)) if broken(cause) => "the connection broke off".to_owned(),
        ("", None) => status.code().to_string(),
        (message, Some(cause)) if !message.contains(&cause.to_string()) => format!("{message}: {cause}"),
        (message, _) => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn session(generation: u64) -> Session {
        let channel = Channel::from_static("http://localhost:1").connect_lazy();
        Session {
            id: vec![1],
            client: FederationClient::new(channel),
            generation,
            round_trip: RoundTrip::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_for_a_session_and_is_repeated_until_it_succeeds() {
        let (link, keeper) = link();
        let calls = AtomicU32::new(0);
        let call = link.call("test", |_| async {
            match calls.fetch_add(1, Ordering::Relaxed) {
                0..5 => Err(Status::unavailable("not yet")),
                _ => Ok(7),
            }
        });
        let (answer, ()) = tokio::join!(call, async { keeper.publish(Some(session(1))) });
        assert_eq!(answer.unwrap(), 7);
        assert_eq!(calls.load(Ordering::Relaxed), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_session_is_reported_once_and_the_call_goes_on_with_the_next() {
        let (link, mut keeper) = link();
        keeper.publish(Some(session(3)));
        let call = link.call("test", |session| async move {
            if session.generation == 3 { Err(Status::aborted("join again")) } else { Ok(session.generation) }
        });
        let renew = async {
            keeper.refused(3).await;
            keeper.publish(Some(session(4)));
        };
        let (answer, ()) = tokio::join!(call, renew);
        assert_eq!(answer.unwrap(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_do_not_grow_from_one_lost_session_to_the_next() {
        let (link, keeper) = link();
        keeper.publish(Some(session(1)));
        let begin = tokio::time::Instant::now();
        let call = link.call("test", |session: Session| {
            keeper.publish(Some(self::session(session.generation + 1)));
            std::future::ready(match session.generation {
                0..=20 => Err(Status::unavailable("the connection broke off")),
                _ => Ok(()),
            })
        });
        call.await.unwrap();
        // Of the paused clock: twenty first waits.
        assert!(begin.elapsed() <= 20 * NETWORK.first + Duration::from_millis(100), "{:?}", begin.elapsed());
    }

    #[test]
    fn a_connection_that_breaks_off_is_said_in_few_words() {
        let eof =
            std::io::Error::other("peer closed connection without sending TLS close_notify: see this page");
        assert_eq!(describe(&Status::from_error(Box::new(eof))), "the connection broke off");
        assert_eq!(describe(&Status::unavailable("shutting down")), "shutting down");
    }

    #[test]
    fn a_round_trip_is_the_least_that_was_seen() {
        let round_trip = RoundTrip::default();
        assert_eq!(round_trip.least(), None);
        for (took, least) in [(9, 9), (12, 9), (5, 5), (6, 5)] {
            round_trip.clone().took(Duration::from_millis(took));
            assert_eq!(round_trip.least(), Some(Duration::from_millis(least) + Duration::from_micros(1)));
        }
        round_trip.took(Duration::ZERO);
        assert_eq!(round_trip.least(), Some(Duration::from_micros(1)));
    }

    #[tokio::test]
    async fn what_would_fail_again_is_returned_at_once() {
        let (link, keeper) = link();
        keeper.publish(Some(session(1)));
        for code in [Code::FailedPrecondition, Code::InvalidArgument, Code::PermissionDenied, Code::NotFound]
        {
            let answer: Result<(), Status> =
                link.call("test", |_| async { Err(Status::new(code, "no")) }).await;
            assert_eq!(answer.unwrap_err().code(), code);
        }
    }
}
