//! What can happen to a run, and why an event may be refused.

use consort_common::{
    codec::Encoding,
    ids::{DeltaId, Digest, SiteName},
};
use serde::{Deserialize, Serialize};

use super::state::RunStatus;

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The site is connected and has prepared itself for the run.
    SiteReady {
        /// Which.
        site: SiteName,
        /// Tokens that it has to train on, as it reports them.
        train_tokens: u64,
    },
    /// The site left or lost its connection.
    SiteGone(SiteName),
    /// An operator starts the run.
    Start,
    /// An operator sets the run aside.
    Pause,
    /// An operator lets the run go on.
    Resume,
    /// An operator ends the run for good.
    Abort {
        /// Why, in words.
        reason: String,
    },
    /// All chunks of a delta are durable and verified.
    Delivered {
        /// Whose.
        site: SiteName,
        /// For which round.
        round: u32,
        /// What the site and the upload said.
        facts: ContributionFacts,
    },
    /// Time has passed.
    Tick,
    /// The reduction of a round is on disk.
    Reduced {
        /// Which round.
        round: u32,
        /// What it gave.
        facts: ReducedFacts,
    },
    /// The reduction of a round came to nothing; its spool is as it was.
    ReduceFailed {
        /// Which round.
        round: u32,
        /// Why, in words.
        reason: String,
        /// Whose delta is spoilt for good, and of which round, if that is why.
        spoilt: Option<(SiteName, u32)>,
    },
    /// A version's checkpoint is complete.
    Published {
        /// Which version.
        version: u32,
    },
    /// A site measured a version on its held-out text.
    Evaluated {
        /// Which site.
        site: SiteName,
        /// What it found.
        evaluation: Evaluation,
    },
}

/// What is known of a delta when it is complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContributionFacts {
    /// Local steps taken.
    pub steps: u32,
    /// Tokens trained.
    pub tokens: u64,
    /// Mean training loss over the round, nats per token.
    #[serde(with = "exact")]
    pub train_loss: f64,
    /// Seconds of local training.
    #[serde(with = "exact")]
    pub train_seconds: f64,
    /// L2 norm of the delta before encoding.
    #[serde(with = "exact")]
    pub delta_norm: f64,
    /// Encoded payload, in bytes.
    pub bytes: u64,
    /// BLAKE3 over the chunk digests, in chunk order.
    pub delta_digest: Digest,
    /// Under which id the delta is spooled.
    pub delta: DeltaId,
    /// How it is encoded.
    pub encoding: Encoding,
}

/// What a reduction gave.
#[derive(Debug, Clone, PartialEq)]
pub struct ReducedFacts {
    /// BLAKE3 of the new version's flat fp32 little-endian vector.
    pub digest: Digest,
    /// L2 norm of the averaged delta.
    pub delta_norm: f64,
    /// L2 norm of the update that the outer optimizer applied.
    pub update_norm: f64,
    /// How else the round moved the model.
    pub statistics: RoundStatistics,
    /// What became of each delta, in canonical order.
    pub treatments: Vec<Treatment>,
    /// Norms of the model's tensors, in the manifest's order.
    pub tensors: Vec<TensorNorms>,
}

/// L2 norms of one tensor of a round. For people and charts: nothing is decided by them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TensorNorms {
    /// Of the averaged delta.
    pub delta: f64,
    /// Of the outer optimizer's momentum after the round, where it has one.
    pub momentum: Option<f64>,
    /// Of the new parameters.
    pub parameters: f64,
}

/// What the rule of aggregation did with a site's delta.
#[derive(Debug, Clone, PartialEq)]
pub struct Treatment {
    /// Whose.
    pub site: SiteName,
    /// For which round it was trained.
    pub round: u32,
    /// Its weight in the average, before it is clipped: as it was given for means, 1/n where all n count alike, 0
    /// where it was not selected.
    pub weight: f64,
    /// L2 norm of what it decodes to; none where it was not decoded: a mean adds fp32 and bf16 as they are, unless
    /// it adds them with others.
    pub norm: Option<f64>,
    /// By what it was scaled, 0 to 1; none where the rule does not clip.
    pub clip: Option<f64>,
    /// Whether it was averaged; none where the rule does not select.
    pub selected: Option<bool>,
}

/// How a round moved the model, beside the norms of the averaged delta and of the update. For people and charts:
/// nothing is decided by it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RoundStatistics {
    /// L2 norm of the new parameters.
    pub parameter_norm: f64,
    /// L2 norm of the outer optimizer's momentum after the round, where it has one.
    pub momentum_norm: Option<f64>,
    /// Cosine of the angle between this round's update and the one before; none in the first round, where one of
    /// them is zero, and with several fragments.
    pub update_cosine: Option<f64>,
    /// Weighted mean of the squared distances of the deltas to their mean, as a multiple of the mean's squared
    /// norm: from [`Treatment::norm`], or else the norms that the sites reported; none where the mean is zero, or the
    /// rule of aggregation is not the mean.
    pub spread: Option<f64>,
}

