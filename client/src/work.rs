//! What an aggregator can ask of a site, parsed; and why it could not be done.

use consort_common::{
    codec::Encoding,
    ids::{Digest, DigestError, NameError, RunName},
    spec::SpecError,
};
use consort_proto::v1::{Instruction, instruction::Task};
use tonic::Status;

use crate::{
    data::DataError,
    link::describe,
    state::StateError,
    steps::StepsError,
    trainer::{TrainerError, checkpoint::CheckpointError},
    transfer::TransferError,
};

/// What the site shall be doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Get ready for a run.
    Prepare(RunId),
    /// Train a round.
    Train(TrainTask),
    /// Measure a global model.
    Evaluate(EvaluateTask),
}

/// A run, named together with what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunId {
    /// Its name.
    pub name: RunName,
    /// Digest of its specification.
    pub spec_digest: Digest,
}

/// One round of local training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainTask {
    /// The run.
    pub run: RunId,
    /// The tensors that the aggregator means.
    pub manifest_digest: Digest,
    /// The round, from 1; its base model is version `round - 1`.
    pub round: u32,
    /// The base model.
    pub base_digest: Digest,
    /// The run's cumulative step before the round.
    pub first_step: u64,
    /// Local steps to take.
    pub steps: u32,
    /// Tokens that they train.
    pub tokens: u64,
    /// Whether to report the base model's held-out loss first.
    pub evaluate_base: bool,
    /// How the delta is to travel.
    pub delta_encoding: Encoding,
}

/// One global model to be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluateTask {
    /// The run.
    pub run: RunId,
    /// The tensors that the aggregator means.
    pub manifest_digest: Digest,
    /// The model's version.
    pub version: u32,
    /// The model.
    pub digest: Digest,
}

/// Why an instruction cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InstructionError {
    /// A digest is none.
    #[error("the aggregator sent an instruction that makes no sense: {0}")]
    Digest(#[from] DigestError),
    /// A name is none.
    #[error("the aggregator sent an instruction that makes no sense: {0}")]
    Name(#[from] NameError),
    /// A round 0, or one without steps.
    #[error("the aggregator sent an instruction that makes no sense: round {round} with {steps} steps")]
    Round {
        /// The round.
        round: u32,
        /// Its steps.
        steps: u32,
    },
    /// An encoding that is not among those that the client named when it joined.
    #[error(
        "the aggregator asks for the delta encoding {0:?}, which this version does not speak: update consort-client"
    )]
    Encoding(String),
    /// A task of a kind that did not exist when this program was built.
    #[error("the aggregator asks for something that this version does not know: update consort-client")]
    Unknown,
}

impl Work {
    /// Reads an instruction: the work, or why there is none.
    ///
    /// # Errors
    /// If a part of it is malformed or unknown.
    pub fn parse(instruction: Instruction) -> Result<Result<Self, String>, InstructionError> {
        let run = |name: String, digest: &[u8]| -> Result<RunId, InstructionError> {
            Ok(RunId { name: name.try_into()?, spec_digest: digest.try_into()? })
        };
        Ok(Ok(match instruction.task.ok_or(InstructionError::Unknown)? {
            Task::Idle(idle) => return Ok(Err(idle.reason)),
            Task::Prepare(task) => Self::Prepare(run(task.run, &task.spec_digest)?),
            Task::Train(task) if task.round == 0 || task.steps == 0 => {
                return Err(InstructionError::Round { round: task.round, steps: task.steps });
            }
            Task::Train(task) => Self::Train(TrainTask {
                run: run(task.run, &task.spec_digest)?,
                manifest_digest: task.manifest_digest.as_slice().try_into()?,
                round: task.round,
                base_digest: task.base_digest.as_slice().try_into()?,
                first_step: task.first_step,
                steps: task.steps,
                tokens: task.tokens,
                evaluate_base: task.evaluate_base,
                delta_encoding: Encoding::parse(&task.delta_encoding)
                    .ok_or(InstructionError::Encoding(task.delta_encoding))?,
            }),
            Task::Evaluate(task) => Self::Evaluate(EvaluateTask {
                run: run(task.run, &task.spec_digest)?,
                manifest_digest: task.manifest_digest.as_slice().try_into()?,
                version: task.version,
                digest: task.digest.as_slice().try_into()?,
            }),
        }))
    }

    /// Whether both ask for the same result, so that what is under way for one serves the other.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            // Whether the base is to be measured as well changes nothing about the delta.
            (Self::Train(mine), Self::Train(theirs)) => {
                *mine == TrainTask { evaluate_base: mine.evaluate_base, ..theirs.clone() }
            }
            (mine, theirs) => mine == theirs,
        }
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prepare(run) => write!(f, "preparing for run {}", run.name),
            Self::Train(task) => {
                write!(f, "round {} of run {} ({} steps)", task.round, task.run.name, task.steps)
            }
            Self::Evaluate(task) => write!(f, "measuring version {} of run {}", task.version, task.run.name),
        }
    }
}

