//! The run specification: one TOML file that says everything about a run but what is a site's own.
//!
//! It is validated whole ([`RunSpec::parse`] reports every problem with its path), stored with the run,
//! identified by its BLAKE3, and sent to every client as it is.

mod aggregation;
mod reference;
mod rules;
mod start;
mod structure;
mod validate;

use serde::{Deserialize, Serialize};

pub use self::{
    aggregation::Aggregation,
    rules::STALENESS_MAX,
    start::StartingPoint,
    validate::{Problem, SpecError},
};
use crate::{
    chunk::ChunkPlan,
    codec::{Encoding, ModelEncoding},
    fragment::Fragment,
    ids::{Digest, RunName},
    model::Architecture,
    schedule::Schedule,
};

/// Longest specification, in bytes.
pub const SPEC_BYTES_MAX: usize = 1 << 20;

/// A run, whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// Name of the run, unique on its aggregator: a-z, 0-9 and '-', at most 40 characters.
    pub name: RunName,
    /// Seed of everything random: initial weights, data order, selection of clients.
    #[serde(default)]
    pub seed: u64,
    /// Rounds to train.
    pub rounds: u32,
    /// The architecture and its sizes.
    pub model: Architecture,
    /// How text becomes tokens.
    #[serde(default)]
    pub tokenizer: TokenizerSpec,
    /// What the run starts from; nothing: initial weights from the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartSpec>,
    /// Local training at the sites.
    #[serde(default)]
    pub training: TrainingSpec,
    /// What the aggregator does with the averaged delta.
    #[serde(default)]
    pub outer: OuterSpec,
    /// Who takes part in a round and how long it may last.
    #[serde(default)]
    pub participation: ParticipationSpec,
    /// How deltas travel.
    #[serde(default)]
    pub wire: WireSpec,
    /// Held-out evaluation at the sites.
    #[serde(default)]
    pub evaluation: EvaluationSpec,
    /// Which global models are kept as checkpoints.
    #[serde(default)]
    pub checkpoints: CheckpointSpec,
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum TokenizerSpec {
    /// One token per byte (0 to 255) and `<|endoftext|>` (256): built in.
    // With braces, because serde lets a unit variant pass with unknown keys.
    Byte {},
    /// A Hugging Face `tokenizer.json`, given when the run is created and sent to the sites.
    File {
        /// Its path, relative to the specification; read by the CLI only.
        path: String,
        /// The token that ends a document, as text.
        end_of_text: String,
    },
}

impl Default for TokenizerSpec {
    fn default() -> Self {
        Self::Byte {}
    }
}

/// What a run starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartSpec {
    /// A Hugging Face directory, relative to the specification; read by the CLI only.
    pub checkpoint: String,
}

/// Local training at the sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingSpec {
    /// Local optimizer steps per round (H in DiLoCo, arXiv 2311.08105).
    pub local_steps: u32,
    /// Sequences per optimizer step.
    pub batch_size: u32,
    /// Sequences per forward and backward pass; must divide `batch_size`. 0: found by each site.
    pub micro_batch_size: u32,
    /// Tokens that a sequence predicts.
    pub sequence_length: u32,
    /// In what the blocks' matrix products and attention are computed.
    pub precision: Precision,
    /// Whether attention stays within documents, of which a sequence may hold several (Llama 3, arXiv
    /// 2407.21783, section 3.2). An end-of-text token opens the document that follows it.
    pub document_mask: bool,
    /// Gradients are scaled down to this L2 norm; 0: never.
    pub gradient_clip: f64,
    /// What becomes of the local optimizer's moments between rounds.
    pub optimizer_state: OptimizerState,
    /// The local optimizer.
    pub optimizer: OptimizerSpec,
    /// Learning rate over the run's cumulative steps, as a factor on the optimizer's.
    pub schedule: Schedule,
}

