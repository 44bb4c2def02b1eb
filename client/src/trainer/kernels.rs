//! Safe wrappers around `kernels.cpp`: operations of the models whose gradients go straight to where the
//! weights' gradients are kept ([`Parameters`](super::parameters::Parameters) places them).
//!
//! Fail as `tch` does, so that a model is one chain of operations. libtorch checks shapes, kinds and devices.

use std::{ffi::c_int, ptr::null_mut};

use tch::{Device, TchError, Tensor};

use super::shim::{Handle, handle, output};

unsafe extern "C" {
    fn consort_linear(x: Handle, weight: Handle, bias: Handle, input_first: bool, out: *mut Handle) -> c_int;
    fn consort_embedding(weight: Handle, tokens: Handle, out: *mut Handle) -> c_int;
    fn consort_head_loss(
        hidden: Handle,
        weight: Handle,
        targets: Handle,
        rows: i64,
        scale: f64,
        out: *mut Handle,
    ) -> c_int;
}

/// `[..., in]` to `[..., out]` by a weight `[out, in]` and perhaps a bias `[out]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
    let bias = bias.map_or(null_mut(), handle);
    // SAFETY: see `output`; a bias may be null.
    output(|out| unsafe { consort_linear(handle(x), handle(weight), bias, false, out) })
}

/// `[..., in]` to `[..., out]` by a weight `[in, out]`, as Hugging Face's `Conv1D` stores it, and a bias `[out]`.
pub(super) fn linear_input_first(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: see `output`.
    output(|out| unsafe { consort_linear(handle(x), handle(weight), handle(bias), true, out) })
}

/// Rows of a weight `[vocabulary, width]` by tokens of any shape.
pub(super) fn embedding(weight: &Tensor, tokens: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: see `output`.
    output(|out| unsafe { consort_embedding(handle(weight), handle(tokens), out) })
}

/// Logits at a time: 16 MiB on a CPU, half of what its cores' last cache holds; on a GPU enough to be busy.
pub(super) fn logits_max(device: Device) -> i64 {
    if device.is_cuda() { 1 << 27 } else { 1 << 22 }
}
/// Fewer rows would read the weight too often.
const ROWS_MIN: i64 = 128;

