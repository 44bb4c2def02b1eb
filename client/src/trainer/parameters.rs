//! All parameters in one flat fp32 tensor on the device, in the manifest's order, and their gradients in
//! another.
//!
//! What the model computes with are leaf views of the first, whose gradients are views of the second. So a
//! model is loaded and read out by one copy, and the norm, the clipping and the clearing of the gradient
//! are one kernel each. In bf16 there is a third, a copy of the first in that precision, of which the leaves of
//! matrix products are views; their gradients are fp32 like all. This module owns every copy of numbers between host and device vectors and checks
//! their lengths: libtorch does not.

use consort_common::{
    model::{Manifest, TensorSpec},
    spec::Precision,
};
use tch::{Device, Kind, TchError, Tensor};

use super::{
    error::{Doing, TrainerError},
    shim,
};

pub(super) struct Parameters {
    tensors: Vec<TensorSpec>,
    /// `[parameters]`; never requires gradients itself.
    pub(super) values: Tensor,
    /// `[parameters]`; `[0]` where nothing is trained.
    pub(super) gradients: Tensor,
    /// `[parameters]` in bf16, where products are computed in that.
    rounded: Option<Tensor>,
}

/// A stretch of the flat vector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Span {
    pub(super) offset: i64,
    pub(super) length: i64,
    /// Whether weight decay applies.
    pub(super) decays: bool,
}

/// A matrix of a block, in the flat vector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Matrix {
    pub(super) offset: i64,
    pub(super) rows: i64,
    pub(super) columns: i64,
}

impl Parameters {
    /// Zeros, until [`Parameters::load`].
    pub(super) fn new(
        manifest: &Manifest,
        precision: Precision,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let mut parameters = Self::frozen(manifest, device)?;
        let count = parameters.values.numel() as i64;
        parameters.gradients = zeros(count, device)?;
        if precision == Precision::Bf16 {
            let rounded = Tensor::f_zeros([count], (Kind::BFloat16, device));
            parameters.rounded = Some(rounded.doing("allocating the model")?);
        }
        Ok(parameters)
    }

    /// The same without gradients and in fp32: the values are read only.
    pub(super) fn frozen(manifest: &Manifest, device: Device) -> Result<Self, TrainerError> {
        let count = i64::try_from(manifest.parameters())
            .map_err(|_| TrainerError::Settings("it has more parameters than fit an address".to_owned()))?;
        let (values, gradients) = (zeros(count, device)?, zeros(0, device)?);
        Ok(Self { tensors: manifest.tensors().to_vec(), values, gradients, rounded: None })
    }

    /// The tensor `name` as a leaf in its shape, in fp32.
    pub(super) fn leaf(&self, name: &str) -> Result<Tensor, TrainerError> {
        self.view(&[name], &self.values)
    }

    /// Tensors that lie next to each other, as one leaf: joined along their first dimension, in the precision of
    /// products. For operations that add to gradients themselves (`kernels`).
    pub(super) fn factor(&self, names: &[&str]) -> Result<Tensor, TrainerError> {
        self.view(names, self.rounded.as_ref().unwrap_or(&self.values))
    }

    fn view(&self, names: &[&str], source: &Tensor) -> Result<Tensor, TrainerError> {
        let missing = || TrainerError::Settings(format!("the manifest has no tensors {names:?} in a row"));
        let first =
            names.first().and_then(|name| self.tensors.iter().position(|tensor| tensor.name == *name));
        let first = first.ok_or_else(missing)?;
        let run = self.tensors.get(first..first + names.len()).ok_or_else(missing)?;
        let inner = &run[0].shape[1..];
        if run.iter().zip(names).any(|(tensor, name)| tensor.name != *name || tensor.shape[1..] != *inner) {
            return Err(missing());
        }

        let offset: usize = self.tensors[..first].iter().map(TensorSpec::parameters).sum();
        let length: usize = run.iter().map(TensorSpec::parameters).sum();
        let rows = run.iter().map(|tensor| tensor.shape[0]).sum::<usize>();
        let shape: Vec<i64> = std::iter::once(&rows).chain(inner).map(|size| *size as i64).collect();
        let view = |flat: &Tensor| {
            flat.f_narrow(0, offset as i64, length as i64)?.f_view(shape.as_slice())?.f_detach()
        };
        let leaf = view(source).doing("placing a parameter")?;
        if self.gradients.numel() == 0 {
            return Ok(leaf);
        }
        let leaf = leaf.f_set_requires_grad(true).doing("placing a parameter")?;
        let gradient = view(&self.gradients).doing("placing a gradient")?;
        shim::set_gradient(&leaf, &gradient)?;
        Ok(leaf)
    }

