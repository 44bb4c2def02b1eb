//! Muon (Jordan et al., kellerjordan.github.io/posts/muon, 2024) for the blocks' matrices, AdamW for the rest.
//!
//! ```text
//! b = momentum b + (1 - momentum) g
//! u = momentum b + (1 - momentum) g                                 (Nesterov)
//! theta = theta - learning_rate (weight_decay theta + 0.2 sqrt(max(rows, columns)) NewtonSchulz(u))
//! ```
//!
//! The factor gives updates the root mean square of AdamW's, so that one learning rate and one decay serve both
//! (Liu et al., arXiv 2502.16982, eq. 4). `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` computes the
//! same. What a checkpoint stores as one matrix is one here: GPT-2's query, key and value together.

use tch::{Kind, TchError, Tensor};

use super::{
    super::{
        error::{Doing, TrainerError},
        parameters::{Matrix, Parameters},
    },
    AdamW, Control, Settings,
};

/// Newton-Schulz iterations, and the coefficients of the quintic that each applies to the singular values: those of
/// Muon's authors.
const ITERATIONS: usize = 5;
const QUINTIC: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// No matrix is divided by a smaller norm.
const NORM_MIN: f64 = 1e-7;

pub(super) struct Muon {
    momentum: f64,
    weight_decay: f64,
    matrices: Vec<MatrixState>,
    others: AdamW,
}

/// Views `[rows, columns]` of the flat vectors.
struct MatrixState {
    parameters: Tensor,
    gradients: Tensor,
    momentum: Tensor,
    /// 0.2 sqrt(max(rows, columns)).
    scale: f64,
}

impl Muon {
    pub(super) fn new(
        settings: Settings,
        momentum: f64,
        parameters: &Parameters,
        first: &Tensor,
        second: &Tensor,
    ) -> Result<Self, TchError> {
        let state = |Matrix { offset, rows, columns }: Matrix| {
            let view = |flat: &Tensor| flat.f_narrow(0, offset, rows * columns)?.f_view([rows, columns]);
            #[allow(clippy::cast_precision_loss)]
            let scale = 0.2 * (rows.max(columns) as f64).sqrt();
            Ok(MatrixState {
                parameters: view(&parameters.values)?,
                gradients: view(&parameters.gradients)?,
                momentum: view(first)?,
                scale,
            })
        };
        Ok(Self {
            momentum,
            weight_decay: settings.weight_decay,
            matrices: parameters.matrices().into_iter().map(state).collect::<Result<_, TchError>>()?,
            others: AdamW::new(settings, parameters.others(), parameters, first, second)?,
        })
    }

    /// `steps` is the number of this step, from 1.
    pub(super) fn step(
        &self,
        learning_rate: f64,
        steps: &Tensor,
        control: &Control,
    ) -> Result<(), TrainerError> {
        self.others.step(learning_rate, steps, control)?;
        self.step_matrices(learning_rate, control).doing("making a Muon step")
    }

    fn step_matrices(&self, learning_rate: f64, control: &Control) -> Result<(), TchError> {
        let taken = control.taken()?;
        let weight = taken.f_mul_scalar(1.0 - self.momentum)?;
        let decay = taken.f_mul_scalar(-learning_rate * self.weight_decay)?.f_add_scalar(1.0)?;
        for matrix in &self.matrices {
            control.apply_to(&matrix.gradients)?;
            let [mut parameters, mut momentum] =
                [&matrix.parameters, &matrix.momentum].map(Tensor::shallow_clone);
            let _ = momentum.f_lerp_tensor_(&matrix.gradients, &weight)?;
            let update = orthogonal(&matrix.gradients.f_lerp(&momentum, self.momentum)?)?;
            let rate = taken.f_mul_scalar(-learning_rate * matrix.scale)?;
            let _ = parameters.f_mul_(&decay)?.f_addcmul_(&update.f_to_kind(Kind::Float)?, &rate)?;
        }
        Ok(())
    }
}

/// A matrix with about the singular vectors of `matrix` and singular values between 0.7 and 1.2, in bf16.
fn orthogonal(matrix: &Tensor) -> Result<Tensor, TchError> {
    let (rows, columns) = matrix.size2()?;
    let mut x = matrix.f_to_kind(Kind::BFloat16)?;
    // The products are of the shorter side.
    if rows > columns {
        x = x.f_transpose(0, 1)?;
    }
    x = x.f_div(&x.f_norm()?.f_clamp_min(NORM_MIN)?)?;
    let [a, b, c] = QUINTIC;
    for _ in 0..ITERATIONS {
        let gram = x.f_matmul(&x.f_transpose(0, 1)?)?;
        let sum = gram.f_matmul(&gram)?.f_mul_scalar(c)?.f_add(&gram.f_mul_scalar(b)?)?;
        x = sum.f_matmul(&x)?.f_add(&x.f_mul_scalar(a)?)?;
    }
    if rows > columns { x.f_transpose(0, 1) } else { Ok(x) }
}
