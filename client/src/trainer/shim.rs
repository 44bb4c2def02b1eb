//! Safe wrappers around `shim.cpp`: the parts of libtorch that `tch` does not bind.
//!
//! Owns every call into the shim. Lengths, shapes, kinds and devices are checked here, before
//! any tensor is touched: an error leaves all tensors as they were.

use std::ffi::{CStr, c_char, c_double, c_int, c_void};

use tch::{Device, Kind, Tensor};
use thiserror::Error;

/// Why a call into the shim was refused or failed.
#[derive(Debug, Error, PartialEq)]
pub(crate) enum ShimError {
    /// No tensors at all: there is nothing to compute, and most likely a caller's mistake.
    #[error("{operation}: the list of tensors is empty")]
    Empty { operation: &'static str },
    /// Lists that belong together differ in length.
    #[error("{operation}: {count} {list}, but {expected} parameters")]
    Length {
        operation: &'static str,
        list: &'static str,
        count: usize,
        expected: usize,
    },
    /// A parameter that took no part in the loss has no gradient.
    #[error("{operation}: tensor {index} of the {list} is not defined")]
    Undefined {
        operation: &'static str,
        list: &'static str,
        index: usize,
    },
    /// A tensor does not fit the parameter that it belongs to.
    #[error("{operation}: tensor {index} of the {list} is {found}, expected {expected}")]
    Form {
        operation: &'static str,
        list: &'static str,
        index: usize,
        found: String,
        expected: String,
    },
    /// libtorch refused.
    #[error("{operation}: libtorch failed: {message}")]
    Libtorch {
        operation: &'static str,
        message: String,
    },
}

/// AdamW's settings for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AdamW {
    pub(crate) learning_rate: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    /// Decoupled: a step first multiplies the parameters by `1 - learning_rate * weight_decay`.
    pub(crate) weight_decay: f64,
    pub(crate) epsilon: f64,
}

/// A `torch::Tensor*`.
type Handle = *mut c_void;

unsafe extern "C" {
    fn consort_last_error() -> *const c_char;
    fn consort_adamw_step(
        params: *const Handle,
        grads: *const Handle,
        exp_avgs: *const Handle,
        exp_avg_sqs: *const Handle,
        steps: *const Handle,
        count: usize,
        lr: c_double,
        beta1: c_double,
        beta2: c_double,
        weight_decay: c_double,
        eps: c_double,
    ) -> c_int;
    fn consort_clip_grad_norm(
        grads: *const Handle,
        count: usize,
        max_norm: c_double,
        out_norm: *mut Handle,
    ) -> c_int;
}

/// One AdamW step on all `params` at once, in place.
///
/// `exp_avgs` and `exp_avg_sqs` are the first and second moments, of the form of the
/// parameters and zero before the first step; `steps` holds for each parameter a float
/// scalar on its device, which this increments. All of them are the optimizer's whole state.
/// Whether the gradients are finite is the caller's to check, before this.
pub(crate) fn adamw_step(
    settings: &AdamW,
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
) -> Result<(), ShimError> {
    const OPERATION: &str = "AdamW step";
    check_defined(OPERATION, "parameters", params)?;
    check_uniform(OPERATION, "parameters", params)?;
    for (list, tensors) in [
        ("gradients", grads),
        ("first moments", exp_avgs),
        ("second moments", exp_avg_sqs),
    ] {
        check_length(OPERATION, list, tensors, params)?;
        check_defined(OPERATION, list, tensors)?;
        for (index, (tensor, param)) in tensors.iter().zip(params).enumerate() {
            check_form(OPERATION, list, index, &Form::of(tensor), &Form::of(param))?;
        }
    }
    check_length(OPERATION, "steps", steps, params)?;
    check_defined(OPERATION, "steps", steps)?;
    for (index, (step, param)) in steps.iter().zip(params).enumerate() {
        let expected = Form {
            kind: Kind::Float,
            device: param.device(),
            shape: Vec::new(),
        };
        check_form(OPERATION, "steps", index, &Form::of(step), &expected)?;
    }
    let AdamW {
        learning_rate,
        beta1,
        beta2,
        weight_decay,
        epsilon,
    } = *settings;
    let [params, grads, exp_avgs, exp_avg_sqs, steps] =
        [params, grads, exp_avgs, exp_avg_sqs, steps].map(handles);
    // SAFETY: each array holds `params.len()` handles of tensors that are borrowed for the
    // whole call and, as checked above, defined; the shim keeps none of them.
    let code = unsafe {
        consort_adamw_step(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            steps.as_ptr(),
            params.len(),
            learning_rate,
            beta1,
            beta2,
            weight_decay,
            epsilon,
        )
    };
    check_code(OPERATION, code)
}