    /// The flat vector cut where weight decay begins or ends.
    pub(super) fn spans(&self) -> Vec<Span> {
        self.cut(|_| true)
    }

    /// The same without the blocks' matrices.
    pub(super) fn others(&self) -> Vec<Span> {
        self.cut(|tensor| !tensor.is_hidden_matrix())
    }

    fn cut(&self, belongs: impl Fn(&TensorSpec) -> bool) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        for (offset, tensor) in self.placed().filter(|(_, tensor)| belongs(tensor)) {
            let (length, decays) = (tensor.parameters() as i64, tensor.decays());
            match spans.last_mut() {
                Some(last) if last.decays == decays && last.offset + last.length == offset => {
                    last.length += length;
                }
                _ => spans.push(Span { offset, length, decays }),
            }
        }
        spans
    }

    /// The blocks' matrices.
    pub(super) fn matrices(&self) -> Vec<Matrix> {
        let matrices = self.placed().filter(|(_, tensor)| tensor.is_hidden_matrix());
        let matrix = |(offset, tensor): (i64, &TensorSpec)| {
            let [rows, columns] = [tensor.shape[0], tensor.shape[1]].map(|size| size as i64);
            Matrix { offset, rows, columns }
        };
        matrices.map(matrix).collect()
    }

    /// The tensors with their positions.
    fn placed(&self) -> impl Iterator<Item = (i64, &TensorSpec)> {
        self.tensors.iter().scan(0, |end, tensor| {
            let offset = *end;
            *end += tensor.parameters() as i64;
            Some((offset, tensor))
        })
    }

    pub(super) fn load(&mut self, flat: &[f32]) -> Result<(), TrainerError> {
        copy_in(&mut self.values, flat, "loading the model")?;
        self.round()
    }

    /// Brings the copy in bf16 up to date, after a change of the values.
    pub(super) fn round(&mut self) -> Result<(), TrainerError> {
        let Some(rounded) = &mut self.rounded else { return Ok(()) };
        rounded.f_copy_(&self.values).doing("rounding the parameters").map(drop)
    }

    /// Takes the values over piece by piece: `fill` is given the position of each piece in the flat vector.
    pub(super) fn load_pieces<E: From<TrainerError>>(
        &mut self,
        mut fill: impl FnMut(u64, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        /// 16 MiB: neither device nor disk gain from more.
        const PIECE_PARAMETERS: usize = 1 << 22;
        let count = self.values.numel();
        let mut piece = vec![0.0; PIECE_PARAMETERS.min(count)];
        for start in (0..count).step_by(PIECE_PARAMETERS) {
            let piece = &mut piece[..PIECE_PARAMETERS.min(count - start)];
            fill(start as u64, piece)?;
            let place = self.values.f_narrow(0, start as i64, piece.len() as i64);
            copy_in(&mut place.doing("loading the model")?, piece, "loading the model")?;
        }
        Ok(())
    }

    pub(super) fn clear_gradients(&mut self) -> Result<(), TrainerError> {
        self.gradients.f_zero_().doing("clearing the gradient").map(drop)
    }
}

/// A flat fp32 vector of zeros.
pub(super) fn zeros(count: i64, device: Device) -> Result<Tensor, TrainerError> {
    Tensor::f_zeros([count], (Kind::Float, device)).doing("allocating the model")
}

/// Copies `values` into the flat tensor `target`, wherever it is. Waits for the device.
pub(super) fn copy_in(target: &mut Tensor, values: &[f32], what: &'static str) -> Result<(), TrainerError> {
    check_length(target, values.len(), what)?;
    let no_grad = tch::no_grad_guard();
    // SAFETY: the tensor borrows `values` for no longer than this function, reads only, and the copy is over
    // when `f_copy_` returns. Its length is that of the slice.
    let host = unsafe {
        let data = values.as_ptr().cast();
        Tensor::f_from_blob(data, &[values.len() as i64], &[1], Kind::Float, Device::Cpu)
    };
    let copied: Result<(), TchError> = host.and_then(|host| target.f_copy_(&host));
    drop(no_grad);
    copied.doing(what)
}

/// Copies the flat tensor `source` into `values`. Waits for the device.
pub(super) fn copy_out(source: &Tensor, values: &mut [f32], what: &'static str) -> Result<(), TrainerError> {
    check_length(source, values.len(), what)?;
    source.f_copy_data(values, values.len()).doing(what)
}

fn check_length(tensor: &Tensor, found: usize, what: &'static str) -> Result<(), TrainerError> {
    let expected = tensor.numel();
    if found == expected { Ok(()) } else { Err(TrainerError::Length { what, found, expected }) }
}
