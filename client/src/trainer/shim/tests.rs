//! The wrappers beside references in f64, and what they refuse.

use super::{super::test_device, *};

const SETTINGS: AdamW =
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.95, weight_decay: 0.1, epsilon: 1e-8 };

fn scalar(value: f64) -> Tensor {
    Tensor::full([0_i64; 0], value, (Kind::Float, test_device()))
}

/// Parameters with made-up values, zero gradients and zero moments.
fn model() -> AdamWTensors {
    let shapes = [vec![2_i64, 3], vec![5], vec![]];
    let parameters: Vec<Tensor> = shapes
        .iter()
        .map(|shape| {
            let count: i64 = shape.iter().product();
            let values = Tensor::arange(count, (Kind::Float, test_device())) * 0.25 - 0.6;
            values.reshape(shape.as_slice()).set_requires_grad(true)
        })
        .collect();
    let zeros = || parameters.iter().map(|parameter| parameter.detach().zeros_like()).collect();
    AdamWTensors { gradients: zeros(), first: zeros(), second: zeros(), parameters }
}

/// Gradients that change from step to step and differ between elements.
fn set_gradients(model: &mut AdamWTensors, step: i32) {
    model.gradients =
        model.parameters.iter().map(|parameter| (parameter.detach() * 3 + f64::from(step)).sin()).collect();
}

fn values(tensors: &[Tensor]) -> Vec<f64> {
    tensors
        .iter()
        .flat_map(|tensor| Vec::<f32>::try_from(tensor.detach().flatten(0, -1)).unwrap())
        .map(f64::from)
        .collect()
}

/// AdamW as in arXiv 1711.05101, algorithm 2, in f64, element by element.
struct Reference {
    parameters: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    step: i32,
}

impl Reference {
    fn new(parameters: Vec<f64>) -> Self {
        Self { first: vec![0.0; parameters.len()], second: vec![0.0; parameters.len()], parameters, step: 0 }
    }

    fn step(&mut self, gradients: &[f64]) {
        let AdamW { learning_rate, beta1, beta2, weight_decay, epsilon } = SETTINGS;
        self.step += 1;
        for (index, &gradient) in gradients.iter().enumerate() {
            self.first[index] = beta1 * self.first[index] + (1.0 - beta1) * gradient;
            self.second[index] = beta2 * self.second[index] + (1.0 - beta2) * gradient * gradient;
            let first = self.first[index] / (1.0 - beta1.powi(self.step));
            let second = self.second[index] / (1.0 - beta2.powi(self.step));
            let parameter = &mut self.parameters[index];
            *parameter -= learning_rate * weight_decay * *parameter;
            *parameter -= learning_rate * first / (second.sqrt() + epsilon);
        }
    }
}

fn largest_difference(left: &[f64], right: &[f64]) -> f64 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f64::max)
}

#[test]
fn fused_adamw_stays_near_a_reference_in_f64() {
    let mut model = model();
    let mut reference = Reference::new(values(&model.parameters));
    for step in 1..=20 {
        set_gradients(&mut model, step);
        reference.step(&values(&model.gradients));
        adamw_step(&SETTINGS, &model, &scalar(f64::from(step)), &scalar(0.0), &scalar(1.0)).unwrap();
        let difference = largest_difference(&values(&model.parameters), &reference.parameters);
        assert!(difference <= 2e-6, "step {step}: {difference:e}");
    }
    assert!(largest_difference(&values(&model.first), &reference.first) <= 2e-6);
    assert!(largest_difference(&values(&model.second), &reference.second) <= 2e-6);
}

#[test]
fn adamw_step_keeps_parameters_trainable_and_records_no_graph() {
    let mut model = model();
    set_gradients(&mut model, 1);
    adamw_step(&SETTINGS, &model, &scalar(1.0), &scalar(0.0), &scalar(1.0)).unwrap();
    assert!(model.parameters.iter().all(|parameter| parameter.requires_grad() && parameter.is_leaf()));
    assert!(model.first.iter().all(|moment| !moment.requires_grad()));
}

#[test]
fn a_skipped_adamw_step_changes_nothing() {
    let mut model = model();
    set_gradients(&mut model, 1);
    let before = values(&model.parameters);
    adamw_step(&SETTINGS, &model, &scalar(1.0), &scalar(1.0), &scalar(1.0)).unwrap();
    assert_eq!(values(&model.parameters), before);
    assert!(values(&model.first).iter().chain(&values(&model.second)).all(|moment| *moment == 0.0));
}

#[test]
fn mismatched_lists_are_an_error_and_change_nothing() {
    let mut model = model();
    set_gradients(&mut model, 1);
    let before = values(&model.parameters);
    model.gradients.pop();
    let error = adamw_step(&SETTINGS, &model, &scalar(1.0), &scalar(0.0), &scalar(1.0)).unwrap_err();
    assert_eq!(error.to_string(), "AdamW step: 2 gradients, but 3 parameters");
    assert_eq!(values(&model.parameters), before);
}

#[test]
fn a_missing_gradient_or_a_wrong_shape_is_an_error_that_names_both() {
    let mut model = model();
    set_gradients(&mut model, 1);
    model.gradients[1] = Tensor::new();
    let error = adamw_step(&SETTINGS, &model, &scalar(1.0), &scalar(0.0), &scalar(1.0)).unwrap_err();
    let device = test_device();
    assert_eq!(
        error.to_string(),
        format!("AdamW step: tensor 1 of the gradients is not defined, expected Float [5] on {device:?}")
    );

    set_gradients(&mut model, 1);
    model.first[0] = model.first[0].reshape([3, 2]);
    let error = adamw_step(&SETTINGS, &model, &scalar(1.0), &scalar(0.0), &scalar(1.0)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "AdamW step: tensor 0 of the first moments is Float [3, 2] on {device:?}, expected Float [2, 3] on \
             {device:?}"
        )
    );
}

#[test]
fn backward_passes_add_to_the_gradient_that_was_placed() {
    let parameter = Tensor::from_slice(&[2.0_f32, 3.0]).to_device(test_device()).set_requires_grad(true);
    let gradient = Tensor::zeros([2], (Kind::Float, test_device()));
    set_gradient(&parameter, &gradient).unwrap();
    for _ in 0..2 {
        (&parameter * &parameter).sum(Kind::Float).backward();
    }
    assert_eq!(values(&[gradient]), [8.0, 12.0]);
}

#[test]
fn deterministic_algorithms_change_nothing_on_a_cpu() {
    let product = || {
        let x = (Tensor::arange(64 * 64, (Kind::Float, Device::Cpu)) * 0.37).sin().reshape([64, 64]);
        values(&[x.matmul(&x)])
    };
    let before = product();
    set_deterministic().unwrap();
    assert_eq!(product(), before);
}

#[test]
fn libtorch_failures_come_back_as_one_line() {
    // No machine has this many GPUs, and only libtorch knows.
    let ShimError::Libtorch { message, .. } = cuda_memory(120).unwrap_err() else {
        panic!("not libtorch's refusal")
    };
    assert!(!message.is_empty() && !message.contains('\n'), "{message}");
}
