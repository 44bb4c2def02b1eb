//! What can go wrong in the trainer, in words for people.

use tch::TchError;

use super::shim::ShimError;

/// Why the trainer could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// A vector handed in has not the model's length.
    #[error("{what}: {found} values, but the model has {expected}")]
    Length {
        /// What was handed in.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The model's length.
        expected: usize,
    },
    /// An optimizer's state is another one's, to which its numbers mean something else.
    #[error(
        "the optimizer's state is that of {found}, and what is trained with is {expected}: go on with {found}, or begin \
         without that state"
    )]
    OtherOptimizer {
        /// Whose state it is.
        found: String,
        /// The optimizer of the training.
        expected: &'static str,
    },
    /// A batch or window has not the size that the training settings give.
    #[error("{what}: {found} tokens, expected {expected}")]
    Tokens {
        /// What was handed in.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What is allowed.
        expected: String,
    },
    /// A token that the vocabulary does not have. On a GPU this would stop the whole device.
    #[error(
        "token {token} is outside the model's vocabulary of {vocabulary}: was the text prepared with the run's \
         tokenizer?"
    )]
    Vocabulary {
        /// The token.
        token: i64,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// Settings that no model can be built or trained with.
    #[error("cannot build the model: {0}")]
    Settings(String),
    /// Every step since the last reading had a loss or gradient that was not finite.
    #[error(
        "training diverged: the loss or its gradient was not finite in each of the last {steps} steps, up to step \
         {step} of the run; no update was made in them. Lower the learning rate, lengthen the warm-up or set \
         gradient_clip, and go on from an earlier checkpoint"
    )]
    Diverged {
        /// The run's cumulative step that was last tried.
        step: u64,
        /// Steps since the last reading.
        steps: u64,
    },
    /// The caller asked to stop; the parameters are those after the last complete step.
    #[error("cancelled")]
    Cancelled,
    /// The device has not enough memory.
    #[error(
        "out of memory on the device while {doing}: lower micro_batch_size in the run's specification, or use a \
         device with more memory ({message})"
    )]
    OutOfMemory {
        /// What was attempted.
        doing: &'static str,
        /// The first line of libtorch's message.
        message: String,
    },
    /// libtorch refused.
    #[error("libtorch failed while {doing}: {message}")]
    Libtorch {
        /// What was attempted.
        doing: &'static str,
        /// The first line of libtorch's message.
        message: String,
    },
    /// The part of libtorch behind the shim refused.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// Says what was attempted when libtorch failed. Model code is a chain of libtorch calls with `?`; the
/// attempt is named once, around the chain.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, TrainerError>;
}

impl<T> Doing<T> for Result<T, TchError> {
    fn doing(self, doing: &'static str) -> Result<T, TrainerError> {
        self.map_err(|error| {
            let message = first_line(&error.to_string());
            if is_out_of_memory(&message) {
                TrainerError::OutOfMemory { doing, message }
            } else {
                TrainerError::Libtorch { doing, message }
            }
        })
    }
}

/// Devices say it in English prose only. A library of NVIDIA's that finds no memory for its own workspace, as it may
/// once tensors have taken all, says so by a status.
fn is_out_of_memory(message: &str) -> bool {
    let signs =
        ["out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"];
    signs.iter().any(|sign| message.contains(sign))
}

/// libtorch's messages go on with a C++ backtrace, or with advice about its allocator, which help nobody here.
fn first_line(message: &str) -> String {
    let line = message.trim_start_matches("Internal torch error: ").lines().next().unwrap_or_default();
    line.split(" Of the allocated memory ").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn libtorch_failures_say_what_was_attempted_without_a_backtrace() {
        let (left, right) = (Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[1.0, 2.0, 3.0]));
        let error = left.f_add(&right).doing("adding").unwrap_err().to_string();
        assert!(error.starts_with("libtorch failed while adding: The size of tensor a (2)"), "{error}");
        assert!(!error.contains('\n') && !error.contains(".cpp"), "{error}");
    }

    /// As libtorch 2.13 words them.
    #[test]
    fn exhausted_memory_of_a_gpu_is_told_apart_whoever_needed_it() {
        let doing =
            |message: &str| Err::<(), _>(TchError::Torch(message.to_owned())).doing("trying").unwrap_err();
        for message in [
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
            "CUDA error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        ] {
            assert!(matches!(doing(message), TrainerError::OutOfMemory { .. }), "{message}");
        }
        let exhausted = doing(
            "CUDA out of memory. Tried to allocate 352.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which \
             326.38 MiB is free. Process 26792 has 48.51 GiB memory in use. Including non-PyTorch memory, this process \
             has 30.34 GiB memory in use. Of the allocated memory 29.26 GiB is allocated by PyTorch, and 456.21 MiB is \
             reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting",
        );
        assert!(exhausted.to_string().ends_with("30.34 GiB memory in use.)"), "{exhausted}");
        let other = doing("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`");
        assert!(matches!(other, TrainerError::Libtorch { .. }), "{other}");
    }

    #[test]
    fn exhausted_memory_is_told_apart() {
        let huge = Tensor::f_zeros([1 << 50], (tch::Kind::Double, tch::Device::Cpu))
            .doing("allocating")
            .unwrap_err();
        assert!(matches!(huge, TrainerError::OutOfMemory { doing: "allocating", .. }), "{huge}");
    }
}
