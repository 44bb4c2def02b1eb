//! The sites that are connected now: one session each, in memory only.
//!
//! Nothing here is durable and nothing here decides about rounds. After a restart of the aggregator the
//! sites find their session unknown and join again.

use std::collections::BTreeMap;

use consort_common::{
    codec::Encoding,
    ids::{RunName, SiteName},
    units::UnixMs,
};
use consort_proto::v1;
use tokio::sync::watch;

/// A session that joined this recently holds its place though its instruction stream is not open yet.
const JOIN_GRACE_MS: u64 = 15_000;

/// Names a session; known to its client only.
pub type SessionId = [u8; 16];

/// Why a session could not be opened or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Another daemon of the same site is connected.
    #[error(
        "another daemon is connected as site {site} ({device}); stop it, or issue this one a certificate with a name of its own"
    )]
    Taken {
        /// The site.
        site: SiteName,
        /// What the other one runs on.
        device: String,
    },
    /// The session is not, or no longer, this site's.
    #[error("this session of site {0} is unknown (the aggregator restarted, or the site joined again): join")]
    Unknown(SiteName),
}

/// What a daemon says of itself when it joins.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Names its state directory: tells a restarted daemon from a second one.
    pub instance: [u8; 16],
    /// Compute device, for people.
    pub device: String,
    /// The client's version, for people.
    pub software_version: String,
    /// Delta encodings that it speaks.
    pub encodings: Vec<Encoding>,
}

impl Daemon {
    /// How its deltas are to travel where the run prefers `preferred`: every client speaks fp32.
    pub fn delta_encoding(&self, preferred: Encoding) -> Encoding {
        if self.encodings.contains(&preferred) { preferred } else { Encoding::Fp32 }
    }
}

/// One connected (or just lost) site.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    /// The daemon at the other end.
    pub daemon: Daemon,
    /// The instruction that holds; its receivers are the open streams.
    pub instruction: watch::Sender<v1::Instruction>,
    /// What it last reported.
    pub progress: Option<v1::Progress>,
    /// When it was last heard.
    pub last_seen_ms: UnixMs,
    /// The run it is ready for.
    pub ready: Option<Prepared>,
}

/// What a site has prepared itself for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The run.
    pub run: RunName,
    /// Tokens that it has to train on, as it reports them.
    pub train_tokens: u64,
}

impl Session {
    /// Whether an instruction stream is open.
    pub fn connected(&self) -> bool {
        self.instruction.receiver_count() > 0
    }
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Sessions {
    by_site: BTreeMap<SiteName, Session>,
}

impl Sessions {
    /// Opens a session under `id`, or renews the same daemon's: what it was ready for stays. The streams
    /// of the session that it replaces end.
    ///
    /// # Errors
    /// If another daemon of this site is connected.
    pub fn join(
        &mut self,
        site: &SiteName,
        id: SessionId,
        daemon: Daemon,
        now: UnixMs,
    ) -> Result<(), SessionError> {
        let previous = self.by_site.get(site);
        if let Some(other) = previous.filter(|previous| previous.daemon.instance != daemon.instance)
            && (other.connected() || now < other.last_seen_ms + JOIN_GRACE_MS)
        {
            return Err(SessionError::Taken { site: site.clone(), device: other.daemon.device.clone() });
        }
        let ready = previous.and_then(|previous| previous.ready.clone());
        let instruction = watch::Sender::new(v1::Instruction { task: None });
        let session = Session { id, daemon, instruction, progress: None, last_seen_ms: now, ready };
        self.by_site.insert(site.clone(), session);
        Ok(())
    }

    /// The site's session, if `id` names it; it was heard `now`.
    ///
    /// # Errors
    /// If `id` is not this site's session.
    pub fn touch(&mut self, site: &SiteName, id: &[u8], now: UnixMs) -> Result<&mut Session, SessionError> {
        let session = self.by_site.get_mut(site).filter(|session| session.id == id);
        let session = session.ok_or_else(|| SessionError::Unknown(site.clone()))?;
        session.last_seen_ms = now;
        Ok(session)
    }