/// Scales `grads` in place so that their common L2 norm is at most `max_norm`, and returns the
/// norm from before as a scalar on their device: reading it there waits for the device, so read
/// it only when it is needed. A norm that is not finite leaves gradients that are not finite.
pub(crate) fn clip_grad_norm(grads: &[Tensor], max_norm: f64) -> Result<Tensor, ShimError> {
    const OPERATION: &str = "gradient clipping";
    check_defined(OPERATION, "gradients", grads)?;
    check_uniform(OPERATION, "gradients", grads)?;
    let grads = handles(grads);
    let mut norm: Handle = std::ptr::null_mut();
    // SAFETY: the array holds `grads.len()` handles of defined tensors, borrowed for the whole
    // call; `norm` is written only on success.
    let code =
        unsafe { consort_clip_grad_norm(grads.as_ptr(), grads.len(), max_norm, &raw mut norm) };
    check_code(OPERATION, code)?;
    // SAFETY: the call succeeded, so `norm` is a new tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(norm.cast()) })
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
        Self {
            kind: tensor.kind(),
            device: tensor.device(),
            shape: tensor.size(),
        }
    }

    fn describe(&self) -> String {
        format!("{:?} {:?} on {:?}", self.kind, self.shape, self.device)
    }
}

fn handles(tensors: &[Tensor]) -> Vec<Handle> {
    tensors
        .iter()
        .map(|tensor| tensor.as_ptr().cast_mut().cast())
        .collect()
}

fn check_length(
    operation: &'static str,
    list: &'static str,
    tensors: &[Tensor],
    params: &[Tensor],
) -> Result<(), ShimError> {
    if tensors.len() == params.len() {
        return Ok(());
    }
    Err(ShimError::Length {
        operation,
        list,
        count: tensors.len(),
        expected: params.len(),
    })
}

fn check_defined(
    operation: &'static str,
    list: &'static str,
    tensors: &[Tensor],
) -> Result<(), ShimError> {
    match tensors.iter().position(|tensor| !tensor.defined()) {
        Some(index) => Err(ShimError::Undefined {
            operation,
            list,
            index,
        }),
        None => Ok(()),
    }
}

/// One kind and one device for all: a fused kernel knows only one of each.
fn check_uniform(
    operation: &'static str,
    list: &'static str,
    tensors: &[Tensor],
) -> Result<(), ShimError> {
    let Some(first) = tensors.first() else {
        return Err(ShimError::Empty { operation });
    };
    for (index, tensor) in tensors.iter().enumerate() {
        let expected = Form {
            kind: first.kind(),
            device: first.device(),
            shape: tensor.size(),
        };
        check_form(operation, list, index, &Form::of(tensor), &expected)?;
    }
    Ok(())
}

fn check_form(
    operation: &'static str,
    list: &'static str,
    index: usize,
    found: &Form,
    expected: &Form,
) -> Result<(), ShimError> {
    if found == expected {
        return Ok(());
    }
    Err(ShimError::Form {
        operation,
        list,
        index,
        found: found.describe(),
        expected: expected.describe(),
    })
}

