//! The weights of a checkpoint as the architecture's flat vector: in one safetensors file, or in several that
//! an index lists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Component, Path, PathBuf},
};

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use super::{
    CheckpointError, MODEL_FILE, json,
    tensor_file::{TensorFile, TensorFileError, is_supported},
};
use crate::{atomic_file::named, model::Architecture};

/// Lists the files of weights that are too large for one.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Most files of weights; each is open while the weights are read.
const FILES_MAX: usize = 500;
/// Names listed in an error.
const NAMES_SHOWN_MAX: usize = 20;

/// Why weights are not the model's.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// The index is no list of files beside it.
    #[error("{0}")]
    Index(String),
    /// The tensors are not those of the configuration.
    #[error("does not hold the tensors of config.json: {}", shown(.0))]
    Mismatch(Vec<String>),
    /// A value is NaN or infinite.
    #[error("tensor {0} holds NaN or infinite values")]
    NotFinite(String),
}

/// The first problems, and how many more there are.
fn shown(problems: &[String]) -> String {
    let mut text = problems.iter().take(NAMES_SHOWN_MAX).cloned().collect::<Vec<_>>().join("; ");
    if problems.len() > NAMES_SHOWN_MAX {
        text += &format!("; and {} more", problems.len() - NAMES_SHOWN_MAX);
    }
    text
}

/// Weights that are known to be there, whole; their values are read when asked for.
#[derive(Debug)]
pub(super) struct Weights {
    files: Vec<(PathBuf, TensorFile)>,
    /// In the manifest's order.
    parts: Vec<Part>,
    parameters: u64,
}

/// A tensor of the manifest and where its values are.
#[derive(Debug)]
struct Part {
    name: String,
    /// Its place in the flat vector.
    start: u64,
    parameters: usize,
    file: usize,
    info: TensorInfo,
}

impl Weights {
    /// Opens the weights in `directory` and checks that they are exactly `architecture`'s. Takes no more
    /// memory than the files' headers.
    pub(super) fn open(directory: &Path, architecture: &Architecture) -> Result<Self, CheckpointError> {
        let path = directory.join(MODEL_FILE);
        let index = directory.join(INDEX_FILE);
        // `transformers` too looks for the one file first.
        let (listed_in, paths) = if !path.exists() && index.exists() {
            let paths = read_index(directory, &index)?;
            (index, paths)
        } else {
            refuse_other_formats(directory)?;
            (path.clone(), vec![path])
        };
        let open = |path: PathBuf| {
            let file = named("open", &path, File::open(&path))?;
            let file = TensorFile::open(file).map_err(|error| weights_error(&path, error.into()))?;
            Ok((path, file))
        };
        let files = paths.into_iter().map(open).collect::<Result<Vec<_>, CheckpointError>>()?;
        let parts = matched(architecture, &files)
            .map_err(|problems| weights_error(&listed_in, WeightsError::Mismatch(problems)))?;
        Ok(Self { files, parts, parameters: architecture.manifest().parameters() })
    }

    /// What the header of the first file that has it says under `key`.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.files.iter().find_map(|(_, file)| file.metadata(key))
    }

    /// Fills `values` with the flat vector's from `start` on.
    pub(super) fn fill(&self, start: u64, values: &mut [f32]) -> Result<(), CheckpointError> {
        let end = start.saturating_add(values.len() as u64);
        if end > self.parameters {
            return Err(CheckpointError::Length { expected: self.parameters, actual: end });
        }
        let mut part = self.parts.partition_point(|part| part.start + part.parameters as u64 <= start);
        let mut rest = values;
        while !rest.is_empty() {
            let Part { name, start: part_start, parameters, file, info } = &self.parts[part];
            #[allow(clippy::cast_possible_truncation)] // below the tensor's parameters
            let first = start.saturating_sub(*part_start) as usize;
            let (values, tail) = rest.split_at_mut(rest.len().min(parameters - first));
            let (path, file) = &self.files[*file];
            file.read(info, first, values)
                .map_err(|error| weights_error(path, TensorFileError::from(error).into()))?;
            if !values.iter().fold(true, |finite, value| finite & value.is_finite()) {
                return Err(weights_error(path, WeightsError::NotFinite(name.clone())));
            }
            rest = tail;
            part += 1;
        }
        Ok(())
    }
}

