//! The optimizers over a small model's flat vectors. `parity` compares whole trainings with PyTorch's.

use consort_common::{
    model::{Architecture, LlamaConfig},
    spec::Precision,
};

use super::{super::test_device, *};

fn parameters() -> Parameters {
    let config = LlamaConfig {
        vocab_size: 20,
        hidden_size: 8,
        intermediate_size: 12,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        tie_word_embeddings: false,
        ..LlamaConfig::default()
    };
    let manifest = Architecture::Llama(config).manifest();
    let mut parameters = Parameters::new(&manifest, Precision::Fp32, test_device()).unwrap();
    parameters.load(&manifest.initialise(1)).unwrap();
    parameters
}

fn spec(kind: &str) -> OptimizerSpec {
    serde_json::from_value(serde_json::json!({"kind": kind, "learning_rate": 0.01})).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::<f32>::try_from(tensor).unwrap().into_iter().map(f64::from).collect()
}

/// A gradient that differs between elements and steps.
fn set_gradient(parameters: &mut Parameters, step: i64) {
    let gradient =
        (Tensor::arange(parameters.values.numel() as i64, (Kind::Float, test_device())) * 0.7 + step).sin();
    parameters.gradients.copy_(&gradient);
}

fn control(skip: f64, divisor: f64) -> Control {
    let scalar = |value| Tensor::full([0_i64; 0], value, (Kind::Float, test_device()));
    Control { skip: scalar(skip), divisor: scalar(divisor) }
}

#[test]
fn adopt_stays_near_a_reference_in_f64() {
    let mut parameters = parameters();
    let OptimizerSpec::Adopt { learning_rate, beta1, beta2, epsilon, weight_decay } = spec("adopt") else {
        panic!("another kind")
    };
    let mut optimizer = Optimizer::new(&spec("adopt"), &parameters, test_device()).unwrap();
    let decays: Vec<bool> = parameters
        .spans()
        .iter()
        .flat_map(|span| std::iter::repeat_n(span.decays, span.length as usize))
        .collect();
    let mut theta = values(&parameters.values);
    let (mut m, mut v) = (vec![0.0; theta.len()], vec![0.0; theta.len()]);
    for step in 0..12 {
        set_gradient(&mut parameters, step);
        let gradient = values(&parameters.gradients);
        for index in 0..theta.len() {
            let g = gradient[index] / 2.0;
            if step == 0 {
                v[index] = g * g;
                continue;
            }
            let limit = (step as f64).powf(0.25);
            let normed = (g / f64::max(v[index].sqrt(), epsilon)).clamp(-limit, limit);
            m[index] = beta1 * m[index] + (1.0 - beta1) * normed;
            let decay = if decays[index] { weight_decay } else { 0.0 };
            theta[index] -= learning_rate * (decay * theta[index] + m[index]);
            v[index] = beta2 * v[index] + (1.0 - beta2) * g * g;
        }
        optimizer.step(1.0, &control(0.0, 2.0)).unwrap();
        let differences =
            values(&parameters.values).into_iter().zip(&theta).map(|(ours, theirs)| (ours - theirs).abs());
        let difference = differences.fold(0.0, f64::max);
        assert!(difference < 5e-6, "step {step}: {difference:e}");
    }
    assert_eq!(optimizer.moments().unwrap().steps, 12);
}

#[test]
fn a_skipped_step_changes_nothing_whatever_the_gradient_is() {
    for kind in ["adamw", "adopt", "muon"] {
        let mut parameters = parameters();
        let mut optimizer = Optimizer::new(&spec(kind), &parameters, test_device()).unwrap();
        for step in 0..3 {
            set_gradient(&mut parameters, step);
            optimizer.step(1.0, &control(0.0, 1.0)).unwrap();
        }
        let before = (values(&parameters.values), optimizer.moments().unwrap());
        assert_eq!(before.1.steps, 3);
        for gradient in [f64::NAN, f64::INFINITY, 1.0] {
            let _ = parameters.gradients.fill_(gradient);
            optimizer.step(1.0, &control(1.0, f64::NAN)).unwrap();
            assert!(
                (values(&parameters.values), optimizer.moments().unwrap()) == before,
                "{kind}, {gradient}"
            );
        }
    }
}

#[test]
fn the_divisor_scales_the_gradient() {
    for kind in ["adamw", "adopt", "muon"] {
        let after = |scale: f64, divisor: f64| {
            let mut parameters = parameters();
            let mut optimizer = Optimizer::new(&spec(kind), &parameters, test_device()).unwrap();
            for step in 0..3 {
                set_gradient(&mut parameters, step);
                parameters.gradients *= scale;
                optimizer.step(1.0, &control(0.0, divisor)).unwrap();
            }
            (values(&parameters.values), optimizer.moments().unwrap())
        };
        assert!(after(4.0, 4.0) == after(1.0, 1.0), "{kind}");
        assert!(after(1.0, 4.0).1 != after(1.0, 1.0).1, "{kind}");
    }
}

#[test]
fn muon_moves_matrices_by_orthogonal_updates_and_keeps_second_moments_of_the_others_only() {
    let mut parameters = parameters();
    let OptimizerSpec::Muon { learning_rate, .. } = spec("muon") else { panic!("another kind") };
    let still = OptimizerSpec::Muon {
        learning_rate,
        momentum: 0.95,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.0,
    };
    let mut optimizer = Optimizer::new(&still, &parameters, test_device()).unwrap();
    let before = parameters.values.copy();
    set_gradient(&mut parameters, 1);
    optimizer.step(1.0, &control(0.0, 1.0)).unwrap();
    let matrices = parameters.matrices();
    assert_eq!(matrices.len(), 7);
    for matrix in &matrices {
        let update = (&parameters.values - &before)
            .narrow(0, matrix.offset, matrix.rows * matrix.columns)
            .view([matrix.rows, matrix.columns]);
        let size = learning_rate * 0.2 * (matrix.rows.max(matrix.columns) as f64).sqrt();
        let (_, singular, _) = (update / size).svd(true, false);
        // The made-up gradient has few directions; in each, the update has about full size.
        assert!((0.6..1.3).contains(&singular.max().double_value(&[])), "{matrix:?}");
    }
    let matrix_values: i64 = matrices.iter().map(|matrix| matrix.rows * matrix.columns).sum();
    let moments = optimizer.moments().unwrap();
    assert_eq!(moments.second.len() as i64, moments.first.len() as i64 - matrix_values);
    assert!(moments.second.iter().any(|moment| *moment > 0.0));
}

#[test]
fn moments_of_another_optimizer_are_refused_by_name_and_change_nothing() {
    let parameters = parameters();
    let optimizer = |kind| Optimizer::new(&spec(kind), &parameters, test_device()).unwrap();
    let kinds = ["adamw", "adopt", "muon"];
    for found in kinds {
        let moments = Moments { steps: 7, ..optimizer(found).moments().unwrap() };
        for expected in kinds {
            let mut other = optimizer(expected);
            if found == expected {
                other.load_moments(&moments).unwrap();
                assert_eq!(other.moments().unwrap(), moments);
                let unnamed = Moments { optimizer: None, steps: 8, ..moments.clone() };
                other.load_moments(&unnamed).unwrap();
                assert_eq!(other.moments().unwrap().steps, 8);
                continue;
            }
            let error = other.load_moments(&moments).unwrap_err().to_string();
            assert!(
                error.contains(&format!("that of {found}, and what is trained with is {expected}")),
                "{error}"
            );
            assert_eq!(other.moments().unwrap().steps, 0);
        }
    }
}