impl Default for TrainingSpec {
    fn default() -> Self {
        Self {
            local_steps: 100,
            batch_size: 16,
            micro_batch_size: 0,
            sequence_length: 128,
            precision: Precision::default(),
            document_mask: false,
            gradient_clip: 1.0,
            optimizer_state: OptimizerState::default(),
            optimizer: OptimizerSpec::default(),
            schedule: Schedule::default(),
        }
    }
}

/// In what matrix products and attention are computed. Parameters, gradients, moments and the residual stream are
/// fp32 in both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// fp32.
    #[default]
    Fp32,
    /// bf16, as in PyTorch's autocast (Micikevicius et al., arXiv 1710.03740; bf16 needs no loss scaling).
    Bf16,
}

/// What becomes of the local optimizer's moments between rounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerState {
    /// They stay at the site and go on in its next round (DiLoCo).
    #[default]
    Keep,
    /// Every round begins with zeros (Photon).
    Reset,
}

/// The local optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum OptimizerSpec {
    /// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
    AdamW {
        /// Peak learning rate.
        #[serde(default = "defaults::learning_rate")]
        learning_rate: f64,
        /// Decay of the first moment.
        #[serde(default = "defaults::beta1")]
        beta1: f64,
        /// Decay of the second moment.
        #[serde(default = "defaults::beta2")]
        beta2: f64,
        /// Added to the root of the second moment.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
        /// Decoupled weight decay of matrices and embeddings, as a factor on the learning rate.
        #[serde(default = "defaults::weight_decay")]
        weight_decay: f64,
    },
    /// ADOPT with its clipping (Taniguchi et al., arXiv 2411.02853, algorithm 2): what Photon trains with.
    Adopt {
        /// Peak learning rate.
        #[serde(default = "defaults::learning_rate")]
        learning_rate: f64,
        /// Decay of the first moment.
        #[serde(default = "defaults::beta1")]
        beta1: f64,
        /// Decay of the second moment; converges with any.
        #[serde(default = "defaults::adopt_beta2")]
        beta2: f64,
        /// The root of the second moment is at least this.
        #[serde(default = "defaults::adopt_epsilon")]
        epsilon: f64,
        /// Decoupled weight decay of matrices and embeddings, as a factor on the learning rate.
        #[serde(default = "defaults::weight_decay")]
        weight_decay: f64,
    },
    /// Muon (Jordan et al., kellerjordan.github.io/posts/muon, 2024) for the blocks' matrices, scaled to the
    /// size of AdamW's updates (Liu et al., arXiv 2502.16982, eq. 4), so that one learning rate and one decay
    /// serve both; AdamW for embeddings, output projection, gains and biases. The local optimizer of MuLoCo
    /// (Thérien et al., arXiv 2505.23725).
    Muon {
        /// Peak learning rate.
        #[serde(default = "defaults::learning_rate")]
        learning_rate: f64,
        /// Decay of Muon's momentum.
        #[serde(default = "defaults::muon_momentum")]
        momentum: f64,
        /// Decay of AdamW's first moment.
        #[serde(default = "defaults::beta1")]
        beta1: f64,
        /// Decay of AdamW's second moment.
        #[serde(default = "defaults::beta2")]
        beta2: f64,
        /// Added to the root of AdamW's second moment.
        #[serde(default = "defaults::epsilon")]
        epsilon: f64,
        /// Decoupled weight decay of matrices and embeddings, as a factor on the learning rate.
        #[serde(default = "defaults::weight_decay")]
        weight_decay: f64,
    },
}