fn weights_error(path: &Path, source: WeightsError) -> CheckpointError {
    CheckpointError::Weights { path: path.to_owned(), source }
}

/// The part of the index that is needed.
#[derive(Deserialize)]
struct Index {
    /// Tensor to file.
    weight_map: BTreeMap<String, String>,
}

/// The files that the index names, each once.
fn read_index(directory: &Path, path: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let Index { weight_map } = json::read(path)?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    let refused = |problem: String| weights_error(path, WeightsError::Index(problem));
    if names.is_empty() || names.len() > FILES_MAX {
        return Err(refused(format!("it names {} files; allowed: 1 to {FILES_MAX}", names.len())));
    }
    let file = |name: String| match Path::new(&name).components().collect::<Vec<_>>()[..] {
        [Component::Normal(_)] => Ok(directory.join(name)),
        _ => Err(refused(format!("it names the file {name:?}, which is not in the checkpoint's directory"))),
    };
    names.into_iter().map(file).collect()
}

/// Weights that are there, but not as safetensors.
fn refuse_other_formats(directory: &Path) -> Result<(), CheckpointError> {
    let others = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    match others.into_iter().find(|name| directory.join(name).exists()) {
        Some(found) if !directory.join(MODEL_FILE).exists() => {
            Err(CheckpointError::OtherFormat { directory: directory.to_owned(), found })
        }
        _ => Ok(()),
    }
}

/// The place of each of the manifest's tensors, or everything that does not match.
fn matched(architecture: &Architecture, files: &[(PathBuf, TensorFile)]) -> Result<Vec<Part>, Vec<String>> {
    let mut problems = Vec::new();
    let mut found: BTreeMap<String, (String, usize, TensorInfo)> = BTreeMap::new();
    for (file, (_, tensors)) in files.iter().enumerate() {
        for (name, info) in tensors.tensors() {
            let key = canonical(architecture, &name).to_owned();
            if let Some((other, ..)) = found.insert(key, (name.clone(), file, info)) {
                problems.push(format!("{name} is there twice (also as {other})"));
            }
        }
    }
    let mut parts = Vec::new();
    let mut start = 0;
    for tensor in architecture.manifest().tensors() {
        match found.remove(canonical(architecture, &tensor.name)) {
            None => problems.push(format!("{} is missing", tensor.name)),
            Some((name, _, info)) if info.shape != tensor.shape => {
                problems.push(format!("{name} has the shape {:?}, not {:?}", info.shape, tensor.shape));
            }
            Some((name, _, info)) if !is_supported(info.dtype) => {
                problems.push(format!("{name} is {:?}; supported: F32, BF16, F16", info.dtype));
            }
            Some((name, file, info)) => {
                parts.push(Part { name, start, parameters: tensor.parameters(), file, info });
            }
        }
        start += tensor.parameters() as u64;
    }
    found.retain(|key, _| !is_ignored(architecture, key));
    problems.extend(found.into_values().map(|(name, ..)| format!("{name} is not expected")));
    if problems.is_empty() { Ok(parts) } else { Err(problems) }
}

/// The name by which a tensor is looked up: without the prefix that files of the bare model, saved without
/// its output projection, lack.
fn canonical<'a>(architecture: &Architecture, name: &'a str) -> &'a str {
    let prefix = match architecture {
        Architecture::Llama(_) => "model.",
        Architecture::Gpt2(_) | Architecture::Mpt(_) => "transformer.",
    };
    name.strip_prefix(prefix).unwrap_or(name)
}

/// Tensors that files may hold and no model needs: causal masks, rotary frequencies, and an output projection
/// that is the embedding (`transformers` too takes the embedding).
fn is_ignored(architecture: &Architecture, name: &str) -> bool {
    let (buffers, tied): (&[&str], bool) = match architecture {
        Architecture::Llama(config) => (&[".rotary_emb.inv_freq"], config.tie_word_embeddings),
        Architecture::Gpt2(config) => (&[".attn.bias", ".attn.masked_bias"], config.tie_word_embeddings),
        Architecture::Mpt(config) => (&[], config.tie_word_embeddings),
    };
    buffers.iter().any(|buffer| name.ends_with(buffer)) || (tied && name == "lm_head.weight")
}
