//! Safe wrappers around `shim.cpp`: the parts of libtorch that `tch` does not bind.
//!
//! Owns every call into the shim. Lengths, shapes, kinds and devices are checked here, before any
//! tensor is touched: an error leaves all tensors as they were.

use std::{
    ffi::{CStr, c_char, c_double, c_int, c_void},
    ptr::null_mut,
};

use tch::{Device, Kind, TchError, Tensor};
use thiserror::Error;

/// Why a call into the shim was refused or failed.
#[derive(Debug, Error, PartialEq)]
pub enum ShimError {
    /// Lists that belong together differ in length.
    #[error("{operation}: {count} {list}, but {expected} parameters")]
    Length {
        /// What was attempted.
        operation: &'static str,
        /// Which list.
        list: &'static str,
        /// Its length.
        count: usize,
        /// Length of the list of parameters.
        expected: usize,
    },
    /// A tensor does not fit the parameter that it belongs to.
    #[error("{operation}: tensor {index} of the {list} is {found}, expected {expected}")]
    Form {
        /// What was attempted.
        operation: &'static str,
        /// Which list.
        list: &'static str,
        /// Position in it.
        index: usize,
        /// Kind, shape and device found.
        found: String,
        /// Kind, shape and device needed.
        expected: String,
    },
    /// libtorch refused.
    #[error("{operation}: libtorch failed: {message}")]
    Libtorch {
        /// What was attempted.
        operation: &'static str,
        /// The first line of libtorch's message.
        message: String,
    },
}

/// AdamW's settings for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct AdamW {
    pub(super) learning_rate: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    /// Decoupled: a step first multiplies the parameters by `1 - learning_rate * weight_decay`.
    pub(super) weight_decay: f64,
    pub(super) epsilon: f64,
}

/// Tensors that one AdamW step works on: four lists of one length, whose tensors at one position have
/// one form (fp32, on one device).
#[derive(Debug, Default)]
pub(super) struct AdamWTensors {
    pub(super) parameters: Vec<Tensor>,
    pub(super) gradients: Vec<Tensor>,
    /// First moments; zero before the first step.
    pub(super) first: Vec<Tensor>,
    /// Second moments; zero before the first step.
    pub(super) second: Vec<Tensor>,
}

/// A `torch::Tensor*`.
pub(super) type Handle = *mut c_void;

unsafe extern "C" {
    fn consort_last_error() -> *const c_char;
    fn consort_adamw_step(
        params: *const Handle,
        grads: *const Handle,
        exp_avgs: *const Handle,
        exp_avg_sqs: *const Handle,
        count: usize,
        step: Handle,
        skip: Handle,
        divisor: Handle,
        lr: c_double,
        beta1: c_double,
        beta2: c_double,
        weight_decay: c_double,
        eps: c_double,
    ) -> c_int;
    fn consort_set_gradient(parameter: Handle, gradient: Handle) -> c_int;
    fn consort_pinned(tensor: Handle, out: *mut Handle) -> c_int;
    fn consort_release_cuda_cache() -> c_int;
    fn consort_set_deterministic() -> c_int;
    fn consort_cuda_memory(device: i64, free_bytes: *mut u64, total_bytes: *mut u64) -> c_int;
    fn consort_cuda_peak_memory(device: i64, bytes: *mut u64) -> c_int;
}

/// One AdamW step on all of `tensors`, in place.
///
/// `step` is the number of this step, from 1, `skip` is 1 to leave everything as it is, else 0, and the
/// gradients are divided by `divisor` before they are used: float scalars on the parameters' device, so that the
/// host need not know them.
pub(super) fn adamw_step(
    settings: &AdamW,
    tensors: &AdamWTensors,
    step: &Tensor,
    skip: &Tensor,
    divisor: &Tensor,
) -> Result<(), ShimError> {
    const OPERATION: &str = "AdamW step";
    let AdamWTensors { parameters, gradients, first, second } = tensors;
    // A fused kernel knows one kind and one device.
    let device = parameters.first().map_or(Device::Cpu, Tensor::device);
    for (index, parameter) in parameters.iter().enumerate() {
        let expected = Form { kind: Kind::Float, device, shape: parameter.size() };
        check_form(OPERATION, "parameters", index, parameter, &expected)?;
    }
    for (list, others) in [("gradients", gradients), ("first moments", first), ("second moments", second)] {
        if others.len() != parameters.len() {
            let (count, expected) = (others.len(), parameters.len());
            return Err(ShimError::Length { operation: OPERATION, list, count, expected });
        }
        for (index, (other, parameter)) in others.iter().zip(parameters).enumerate() {
            check_form(OPERATION, list, index, other, &Form::of(parameter))?;
        }
    }
    let scalar = Form { kind: Kind::Float, device, shape: Vec::new() };
    check_form(OPERATION, "step counter", 0, step, &scalar)?;
    check_form(OPERATION, "skip flag", 0, skip, &scalar)?;
    check_form(OPERATION, "divisor", 0, divisor, &scalar)?;

    let AdamW { learning_rate, beta1, beta2, weight_decay, epsilon } = *settings;
    let [parameters, gradients, first, second] =
        [parameters, gradients, first, second].map(|list| handles(list));
    // SAFETY: each array holds `parameters.len()` handles of tensors that are borrowed for the whole call
    // and, as checked above, defined and of one form; the shim keeps none of them.
    let code = unsafe {
        consort_adamw_step(
            parameters.as_ptr(),
            gradients.as_ptr(),
            first.as_ptr(),
            second.as_ptr(),
            parameters.len(),
            handle(step),
            handle(skip),
            handle(divisor),
            learning_rate,
            beta1,
            beta2,
            weight_decay,
            epsilon,
        )
    };
    check_code(OPERATION, code)
}