fn check_code(operation: &'static str, code: c_int) -> Result<(), ShimError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: after a failure on this thread the shim returns a string that ends in a zero byte
    // and lives until its next failure; it is copied at once.
    let message = unsafe { CStr::from_ptr(consort_last_error()) }.to_string_lossy();
    // Further lines are a backtrace or advice for people who program against libtorch.
    let message = message.lines().next().unwrap_or_default().to_owned();
    Err(ShimError::Libtorch { operation, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: AdamW = AdamW {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        weight_decay: 0.1,
        epsilon: 1e-8,
    };

    /// A model of `params` with made-up gradients, and the optimizer's state before step 1.
    struct Model {
        params: Vec<Tensor>,
        grads: Vec<Tensor>,
        exp_avgs: Vec<Tensor>,
        exp_avg_sqs: Vec<Tensor>,
        steps: Vec<Tensor>,
    }

    impl Model {
        fn new(kind: Kind) -> Self {
            let shapes = [vec![2_i64, 3], vec![5], vec![]];
            let params: Vec<Tensor> = shapes
                .iter()
                .map(|shape| {
                    let count: i64 = shape.iter().product();
                    let values = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.25 - 0.6;
                    values
                        .reshape(shape.as_slice())
                        .to_kind(kind)
                        .set_requires_grad(true)
                })
                .collect();
            let zeros = || params.iter().map(Tensor::zeros_like).collect();
            let steps = params
                .iter()
                .map(|_| Tensor::zeros([0_i64; 0], (Kind::Float, Device::Cpu)))
                .collect();
            Self {
                grads: zeros(),
                exp_avgs: zeros(),
                exp_avg_sqs: zeros(),
                steps,
                params,
            }
        }

        /// Gradients that change from step to step and differ between elements.
        fn set_grads(&mut self, step: i32) {
            self.grads = self
                .params
                .iter()
                .map(|param| (param.detach() * 3 + f64::from(step)).sin())
                .collect();
        }

        fn step(&self) -> Result<(), ShimError> {
            adamw_step(
                &SETTINGS,
                &self.params,
                &self.grads,
                &self.exp_avgs,
                &self.exp_avg_sqs,
                &self.steps,
            )
        }
    }

    fn values(tensors: &[Tensor]) -> Vec<f64> {
        tensors
            .iter()
            .flat_map(|tensor| Vec::<f64>::try_from(tensor.detach().flatten(0, -1)).unwrap())
            .collect()
    }

    /// AdamW as in arXiv 1711.05101, algorithm 2, in f64, element by element.
    struct Reference {
        params: Vec<f64>,
        first: Vec<f64>,
        second: Vec<f64>,
        step: i32,
    }

    impl Reference {
        fn new(params: Vec<f64>) -> Self {
            Self {
                first: vec![0.0; params.len()],
                second: vec![0.0; params.len()],
                params,
                step: 0,
            }
        }

        fn step(&mut self, grads: &[f64]) {
            let AdamW {
                learning_rate,
                beta1,
                beta2,
                weight_decay,
                epsilon,
            } = SETTINGS;
            self.step += 1;
            for (index, &grad) in grads.iter().enumerate() {
                self.first[index] = beta1 * self.first[index] + (1.0 - beta1) * grad;
                self.second[index] = beta2 * self.second[index] + (1.0 - beta2) * grad * grad;
                let first = self.first[index] / (1.0 - beta1.powi(self.step));
                let second = self.second[index] / (1.0 - beta2.powi(self.step));
                let param = &mut self.params[index];
                *param -= learning_rate * weight_decay * *param;
                *param -= learning_rate * first / (second.sqrt() + epsilon);
            }
        }
    }

    fn largest_difference(left: &[f64], right: &[f64]) -> f64 {
        assert_eq!(left.len(), right.len());
        left.iter()
            .zip(right)
            .map(|(left, right)| (left - right).abs())
            .fold(0.0, f64::max)
    }

    fn check_against_reference(kind: Kind, tolerance: f64) {
        let mut model = Model::new(kind);
        let mut reference = Reference::new(values(&model.params));
        for step in 1..=20 {
            model.set_grads(step);
            reference.step(&values(&model.grads));
            model.step().unwrap();
            let difference = largest_difference(&values(&model.params), &reference.params);
            assert!(difference <= tolerance, "step {step}: {difference:e}");
        }
        assert!(largest_difference(&values(&model.exp_avgs), &reference.first) <= tolerance);
        assert!(largest_difference(&values(&model.exp_avg_sqs), &reference.second) <= tolerance);
        assert_eq!(values(&model.steps), [20.0; 3]);
    }

    #[test]
    fn fused_adamw_agrees_with_a_reference_in_f64() {
        check_against_reference(Kind::Double, 1e-12);
    }

    #[test]
    fn fused_adamw_in_f32_stays_near_the_reference() {
        check_against_reference(Kind::Float, 2e-6);
    }

    #[test]
    fn adamw_step_keeps_parameters_trainable_and_records_no_graph() {
        let mut model = Model::new(Kind::Float);
        model.set_grads(1);
        model.step().unwrap();
        assert!(
            model
                .params
                .iter()
                .all(|param| param.requires_grad() && param.is_leaf())
        );
        assert!(model.exp_avgs.iter().all(|moment| !moment.requires_grad()));
    }

    #[test]
    fn mismatched_lists_are_an_error_and_change_nothing() {
        let mut model = Model::new(Kind::Float);
        model.set_grads(1);
        let before = values(&model.params);
        model.grads.pop();
        let error = model.step().unwrap_err();
        assert_eq!(
            error.to_string(),
            "AdamW step: 2 gradients, but 3 parameters"
        );
        assert_eq!(values(&model.params), before);
        assert_eq!(values(&model.steps), [0.0; 3]);
    }

    #[test]
    fn a_missing_gradient_is_an_error_that_names_it() {
        let mut model = Model::new(Kind::Float);
        model.set_grads(1);
        model.grads[1] = Tensor::new();
        let error = model.step().unwrap_err();
        assert_eq!(
            error.to_string(),
            "AdamW step: tensor 1 of the gradients is not defined"
        );
    }

    #[test]
    fn a_wrong_shape_or_kind_is_an_error_that_names_both() {
        let mut model = Model::new(Kind::Float);
        model.set_grads(1);
        model.exp_avgs[0] = model.exp_avgs[0].reshape([3, 2]);
        let error = model.step().unwrap_err().to_string();
        assert_eq!(
            error,
            "AdamW step: tensor 0 of the first moments is Float [3, 2] on Cpu, expected Float [2, 3] on Cpu"
        );

        let mut model = Model::new(Kind::Float);
        model.set_grads(1);
        model.steps[2] = model.steps[2].to_kind(Kind::Int64);
        assert!(matches!(
            model.step(),
            Err(ShimError::Form {
                list: "steps",
                index: 2,
                ..
            })
        ));
    }

    #[test]
    fn libtorch_failures_come_back_as_one_line() {
        // Clipping integers passes our checks of form and is libtorch's to refuse.
        let grads = [Tensor::from_slice(&[3_i64, 4])];
        let error = clip_grad_norm(&grads, 1.0).unwrap_err();
        let ShimError::Libtorch { message, .. } = &error else {
            panic!("{error}")
        };
        assert!(!message.is_empty() && !message.contains('\n'), "{message}");
    }

    #[test]
    fn clipping_scales_to_the_norm_and_returns_the_one_before() {
        let grads = [
            Tensor::from_slice(&[3.0_f32, 0.0]),
            Tensor::from_slice(&[[4.0_f32], [12.0]].concat()),
        ];
        let norm = clip_grad_norm(&grads, 6.5).unwrap();
        assert_eq!(norm.size(), [0_i64; 0]);
        assert!((norm.double_value(&[]) - 13.0).abs() < 1e-5);
        let difference = largest_difference(&values(&grads), &[1.5, 0.0, 2.0, 6.0]);
        assert!(difference < 1e-5, "{difference:e}");
    }

    #[test]
    fn clipping_leaves_gradients_below_the_limit_alone() {
        let grads = [
            Tensor::from_slice(&[0.1_f32, -0.2]),
            Tensor::from_slice(&[0.3_f32]),
        ];
        let before = values(&grads);
        let norm = clip_grad_norm(&grads, 1.0).unwrap();
        assert!((norm.double_value(&[]) - 0.14_f64.sqrt()).abs() < 1e-6);
        assert_eq!(values(&grads), before);
    }

    #[test]
    fn clipping_half_precision_measures_the_norm_in_f32() {
        let grads = [Tensor::full([10_000], 0.01, (Kind::BFloat16, Device::Cpu))];
        let exact = 100.0 * grads[0].double_value(&[0]);
        let norm = clip_grad_norm(&grads, 0.5).unwrap();
        assert_eq!(norm.kind(), Kind::Float);
        assert!((norm.double_value(&[]) - exact).abs() < 1e-4 * exact);
        assert_eq!(grads[0].kind(), Kind::BFloat16);
        assert!((grads[0].double_value(&[0]) - 0.005).abs() < 5e-5);
    }

    #[test]
    fn a_gradient_that_is_not_finite_shows_in_the_norm() {
        for bad in [f32::NAN, f32::INFINITY] {
            let grads = [Tensor::from_slice(&[1.0_f32, bad])];
            assert!(
                !clip_grad_norm(&grads, 1.0)
                    .unwrap()
                    .double_value(&[])
                    .is_finite()
            );
        }
    }

    #[test]
    fn clipping_nothing_is_an_error() {
        assert_eq!(
            clip_grad_norm(&[], 1.0).unwrap_err().to_string(),
            "gradient clipping: the list of tensors is empty"
        );
    }
}