/// Why work did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The instruction no longer holds, or the daemon is shutting down.
    #[error("cancelled")]
    Cancelled,
    /// The aggregator answers a call with a refusal.
    #[error("the aggregator refuses {what}: {}", describe(status))]
    Refused {
        /// The call.
        what: &'static str,
        /// Its answer.
        status: Status,
    },
    /// The aggregator's answers do not fit together.
    #[error("the aggregator's {0}; tell the federation's operator")]
    Inconsistent(String),
    /// The specification is beyond this version.
    #[error("this version cannot take part in the run: {0}")]
    Specification(#[from] SpecError),
    /// Both sides derive different tensors from the specification.
    #[error(
        "this version derives other tensors from the run's specification than the aggregator ({ours} here, {theirs} there): install the same version of Consort on both sides"
    )]
    Manifest {
        /// Our manifest's digest.
        ours: Digest,
        /// The aggregator's.
        theirs: Digest,
    },
    /// The aggregator counts a round's tokens in another way.
    #[error(
        "the round's {steps} steps train {ours} tokens here and {theirs} at the aggregator: install the same version of Consort on both sides"
    )]
    Tokens {
        /// Local steps.
        steps: u32,
        /// As we count.
        ours: u64,
        /// As the aggregator counts.
        theirs: u64,
    },
    /// The delta is useless.
    #[error(
        "local training of round {round} diverged: the delta's norm is {norm}; tell the federation's operator (a lower learning rate or gradient clipping helps)"
    )]
    Diverged {
        /// The round.
        round: u32,
        /// The L2 norm, NaN or infinite.
        norm: f64,
    },
    /// A part of the program failed in a way that it should not.
    #[error("an internal failure: {0}; please report it")]
    Internal(String),
    /// The site's text.
    #[error(transparent)]
    Data(DataError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A transfer.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The round's checkpoint, or the site's state.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Training or evaluation.
    #[error(transparent)]
    Trainer(TrainerError),
}

impl From<DataError> for WorkError {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Cancelled => Self::Cancelled,
            error => Self::Data(error),
        }
    }
}

impl From<StepsError> for WorkError {
    fn from(error: StepsError) -> Self {
        match error {
            StepsError::Data(error) => error.into(),
            StepsError::Trainer(error) => error.into(),
            StepsError::Checkpoint(error) => error.into(),
        }
    }
}

impl From<TrainerError> for WorkError {
    fn from(error: TrainerError) -> Self {
        match error {
            TrainerError::Cancelled => Self::Cancelled,
            error => Self::Trainer(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use consort_proto::v1::{Idle, Prepare, Train};

    use super::*;

    fn instruction(task: Task) -> Instruction {
        Instruction { task: Some(task) }
    }

    fn train() -> Train {
        let digest = || Digest::of(b"x").to_vec();
        Train {
            run: "r".to_owned(),
            spec_digest: digest(),
            manifest_digest: digest(),
            round: 3,
            base_digest: digest(),
            first_step: 20,
            steps: 10,
            tokens: 100,
            deadline_unix_ms: 5,
            evaluate_base: true,
            delta_encoding: "fp32".to_owned(),
        }
    }

    fn parse(task: Task) -> Work {
        Work::parse(instruction(task)).unwrap().unwrap()
    }

    #[test]
    fn the_same_round_with_another_deadline_is_the_same_work() {
        let work = parse(Task::Train(train()));
        assert!(work.is_same(&parse(Task::Train(Train {
            deadline_unix_ms: 9,
            evaluate_base: false,
            ..train()
        }))));
        assert!(!work.is_same(&parse(Task::Train(Train { round: 4, ..train() }))));
        assert!(
            !work.is_same(&parse(Task::Train(Train { base_digest: Digest::of(b"y").to_vec(), ..train() })))
        );
        let prepare = Prepare { run: "r".to_owned(), spec_digest: Digest::of(b"x").to_vec() };
        assert!(!work.is_same(&parse(Task::Prepare(prepare))));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for task in [
            Train { round: 0, ..train() },
            Train { steps: 0, ..train() },
            Train { base_digest: vec![1], ..train() },
            Train { run: "../r".to_owned(), ..train() },
            Train { delta_encoding: "fp31".to_owned(), ..train() },
        ] {
            assert!(Work::parse(instruction(Task::Train(task))).is_err());
        }
        assert_eq!(Work::parse(Instruction { task: None }), Err(InstructionError::Unknown));
    }

    #[test]
    fn idle_is_no_work_and_says_why() {
        let idle = Idle { reason: "paused".to_owned() };
        assert_eq!(Work::parse(instruction(Task::Idle(idle))), Ok(Err("paused".to_owned())));
    }
}