mod defaults {
    pub(super) fn learning_rate() -> f64 {
        1e-3
    }
    pub(super) fn beta1() -> f64 {
        0.9
    }
    pub(super) fn beta2() -> f64 {
        0.95
    }
    pub(super) fn epsilon() -> f64 {
        1e-8
    }
    pub(super) fn weight_decay() -> f64 {
        0.1
    }
    /// The next two are those of ADOPT's authors.
    pub(super) fn adopt_beta2() -> f64 {
        0.9999
    }
    pub(super) fn adopt_epsilon() -> f64 {
        1e-6
    }
    pub(super) fn muon_momentum() -> f64 {
        0.95
    }
    /// DiLoCo (arXiv 2311.08105, section 3.1) found this rate and this momentum best.
    pub(super) fn outer_learning_rate() -> f64 {
        0.7
    }
    pub(super) fn outer_momentum() -> f64 {
        0.9
    }
    pub(super) fn sgd_learning_rate() -> f64 {
        1.0
    }
    /// Ours: the paper tunes it for each task.
    pub(super) fn adaptive_learning_rate() -> f64 {
        1e-2
    }
    /// These decays and this tau are those of Reddi et al. (arXiv 2003.00295, section 5).
    pub(super) fn adaptive_beta1() -> f64 {
        0.9
    }
    pub(super) fn adaptive_beta2() -> f64 {
        0.99
    }
    pub(super) fn tau() -> f64 {
        1e-3
    }
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        Self::AdamW {
            learning_rate: defaults::learning_rate(),
            beta1: defaults::beta1(),
            beta2: defaults::beta2(),
            epsilon: defaults::epsilon(),
            weight_decay: defaults::weight_decay(),
        }
    }
}

/// What the aggregator does with the averaged delta.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OuterSpec {
    /// The outer optimizer.
    pub optimizer: OuterOptimizer,
    /// What a contribution counts.
    pub weighting: Weighting,
    /// How the deltas become one.
    pub aggregation: Aggregation,
    /// Streaming DiLoCo; nothing: each round synchronises the whole model, and sites wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streaming: Option<StreamingSpec>,
}

impl Default for OuterSpec {
    fn default() -> Self {
        Self {
            optimizer: OuterOptimizer::default(),
            weighting: Weighting::Tokens,
            aggregation: Aggregation::default(),
            streaming: None,
        }
    }
}

/// Streaming DiLoCo (arXiv 2501.18512): a round synchronises one fragment of the model, while the sites train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamingSpec {
    /// Fragments, P; see [`Fragment`]. Each is synchronised every P rounds, so that the paper's H is P x
    /// `training.local_steps`.
    pub fragments: u32,
    /// Local steps that a site takes while a fragment is on its way, tau; then it is mixed in.
    pub overlap: u32,
    /// What remains of the site's own values when a fragment is mixed in, alpha: alpha x local + (1 - alpha) x
    /// global (algorithm 2).
    pub mixing: f64,
}

impl Default for StreamingSpec {
    /// tau and alpha are those that the paper recommends (section 3).
    fn default() -> Self {
        Self { fragments: 3, overlap: 5, mixing: 0.5 }
    }
}

/// The outer optimizer, over the averaged delta d = mean(local - global).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum OuterOptimizer {
    /// global += d (McMahan et al., arXiv 1602.05629).
    // With braces, because serde lets a unit variant pass with unknown keys.
    FedAvg {},
    /// m = momentum x m + d; global += learning_rate x m (FedAvgM: Hsu et al., arXiv 1909.06335, section 4.3, with
    /// PyTorch's place for the learning rate).
    Sgd {
        /// Outer learning rate.
        #[serde(default = "defaults::sgd_learning_rate")]
        learning_rate: f64,
        /// Decay of the momentum.
        #[serde(default = "defaults::outer_momentum")]
        momentum: f64,
    },
    /// m = momentum x m + d; global += learning_rate x (d + momentum x m) (DiLoCo, arXiv 2311.08105,
    /// in PyTorch's form of Nesterov momentum).
    Nesterov {
        /// Outer learning rate.
        #[serde(default = "defaults::outer_learning_rate")]
        learning_rate: f64,
        /// Decay of the momentum.
        #[serde(default = "defaults::outer_momentum")]
        momentum: f64,
    },
    /// m = beta1 x m + (1 - beta1) x d; v = beta2 x v + (1 - beta2) x d^2; global += learning_rate x m /
    /// (sqrt(v) + tau), with v = tau^2 at first and no correction of bias (Reddi et al., arXiv 2003.00295,
    /// algorithm 2).
    FedAdam {
        /// Outer learning rate.
        #[serde(default = "defaults::adaptive_learning_rate")]
        learning_rate: f64,
        /// Decay of the first moment.
        #[serde(default = "defaults::adaptive_beta1")]
        beta1: f64,
        /// Decay of the second moment.
        #[serde(default = "defaults::adaptive_beta2")]
        beta2: f64,
        /// Degree of adaptivity: where the root of the second moment is far below, steps are proportional to m.
        #[serde(default = "defaults::tau")]
        tau: f64,
    },
    /// As FedAdam, but v = v - (1 - beta2) x d^2 x sign(v - d^2) (the same, algorithm 2).
    FedYogi {
        /// Outer learning rate.
        #[serde(default = "defaults::adaptive_learning_rate")]
        learning_rate: f64,
        /// Decay of the first moment.
        #[serde(default = "defaults::adaptive_beta1")]
        beta1: f64,
        /// How fast the second moment follows.
        #[serde(default = "defaults::adaptive_beta2")]
        beta2: f64,
        /// Degree of adaptivity.
        #[serde(default = "defaults::tau")]
        tau: f64,
    },
}

