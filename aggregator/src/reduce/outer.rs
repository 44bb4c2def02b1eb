//! The outer optimizer: how the averaged delta moves the global model, element by element.
//!
//! With d the averaged delta, mean(local - global): the direction in which the sites moved, so it is added.
//! DiLoCo (Douillard et al., arXiv 2311.08105, algorithm 1, lines 12 to 14) calls -d the outer gradient and
//! subtracts.
//!
//! Precision: d and the momentum m are f32, the parameters p are f32 too, or f64 where a
//! residual was added to them (see `broadcast`); each line below is computed in f64 from left to right and rounded to f32 once. The second line of
//! Nesterov takes the m' that was rounded, so that it is a function of what is stored.

use consort_common::spec::OuterOptimizer;
use multiversion::multiversion;

/// Whether the optimizer keeps momentum beside the parameters.
pub fn has_momentum(optimizer: &OuterOptimizer) -> bool {
    matches!(optimizer, OuterOptimizer::Nesterov { .. })
}

/// From the averaged `delta` and `start`, the parameters before in f32 or f64, moves `momentum` where the
/// optimizer has one (else it is empty) and gives the parameters after. All slices have the same length.
pub(super) fn step<P: Copy + Into<f64>>(
    optimizer: &OuterOptimizer,
    delta: &[f32],
    start: &[P],
    parameters: &mut [f32],
    momentum: &mut [f32],
) {
    match *optimizer {
        OuterOptimizer::FedAvg {} => fedavg(delta, start, parameters),
        OuterOptimizer::Nesterov { learning_rate, momentum: mu } => {
            nesterov(learning_rate, mu, delta, start, parameters, momentum);
        }
    }
}

/// p' = p + d (McMahan et al., arXiv 1602.05629, algorithm 1: the mean of the local models).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn fedavg<P: Copy + Into<f64>>(delta: &[f32], start: &[P], parameters: &mut [f32]) {
    for ((parameter, p), d) in parameters.iter_mut().zip(start).zip(delta) {
        let p: f64 = (*p).into();
        *parameter = rounded(p + f64::from(*d));
    }
}

/// m' = mu m + d;  p' = p + lr (d + mu m'). Nesterov momentum in the form of Sutskever et al. (ICML 2013,
/// equations 3 and 4, over the looked-ahead parameters) as PyTorch's SGD(nesterov=True) computes it, without
/// dampening.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn nesterov<P: Copy + Into<f64>>(
    learning_rate: f64,
    mu: f64,
    delta: &[f32],
    start: &[P],
    parameters: &mut [f32],
    momentum: &mut [f32],
) {
    for (((parameter, m), p), d) in parameters.iter_mut().zip(momentum).zip(start).zip(delta) {
        let (p, d): (f64, f64) = ((*p).into(), f64::from(*d));
        *m = rounded(mu * f64::from(*m) + d);
        *parameter = rounded(p + learning_rate * (d + mu * f64::from(*m)));
    }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // the rounding that is meant
fn rounded(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const NESTEROV: OuterOptimizer = OuterOptimizer::Nesterov { learning_rate: 0.5, momentum: 0.5 };

    fn step_in_place(
        optimizer: &OuterOptimizer,
        delta: &[f32],
        parameters: &mut [f32],
        momentum: &mut [f32],
    ) {
        let start = parameters.to_vec();
        step(optimizer, delta, &start, parameters, momentum);
    }

    /// Steps from a parameter of 1 with the given deltas; all numbers are exact in binary.
    fn check(optimizer: &OuterOptimizer, deltas: &[f32], expected: &[(f32, f32)]) {
        let (mut parameters, mut momentum) = ([1.0], [0.0]);
        for (delta, (parameter, m)) in deltas.iter().zip(expected) {
            step_in_place(optimizer, &[*delta], &mut parameters, &mut momentum);
            assert_eq!((parameters[0], momentum[0]), (*parameter, *m));
        }
    }

    #[test]
    fn fedavg_adds_the_delta() {
        check(&OuterOptimizer::FedAvg {}, &[0.5, -0.25, -2.0], &[(1.5, 0.0), (1.25, 0.0), (-0.75, 0.0)]);
    }

    /// Worked out by hand, with lr = mu = 1/2:
    /// d = 1:  m = 1;               p = 1 + (1 + 1/2) / 2 = 1.75
    /// d = 1:  m = 1/2 + 1 = 1.5;   p = 1.75 + (1 + 0.75) / 2 = 2.625
    /// d = 0:  m = 0.75;            p = 2.625 + (0 + 0.375) / 2 = 2.8125
    /// d = -2: m = 0.375 - 2;       p = 2.8125 + (-2 - 0.8125) / 2 = 1.40625
    #[test]
    fn nesterov_follows_the_hand_calculation() {
        let expected = [(1.75, 1.0), (2.625, 1.5), (2.8125, 0.75), (1.40625, -1.625)];
        check(&NESTEROV, &[1.0, 1.0, 0.0, -2.0], &expected);
    }

    #[test]
    fn nesterov_stays_at_a_reference_in_f64() {
        let optimizer = OuterOptimizer::Nesterov { learning_rate: 0.7, momentum: 0.9 };
        let (mut parameters, mut momentum) = ([0.3f32], [0.0f32]);
        let (mut p, mut m) = (0.3f64, 0.0f64);
        for round in 0..50u8 {
            let d = (f32::from(round) * 0.7).sin() * 0.01;
            step_in_place(&optimizer, &[d], &mut parameters, &mut momentum);
            m = 0.9 * m + f64::from(d);
            p += 0.7 * (f64::from(d) + 0.9 * m);
        }
        assert!((f64::from(parameters[0]) - p).abs() < 1e-6, "{} {p}", parameters[0]);
    }

    /// The sites' models are all zero, so each delta is minus the global model: it must go to zero.
    #[test]
    fn the_global_model_moves_towards_the_sites() {
        for optimizer in [OuterOptimizer::FedAvg {}, NESTEROV] {
            let (mut parameters, mut momentum) = ([1.0f32, -2.0], [0.0; 2]);
            for (rounds, bound) in [(1, 0.5), (40, 1e-6)] {
                for _ in 0..rounds {
                    let delta = parameters.map(|value| -value);
                    step_in_place(&optimizer, &delta, &mut parameters, &mut momentum);
                }
                assert!(parameters.iter().all(|value| value.abs() <= bound), "{optimizer:?}: {parameters:?}");
            }
        }
    }
}
