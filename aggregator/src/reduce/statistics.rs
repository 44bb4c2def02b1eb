//! What is recorded of a round beside its model: norms, and the angle between successive updates.
//!
//! With p the new parameters, b the base and q the version before it, the update is p - b and the one before
//! b - q. All differences, products and sums are f64; a chunk's values are added in interleaved lanes (see
//! `kernel`), chunks in their order: the same on every machine, whatever the number of threads.

use multiversion::multiversion;

use super::kernel::LANES;

/// What the model's vectors say of a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelStatistics {
    /// L2 norm of the new parameters.
    pub parameter_norm: f64,
    /// L2 norm of the outer optimizer's momentum after the round, where it has one.
    pub momentum_norm: Option<f64>,
    /// Cosine of the angle between this round's update and the one before; none where one of them is zero, or
    /// there was none before.
    pub update_cosine: Option<f64>,
}

/// Sums over a chunk, or over several.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sums {
    parameter_squares: f64,
    momentum_squares: f64,
    /// Of the update before.
    previous_squares: f64,
    /// Of the products of both updates.
    products: f64,
}

impl Sums {
    /// Over a chunk; `momentum` and `previous`, the parameters of the version before the base, are empty where
    /// there is none.
    pub(super) fn of_chunk(parameters: &[f32], base: &[f32], momentum: &[f32], previous: &[f32]) -> Self {
        let sum = |lanes: [f64; LANES]| lanes.iter().sum::<f64>();
        let [previous_squares, products] = compare(parameters, base, previous).map(sum);
        Self {
            parameter_squares: sum(squares(parameters)),
            momentum_squares: sum(squares(momentum)),
            previous_squares,
            products,
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.parameter_squares += other.parameter_squares;
        self.momentum_squares += other.momentum_squares;
        self.previous_squares += other.previous_squares;
        self.products += other.products;
    }

    /// Of the whole model, whose update has this sum of squares.
    pub(super) fn statistics(self, update_squares: f64, has_momentum: bool) -> ModelStatistics {
        let norms = update_squares.sqrt() * self.previous_squares.sqrt();
        // Rounding may take it a little beyond.
        let update_cosine = (norms > 0.0).then(|| (self.products / norms).clamp(-1.0, 1.0));
        ModelStatistics {
            parameter_norm: self.parameter_squares.sqrt(),
            momentum_norm: has_momentum.then(|| self.momentum_squares.sqrt()),
            update_cosine,
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn squares(values: &[f32]) -> [f64; LANES] {
    let mut lanes = [0.0; LANES];
    for values in values.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    lanes
}

/// Squares of the update before, and products of both updates.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn compare(parameters: &[f32], base: &[f32], previous: &[f32]) -> [[f64; LANES]; 2] {
    let (mut squares, mut products) = ([0.0; LANES], [0.0; LANES]);
    let pieces = parameters.chunks(LANES).zip(base.chunks(LANES)).zip(previous.chunks(LANES));
    for ((parameters, base), previous) in pieces {
        let values = parameters.iter().zip(base).zip(previous);
        for (((p, b), q), (square, product)) in values.zip(squares.iter_mut().zip(&mut products)) {
            let update = f64::from(*p) - f64::from(*b);
            let before = f64::from(*b) - f64::from(*q);
            *square += before * before;
            *product += update * before;
        }
    }
    [squares, products]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_and_the_cosine_are_those_of_the_whole_model() {
        let vector = |scale: f32| -> Vec<f32> { (0..21u8).map(|at| f32::from(at) * scale).collect() };
        let (previous, base, parameters) = (vector(1.0), vector(3.0), vector(2.0));
        // 0 + 1 + 4 + ... + 400 = 2870.
        let mut sums = Sums::default();
        for at in [0..13, 13..21] {
            let momentum = &vector(0.5)[at.clone()];
            sums.add(Sums::of_chunk(&parameters[at.clone()], &base[at.clone()], momentum, &previous[at]));
        }
        let statistics = sums.statistics(2870.0, true);
        assert!((statistics.parameter_norm - (4.0 * 2870f64).sqrt()).abs() < 1e-9);
        assert!((statistics.momentum_norm.unwrap() - (2870f64 / 4.0).sqrt()).abs() < 1e-9);
        // The updates are opposite: twice the vector forth, once back.
        assert!((statistics.update_cosine.unwrap() + 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_right_angle_has_the_cosine_0_and_no_update_has_none() {
        let sums = Sums::of_chunk(&[1.0, 2.0], &[1.0, 1.0], &[], &[0.0, 1.0]);
        assert_eq!(sums.statistics(1.0, false).update_cosine, Some(0.0));
        assert_eq!(sums.statistics(0.0, false).update_cosine, None);
        let first = Sums::of_chunk(&[1.0, 2.0], &[1.0, 1.0], &[], &[]);
        let statistics = first.statistics(1.0, false);
        assert_eq!((statistics.update_cosine, statistics.momentum_norm), (None, None));
    }
}