/// Makes `gradient`, of the same shape in fp32, the place where backward passes add up the gradient of the leaf
/// `parameter`. Only operations that add to it themselves can do so if `parameter` is not fp32.
pub(super) fn set_gradient(parameter: &Tensor, gradient: &Tensor) -> Result<(), ShimError> {
    const OPERATION: &str = "placing a gradient";
    let expected = Form { kind: Kind::Float, ..Form::of(parameter) };
    check_form(OPERATION, "gradients", 0, gradient, &expected)?;
    // SAFETY: both handles are of tensors that are borrowed for the whole call and defined; the shim
    // copies the gradient's handle with its reference count.
    let code = unsafe { consort_set_gradient(handle(parameter), handle(gradient)) };
    check_code(OPERATION, code)
}

/// A copy of a tensor of the host's in memory from which a GPU fetches by itself. (The bindings' own function names a
/// device, which libtorch warns of.)
pub(super) fn pinned(tensor: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: see `output`.
    output(|out| unsafe { consort_pinned(handle(tensor), out) })
}

/// Gives back the GPU memory that is allocated but not in use.
pub(super) fn release_cuda_cache() -> Result<(), ShimError> {
    // SAFETY: takes nothing and touches no tensor in use.
    check_code("releasing GPU memory", unsafe { consort_release_cuda_cache() })
}

/// Makes libtorch take deterministic algorithms, or fail where there is none.
pub(super) fn set_deterministic() -> Result<(), ShimError> {
    // SAFETY: sets flags of the process, which libtorch reads when it chooses kernels.
    check_code("choosing deterministic algorithms", unsafe { consort_set_deterministic() })
}

/// Free and total memory of CUDA device `index`, in bytes.
pub(super) fn cuda_memory(index: usize) -> Result<(u64, u64), ShimError> {
    let (mut free, mut total) = (0, 0);
    let index = i64::try_from(index).unwrap_or(i64::MAX);
    // SAFETY: the two places live for the whole call.
    let code = unsafe { consort_cuda_memory(index, &raw mut free, &raw mut total) };
    check_code("reading the memory of a CUDA device", code)?;
    Ok((free, total))
}

/// The most that tensors of this process ever held of CUDA device `index` at once, in bytes.
pub(super) fn cuda_peak_memory(index: usize) -> Result<u64, ShimError> {
    let mut bytes = 0;
    let index = i64::try_from(index).unwrap_or(i64::MAX);
    // SAFETY: the place lives for the whole call.
    let code = unsafe { consort_cuda_peak_memory(index, &raw mut bytes) };
    check_code("reading the peak memory of a CUDA device", code)?;
    Ok(bytes)
}

/// What must agree between tensors that are worked on element by element.
#[derive(PartialEq)]
struct Form {
    kind: Kind,
    device: Device,
    shape: Vec<i64>,
}

impl Form {
    fn of(tensor: &Tensor) -> Self {
        Self { kind: tensor.kind(), device: tensor.device(), shape: tensor.size() }
    }

    fn describe(&self) -> String {
        format!("{:?} {:?} on {:?}", self.kind, self.shape, self.device)
    }
}

pub(super) fn handle(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}

fn handles(tensors: &[Tensor]) -> Vec<Handle> {
    tensors.iter().map(handle).collect()
}

fn check_form(
    operation: &'static str,
    list: &'static str,
    index: usize,
    tensor: &Tensor,
    expected: &Form,
) -> Result<(), ShimError> {
    let found = if tensor.defined() {
        let form = Form::of(tensor);
        if form == *expected {
            return Ok(());
        }
        form.describe()
    } else {
        "not defined".to_owned()
    };
    Err(ShimError::Form { operation, list, index, found, expected: expected.describe() })
}

/// What a C++ function makes. The handles given to it are of tensors that are borrowed for the whole call.
pub(super) fn output(call: impl FnOnce(*mut Handle) -> c_int) -> Result<Tensor, TchError> {
    let mut out: Handle = null_mut();
    if call(&raw mut out) != 0 {
        return Err(TchError::Torch(last_error()));
    }
    // SAFETY: after success, `out` is a `torch::Tensor*` from `new` that nobody else owns; `Tensor` frees it.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

fn check_code(operation: &'static str, code: c_int) -> Result<(), ShimError> {
    if code == 0 {
        return Ok(());
    }
    Err(ShimError::Libtorch { operation, message: last_error() })
}

/// Why the last call into C++ on this thread failed that did.
fn last_error() -> String {
    // SAFETY: after a failure on this thread the shim returns a string that ends in a zero byte and lives
    // until its next failure; it is copied at once.
    let message = unsafe { CStr::from_ptr(consort_last_error()) }.to_string_lossy();
    // Further lines are a backtrace or advice for people who program against libtorch.
    message.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
