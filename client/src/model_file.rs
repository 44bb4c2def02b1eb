//! Files of the state directory mapped into memory: flat fp32 vectors, read as slices, and plain bytes.

use std::{fs::File, path::Path};

use bytes::Bytes;
use memmap2::Mmap;

use crate::state::{StateError, io_error};

/// A file of fp32 little-endian values, mapped into memory.
#[derive(Debug)]
pub struct ModelFile {
    bytes: Mmap,
}

impl ModelFile {
    /// Maps the file.
    ///
    /// # Errors
    /// If it cannot be read, or is not a whole number of values.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let bytes = map_file(path)?;
        if bytes.len() % size_of::<f32>() != 0 {
            let error = std::io::Error::other("its length is no whole number of values");
            return Err(io_error("read", path)(error));
        }
        Ok(Self { bytes })
    }

    /// The values. A map begins at a page's boundary, so that they are aligned.
    pub fn values(&self) -> &[f32] {
        bytemuck::cast_slice(&self.bytes)
    }

    /// The same as bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Maps a file of anything; slices of the result share the map.
///
/// # Errors
/// If it cannot be read.
pub fn map(path: &Path) -> Result<Bytes, StateError> {
    map_file(path).map(Bytes::from_owner)
}

fn map_file(path: &Path) -> Result<Mmap, StateError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    // SAFETY: files of the state directory are replaced or removed as a whole, never changed in place,
    // and only by this daemon, which holds the directory's lock. A removed file stays while it is mapped.
    unsafe { Mmap::map(&file) }.map_err(io_error("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let values = [1.5f32, -2.0, f32::MIN_POSITIVE];
        std::fs::write(&path, values.map(f32::to_le_bytes).concat()).unwrap();
        assert_eq!(ModelFile::open(&path).unwrap().values(), values);
        std::fs::write(&path, [0; 7]).unwrap();
        assert!(ModelFile::open(&path).is_err());
        std::fs::write(&path, []).unwrap();
        assert_eq!(ModelFile::open(&path).unwrap().values(), [0.0f32; 0]);
        assert!(map(&path).unwrap().is_empty());
    }

    #[test]
    fn a_slice_outlives_the_map_that_it_was_taken_from() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, b"abcdef").unwrap();
        let slice = map(&path).unwrap().slice(2..4);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(slice, b"cd".as_slice());
    }
}
