//! One safetensors file: 8 bytes with the length of the header (little-endian), the header (JSON: name to
//! dtype, shape and position), then the tensors' values without gaps, little-endian.
//!
//! Written with the tensors in the manifest's order, the file's data are the flat vector itself. The
//! header is written here and not by the crate, whose order of metadata changes from call to call, so
//! that equal models are equal files.

use std::{
    collections::BTreeMap,
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

use crate::model::Manifest;

// The file is little-endian and the vector is written as it lies in memory.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are written on little-endian machines");

const LENGTH_BYTES: u64 = 8;
/// The limit of the format's own reader.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes read and written at a time; a multiple of every dtype's size.
const BLOCK_BYTES: usize = 1 << 20;

/// Why a safetensors file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// The file system refused.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
    /// The file contradicts itself.
    #[error("not a whole safetensors file: {0}")]
    Malformed(String),
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

/// A safetensors file that is open, its header read and checked.
#[derive(Debug)]
pub(super) struct TensorFile {
    file: File,
    /// Where the data begin, in bytes.
    data_start: u64,
    metadata: Metadata,
}

impl TensorFile {
    /// Takes no more memory than the header.
    pub(super) fn open(file: File) -> Result<Self, TensorFileError> {
        let (metadata, data_start) = read_header(&file)?;
        Ok(Self { file, data_start, metadata })
    }

    /// What is in the file, by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, TensorInfo)> {
        self.metadata.tensors().into_iter().map(|(name, info)| (name, info.clone()))
    }

    /// What the header says under `key`, beside the tensors.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Reads a tensor's values from its `first` on, as many as `values` takes, widened to fp32.
    pub(super) fn read(&self, info: &TensorInfo, first: usize, values: &mut [f32]) -> io::Result<()> {
        let value_bytes = value_bytes(info.dtype);
        let mut offset = self.data_start + (info.data_offsets.0 + first * value_bytes) as u64;
        let mut block = vec![0; BLOCK_BYTES.min(values.len() * value_bytes)];
        for values in values.chunks_mut(BLOCK_BYTES / value_bytes) {
            let block = &mut block[..values.len() * value_bytes];
            self.file.read_exact_at(block, offset)?;
            offset += block.len() as u64;
            convert(info.dtype, block, values);
        }
        Ok(())
    }
}

/// Whether tensors of this type can be read.
pub(super) fn is_supported(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16)
}

fn value_bytes(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
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
