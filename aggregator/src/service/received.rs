//! A chunk of an upload, checked and then written: what holds for deltas holds for the models that runs start
//! from.

use bytes::Bytes;
use consort_common::ids::Digest;
use tonic::Status;

use super::digest;
use crate::{
    driver::DriverError,
    spool::{DeltaLayout, SpooledDelta},
};

/// A chunk whose sizes are right.
pub(super) struct Received {
    pub(super) index: u32,
    parameters: usize,
    pub(super) payload: Bytes,
    digest: Digest,
}

impl Received {
    /// Checks what can be seen without looking at the payload.
    pub(super) fn new(
        index: u32,
        payload: Bytes,
        announced: &[u8],
        layout: DeltaLayout,
    ) -> Result<Self, Status> {
        let parameters = layout.plan().length(index);
        let parameters = parameters.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let expected = layout.payload_bytes(index).unwrap_or_default();
        if payload.len() != expected {
            return Err(Status::invalid_argument(format!(
                "chunk {index}: has {} bytes; its encoding takes {expected}",
                payload.len()
            )));
        }
        let digest = digest("chunk digest", announced)?;
        Ok(Self { index, parameters, payload, digest })
    }

    /// Checks the payload, and writes it; `values` is room to decode it in.
    pub(super) fn write(&self, delta: &SpooledDelta, values: &mut Vec<f32>) -> Result<(), DriverError> {
        let index = self.index;
        if Digest::of(&self.payload) != self.digest {
            return Err(DriverError::DamagedChunk { index });
        }
        values.resize(self.parameters, 0.0);
        let codec = delta.layout().encoding().codec();
        codec.decode(&self.payload, values).map_err(|source| DriverError::Undecodable { index, source })?;
        Ok(delta.write(index, &self.payload, self.digest)?)
    }
}
