//! How many sequences go through the model at once: as given, or found by itself. Less memory by less at once is
//! always possible, since gradients do not depend on it beyond rounding.

use consort_common::spec::TrainingSpec;
use tch::Device;

use super::error::TrainerError;

/// Tokens at once on a CPU: enough to keep cores busy, and little to keep for the backward pass.
const TOKENS_CPU: usize = 4096;

/// Sequences at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct MicroBatch {
    pub(super) sequences: usize,
    /// Whether more are tried from step to step until memory does not suffice: on a GPU, where the
    /// specification leaves it to the site.
    is_growing: bool,
}

impl MicroBatch {
    pub(super) fn new(training: &TrainingSpec, device: Device) -> Self {
        let given = training.micro_batch_size as usize;
        if given > 0 {
            return Self { sequences: given, is_growing: false };
        }
        if device.is_cuda() {
            return Self { sequences: 1, is_growing: true };
        }
        Self { sequences: sequences_cpu(training), is_growing: false }
    }

    /// Makes an attempt at a step of `batch` sequences. Where memory does not suffice, makes it again with half as
    /// many at once, and stays with those.
    pub(super) fn fit<T>(
        &mut self,
        batch: usize,
        mut attempt: impl FnMut(usize) -> Result<T, TrainerError>,
    ) -> Result<T, TrainerError> {
        loop {
            match attempt(self.sequences) {
                Err(error @ TrainerError::OutOfMemory { .. }) if self.sequences > 1 => {
                    let fewer = self.sequences.div_ceil(2);
                    if self.is_growing {
                        tracing::info!(
                            "{fewer} sequences at once fit the device's memory, {} do not",
                            self.sequences
                        );
                    } else {
                        tracing::warn!("{error}: going on with {fewer} sequences at once");
                    }
                    *self = Self { sequences: fewer, is_growing: false };
                }
                Ok(value) => {
                    if self.is_growing {
                        self.sequences = batch.min(2 * self.sequences);
                    }
                    return Ok(value);
                }
                error => return error,
            }
        }
    }
}

/// What a CPU takes at once if it is not given.
pub(super) fn sequences_cpu(training: &TrainingSpec) -> usize {
    let sequences = TOKENS_CPU / (training.sequence_length as usize).max(1);
    sequences.clamp(1, (training.batch_size as usize).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: usize = 12;

    /// A device that holds `room` sequences; what was tried is noted.
    fn attempt(room: usize, tried: &mut Vec<usize>) -> impl FnMut(usize) -> Result<(), TrainerError> {
        move |sequences| {
            tried.push(sequences);
            if sequences <= room {
                return Ok(());
            }
            Err(TrainerError::OutOfMemory { doing: "trying", message: "CUDA out of memory".to_owned() })
        }
    }

    fn training(micro_batch_size: u32) -> TrainingSpec {
        TrainingSpec { batch_size: 12, sequence_length: 512, micro_batch_size, ..TrainingSpec::default() }
    }

    #[test]
    fn on_a_gpu_it_grows_from_step_to_step_until_memory_does_not_suffice() {
        let mut micro_batch = MicroBatch::new(&training(0), Device::Cuda(0));
        let mut tried = Vec::new();
        for _ in 0..5 {
            micro_batch.fit(BATCH, attempt(5, &mut tried)).unwrap();
        }
        assert_eq!(tried, [1, 2, 4, 8, 4, 4]);
    }

    #[test]
    fn it_grows_to_the_whole_batch_and_no_further() {
        let mut micro_batch = MicroBatch::new(&training(0), Device::Cuda(0));
        let mut tried = Vec::new();
        for _ in 0..7 {
            micro_batch.fit(BATCH, attempt(100, &mut tried)).unwrap();
        }
        assert_eq!(tried, [1, 2, 4, 8, 12, 12, 12]);
    }

    #[test]
    fn exhausted_memory_halves_what_was_given_until_it_fits_and_stays() {
        let mut micro_batch = MicroBatch::new(&training(12), Device::Cpu);
        let mut tried = Vec::new();
        micro_batch.fit(BATCH, attempt(2, &mut tried)).unwrap();
        micro_batch.fit(BATCH, attempt(100, &mut tried)).unwrap();
        assert_eq!(tried, [12, 6, 3, 2, 2]);
    }

    #[test]
    fn one_sequence_that_does_not_fit_is_an_error_and_so_is_any_other_failure_at_once() {
        let mut micro_batch = MicroBatch::new(&training(2), Device::Cpu);
        let error = micro_batch.fit(BATCH, attempt(0, &mut Vec::new())).unwrap_err();
        assert!(matches!(error, TrainerError::OutOfMemory { .. }));
        let mut tries = 0;
        let error = MicroBatch::new(&training(2), Device::Cpu).fit(BATCH, |_| {
            tries += 1;
            Err::<(), _>(TrainerError::Cancelled)
        });
        assert!(matches!(error, Err(TrainerError::Cancelled)) && tries == 1);
    }

    #[test]
    fn a_cpu_takes_about_4096_tokens_at_once() {
        for (sequence_length, sequences) in [(512, 8), (100, 12), (5000, 1)] {
            let training = TrainingSpec { sequence_length, ..training(0) };
            assert_eq!(MicroBatch::new(&training, Device::Cpu).sequences, sequences);
        }
    }
}
