//! Reading a version from its beginning to its end.

use std::io::{self, Read};

use consort_common::ids::Digest;

use super::{ModelError, ModelVersion, VALUE_BYTES, files::PARAMETERS_FILE};

/// The bytes of a version's flat vector, in order. Every chunk is verified before any of it is given, and
/// the last one is given only if all of them together have the version's digest.
#[derive(Debug)]
pub struct ModelBytes<'a> {
    version: &'a ModelVersion,
    next_chunk: u32,
    chunk: Vec<u8>,
    /// How much of `chunk` was given.
    taken: usize,
    hasher: blake3::Hasher,
    fault: Option<ModelError>,
}

impl<'a> ModelBytes<'a> {
    pub(super) fn new(version: &'a ModelVersion) -> Self {
        Self {
            version,
            next_chunk: 0,
            chunk: Vec::new(),
            taken: 0,
            hasher: blake3::Hasher::new(),
            fault: None,
        }
    }

    /// Why reading failed, if it did: the error of [`Read`] says no more than that.
    pub fn into_fault(self) -> Option<ModelError> {
        self.fault
    }

    fn read_next_chunk(&mut self) -> Result<(), ModelError> {
        let Self { version, next_chunk, chunk, taken, hasher, .. } = self;
        *taken = 0;
        chunk.resize(version.plan().length(*next_chunk)? * VALUE_BYTES as usize, 0);
        version.read(&version.parts.parameters, *next_chunk, chunk)?;
        hasher.update_rayon(chunk);
        *next_chunk += 1;
        let found = Digest::from(hasher.finalize());
        if *next_chunk == version.plan().chunks() && found != version.digest {
            let reason = format!("it has the digest {}, not {}", found.short(), version.digest.short());
            return Err(version.place.corrupt(PARAMETERS_FILE, reason));
        }
        Ok(())
    }
}

impl Read for ModelBytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.chunk.len() && self.next_chunk < self.version.plan().chunks() {
            self.read_next_chunk().map_err(|fault| {
                self.chunk.clear();
                self.fault = Some(fault);
                io::Error::other("the model cannot be read")
            })?;
        }
        let given = (&self.chunk[self.taken..]).read(buffer)?;
        self.taken += given;
        Ok(given)
    }
}