/// Loss of one version on one site's held-out text.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Which version.
    pub version: u32,
    /// Mean cross-entropy, nats per token.
    pub loss: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// UTF-8 bytes of the text that those tokens encode.
    pub text_bytes: u64,
}

/// Why an event was refused. The state is as it was.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Rejection {
    /// An operator's action does not fit the run's status.
    #[error("the run cannot be {action}: it is {status}")]
    WrongStatus {
        /// "started", "paused", "resumed", "aborted".
        action: &'static str,
        /// As it is.
        status: RunStatus,
    },
    /// The run takes nothing from sites any more, or not yet.
    #[error("the run takes nothing from sites: it is {status}; look at the next instruction")]
    NotRunning {
        /// As it is.
        status: RunStatus,
    },
    /// A delta for a round that takes none now: an older one, a later one, or one being reduced.
    #[error("round {round} takes no deltas now: the run is at round {current}; look at the next instruction")]
    RoundOver {
        /// The delta's.
        round: u32,
        /// The run's.
        current: u32,
    },
    /// A delta from a site that was not selected.
    #[error("site {site} has no assignment in round {round}; look at the next instruction")]
    NotAssigned {
        /// Whose delta.
        site: SiteName,
        /// For which round.
        round: u32,
    },
    /// A second delta that differs from the accepted one.
    #[error(
        "site {site} delivered another delta for round {round} before: {first}, now {second}; the first stays"
    )]
    Conflict {
        /// Whose.
        site: SiteName,
        /// For which round.
        round: u32,
        /// Of the accepted delta.
        first: Digest,
        /// Of the refused one.
        second: Digest,
    },
    /// A report of more than was asked for.
    #[error("{claimed} {what} are reported, but at most {allowed} were assigned")]
    OverClaimed {
        /// "steps", "tokens", "held-out tokens".
        what: &'static str,
        /// As reported.
        claimed: u64,
        /// As assigned.
        allowed: u64,
    },
    /// A measurement that no computation can give.
    #[error("{what} is {value}, but must be a finite number of at least 0")]
    Implausible {
        /// "the training loss".
        what: &'static str,
        /// As reported.
        value: f64,
    },
    /// A held-out loss of a version that does not exist yet.
    #[error("version {version} does not exist: the newest is {current}")]
    UnknownVersion {
        /// As reported.
        version: u32,
        /// The newest.
        current: u32,
    },
    /// A held-out loss that was not asked for, or is too late.
    #[error("no held-out loss of version {version} is wanted: the newest version is {current}")]
    NotWanted {
        /// As reported.
        version: u32,
        /// The newest.
        current: u32,
    },
    /// A reduction that the run is not waiting for.
    #[error("the run is not reducing round {round}: it is at round {current}")]
    NotReducing {
        /// The reduction's.
        round: u32,
        /// The run's.
        current: u32,
    },
    /// More sites than one run can have.
    #[error("site {site} cannot join: the run has {limit} sites already")]
    TooManySites {
        /// Which site.
        site: SiteName,
        /// The most there can be.
        limit: usize,
    },
}

impl Rejection {
    /// Whether what was sent is wrong, so that sending it again is useless; else the run has moved on.
    pub fn is_content(&self) -> bool {
        match self {
            Self::Conflict { .. }
            | Self::OverClaimed { .. }
            | Self::Implausible { .. }
            | Self::UnknownVersion { .. } => true,
            Self::WrongStatus { .. }
            | Self::NotRunning { .. }
            | Self::RoundOver { .. }
            | Self::NotAssigned { .. }
            | Self::NotWanted { .. }
            | Self::NotReducing { .. }
            | Self::TooManySites { .. } => false,
        }
    }
}

/// Refuses what is not a finite number of at least 0.
pub(super) fn check_measurement(what: &'static str, value: f64) -> Result<(), Rejection> {
    if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(Rejection::Implausible { what, value }) }
}

/// Refuses more than was allowed.
pub(super) fn check_claim(what: &'static str, claimed: u64, allowed: u64) -> Result<(), Rejection> {
    if claimed <= allowed { Ok(()) } else { Err(Rejection::OverClaimed { what, claimed, allowed }) }
}

/// Floats as decimal text. serde_json reads JSON numbers only to within one unit in the last place, but a
/// stored state must come back as it was; Rust's shortest decimal text and its parser are exact.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
