//! One safetensors file: 8 bytes with the length of the header (little-endian), the header (JSON: name to
//! dtype, shape and position), then the tensors' values without gaps, little-endian.
//!
//! Written with the tensors in the manifest's order, the file's data are the flat vector itself. The
//! header is written here and not by the crate, whose order of metadata changes from call to call, so
//! that equal models are equal files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
};

use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::model::{Architecture, Manifest};

// The file is little-endian and the vector is written as it lies in memory.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are written on little-endian machines");

const LENGTH_BYTES: u64 = 8;
/// The limit of the format's own reader.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes read and written at a time; a multiple of every dtype's size.
const BLOCK_BYTES: usize = 1 << 20;
/// Names listed in an error.
const NAMES_SHOWN_MAX: usize = 20;

/// Why a safetensors file is not the model's.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// The file system refused.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
    /// The file contradicts itself.
    #[error("not a whole safetensors file: {0}")]
    Malformed(String),
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

/// Writes the whole file, with the flat vector's bytes as they come from `values`, and returns its length in
/// bytes.
pub(super) fn write(
    file: &mut File,
    manifest: &Manifest,
    values: &mut dyn Read,
    metadata: &BTreeMap<String, String>,
) -> io::Result<u64> {
    let mut header = serde_json::to_vec(&Header { manifest, metadata })?;
    // The format asks for data that begin at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut block = vec![0; BLOCK_BYTES];
    for tensor in manifest.tensors() {
        let mut bytes_left = tensor.parameters() * size_of::<f32>();
        while bytes_left > 0 {
            let piece = &mut block[..bytes_left.min(BLOCK_BYTES)];
            values.read_exact(piece)?;
            file.write_all(piece)?;
            bytes_left -= piece.len();
        }
    }
    Ok(LENGTH_BYTES + header.len() as u64 + manifest.parameters() * size_of::<f32>() as u64)
}

struct Header<'a> {
    manifest: &'a Manifest,
    metadata: &'a BTreeMap<String, String>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut metadata = self.metadata.clone();
        // transformers refuses a file that does not say so.
        metadata.insert("format".to_owned(), "pt".to_owned());
        map.serialize_entry("__metadata__", &metadata)?;
        let mut start = 0;
        for tensor in self.manifest.tensors() {
            let end = start + tensor.parameters() * size_of::<f32>();
            let info =
                TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets: (start, end) };
            map.serialize_entry(&tensor.name, &info)?;
            start = end;
        }
        map.end()
    }
}

/// Reads the architecture's flat vector. Nothing of the model's size is allocated before the file is known
/// to hold exactly its tensors.
pub(super) fn read(file: &File, architecture: &Architecture) -> Result<Vec<f32>, TensorFileError> {
    let (metadata, data_start) = read_header(file)?;
    let manifest = architecture.manifest();
    let tensors = matched(&manifest, &metadata, architecture)?;
    let parameters = usize::try_from(manifest.parameters()).map_err(|error| malformed(&error))?;
    let mut flat = vec![0.0f32; parameters];
    let mut block = vec![0u8; BLOCK_BYTES];
    let mut rest = flat.as_mut_slice();
    for (tensor, info) in manifest.tensors().iter().zip(tensors) {
        let (values, tail) = rest.split_at_mut(tensor.parameters());
        read_values(file, data_start + info.data_offsets.0 as u64, info.dtype, &mut block, values)?;
        if !values.iter().fold(true, |finite, value| finite & value.is_finite()) {
            return Err(TensorFileError::NotFinite(tensor.name.clone()));
        }
        rest = tail;
    }
    Ok(flat)
}

