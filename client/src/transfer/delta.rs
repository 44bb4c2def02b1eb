//! A round's delta on disk: encoded once, chunk after chunk, each at a place that follows from its index;
//! and what is to be said of it, written last.

use std::{io::Write, path::Path};

use bytes::Bytes;
use consort_common::{
    atomic_file::{write_atomically, write_atomically_with},
    chunk::{ChunkPlan, NoSuchChunk},
    codec::{DecodeError, Encoding, encode_with_feedback},
    fragment::Fragment,
    ids::Digest,
};
use consort_proto::v1::DeltaChunk;
use rand::RngCore;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{TransferError, encoding_error::EncodingError, file_error};
use crate::{
    model_file,
    state::{self, RunDirectory},
};

/// Chunks that are encoded at once, before they are written: at most 64 MiB of them.
const GROUP_CHUNKS: usize = 16;

/// What is to be said of a delta, besides its values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaDescription {
    /// The round that it is of.
    pub round: u32,
    /// The run's specification.
    pub spec_digest: Digest,
    /// The tensors.
    pub manifest_digest: Digest,
    /// The model that training started from.
    pub base_digest: Digest,
    /// The run's cumulative step before the round.
    pub first_step: u64,
    /// Local steps taken.
    pub steps: u32,
    /// Tokens trained.
    pub tokens: u64,
    /// Mean loss over the round, in nats per token.
    pub train_loss: f64,
    /// Seconds of local training.
    pub train_seconds: f64,
    /// L2 norm of the values before they were encoded.
    pub norm: f64,
    /// BLAKE3 of the encoded chunks, one after another.
    pub encoded_digest: Digest,
    /// How they are encoded.
    pub encoding: Encoding,
    /// Drawn once; names the delta towards the aggregator.
    pub delta_id: [u8; 16],
}

/// A round's delta, on disk.
#[derive(Debug, Clone)]
pub struct Delta {
    /// What is to be said of it.
    pub description: DeltaDescription,
    plan: ChunkPlan,
    /// The encoded chunks; mapped, so that clones and chunks share one copy.
    encoded: Bytes,
}

impl Delta {
    /// Encodes the values of the round's fragment and makes them durable; returns the digest of what was written.
    /// Where the encoding asks for error feedback, `values` are in the end what it dropped, which is made durable
    /// too, and what it dropped of this fragment before, up to the round whose state this one began with, is added
    /// first. The delta is not there before [`describe`](Self::describe) has added its description.
    ///
    /// # Errors
    /// If the disk fails, or a value is not finite once the earlier error is added to it.
    pub fn write(
        directory: &RunDirectory,
        round: u32,
        fragment: Fragment,
        encoding: Encoding,
        values: &mut [f32],
    ) -> Result<Digest, TransferError> {
        let (path, plan) = (directory.delta(round), fragment.plan());
        let Some(decay) = encoding.error_feedback_decay() else {
            return write_chunks(&path, plan, encoding, values, |_, values, payload| {
                encoding.codec().encode(values, payload);
                Ok(())
            });
        };
        let before = directory.encoding_error_before(round, fragment.count())?;
        let before = before.and_then(|before| EncodingError::open(&before, encoding, values.len()));
        let before = before.as_ref().map(EncodingError::values);
        let digest = write_chunks(&path, plan, encoding, values, |start, values, payload| {
            let mut error = match before {
                Some(before) => before[start..start + values.len()].to_vec(),
                None => vec![0.0; values.len()],
            };
            encode_with_feedback(encoding.codec(), decay, values, &mut error, payload)?;
            values.copy_from_slice(&error);
            Ok(())
        })?;
        EncodingError::save(&directory.encoding_error(round), encoding, values)?;
        Ok(digest)
    }