impl Default for OuterOptimizer {
    fn default() -> Self {
        Self::Nesterov {
            learning_rate: defaults::outer_learning_rate(),
            momentum: defaults::outer_momentum(),
        }
    }
}

/// What a contribution counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weighting {
    /// By the tokens of its assignment.
    #[default]
    Tokens,
    /// All the same.
    Uniform,
}

/// Who takes part in a round and how long it may last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParticipationSpec {
    /// A round begins when this many sites are connected and ready.
    pub minimum_clients: u32,
    /// Sites selected per round; 0: all that are ready.
    pub clients_per_round: u32,
    /// How they are drawn out of those that are ready.
    pub sampling: Sampling,
    /// Sites selected beyond `clients_per_round`: the round ends with the first `clients_per_round` deltas
    /// (Bonawitz et al., arXiv 1902.01046, section 3.2, select 130 % of what they need).
    pub over_selection: u32,
    /// Fewest local steps that a slow site is given; 0: every site takes `training.local_steps`.
    pub minimum_steps: u32,
    /// Deltas without which no round is committed; 0: as many as were selected.
    pub quorum: u32,
    /// Seconds until a round ends with its quorum, or selects anew without it; 0: no deadline.
    pub deadline_seconds: u64,
    /// Most rounds between the one that a delta was trained for and the one in whose average it counts; 0: what
    /// comes after its round is dropped. At most [`STALENESS_MAX`].
    pub staleness_max: u32,
    /// A delta of age a weighs (1 + a)^-exponent as much as one that is not late (Xie et al., arXiv 1903.03934,
    /// section 5.2).
    pub staleness_exponent: f64,
    /// Deltas, of whatever age, with which a round ends in the buffered mode, where every ready site is put to work
    /// (FedBuff, Nguyen et al., arXiv 2106.06639); 0: rounds are synchronous.
    pub buffer: u32,
    /// A deadline that follows the sites' pace; where both are there, the earlier one holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive_deadline: Option<AdaptiveDeadline>,
}

impl Default for ParticipationSpec {
    fn default() -> Self {
        Self {
            minimum_clients: 1,
            clients_per_round: 0,
            sampling: Sampling::Uniform,
            over_selection: 0,
            minimum_steps: 0,
            quorum: 0,
            deadline_seconds: 0,
            staleness_max: 0,
            staleness_exponent: 0.5,
            buffer: 0,
            adaptive_deadline: None,
        }
    }
}

/// A deadline from the time that sites took in earlier rounds: median + deviations x MAD, where MAD is the
/// median absolute deviation from the median.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdaptiveDeadline {
    /// How many MADs beyond the median; for normally distributed times 1.48 MADs are a standard deviation.
    pub deviations: f64,
    /// Seconds that a round may last in any case.
    pub minimum_seconds: u64,
}

impl Default for AdaptiveDeadline {
    fn default() -> Self {
        Self { deviations: 6.0, minimum_seconds: 60 }
    }
}

