//! The outer optimizer: how the averaged delta moves the global model, element by element.
//!
//! With d the averaged delta, mean(local - global): the direction in which the sites moved, so it is added.
//! DiLoCo (Douillard et al., arXiv 2311.08105, algorithm 1, lines 12 to 14) calls -d the outer gradient and
//! subtracts.
//!
//! Precision: d, the momentum m and the second moment v are f32, the parameters p are f32 too, or f64 where a
//! residual was added to them (see `broadcast`); each line below is computed in f64 from left to right and rounded
//! to f32 once. A line that takes m' or v' takes what was rounded, so that it is a function of what is stored.

use consort_common::spec::OuterOptimizer;
use multiversion::multiversion;

/// Whether the optimizer keeps momentum, a decayed mean or sum of deltas, beside the parameters.
pub fn has_momentum(optimizer: &OuterOptimizer) -> bool {
    !matches!(optimizer, OuterOptimizer::FedAvg {})
}

/// What the second moment of the deltas is at version 0, where the optimizer keeps one: tau^2, the least that
/// Reddi et al. allow (arXiv 2003.00295, algorithm 2, line 1).
pub fn initial_second_moment(optimizer: &OuterOptimizer) -> Option<f32> {
    match *optimizer {
        OuterOptimizer::FedAdam { tau, .. } | OuterOptimizer::FedYogi { tau, .. } => Some(rounded(tau * tau)),
        OuterOptimizer::FedAvg {} | OuterOptimizer::Sgd { .. } | OuterOptimizer::Nesterov { .. } => None,
    }
}

/// What the optimizer keeps of a piece of the model; what it does not have is empty.
#[derive(Debug, Default)]
pub(super) struct Moments<'a> {
    pub(super) momentum: &'a mut [f32],
    /// Of the deltas' squares.
    pub(super) second: &'a mut [f32],
}