    /// Adds the description: from now on the delta is there, and stays until it is removed. What was written
    /// just before is not hashed again.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn describe(
        directory: &RunDirectory,
        plan: ChunkPlan,
        description: DeltaDescription,
    ) -> Result<Self, TransferError> {
        let path = directory.delta_description(description.round);
        let json = serde_json::to_vec_pretty(&description).unwrap_or_default();
        write_atomically(&path, &json).map_err(file_error("write", &path))?;
        let encoded = model_file::map(&directory.delta(description.round))?;
        Ok(Self { description, plan, encoded })
    }

    /// The delta of `round`, if it is there, whole and undamaged.
    pub fn open(directory: &RunDirectory, round: u32, plan: ChunkPlan) -> Option<Self> {
        let description = std::fs::read(directory.delta_description(round)).ok()?;
        let description: DeltaDescription = serde_json::from_slice(&description).ok()?;
        let encoded = model_file::map(&directory.delta(round)).ok()?;
        let whole = encoded.len() as u64 == encoded_bytes(plan, description.encoding)
            && Digest::of_parallel(&encoded) == description.encoded_digest;
        whole.then_some(Self { description, plan, encoded })
    }

    /// Removes the delta of `round`.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn remove(directory: &RunDirectory, round: u32) -> Result<(), TransferError> {
        state::remove(&directory.delta_description(round))?;
        Ok(state::remove(&directory.delta(round))?)
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> u32 {
        self.plan.chunks()
    }

    /// Length of all encoded chunks, in bytes.
    pub fn encoded_bytes(&self) -> u64 {
        self.encoded.len() as u64
    }

    /// Length of one, in bytes.
    pub(super) fn chunk_bytes(&self, index: u32) -> Result<usize, NoSuchChunk> {
        Ok(self.description.encoding.codec().encoded_bytes(self.plan.length(index)?))
    }

    /// A chunk as it travels; reads and hashes it.
    pub(super) fn chunk(&self, index: u32) -> Result<DeltaChunk, NoSuchChunk> {
        let bytes = self.chunk_bytes(index)?;
        let start = index as usize * self.chunk_bytes(0)?;
        let payload = self.encoded.slice(start..start + bytes);
        let digest = Digest::of(&payload).to_vec();
        Ok(DeltaChunk { index, payload, digest })
    }
}

/// Total length of the encoded chunks, in bytes.
fn encoded_bytes(plan: ChunkPlan, encoding: Encoding) -> u64 {
    let codec = encoding.codec();
    let chunk = plan.chunk_parameters() as usize;
    let (whole, last) = (plan.parameters() / chunk as u64, plan.parameters() % chunk as u64);
    // The last one has fewer values than a chunk, which fit.
    #[allow(clippy::cast_possible_truncation)]
    let last = if last == 0 { 0 } else { codec.encoded_bytes(last as usize) };
    whole * codec.encoded_bytes(chunk) as u64 + last as u64
}

/// Writes the chunks one after another and returns the digest of the whole. `encode` is called for each, on
/// all cores, with the position of its first value, its values, and room for its payload.
fn write_chunks(
    path: &Path,
    plan: ChunkPlan,
    encoding: Encoding,
    values: &mut [f32],
    encode: impl Fn(usize, &mut [f32], &mut [u8]) -> Result<(), DecodeError> + Sync,
) -> Result<Digest, TransferError> {
    let chunk = plan.chunk_parameters() as usize;
    let chunk_bytes = encoding.codec().encoded_bytes(chunk);
    let mut payloads = Vec::new();
    let mut hasher = blake3::Hasher::new();
    let mut refused = None;
    let written = write_atomically_with(path, |file| {
        for (at, group) in values.chunks_mut(chunk * GROUP_CHUNKS).enumerate() {
            let lengths = group.chunks(chunk).map(<[f32]>::len);
            payloads.resize(lengths.map(|length| encoding.codec().encoded_bytes(length)).sum(), 0);
            let chunks = group.par_chunks_mut(chunk).zip(payloads.par_chunks_mut(chunk_bytes)).enumerate();
            let encoded = chunks.try_for_each(|(index, (values, payload))| {
                encode((at * GROUP_CHUNKS + index) * chunk, values, payload)
            });
            if let Err(error) = encoded {
                refused = Some(error.clone());
                return Err(std::io::Error::other(error));
            }
            hasher.update_rayon(&payloads);
            file.write_all(&payloads)?;
        }
        Ok(())
    });
    match (written, refused) {
        (Ok(()), _) => Ok(hasher.finalize().into()),
        (Err(_), Some(error)) => Err(TransferError::Encode(error)),
        (Err(error), None) => Err(file_error("write", path)(error)),
    }
}