/// `scale` times the sum of the cross-entropies, in nats, of `targets` `[rows]` given `hidden` `[..., width]` times
/// the weight `[vocabulary, width]`, as a scalar. Targets of -100 do not count.
///
/// Where `hidden` requires a gradient, that of the weight is added to at once, and the loss must be
/// propagated back as it is.
pub(super) fn head_loss(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    scale: f64,
) -> Result<Tensor, TchError> {
    let vocabulary = weight.size().first().copied().unwrap_or_default().max(1);
    let rows = (logits_max(weight.device()) / vocabulary).max(ROWS_MIN);
    // SAFETY: see `output`.
    output(|out| unsafe {
        consort_head_loss(handle(hidden), handle(weight), handle(targets), rows, scale, out)
    })
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::{
        super::{shim::set_gradient, test_device},
        *,
    };

    /// Made-up values between -1 and 1, different for each `seed`.
    fn values(shape: &[i64], seed: i64) -> Tensor {
        let count: i64 = shape.iter().product();
        let phase = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.7 + seed as f64;
        (phase.square() + phase).sin().to_kind(Kind::Float).reshape(shape).to_device(test_device())
    }

    /// A leaf with a place for its gradient in which ones lie already: gradients are added.
    fn weight(shape: &[i64], seed: i64) -> (Tensor, Tensor) {
        let leaf = values(shape, seed).set_requires_grad(true);
        let gradient = leaf.detach().ones_like();
        set_gradient(&leaf, &gradient).unwrap();
        (leaf, gradient)
    }

    /// The same leaf for libtorch's own operations.
    fn plain(leaf: &Tensor) -> Tensor {
        leaf.detach().copy().set_requires_grad(true)
    }

    #[track_caller]
    fn assert_near(left: &Tensor, right: &Tensor) {
        assert_within(1e-5, left, right);
    }

    #[track_caller]
    fn assert_within(allowed: f64, left: &Tensor, right: &Tensor) {
        assert_eq!(left.size(), right.size());
        let difference = (left - right).abs().max().double_value(&[]);
        assert!(difference < allowed, "{difference:e}");
    }

    /// A leaf in bf16 with the place for its gradient in fp32, and the same weight in fp32 for libtorch.
    fn rounded(shape: &[i64], seed: i64) -> (Tensor, Tensor, Tensor) {
        let leaf = values(shape, seed).to_kind(Kind::BFloat16).set_requires_grad(true);
        let gradient = leaf.detach().to_kind(Kind::Float).full_like(THERE_BEFORE);
        set_gradient(&leaf, &gradient).unwrap();
        let plain = leaf.detach().to_kind(Kind::Float).set_requires_grad(true);
        (leaf, gradient, plain)
    }

    /// What lies in the place of a gradient in fp32: sums that were rounded to bf16 would be wrong by up to 2.
    const THERE_BEFORE: f64 = 1000.0;

    /// What bf16 loses of numbers of about 1.
    const BF16_ERROR: f64 = 0.03;

    #[test]
    fn linear_in_bf16_adds_gradients_in_fp32() {
        let x = plain(&values(&[2, 5, 6], 1).to_kind(Kind::BFloat16).to_kind(Kind::Float));
        let (w, gradient, w_plain) = rounded(&[4, 6], 2);
        let x_plain = plain(&x);
        let (ours, theirs) = (linear(&x, &w, None).unwrap(), x_plain.linear::<&Tensor>(&w_plain, None));
        assert_eq!(ours.kind(), Kind::BFloat16);
        assert_within(BF16_ERROR, &ours.to_kind(Kind::Float), &theirs);
        for y in [&ours, &theirs] {
            (y.to_kind(Kind::Float) * values(&[2, 5, 4], 3)).sum(Kind::Float).backward();
        }
        assert_within(BF16_ERROR, &x.grad(), &x_plain.grad());
        assert_within(BF16_ERROR, &gradient, &(w_plain.grad() + THERE_BEFORE));
    }

    #[test]
    fn linear_and_its_gradients_are_those_of_libtorch() {
        let x = plain(&values(&[2, 5, 6], 1));
        let (w, gradient) = weight(&[4, 6], 2);
        let (x_plain, w_plain) = (plain(&x), plain(&w));
        let (ours, theirs) = (linear(&x, &w, None).unwrap(), x_plain.linear::<&Tensor>(&w_plain, None));
        assert_near(&ours, &theirs);
        for y in [&ours, &theirs] {
            (y * values(&[2, 5, 4], 3)).sum(Kind::Float).backward();
        }
        assert_near(&x.grad(), &x_plain.grad());
        assert_near(&gradient, &(w_plain.grad() + 1.0));
    }

    #[test]
    fn linear_of_an_input_first_weight_and_its_gradients_are_those_of_libtorch() {
        let x = plain(&values(&[2, 5, 6], 1));
        let ((w, gradient), (b, b_gradient)) = (weight(&[6, 4], 2), weight(&[4], 3));
        let (x_plain, w_plain, b_plain) = (plain(&x), plain(&w), plain(&b));
        let ours = linear_input_first(&x, &w, &b).unwrap();
        let theirs = x_plain.linear(&w_plain.transpose(0, 1), Some(&b_plain));
        assert_near(&ours, &theirs);
        for y in [&ours, &theirs] {
            (y * values(&[2, 5, 4], 4)).sum(Kind::Float).backward();
        }
        assert_near(&x.grad(), &x_plain.grad());
        assert_near(&gradient, &(w_plain.grad() + 1.0));
        assert_near(&b_gradient, &(b_plain.grad() + 1.0));
    }

    #[test]
    fn an_embedding_adds_the_gradients_of_a_token_that_comes_twice() {
        let (w, gradient) = weight(&[5, 3], 1);
        let tokens = Tensor::from_slice(&[4_i64, 0, 4, 2]).view([2, 2]).to_device(test_device());
        let w_plain = plain(&w);
        let ours = embedding(&w, &tokens).unwrap();
        let theirs = Tensor::embedding(&w_plain, &tokens, -1, false, false);
        assert_near(&ours, &theirs);
        for y in [&ours, &theirs] {
            (y * values(&[2, 2, 3], 2)).sum(Kind::Float).backward();
        }
        assert_near(&gradient, &(w_plain.grad() + 1.0));
    }

    /// Both losses of `rows` rows, one target of which does not count, and both sides' gradients.
    fn check_head_loss(kind: Kind, rows: i64, chunk: i64) {
        let hidden = plain(&values(&[rows, 6], 1).to_kind(kind).to_kind(Kind::Float));
        let (w, gradient, w_plain) = if kind == Kind::BFloat16 {
            rounded(&[9, 6], 2)
        } else {
            let (w, gradient) = weight(&[9, 6], 2);
            let w_plain = plain(&w);
            (w, gradient, w_plain)
        };
        let (allowed, before) = if kind == Kind::BFloat16 { (BF16_ERROR, THERE_BEFORE) } else { (1e-5, 1.0) };
        let targets = Tensor::arange(rows, (Kind::Int64, test_device())).remainder(9);
        let _ = targets.narrow(0, 1, 1).fill_(-100);
        let hidden_plain = plain(&hidden);
        let ours = output(|out| unsafe {
            consort_head_loss(handle(&hidden), handle(&w), handle(&targets), chunk, 0.25, out)
        })
        .unwrap();
        let logits = hidden_plain.linear::<&Tensor>(&w_plain, None);
        let sum = tch::Reduction::Sum;
        let theirs = logits.cross_entropy_loss::<&Tensor>(&targets, None, sum, -100, 0.0) * 0.25;
        assert_within(allowed, &ours, &theirs);
        ours.backward();
        theirs.backward();
        assert_within(allowed, &hidden.grad(), &hidden_plain.grad());
        assert_within(allowed, &gradient, &(w_plain.grad() + before));
    }

    #[test]
    fn the_loss_in_chunks_and_its_gradients_are_those_of_all_logits_at_once() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (rows, chunk) in [(7, 7), (7, 3), (7, 1), (8, 4), (2, 100)] {
                check_head_loss(kind, rows, chunk);
            }
        }
    }

    #[test]
    fn a_loss_that_is_only_measured_adds_no_gradient() {
        let (w, gradient) = weight(&[9, 6], 2);
        let targets = Tensor::from_slice(&[3_i64, 8]).to_device(test_device());
        let measured = tch::no_grad(|| head_loss(&values(&[2, 6], 1), &w, &targets, 1.0)).unwrap();
        assert!(measured.double_value(&[]) > 0.0 && !measured.requires_grad());
        assert_near(&gradient, &gradient.ones_like());
    }

    #[test]
    fn shapes_that_do_not_fit_are_an_error_of_one_line() {
        let (w, _) = weight(&[4, 6], 2);
        let error = linear(&values(&[2, 5], 1), &w, None).unwrap_err().to_string();
        assert!(!error.is_empty() && !error.contains('\n'), "{error}");
    }
}