    /// The site was heard, in whatever session.
    pub fn heard(&mut self, site: &SiteName, now: UnixMs) {
        if let Some(session) = self.by_site.get_mut(site) {
            session.last_seen_ms = now;
        }
    }

    /// Closes the session, if `id` names it.
    pub fn leave(&mut self, site: &SiteName, id: &[u8]) -> Result<Session, SessionError> {
        match self.by_site.get(site) {
            Some(session) if session.id == id => self.by_site.remove(site),
            _ => None,
        }
        .ok_or_else(|| SessionError::Unknown(site.clone()))
    }

    /// The site's session, if it has one.
    pub fn get(&self, site: &SiteName) -> Option<&Session> {
        self.by_site.get(site)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&SiteName, &Session)> {
        self.by_site.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: [u8; 16] = [1; 16];
    const SECOND: [u8; 16] = [2; 16];

    fn daemon(instance: [u8; 16]) -> Daemon {
        Daemon { instance, device: "cpu".into(), software_version: "0".into(), encodings: Vec::new() }
    }

    fn site() -> SiteName {
        "bank".parse().unwrap()
    }

    #[test]
    fn a_second_daemon_is_refused_while_the_first_is_connected() {
        let mut sessions = Sessions::default();
        sessions.join(&site(), [1; 16], daemon(FIRST), 0).unwrap();
        let stream = sessions.touch(&site(), &[1; 16], 0).unwrap().instruction.subscribe();
        let later = 10 * JOIN_GRACE_MS;
        assert!(matches!(
            sessions.join(&site(), [2; 16], daemon(SECOND), later),
            Err(SessionError::Taken { .. })
        ));
        assert!(sessions.touch(&site(), &[1; 16], 0).is_ok(), "the first keeps its session");
        drop(stream);
        sessions.join(&site(), [2; 16], daemon(SECOND), later).unwrap();
    }

    #[test]
    fn a_daemon_that_just_joined_holds_its_place_before_its_stream_is_open() {
        let mut sessions = Sessions::default();
        sessions.join(&site(), [1; 16], daemon(FIRST), 0).unwrap();
        assert!(sessions.join(&site(), [2; 16], daemon(SECOND), JOIN_GRACE_MS - 1).is_err());
        assert!(sessions.join(&site(), [2; 16], daemon(SECOND), JOIN_GRACE_MS).is_ok());
    }

    #[test]
    fn a_restarted_daemon_takes_its_session_over_and_stays_ready() {
        let mut sessions = Sessions::default();
        sessions.join(&site(), [1; 16], daemon(FIRST), 0).unwrap();
        let ready = Prepared { run: "r".parse().unwrap(), train_tokens: 7 };
        sessions.touch(&site(), &[1; 16], 0).unwrap().ready = Some(ready.clone());
        let stream = sessions.touch(&site(), &[1; 16], 0).unwrap().instruction.subscribe();
        sessions.join(&site(), [3; 16], daemon(FIRST), 1).unwrap();
        assert!(stream.has_changed().is_err(), "the old stream ends");
        assert_eq!(sessions.touch(&site(), &[1; 16], 0).unwrap_err(), SessionError::Unknown(site()));
        assert_eq!(sessions.touch(&site(), &[3; 16], 0).unwrap().ready, Some(ready));
    }

    #[test]
    fn leaving_closes_the_session_once() {
        let mut sessions = Sessions::default();
        sessions.join(&site(), [1; 16], daemon(FIRST), 0).unwrap();
        assert!(sessions.leave(&site(), &[9; 16]).is_err());
        assert!(sessions.leave(&site(), &[1; 16]).is_ok());
        assert!(sessions.leave(&site(), &[1; 16]).is_err());
    }
}
