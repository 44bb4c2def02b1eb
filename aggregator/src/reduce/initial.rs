//! Version 0 of a run.

use std::io;

use consort_common::ids::RunName;
use rayon::prelude::*;

use super::broadcast::Rounding;
use crate::models::{ChunkRecord, ModelError, ModelFiles, ModelLayout, ModelVersion, NewChunk, NewVersion};

/// Writes version 0, rounded to what is sent, with moments of zeros where the layout has any: `fill` is
/// called with a position and the chunk of the flat vector that begins there, by several threads at a time. To
/// be called before the run is recorded, never after: it replaces a version 0 that is there.
///
/// # Errors
/// [`ModelError::Full`], before anything is filled; the system's; or one of `fill`. Nothing is left then.
pub fn create_initial<E: From<ModelError> + Send>(
    models: &ModelFiles,
    run: &RunName,
    layout: ModelLayout,
    fill: impl Fn(u64, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<ModelVersion, E> {
    let version = models.begin(run, 0, layout)?;
    let write = |scratch: &mut Scratch, index| scratch.write(&version, index, &fill);
    let chunks = (0..layout.plan.chunks()).into_par_iter().map_init(Scratch::default, write);
    let chunks = chunks.collect::<Result<Vec<_>, E>>()?;
    Ok(version.finish(&chunks)?)
}

/// A chunk's vectors, kept from chunk to chunk.
#[derive(Default)]
struct Scratch {
    parameters: Vec<f32>,
    residual: Vec<f32>,
    zeros: Vec<f32>,
    payload: Vec<u8>,
}

impl Scratch {
    fn write<E: From<ModelError>>(
        &mut self,
        version: &NewVersion,
        index: u32,
        fill: impl Fn(u64, &mut [f32]) -> Result<(), E>,
    ) -> Result<ChunkRecord, E> {
        let Self { parameters, residual, zeros, payload } = self;
        let layout = version.layout();
        let length = layout.plan.length(index).map_err(ModelError::from)?;
        parameters.resize(length, 0.0);
        residual.resize(if layout.has_residual() { length } else { 0 }, 0.0);
        zeros.resize(length, 0.0);
        let zeros = |there: bool| if there { &zeros[..] } else { &[] };
        fill(layout.plan.range(index).map_err(ModelError::from)?.start, parameters)?;

        let rounding = Rounding::new(layout.encoding);
        // An update has nothing to begin from: version 0 is sent whole, and nothing is rounded away.
        if let (None, Some(encoding)) = (layout.encoding.update(), rounding.encoding()) {
            payload.resize(encoding.codec().encoded_bytes(length), 0);
            let rounded = rounding.apply(&[], parameters, residual, payload);
            rounded.map_err(|error| ModelError::from(io::Error::other(error)))?;
        }
        let chunk = NewChunk {
            parameters,
            momentum: zeros(layout.momentum),
            // What it is at first is put in its place when it is read.
            second_moment: zeros(layout.second_moment),
            residual,
            whole_payload: payload,
            update_payload: &[],
        };
        Ok(version.write(index, chunk)?)
    }
}
