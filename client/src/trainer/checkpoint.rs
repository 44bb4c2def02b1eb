//! The local checkpoint of a training: one safetensors file with the flat parameters and moments, and where
//! the training stood, which is its owner's affair.
//!
//! It appears whole or not at all, and is believed only if its BLAKE3 is right. Values are little-endian, as
//! safetensors are.

mod writer;

use std::{
    collections::HashMap,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use consort_common::{
    atomic_file::{partial_path, write_atomically_with},
    ids::Digest,
};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use self::writer::Writer;
use super::Moments;

/// All that a training goes on with. `P` says where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint<P> {
    /// Where the training stands.
    pub progress: P,
    /// The flat parameters.
    pub parameters: Vec<f32>,
    /// The optimizer's state.
    pub moments: Moments,
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error(
        "cannot {action} the training checkpoint {path}: {source}; check the disk's space and the folder's owner"
    )]
    Io {
        /// "write" or "read".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("the training checkpoint {path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The thread that writes cannot be started, or has panicked.
    #[error("the training checkpoint {path} was not written: {reason}")]
    Thread {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What is stored beside the tensors, as one JSON text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata<P> {
    progress: P,
    /// Whose the moments are, as the specification names it; checkpoints of earlier versions do not say it.
    #[serde(default)]
    optimizer: Option<String>,
    optimizer_steps: u64,
}

const METADATA: &str = "consort";
const DIGEST: &str = "blake3";
const TENSORS: [&str; 3] = ["first_moments", "parameters", "second_moments"];

/// Writes a checkpoint to `path`, in place of the one there.
///
/// # Errors
/// The file system refused; what was at `path` is still there.
pub fn save<P: Serialize>(
    path: &Path,
    progress: &P,
    parameters: &[f32],
    moments: &Moments,
) -> Result<(), CheckpointError> {
    let written = write_atomically_with(path, |_| write(&partial_path(path), progress, parameters, moments));
    written.map_err(|source| CheckpointError::Io { action: "write", path: path.to_owned(), source })
}

/// Writes the content through a handle of its own, as the safetensors crate will have it; the caller's
/// handle, of the same file, then makes it durable.
fn write<P: Serialize>(path: &Path, progress: &P, parameters: &[f32], moments: &Moments) -> io::Result<()> {
    let optimizer = moments.optimizer.clone();
    let metadata = Metadata { progress, optimizer, optimizer_steps: moments.steps };
    let metadata = serde_json::to_string(&metadata)?;
    let vectors = [&moments.first, parameters, &moments.second];
    let digest = digest(&metadata, vectors.map(bytemuck::cast_slice));
    let mut tensors = Vec::new();
    for (name, values) in TENSORS.into_iter().zip(vectors) {
        let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values));
        tensors.push((name, view.map_err(io::Error::other)?));
    }
    let metadata = HashMap::from([(METADATA.to_owned(), metadata), (DIGEST.to_owned(), digest.to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(error) => error,
        other => io::Error::other(other),
    })
}

/// Reads the checkpoint at `path`; `None` if there is none.
///
/// # Errors
/// The file system refused, or the file is damaged or says of its progress what no `P` is.
pub fn load<P: DeserializeOwned>(path: &Path) -> Result<Option<Checkpoint<P>>, CheckpointError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(CheckpointError::Io { action: "read", path: path.to_owned(), source }),
    };
    // SAFETY: a checkpoint is only ever replaced by a rename, never written in place or shortened, and the
    // map does not outlive this function.
    let bytes = unsafe { Mmap::map(&file) }.map_err(|source| CheckpointError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    parse(&bytes).map(Some).map_err(|reason| CheckpointError::Damaged { path: path.to_owned(), reason })
}

fn parse<P: DeserializeOwned>(bytes: &[u8]) -> Result<Checkpoint<P>, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let entry = |key: &str| {
        let entries = header.metadata().as_ref();
        entries.and_then(|entries| entries.get(key)).ok_or_else(|| format!("it has no {key} entry"))
    };
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut vectors = [[].as_slice(); 3];
    for (name, vector) in TENSORS.into_iter().zip(&mut vectors) {
        let tensor = tensors.tensor(name).map_err(|error| error.to_string())?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("{name} is {:?}, not F32", tensor.dtype()));
        }
        *vector = tensor.data();
    }
    if digest(entry(METADATA)?, vectors).to_string() != *entry(DIGEST)? {
        return Err("its checksum is wrong".to_owned());
    }
    let metadata: Metadata<P> = serde_json::from_str(entry(METADATA)?).map_err(|error| error.to_string())?;
    let [first, parameters, second] = vectors.map(bytemuck::pod_collect_to_vec);
    let Metadata { progress, optimizer, optimizer_steps: steps } = metadata;
    let moments = Moments { optimizer, first, second, steps };
    Ok(Checkpoint { progress, parameters, moments })
}

/// BLAKE3 over the metadata and the vectors, each with its length before it.
fn digest(metadata: &str, vectors: [&[u8]; 3]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for part in std::iter::once(metadata.as_bytes()).chain(vectors) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update_rayon(part);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    /// Any progress does.
    fn example() -> Checkpoint<Value> {
        let progress = json!({"steps": 17, "cursor": {"epoch": 1, "position": 99}});
        let vector = |scale: f32| (0..100).map(|index| index as f32 * scale).collect::<Vec<f32>>();
        let optimizer = Some("adopt".to_owned());
        let moments = Moments { optimizer, first: vector(0.1), second: vector(-0.2), steps: 317 };
        Checkpoint { progress, parameters: vector(1.5), moments }
    }

    fn write(folder: &Path) -> PathBuf {
        let path = folder.join("round.safetensors");
        let Checkpoint { progress, parameters, moments } = example();
        save(&path, &progress, &parameters, &moments).unwrap();
        path
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path());
        assert_eq!(load(&path).unwrap(), Some(example()));
        assert_eq!(write(folder.path()), path, "an older one is replaced");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn what_an_earlier_version_says_without_the_optimizer_is_understood() {
        let json = r#"{"progress": 5, "optimizer_steps": 317}"#;
        let metadata: Metadata<Value> = serde_json::from_str(json).unwrap();
        assert_eq!((metadata.optimizer, metadata.optimizer_steps), (None, 317));
    }

    #[test]
    fn no_checkpoint_is_none() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(load::<Value>(&folder.path().join("round.safetensors")).unwrap(), None);
    }

    #[test]
    fn a_folder_that_is_missing_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/round.safetensors");
        let Checkpoint { progress, parameters, moments } = example();
        let error = save(&path, &progress, &parameters, &moments).unwrap_err().to_string();
        assert!(error.contains("cannot write") && error.contains("missing/round.safetensors"), "{error}");
    }

    #[test]
    fn a_truncated_checkpoint_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path());
        let whole = fs::read(&path).unwrap();
        for length in [0, 1, 8, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(load::<Value>(&path), Err(CheckpointError::Damaged { .. })), "{length} bytes");
        }
    }

    #[test]
    fn a_checkpoint_with_any_byte_changed_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::read(write(folder.path())).unwrap();
        for position in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[position] ^= 1 << (position % 8);
            // Padding and letters' case in the header may change without a change of meaning.
            assert!(
                parse::<Value>(&bytes).is_err() || parse(&bytes) == Ok(example()),
                "byte {position} of {}",
                whole.len()
            );
            if position >= whole.len() - 1200 {
                assert!(parse::<Value>(&bytes).is_err(), "byte {position} is data");
            }
        }
    }
}