/// From the averaged `delta` and `start`, the parameters before in f32 or f64, moves the `moments` and gives the
/// parameters after. All slices that are not empty have the same length.
pub(super) fn step<P: Copy + Into<f64>>(
    optimizer: &OuterOptimizer,
    delta: &[f32],
    start: &[P],
    parameters: &mut [f32],
    moments: Moments<'_>,
) {
    let Moments { momentum, second } = moments;
    match *optimizer {
        OuterOptimizer::FedAvg {} => fedavg(delta, start, parameters),
        OuterOptimizer::Sgd { learning_rate, momentum: mu } => {
            sgd(learning_rate, mu, delta, start, parameters, momentum);
        }
        OuterOptimizer::Nesterov { learning_rate, momentum: mu } => {
            nesterov(learning_rate, mu, delta, start, parameters, momentum);
        }
        OuterOptimizer::FedAdam { learning_rate, beta1, beta2, tau } => {
            adam_moment(beta2, delta, second);
            adaptive(learning_rate, beta1, tau, delta, start, parameters, momentum, second);
        }
        OuterOptimizer::FedYogi { learning_rate, beta1, beta2, tau } => {
            yogi_moment(beta2, delta, second);
            adaptive(learning_rate, beta1, tau, delta, start, parameters, momentum, second);
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

/// m' = mu m + d;  p' = p + lr m'. FedAvgM (Hsu et al., arXiv 1909.06335, section 4.3) as PyTorch's SGD computes
/// it, without dampening.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn sgd<P: Copy + Into<f64>>(
    learning_rate: f64,
    mu: f64,
    delta: &[f32],
    start: &[P],
    parameters: &mut [f32],
    momentum: &mut [f32],
) {
    for (((parameter, m), p), d) in parameters.iter_mut().zip(momentum).zip(start).zip(delta) {
        let p: f64 = (*p).into();
        *m = rounded(mu * f64::from(*m) + f64::from(*d));
        *parameter = rounded(p + learning_rate * f64::from(*m));
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

/// v' = beta2 v + (1 - beta2) d^2 (Reddi et al., arXiv 2003.00295, algorithm 2, FedAdam).
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn adam_moment(beta2: f64, delta: &[f32], second: &mut [f32]) {
    for (v, d) in second.iter_mut().zip(delta) {
        let square = f64::from(*d) * f64::from(*d);
        *v = rounded(beta2 * f64::from(*v) + (1.0 - beta2) * square);
    }
}

/// v' = v - (1 - beta2) d^2 sign(v - d^2) (the same, FedYogi), where sign(0) = 0.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn yogi_moment(beta2: f64, delta: &[f32], second: &mut [f32]) {
    for (value, d) in second.iter_mut().zip(delta) {
        let (v, square) = (f64::from(*value), f64::from(*d) * f64::from(*d));
        let sign = f64::from(u8::from(v > square)) - f64::from(u8::from(v < square));
        *value = rounded(v - (1.0 - beta2) * square * sign);
    }
}

/// m' = beta1 m + (1 - beta1) d;  p' = p + lr m' / (sqrt(v') + tau) (the same, all of algorithm 2), with the v'
/// that was rounded. The paper corrects no bias. Roots and quotients are rounded correctly on every machine
/// (IEEE 754).
#[allow(clippy::too_many_arguments)] // the formula has them
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn adaptive<P: Copy + Into<f64>>(
    learning_rate: f64,
    beta1: f64,
    tau: f64,
    delta: &[f32],
    start: &[P],
    parameters: &mut [f32],
    momentum: &mut [f32],
    second: &[f32],
) {
    let values = parameters.iter_mut().zip(momentum).zip(second).zip(start).zip(delta);
    for ((((parameter, m), v), p), d) in values {
        let p: f64 = (*p).into();
        *m = rounded(beta1 * f64::from(*m) + (1.0 - beta1) * f64::from(*d));
        *parameter = rounded(p + learning_rate * f64::from(*m) / (f64::from(*v).sqrt() + tau));
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

    const SGD: OuterOptimizer = OuterOptimizer::Sgd { learning_rate: 0.5, momentum: 0.5 };
    const FEDADAM: OuterOptimizer =
        OuterOptimizer::FedAdam { learning_rate: 0.5, beta1: 0.5, beta2: 0.75, tau: 0.25 };
    const FEDYOGI: OuterOptimizer =
        OuterOptimizer::FedYogi { learning_rate: 0.5, beta1: 0.5, beta2: 0.75, tau: 0.25 };

    /// A model of some parameters under an optimizer.
    struct Model {
        optimizer: OuterOptimizer,
        parameters: Vec<f32>,
        momentum: Vec<f32>,
        second: Vec<f32>,
    }

    impl Model {
        fn new(optimizer: &OuterOptimizer, parameters: &[f32]) -> Self {
            let second = initial_second_moment(optimizer);
            Self {
                optimizer: optimizer.clone(),
                parameters: parameters.to_vec(),
                momentum: vec![0.0; if has_momentum(optimizer) { parameters.len() } else { 0 }],
                second: second.map_or_else(Vec::new, |initial| vec![initial; parameters.len()]),
            }
        }

        fn step(&mut self, delta: &[f32]) {
            let Self { optimizer, parameters, momentum, second } = self;
            let start = parameters.clone();
            step(optimizer, delta, &start, parameters, Moments { momentum, second });
        }
    }

    /// Steps from a parameter of 1 with the given deltas, to the parameter and the moments that there are; all
    /// numbers are exact in binary.
    #[track_caller]
    fn check(optimizer: &OuterOptimizer, deltas: &[f32], expected: &[&[f32]]) {
        let mut model = Model::new(optimizer, &[1.0]);
        for (delta, expected) in deltas.iter().zip(expected) {
            model.step(&[*delta]);
            let state = [&model.parameters, &model.momentum, &model.second].map(Vec::as_slice);
            assert_eq!(state.concat(), *expected);
        }
    }

    #[test]
    fn fedavg_adds_the_delta() {
        check(&OuterOptimizer::FedAvg {}, &[0.5, -0.25, -2.0], &[&[1.5], &[1.25], &[-0.75]]);
    }

    /// As Photon's authors take it: the momentum is the delta, and does nothing.
    #[test]
    fn nesterov_without_momentum_adds_the_delta() {
        let photon = OuterOptimizer::Nesterov { learning_rate: 1.0, momentum: 0.0 };
        check(&photon, &[0.5, -0.25, -2.0], &[&[1.5, 0.5], &[1.25, -0.25], &[-0.75, -2.0]]);
    }

    /// Worked out by hand, with lr = mu = 1/2:
    /// d = 1:  m = 1;               p = 1 + 1/2 = 1.5
    /// d = 1:  m = 1/2 + 1 = 1.5;   p = 1.5 + 0.75 = 2.25
    /// d = 0:  m = 0.75;            p = 2.25 + 0.375 = 2.625
    /// d = -2: m = 0.375 - 2;       p = 2.625 - 0.8125 = 1.8125
    #[test]
    fn sgd_follows_the_hand_calculation() {
        let expected: [&[f32]; 4] = [&[1.5, 1.0], &[2.25, 1.5], &[2.625, 0.75], &[1.8125, -1.625]];
        check(&SGD, &[1.0, 1.0, 0.0, -2.0], &expected);
    }

    /// Worked out by hand, with lr = mu = 1/2:
    /// d = 1:  m = 1;               p = 1 + (1 + 1/2) / 2 = 1.75
    /// d = 1:  m = 1/2 + 1 = 1.5;   p = 1.75 + (1 + 0.75) / 2 = 2.625
    /// d = 0:  m = 0.75;            p = 2.625 + (0 + 0.375) / 2 = 2.8125
    /// d = -2: m = 0.375 - 2;       p = 2.8125 + (-2 - 0.8125) / 2 = 1.40625
    #[test]
    fn nesterov_follows_the_hand_calculation() {
        let expected: [&[f32]; 4] = [&[1.75, 1.0], &[2.625, 1.5], &[2.8125, 0.75], &[1.40625, -1.625]];
        check(&NESTEROV, &[1.0, 1.0, 0.0, -2.0], &expected);
    }

    /// Worked out by hand from algorithm 2, with lr = beta1 = 1/2, beta2 = 3/4, tau = 1/4, so v begins with 1/16;
    /// but for the roots all is exact. FedAdam:
    /// d = 0:    v = 3/64;                   m = 0;     p = 1
    /// d = 1/8:  v = 9/256 + 1/256 = 5/128;  m = 1/16;  p = 1 + 1/32 / (sqrt(5/128) + 1/4)
    ///
    /// FedYogi:
    /// d = 1/2:  v = 1/16 + 1/16 = 1/8 (d^2 = 1/4 is above v);   m = 1/4;   p = 1 + 1/8 / (sqrt(1/8) + 1/4)
    /// d = 0:    v = 1/8;  m = 1/8;  the same root
    /// d = 1/4:  v = 1/8 - 1/64 = 7/64 (d^2 = 1/16 is below v);  m = 3/16
    #[test]
    fn adaptive_optimizers_follow_the_hand_calculation() {
        let rounded = |value: f64| value as f32;
        let second = rounded(1.0 + (1.0 / 32.0) / ((5.0f64 / 128.0).sqrt() + 0.25));
        check(&FEDADAM, &[0.0, 0.125], &[&[1.0, 0.0, 0.046_875], &[second, 0.0625, 0.039_062_5]]);

        let root = 0.125f64.sqrt() + 0.25;
        let first = rounded(1.0 + 0.125 / root);
        let second = rounded(f64::from(first) + 0.0625 / root);
        let third = rounded(f64::from(second) + (3.0 / 32.0) / ((7.0f64 / 64.0).sqrt() + 0.25));
        check(
            &FEDYOGI,
            &[0.5, 0.0, 0.25],
            &[&[first, 0.25, 0.125], &[second, 0.125, 0.125], &[third, 0.1875, 0.109_375]],
        );
    }

    /// Where d^2 = v the sign is 0: v stays.
    #[test]
    fn yogis_moment_stays_where_it_is_right() {
        check(&FEDYOGI, &[0.25], &[&[1.0 + 0.0625 / 0.5, 0.125, 0.0625]]);
    }

    /// All in f64, over 50 rounds, from the equations as they stand in the papers.
    #[test]
    fn every_optimizer_stays_at_a_reference_in_f64() {
        let (lr, mu, beta1, beta2, tau) = (0.7, 0.9, 0.9, 0.99, 1e-3);
        let optimizers = [
            OuterOptimizer::FedAvg {},
            OuterOptimizer::Sgd { learning_rate: lr, momentum: mu },
            OuterOptimizer::Nesterov { learning_rate: lr, momentum: mu },
            OuterOptimizer::FedAdam { learning_rate: lr, beta1, beta2, tau },
            OuterOptimizer::FedYogi { learning_rate: lr, beta1, beta2, tau },
        ];
        for optimizer in optimizers {
            let mut model = Model::new(&optimizer, &[0.3]);
            let (mut p, mut m, mut v) = (f64::from(0.3f32), 0.0, tau * tau);
            for round in 0..50u8 {
                let delta = (f32::from(round) * 0.7).sin() * 0.01;
                model.step(&[delta]);
                let d = f64::from(delta);
                let adaptive = |m: f64, v: f64| lr * m / (v.sqrt() + tau);
                match optimizer {
                    OuterOptimizer::FedAvg {} => p += d,
                    OuterOptimizer::Sgd { .. } => {
                        m = mu * m + d;
                        p += lr * m;
                    }
                    OuterOptimizer::Nesterov { .. } => {
                        m = mu * m + d;
                        p += lr * (d + mu * m);
                    }
                    OuterOptimizer::FedAdam { .. } => {
                        m = beta1 * m + (1.0 - beta1) * d;
                        v = beta2 * v + (1.0 - beta2) * d.powi(2);
                        p += adaptive(m, v);
                    }
                    OuterOptimizer::FedYogi { .. } => {
                        m = beta1 * m + (1.0 - beta1) * d;
                        v -= (1.0 - beta2)
                            * d.powi(2)
                            * if v == d.powi(2) { 0.0 } else { (v - d.powi(2)).signum() };
                        p += adaptive(m, v);
                    }
                }
            }
            let found = f64::from(model.parameters[0]);
            assert!((found - p).abs() < 2e-5 * p.abs().max(1.0), "{optimizer:?}: {found} {p}");
        }
    }

    /// The sites' models are all zero, so each delta is minus the global model: it must go to zero.
    #[test]
    fn the_global_model_moves_towards_the_sites() {
        let with_tau = |tau| {
            [
                OuterOptimizer::FedAdam { learning_rate: 0.1, beta1: 0.5, beta2: 0.9, tau },
                OuterOptimizer::FedYogi { learning_rate: 0.1, beta1: 0.5, beta2: 0.9, tau },
            ]
        };
        let optimizers = [OuterOptimizer::FedAvg {}, SGD, NESTEROV];
        for optimizer in optimizers.into_iter().chain(with_tau(1e-3)).chain(with_tau(0.5)) {
            let begin = [1.0f32, -2.0];
            let mut model = Model::new(&optimizer, &begin);
            model.step(&begin.map(|value| -value));
            for (after, before) in model.parameters.iter().zip(begin) {
                assert!(
                    after.abs() < before.abs() && after * before >= 0.0,
                    "{optimizer:?}: {before} {after}"
                );
            }
            for _ in 0..300 {
                let delta: Vec<f32> = model.parameters.iter().map(|value| -value).collect();
                model.step(&delta);
            }
            let rest = model.parameters.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            assert!(rest <= 0.1, "{optimizer:?}: {:?}", model.parameters);
        }
    }
}
