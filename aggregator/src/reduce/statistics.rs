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
    /// Of the mean delta.
    pub(super) delta_squares: f64,
    /// Of the update.
    pub(super) update_squares: f64,
    parameter_squares: f64,
    momentum_squares: f64,
    /// Of the update before.
    previous_squares: f64,
    /// Of the products of both updates.
    products: f64,
}

/// The same while a chunk is folded: partial sums, which grow tile by tile.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    pub(super) delta: [f64; LANES],
    update: [f64; LANES],
    parameters: [f64; LANES],
    momentum: [f64; LANES],
    previous: [f64; LANES],
    products: [f64; LANES],
}

impl Lanes {
    /// Adds a tile, which has a multiple of [`LANES`] values unless it is a chunk's last; `momentum` and `previous`,
    /// the parameters of the version before the base, are empty where there is none. The delta is added by whoever
    /// rounds it.
    pub(super) fn add(&mut self, parameters: &[f32], base: &[f32], momentum: &[f32], previous: &[f32]) {
        move_and_place(&mut self.update, &mut self.parameters, parameters, base);
        squares(&mut self.momentum, momentum);
        compare(&mut self.previous, &mut self.products, parameters, base, previous);
    }

    pub(super) fn sums(&self) -> Sums {
        let sum = |lanes: &[f64; LANES]| lanes.iter().sum::<f64>();
        Sums {
            delta_squares: sum(&self.delta),
            update_squares: sum(&self.update),
            parameter_squares: sum(&self.parameters),
            momentum_squares: sum(&self.momentum),
            previous_squares: sum(&self.previous),
            products: sum(&self.products),
        }
    }
}

impl Sums {
    pub(super) fn add(&mut self, other: Self) {
        self.delta_squares += other.delta_squares;
        self.update_squares += other.update_squares;
        self.parameter_squares += other.parameter_squares;
        self.momentum_squares += other.momentum_squares;
        self.previous_squares += other.previous_squares;
        self.products += other.products;
    }

    /// If these are of the whole model.
    pub(super) fn statistics(self, has_momentum: bool) -> ModelStatistics {
        let norms = self.update_squares.sqrt() * self.previous_squares.sqrt();
        // Rounding may take it a little beyond.
        let update_cosine = (norms > 0.0).then(|| (self.products / norms).clamp(-1.0, 1.0));
        ModelStatistics {
            parameter_norm: self.parameter_squares.sqrt(),
            momentum_norm: has_momentum.then(|| self.momentum_squares.sqrt()),
            update_cosine,
        }
    }
}

/// Squares of the update, and of the parameters.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn move_and_place(update: &mut [f64; LANES], place: &mut [f64; LANES], parameters: &[f32], base: &[f32]) {
    let add = |update: &mut [f64; LANES], place: &mut [f64; LANES], parameters: &[f32], base: &[f32]| {
        for (((p, b), update), place) in parameters.iter().zip(base).zip(update).zip(place) {
            let (p, b) = (f64::from(*p), f64::from(*b));
            *update += (p - b) * (p - b);
            *place += p * p;
        }
    };
    let (groups, rest) = parameters.as_chunks::<LANES>();
    let (base_groups, base_rest) = base.as_chunks::<LANES>();
    for (parameters, base) in groups.iter().zip(base_groups) {
        add(update, place, parameters, base);
    }
    add(update, place, rest, base_rest);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn squares(lanes: &mut [f64; LANES], values: &[f32]) {
    let add = |lanes: &mut [f64; LANES], values: &[f32]| {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    };
    let (groups, rest) = values.as_chunks::<LANES>();
    for values in groups {
        add(lanes, values);
    }
    add(lanes, rest);
}

/// Squares of the update before, and products of both updates.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn compare(
    squares: &mut [f64; LANES],
    products: &mut [f64; LANES],
    parameters: &[f32],
    base: &[f32],
    previous: &[f32],
) {
    let add = |squares: &mut [f64; LANES], products: &mut [f64; LANES], values: [&[f32]; 3]| {
        let [parameters, base, previous] = values;
        let values = parameters.iter().zip(base).zip(previous);
        for (((p, b), q), (square, product)) in values.zip(squares.iter_mut().zip(products)) {
            let update = f64::from(*p) - f64::from(*b);
            let before = f64::from(*b) - f64::from(*q);
            *square += before * before;
            *product += update * before;
        }
    };
    let (groups, rest) = previous.as_chunks::<LANES>();
    let (parameter_groups, parameter_rest) = parameters.as_chunks::<LANES>();
    let (base_groups, base_rest) = base.as_chunks::<LANES>();
    for ((parameters, base), previous) in parameter_groups.iter().zip(base_groups).zip(groups) {
        add(squares, products, [parameters, base, previous]);
    }
    add(squares, products, [parameter_rest, base_rest, rest]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_and_the_cosine_are_those_of_the_whole_model() {
        let vector = |scale: f32| -> Vec<f32> { (0..21u8).map(|at| f32::from(at) * scale).collect() };
        let (previous, base, parameters, momentum) = (vector(1.0), vector(3.0), vector(2.0), vector(0.5));
        // 0 + 1 + 4 + ... + 400 = 2870; the first chunk is two tiles.
        let mut sums = Sums::default();
        for tiles in [&[(0, 8), (8, 13)][..], &[(13, 21)]] {
            let mut lanes = Lanes::default();
            for (begin, end) in tiles {
                let at = *begin..*end;
                let [p, b, m, q] =
                    [&parameters, &base, &momentum, &previous].map(|vector| &vector[at.clone()]);
                lanes.add(p, b, m, q);
            }
            sums.add(lanes.sums());
        }
        assert_eq!(sums.update_squares, 2870.0);
        let statistics = sums.statistics(true);
        assert!((statistics.parameter_norm - (4.0 * 2870f64).sqrt()).abs() < 1e-9);
        assert!((statistics.momentum_norm.unwrap() - (2870f64 / 4.0).sqrt()).abs() < 1e-9);
        // The updates are opposite: twice the vector forth, once back.
        assert!((statistics.update_cosine.unwrap() + 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_right_angle_has_the_cosine_0_and_no_update_has_none() {
        let statistics = |parameters: &[f32], previous: &[f32]| {
            let mut lanes = Lanes::default();
            lanes.add(parameters, &[1.0, 1.0], &[], previous);
            lanes.sums().statistics(false)
        };
        assert_eq!(statistics(&[1.0, 2.0], &[0.0, 1.0]).update_cosine, Some(0.0));
        assert_eq!(statistics(&[1.0, 1.0], &[0.0, 1.0]).update_cosine, None);
        let first = statistics(&[1.0, 2.0], &[]);
        assert_eq!((first.update_cosine, first.momentum_norm), (None, None));
    }

    /// One value that is not finite makes its sum so: the fold looks at the sums, not at each value.
    #[test]
    fn a_value_that_is_not_finite_shows_in_its_sums() {
        for at in [3, 17, 20] {
            let mut bad = [1.0; 21];
            bad[at] = f32::INFINITY;
            let mut lanes = Lanes::default();
            lanes.add(&bad, &[1.0; 21], &bad, &[]);
            let sums = lanes.sums();
            assert!(
                ![sums.update_squares, sums.parameter_squares, sums.momentum_squares]
                    .iter()
                    .any(|sum| sum.is_finite())
            );
        }
    }
}