/// A name for a new delta.
pub fn draw_delta_id() -> [u8; 16] {
    let mut id = [0; 16];
    rand::rng().fill_bytes(&mut id);
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDirectory;

    const PARAMETERS: usize = 20_000;

    fn plan() -> ChunkPlan {
        ChunkPlan::new(PARAMETERS as u64, 1_024)
    }

    fn values(seed: f32) -> Vec<f32> {
        (0..PARAMETERS).map(|index| (index as f32 * seed).sin() * 0.01).collect()
    }

    fn open(folder: &Path) -> RunDirectory {
        StateDirectory::open(folder).unwrap().run(&"r".parse().unwrap()).unwrap()
    }

    /// Encodes a round as a daemon does that was just started, and keeps the site's state after it; what is
    /// then on disk, the error included.
    fn round(folder: &Path, round: u32, encoding: Encoding) -> (Vec<u8>, Option<Vec<u8>>) {
        let directory = open(folder);
        directory.begin_round(round, 1).unwrap();
        let mut values = values(round as f32);
        let digest = Delta::write(&directory, round, Fragment::whole(plan()), encoding, &mut values).unwrap();
        std::fs::write(directory.site_state(round), []).unwrap();
        let encoded = std::fs::read(directory.delta(round)).unwrap();
        assert_eq!(Digest::of(&encoded), digest);
        assert_eq!(encoded.len() as u64, encoded_bytes(plan(), encoding));
        (encoded, std::fs::read(directory.encoding_error(round)).ok())
    }

    #[test]
    fn every_chunk_lies_where_its_index_says() {
        for encoding in Encoding::ALL {
            let folder = tempfile::tempdir().unwrap();
            let (encoded, error) = round(folder.path(), 1, encoding);
            assert_eq!(error.is_some(), encoding.error_feedback_decay().is_some());
            let values = values(1.0);
            let expected: Vec<u8> = values.chunks(1_024).flat_map(|chunk| encoding.encode(chunk)).collect();
            assert_eq!(encoded, expected, "{}", encoding.name());
        }
    }

    #[test]
    fn what_was_dropped_is_added_in_the_next_round_even_by_a_daemon_that_was_restarted() {
        for encoding in Encoding::ALL {
            let Some(decay) = encoding.error_feedback_decay() else { continue };
            let folder = tempfile::tempdir().unwrap();
            let mut error = vec![0.0; PARAMETERS];
            for number in 1..4 {
                let mut expected = Vec::new();
                let values = values(number as f32);
                for (error, values) in error.chunks_mut(1_024).zip(values.chunks(1_024)) {
                    let sum: Vec<f32> = values.iter().zip(&*error).map(|(v, e)| v + decay * e).collect();
                    let payload = encoding.encode(&sum);
                    encoding.codec().decode(&payload, error).unwrap();
                    error.iter_mut().zip(sum).for_each(|(error, sum)| *error = sum - *error);
                    expected.extend(payload);
                }
                let (encoded, kept) = round(folder.path(), number, encoding);
                assert_eq!(encoded, expected, "{} in round {number}", encoding.name());
                assert_eq!(kept.unwrap()[..PARAMETERS * 4], *bytemuck::cast_slice::<f32, u8>(&error));
            }
        }
    }

    #[test]
    fn a_round_that_is_computed_twice_gives_the_same_delta_and_error() {
        let folder = tempfile::tempdir().unwrap();
        round(folder.path(), 1, Encoding::TwoBit);
        let second = round(folder.path(), 2, Encoding::TwoBit);
        assert_eq!(round(folder.path(), 2, Encoding::TwoBit), second);
        let alone = tempfile::tempdir().unwrap();
        assert_ne!(round(alone.path(), 2, Encoding::TwoBit), second, "the first round counts");
    }

    #[test]
    fn an_error_of_another_encoding_is_not_carried_over() {
        let folder = tempfile::tempdir().unwrap();
        round(folder.path(), 1, Encoding::TwoBit);
        let alone = tempfile::tempdir().unwrap();
        let expected = round(alone.path(), 2, Encoding::TopK);
        assert_eq!(round(folder.path(), 2, Encoding::TopK), expected);
        assert!(round(folder.path(), 3, Encoding::Int8).1.is_none());
    }

    #[test]
    fn what_the_aggregator_would_refuse_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let directory = open(folder.path());
        let mut values = values(1.0);
        values[17_000] = f32::INFINITY;
        let result = Delta::write(&directory, 1, Fragment::whole(plan()), Encoding::TwoBit, &mut values);
        assert!(matches!(result, Err(TransferError::Encode(_))), "{result:?}");
        assert!(!directory.delta(1).exists() && !directory.encoding_error(1).exists());
    }
}
