//! What the delta encoding has dropped so far, as it is carried from a round to the next: error feedback
//! for encodings that lose so much that it must not be lost.
//!
//! A file of fp32 values, as many as the model's or its fragment's, and the BLAKE3 of the encoding's name and the values. Like
//! the rest of the site's state it is written once per round and only read by later ones.

use std::{io::Write, path::Path};

use consort_common::{atomic_file::write_atomically_with, codec::Encoding, ids::Digest};
use tracing::warn;

use super::{TransferError, file_error};
use crate::model_file::ModelFile;

const DIGEST_BYTES: usize = 32;

/// The error after a round, mapped into memory.
#[derive(Debug)]
pub(super) struct EncodingError(ModelFile);

impl EncodingError {
    /// Makes the error durable.
    pub(super) fn save(path: &Path, encoding: Encoding, values: &[f32]) -> Result<(), TransferError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        write_atomically_with(path, |file| {
            file.write_all(bytes)?;
            file.write_all(digest(encoding, bytes).as_bytes())
        })
        .map_err(file_error("write", path))
    }

    /// The error that was saved, if it is of this encoding, has this many values and is undamaged. Else the
    /// site begins with zeros: it loses a part of what it learned, and nothing that others count on.
    pub(super) fn open(path: &Path, encoding: Encoding, parameters: usize) -> Option<Self> {
        let fault = match ModelFile::open(path) {
            Err(error) => error.to_string(),
            Ok(file) => match file.bytes().split_last_chunk::<DIGEST_BYTES>() {
                Some((values, _)) if values.len() != parameters * 4 => {
                    format!("it has {} values, the delta {parameters}", values.len() / 4)
                }
                Some((values, found)) if digest(encoding, values).as_bytes() == found => {
                    return Some(Self(file));
                }
                _ => format!("it is of another encoding than {}, or damaged", encoding.name()),
            },
        };
        warn!("what the encoding dropped in earlier rounds is lost, {}: {fault}", path.display());
        None
    }

    /// The values, as many as the delta's.
    pub(super) fn values(&self) -> &[f32] {
        let values = self.0.values();
        &values[..values.len() - DIGEST_BYTES / 4]
    }
}

fn digest(encoding: Encoding, values: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(encoding.name().as_bytes());
    hasher.update(&[0]);
    hasher.update_rayon(values);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_another_encoding_or_length_or_a_damaged_one_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error");
        let values = [1.5, -2.25, 1e-30];
        assert!(EncodingError::open(&path, Encoding::Bf16, 3).is_none(), "there is none");
        EncodingError::save(&path, Encoding::Bf16, &values).unwrap();
        assert_eq!(EncodingError::open(&path, Encoding::Bf16, 3).unwrap().values(), values);
        assert!(EncodingError::open(&path, Encoding::Fp32, 3).is_none());
        assert!(EncodingError::open(&path, Encoding::Bf16, 2).is_none());
        let whole = std::fs::read(&path).unwrap();
        for position in [0, 11, 12, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[position] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert!(EncodingError::open(&path, Encoding::Bf16, 3).is_none(), "byte {position}");
        }
        std::fs::write(&path, [0; 8]).unwrap();
        assert!(EncodingError::open(&path, Encoding::Bf16, 3).is_none());
    }
}