/// How the sites of a round are drawn, without replacement, by a generator that the run's seed determines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// Each is as likely as any other.
    #[default]
    Uniform,
    /// In proportion to the tokens that it has to train on, as it reports them.
    Tokens,
}

/// How deltas travel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WireSpec {
    /// Encoding of deltas, for sites that speak it; others send fp32.
    pub delta_encoding: Encoding,
    /// How the global model reaches the sites.
    pub model_encoding: ModelEncoding,
    /// Parameters per chunk.
    pub chunk_parameters: u32,
}

impl Default for WireSpec {
    fn default() -> Self {
        Self {
            delta_encoding: Encoding::Fp32,
            model_encoding: ModelEncoding::default(),
            chunk_parameters: 1 << 18,
        }
    }
}

/// Held-out evaluation at the sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationSpec {
    /// Share of each site's documents that is never trained on, chosen by content.
    pub held_out_fraction: f64,
    /// Tokens of held-out text to measure on, per site and version.
    pub tokens_max: u64,
    /// Measure every this many rounds (and always version 0 and the last); 0: never.
    pub every_rounds: u32,
}

impl Default for EvaluationSpec {
    fn default() -> Self {
        Self { held_out_fraction: 0.05, tokens_max: 100_000, every_rounds: 1 }
    }
}

/// Which global models are kept as checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSpec {
    /// Publish every this many rounds; the last round always is. 0: only the last.
    pub every_rounds: u32,
    /// Published checkpoints to keep, newest first; 0: all.
    pub keep: u32,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_rounds: 1, keep: 3 }
    }
}

impl RunSpec {
    /// Reads and validates a specification.
    ///
    /// # Errors
    /// Every problem found, each with its path, or that the text is not TOML.
    pub fn parse(toml: &str) -> Result<Self, SpecError> {
        validate::parse(toml)
    }

    /// What identifies a specification: BLAKE3 of its text.
    pub fn digest(toml: &str) -> Digest {
        Digest::of(toml.as_bytes())
    }

    /// How the model's vector is cut.
    pub fn chunk_plan(&self) -> ChunkPlan {
        ChunkPlan::new(self.model.manifest().parameters(), self.wire.chunk_parameters)
    }

    /// How many fragments the model is synchronised in: one without streaming.
    pub fn fragments(&self) -> u32 {
        self.outer.streaming.as_ref().map_or(1, |streaming| streaming.fragments)
    }

    /// What makes `version`, from 1, of the one before; the round of that number synchronises it.
    pub fn fragment(&self, version: u32) -> Fragment {
        Fragment::of_round(self.chunk_plan(), self.fragments(), version)
    }

    /// Steps that every site takes in the whole run, when it takes part in each round.
    pub fn run_steps(&self) -> u64 {
        u64::from(self.rounds) * u64::from(self.training.local_steps)
    }

    /// Every phase of the learning rate's schedule that would not fit, if the run had `steps` steps instead of
    /// [`Self::run_steps`].
    pub fn schedule_problems(&self, steps: u64) -> Vec<Problem> {
        rules::schedule_problems(self, steps)
    }

    /// Tokens that `steps` local steps train.
    pub fn tokens(&self, steps: u32) -> u64 {
        u64::from(steps) * u64::from(self.training.batch_size) * u64::from(self.training.sequence_length)
    }

    /// Sequences per forward and backward pass.
    pub fn micro_batch_size(&self) -> u32 {
        match self.training.micro_batch_size {
            0 => self.training.batch_size,
            size => size,
        }
    }

    /// Whether version `version` is measured on held-out text.
    pub fn evaluates(&self, version: u32) -> bool {
        let every = self.evaluation.every_rounds;
        every != 0 && (version == self.rounds || version.is_multiple_of(every))
    }

    /// Whether version `version` is published as a checkpoint.
    pub fn publishes(&self, version: u32) -> bool {
        let every = self.checkpoints.every_rounds;
        version == self.rounds || (every != 0 && version != 0 && version.is_multiple_of(every))
    }
}