/// The header, checked against the file's length, and where the data begin.
fn read_header(file: &File) -> Result<(Metadata, u64), TensorFileError> {
    let file_bytes = file.metadata()?.len();
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX.min(file_bytes) {
        return Err(TensorFileError::Malformed(format!("it announces a header of {header_bytes} bytes")));
    }
    let mut header = vec![0; usize::try_from(header_bytes).map_err(|error| malformed(&error))?];
    file.read_exact_at(&mut header, LENGTH_BYTES)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| malformed(&error))?;
    let data_start = LENGTH_BYTES + header_bytes;
    let expected = data_start.saturating_add(metadata.data_len() as u64);
    if expected != file_bytes {
        let message = format!("it has {file_bytes} bytes where its header announces {expected}");
        return Err(TensorFileError::Malformed(message));
    }
    Ok((metadata, data_start))
}

fn malformed(error: &dyn std::error::Error) -> TensorFileError {
    TensorFileError::Malformed(error.to_string())
}

/// The file's tensor for each of the manifest's, or everything that does not match.
fn matched(
    manifest: &Manifest,
    metadata: &Metadata,
    architecture: &Architecture,
) -> Result<Vec<TensorInfo>, TensorFileError> {
    let tensors = metadata.tensors();
    let by_name: BTreeMap<&str, (&str, &TensorInfo)> =
        tensors.iter().map(|(name, info)| (canonical(architecture, name), (name.as_str(), *info))).collect();
    let mut problems = Vec::new();
    let mut found = Vec::new();
    for tensor in manifest.tensors() {
        match by_name.get(canonical(architecture, &tensor.name)) {
            None => problems.push(format!("{} is missing", tensor.name)),
            Some((name, info)) if info.shape != tensor.shape => {
                problems.push(format!("{name} has the shape {:?}, not {:?}", info.shape, tensor.shape));
            }
            Some((name, info)) if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) => {
                problems.push(format!("{name} is {:?}; supported: F32, BF16, F16", info.dtype));
            }
            Some((_, info)) => found.push((*info).clone()),
        }
    }
    let known: BTreeSet<&str> =
        manifest.tensors().iter().map(|tensor| canonical(architecture, &tensor.name)).collect();
    let unexpected =
        by_name.iter().filter(|(name, _)| !known.contains(*name) && !ignored(architecture, name));
    problems.extend(unexpected.map(|(_, (name, _))| format!("{name} is not expected")));
    if problems.is_empty() { Ok(found) } else { Err(TensorFileError::Mismatch(problems)) }
}

/// The name by which a tensor is looked up: GPT-2's exist with and without a prefix.
fn canonical<'a>(architecture: &Architecture, name: &'a str) -> &'a str {
    match architecture {
        Architecture::Gpt2(_) => name.strip_prefix("transformer.").unwrap_or(name),
        Architecture::Llama(_) => name,
    }
}

/// Tensors that older files hold and no model needs: causal masks, rotary frequencies, and an output
/// projection that is the embedding (`transformers` too takes the embedding).
fn ignored(architecture: &Architecture, name: &str) -> bool {
    match architecture {
        Architecture::Gpt2(_) => {
            name == "lm_head.weight" || name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
        }
        Architecture::Llama(config) => {
            name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
        }
    }
}

/// Reads `values.len()` numbers of the type `dtype` from `offset` on, block by block.
fn read_values(
    file: &File,
    mut offset: u64,
    dtype: Dtype,
    block: &mut [u8],
    values: &mut [f32],
) -> io::Result<()> {
    let value_bytes = if dtype == Dtype::F32 { 4 } else { 2 };
    for values in values.chunks_mut(BLOCK_BYTES / value_bytes) {
        let block = &mut block[..values.len() * value_bytes];
        file.read_exact_at(block, offset)?;
        offset += block.len() as u64;
        convert(dtype, block, values);
    }
    Ok(())
}

fn convert(dtype: Dtype, block: &[u8], values: &mut [f32]) {
    if dtype == Dtype::F32 {
        for (value, bytes) in values.iter_mut().zip(block.chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        return;
    }
    for (value, bytes) in values.iter_mut().zip(block.chunks_exact(2)) {
        let bytes = [bytes[0], bytes[1]];
        *value = if dtype == Dtype::BF16 {
            bf16::from_le_bytes(bytes).to_f32()
        } else {
            f16::from_le_bytes(bytes).to_f32()
        };
    }
}
