//! ADOPT with its clipping (Taniguchi et al., arXiv 2411.02853, algorithm 2), with decoupled weight decay as in its
//! authors' implementation:
//!
//! ```text
//! v0 = g0^2
//! m_t = beta1 m_(t-1) + (1 - beta1) clip(g_t / max(sqrt(v_(t-1)), epsilon), c_t),  c_t = t^(1/4)
//! theta_t = theta_(t-1) - learning_rate (weight_decay theta_(t-1) + m_t)
//! v_t = beta2 v_(t-1) + (1 - beta2) g_t^2
//! ```

use tch::{TchError, Tensor};

use super::{
    super::parameters::{Parameters, Span},
    Control, Settings,
};

/// Parameters at a time: what the passes over them make lies in a core's cache then, and takes no memory that counts.
/// A GPU is kept busy by more.
const PIECE_CPU: i64 = 1 << 17;
const PIECE_GPU: i64 = 1 << 24;

pub(super) struct Adopt {
    settings: Settings,
    pieces: Vec<Piece>,
}

/// Views of one stretch of the flat vectors.
struct Piece {
    parameters: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    decays: bool,
}

impl Adopt {
    pub(super) fn new(
        settings: Settings,
        parameters: &Parameters,
        first: &Tensor,
        second: &Tensor,
    ) -> Result<Self, TchError> {
        let piece = if first.device().is_cuda() { PIECE_GPU } else { PIECE_CPU };
        let mut pieces = Vec::new();
        for Span { offset, length, decays } in parameters.spans() {
            for start in (0..length).step_by(usize::try_from(piece).unwrap_or(usize::MAX)) {
                let view = |flat: &Tensor| flat.f_narrow(0, offset + start, piece.min(length - start));
                pieces.push(Piece {
                    parameters: view(&parameters.values)?,
                    gradients: view(&parameters.gradients)?,
                    first: view(first)?,
                    second: view(second)?,
                    decays,
                });
            }
        }
        Ok(Self { settings, pieces })
    }

    /// `steps` is the number of steps before this one. The first only measures the gradient.
    pub(super) fn step(&self, learning_rate: f64, steps: &Tensor, control: &Control) -> Result<(), TchError> {
        let Settings { beta1, beta2, epsilon, weight_decay } = self.settings;
        let taken = control.taken()?;
        let is_first = steps.f_eq(0.0)?.f_to_kind(tch::Kind::Float)?;
        let moves = taken.f_mul(&is_first.f_rsub_scalar(1.0)?)?;
        // How far each state goes to its new value: not at all where the step is skipped.
        let first_weight = moves.f_mul_scalar(1.0 - beta1)?;
        let second_weight = moves.f_mul_scalar(1.0 - beta2)?.f_add(&taken.f_mul(&is_first)?)?;
        let rate = moves.f_mul_scalar(-learning_rate)?;
        let decay = rate.f_mul_scalar(weight_decay)?.f_add_scalar(1.0)?;
        let limit = steps.f_pow_tensor_scalar(0.25)?;
        let lower = limit.f_neg()?;
        for piece in &self.pieces {
            control.apply_to(&piece.gradients)?;
            let [mut parameters, mut first, mut second] =
                [&piece.parameters, &piece.first, &piece.second].map(Tensor::shallow_clone);
            let mut normed = piece.gradients.f_div(&second.f_sqrt()?.f_clamp_min_(epsilon)?)?;
            let _ = normed.f_clamp_tensor_(Some(&lower), Some(&limit))?;
            let _ = first.f_lerp_tensor_(&normed, &first_weight)?;
            if piece.decays {
                let _ = parameters.f_mul_(&decay)?;
            }
            let _ = parameters.f_addcmul_(&first, &rate)?;
            let _ = second.f_lerp_tensor_(&piece.gradients.f_square()?, &second_weight)?;
        }
        Ok(())
    }
}
