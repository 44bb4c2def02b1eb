//! Tokens on disk: a header and little-endian ids, written once, then only mapped and read.
//!
//! ```text
//! bytes  0..8   "CONSTOKN"
//!        8..12  format version, u32
//!       12..16  bytes per token, u32: 2 or 4
//!       16..24  tokens, u64
//!       24..32  UTF-8 bytes of the text that they encode, u64
//!       32..40  vocabulary: every token is less than this, u64
//!       40..72  BLAKE3 of the tokens and of the 40 bytes before it
//!       72..    the tokens; each document is followed by the end-of-text token
//! ```

use std::{
    fs::File,
    io::{BufWriter, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;

use super::error::DataError;

const MAGIC: &[u8; 8] = b"CONSTOKN";
/// Changes with the header's layout.
const FORMAT_VERSION: u32 = 2;
const HEADER_BYTES: usize = 72;
/// Before the digest.
const FIELDS_BYTES: usize = 40;
const WRITE_BYTES: usize = 1 << 20;
/// Hashed at a time when a shard is verified.
const VERIFY_BYTES: usize = 8 << 20;

/// Size of a token on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenWidth {
    U16,
    U32,
}

impl TokenWidth {
    /// The smallest that holds every id below `vocabulary`.
    pub(super) fn for_vocabulary(vocabulary: usize) -> Self {
        if vocabulary <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }

    /// Ids as they lie on disk. They must fit, which [`super::Tokenizer::check_vocabulary`] ensures.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn encode(self, ids: &[u32]) -> Vec<u8> {
        match self {
            Self::U16 => ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect(),
            Self::U32 => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        }
    }
}

/// What a shard's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    width: TokenWidth,
    tokens: u64,
    text_bytes: u64,
    vocabulary: u64,
}

impl Header {
    /// All but the digest.
    fn encode(&self) -> [u8; FIELDS_BYTES] {
        let mut bytes = [0; FIELDS_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[12] = if self.width == TokenWidth::U16 { 2 } else { 4 };
        bytes[16..24].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.text_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.vocabulary.to_le_bytes());
        bytes
    }

    /// Reads the header of a file of `file_bytes`, or says what is wrong.
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let file_bytes = bytes.len() as u64;
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(format!("{file_bytes} bytes are less than a header"));
        };
        if !header.starts_with(MAGIC) {
            return Err("it does not begin as a shard does".to_owned());
        }
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
        let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
        if short(8) != FORMAT_VERSION {
            return Err(format!("its format version is {}, expected {FORMAT_VERSION}", short(8)));
        }
        let width = match short(12) {
            2 => TokenWidth::U16,
            4 => TokenWidth::U32,
            other => return Err(format!("{other} bytes per token, expected 2 or 4")),
        };
        let decoded = Self { width, tokens: long(16), text_bytes: long(24), vocabulary: long(32) };
        let expected = decoded
            .tokens
            .checked_mul(width.bytes() as u64)
            .and_then(|bytes| bytes.checked_add(HEADER_BYTES as u64));
        if expected != Some(file_bytes) {
            return Err(format!("{} tokens do not make {file_bytes} bytes", decoded.tokens));
        }
        Ok(decoded)
    }
}

/// Writes one shard. Until [`ShardWriter::finish`] its header is zeros, which nothing accepts.
pub(super) struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    header: Header,
    /// Of the tokens so far.
    hasher: blake3::Hasher,
}

impl ShardWriter {
    pub(super) fn create(path: PathBuf, vocabulary: usize) -> Result<Self, DataError> {
        let file = File::create(&path).map_err(|error| DataError::cache("create", &path, 0, error))?;
        let width = TokenWidth::for_vocabulary(vocabulary);
        let header = Header { width, tokens: 0, text_bytes: 0, vocabulary: vocabulary as u64 };
        let mut writer = Self {
            path,
            file: BufWriter::with_capacity(WRITE_BYTES, file),
            header,
            hasher: blake3::Hasher::new(),
        };
        writer.attempt(|file| file.write_all(&[0; HEADER_BYTES]))?;
        Ok(writer)
    }

    /// Appends ids that encode `text_bytes` of text; returns how many they are.
    pub(super) fn append(&mut self, encoded: &[u8], text_bytes: usize) -> Result<u64, DataError> {
        self.attempt(|file| file.write_all(encoded))?;
        self.hasher.update(encoded);
        let tokens = (encoded.len() / self.header.width.bytes()) as u64;
        self.header.tokens += tokens;
        self.header.text_bytes += text_bytes as u64;
        Ok(tokens)
    }

    /// Writes the header and makes the file durable.
    pub(super) fn finish(mut self) -> Result<(), DataError> {
        let fields = self.header.encode();
        let digest = self.hasher.update(&fields).finalize();
        self.attempt(|file| {
            file.flush()?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&fields)?;
            file.write_all(digest.as_bytes())?;
            file.flush()?;
            file.get_ref().sync_all()
        })
    }

    fn attempt(
        &mut self,
        write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
    ) -> Result<(), DataError> {
        let bytes_written = self.header.tokens * self.header.width.bytes() as u64;
        write(&mut self.file).map_err(|error| DataError::cache("write", &self.path, bytes_written, error))
    }
}

/// Tokens on disk, mapped into memory; clones share the mapping.
#[derive(Clone, Debug)]
pub struct Shard {
    path: PathBuf,
    map: Arc<Mmap>,
    header: Header,
}

impl Shard {
    /// Maps a shard and checks its header against the file's length.
    ///
    /// # Errors
    /// [`DataError::Cache`] if it cannot be opened, [`DataError::Corrupt`] if it is not a whole shard.
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let cannot_open = |error| DataError::cache("open", path, 0, error);
        let file = File::open(path).map_err(cannot_open)?;
        // SAFETY: the file must not change while it is mapped. It lies in the client's own cache, it is
        // written under another name and renamed when complete, and from then on only read or unlinked
        // (which leaves the mapping intact): see `cache`. No reference into the map outlives it, and any
        // byte pattern is a valid u8.
        let map = unsafe { Mmap::map(&file) }.map_err(cannot_open)?;
        let header =
            Header::decode(&map).map_err(|reason| DataError::Corrupt { path: path.to_owned(), reason })?;
        Ok(Self { path: path.to_owned(), map: Arc::new(map), header })
    }

    /// Itself, if it has as many tokens as there should be.
    ///
    /// # Errors
    /// [`DataError::Corrupt`] if it has not.
    pub(super) fn expect_tokens(self, tokens: u64) -> Result<Self, DataError> {
        if self.tokens() == tokens {
            return Ok(self);
        }
        let reason = format!("it has {} tokens, its statistics say {tokens}", self.tokens());
        Err(DataError::Corrupt { path: self.path, reason })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// UTF-8 bytes of the text that the tokens encode.
    pub fn text_bytes(&self) -> u64 {
        self.header.text_bytes
    }

    /// Reads the whole shard and compares it with its digest; `told` hears how many bytes were read each time.
    ///
    /// # Errors
    /// [`DataError::Corrupt`] if it is not what was written.
    pub(super) fn verify(&self, told: &mut dyn FnMut(u64)) -> Result<(), DataError> {
        let mut hasher = blake3::Hasher::new();
        for part in self.map[HEADER_BYTES..].chunks(VERIFY_BYTES) {
            hasher.update_rayon(part);
            told(part.len() as u64);
        }
        let digest = hasher.update(&self.map[..FIELDS_BYTES]).finalize();
        if digest == self.map[FIELDS_BYTES..HEADER_BYTES] {
            return Ok(());
        }
        let reason = "its content does not have the digest that it was written with".to_owned();
        Err(DataError::Corrupt { path: self.path.clone(), reason })
    }

    /// Appends the tokens of `range` to `out`. Each is checked to be in the vocabulary: an id beyond it would
    /// end a CUDA process at the embedding.
    ///
    /// # Errors
    /// [`DataError::OutOfRange`] if the shard ends before, [`DataError::Corrupt`] for an impossible token.
    pub fn copy(&self, range: Range<u64>, out: &mut Vec<i64>) -> Result<(), DataError> {
        let Header { width, tokens, vocabulary, .. } = self.header;
        if range.start > range.end || range.end > tokens {
            return Err(DataError::OutOfRange { start: range.start, end: range.end, tokens });
        }
        // The mapped length fits usize, and `open` checked that it holds all tokens.
        #[allow(clippy::cast_possible_truncation)]
        let at = |token: u64| HEADER_BYTES + token as usize * width.bytes();
        let bytes = &self.map[at(range.start)..at(range.end)];
        let before = out.len();
        match width {
            TokenWidth::U16 => {
                out.extend(bytes.chunks_exact(2).map(|id| i64::from(u16::from_le_bytes([id[0], id[1]]))));
            }
            TokenWidth::U32 => out.extend(
                bytes.chunks_exact(4).map(|id| i64::from(u32::from_le_bytes([id[0], id[1], id[2], id[3]]))),
            ),
        }
        let largest = out[before..].iter().copied().max().unwrap_or_default();
        if largest.unsigned_abs() < vocabulary || range.is_empty() {
            return Ok(());
        }
        out.truncate(before);
        let reason = format!("token {largest} is beyond the vocabulary of {vocabulary}");
        Err(DataError::Corrupt { path: self.path.clone(), reason })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A shard of `ids` with 3 text bytes per token; the file is gone, the mapping lives.
    pub(in super::super) fn shard_of(ids: &[u32], vocabulary: usize) -> Shard {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        write(&path, ids, vocabulary);
        Shard::open(&path).unwrap()
    }

    /// How many clones of a shard there are, with itself.
    pub(in super::super) fn owners(shard: &Shard) -> usize {
        Arc::strong_count(&shard.map)
    }

    fn write(path: &Path, ids: &[u32], vocabulary: usize) {
        let mut writer = ShardWriter::create(path.to_owned(), vocabulary).unwrap();
        writer.append(&TokenWidth::for_vocabulary(vocabulary).encode(ids), 3 * ids.len()).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn tokens_come_back_in_both_widths() {
        for (vocabulary, last) in [(1 << 16, 65_535), ((1 << 16) + 1, 65_536)] {
            let shard = shard_of(&[1, 2, 300, last], vocabulary);
            let mut out = vec![7];
            shard.copy(1..4, &mut out).unwrap();
            assert_eq!(out, [7, 2, 300, i64::from(last)]);
            assert_eq!((shard.tokens(), shard.text_bytes()), (4, 12));
        }
        assert!(shard_of(&[], 10).copy(0..0, &mut Vec::new()).is_ok());
    }

    #[test]
    fn tokens_past_the_end_are_an_error() {
        let shard = shard_of(&[1, 2], 10);
        for range in [0..3, 2..3, u64::MAX - 1..u64::MAX] {
            assert!(matches!(
                shard.copy(range, &mut Vec::new()),
                Err(DataError::OutOfRange { tokens: 2, .. })
            ));
        }
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_an_error() {
        let shard = shard_of(&[1, 10, 2], 10);
        let mut out = vec![5];
        assert!(matches!(shard.copy(0..3, &mut out), Err(DataError::Corrupt { .. })));
        assert_eq!(out, [5]);
        assert!(shard.copy(2..3, &mut out).is_ok());
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        write(&path, &[1, 2, 3], 10);
        let good = std::fs::read(&path).unwrap();
        let check = |bytes: &[u8], part: &str| {
            std::fs::write(&path, bytes).unwrap();
            let error = Shard::open(&path).unwrap_err();
            assert!(matches!(error, DataError::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains(part), "{error}");
        };
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        check(&[], "less than a header");
        check(&good[..71], "less than a header");
        check(&good[..good.len() - 1], "3 tokens do not make");
        check(&[good.as_slice(), &[0]].concat(), "3 tokens do not make");
        check(&with(0, 0), "does not begin");
        check(&with(8, 1), "format version is 1");
        check(&with(12, 3), "3 bytes per token");
        check(&with(16, 4), "4 tokens do not make");
        check(&with(23, 0xFF), "tokens do not make");
    }

    #[test]
    fn any_changed_byte_is_found_by_verifying() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        write(&path, &[1, 2, 3, 4], 10);
        let good = std::fs::read(&path).unwrap();
        let mut read = 0;
        Shard::open(&path).unwrap().verify(&mut |bytes| read += bytes).unwrap();
        assert_eq!(read, 8);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            // Under a new name: what is mapped must not change.
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, bytes).unwrap();
            let result = Shard::open(&path).and_then(|shard| shard.verify(&mut |_| {}));
            assert!(matches!(result, Err(DataError::Corrupt { .. })), "byte {at}");
        }
    }

    #[test]
    fn an_unfinished_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = ShardWriter::create(path.clone(), 10).unwrap();
        writer.append(&[1, 0], 1).unwrap();
        drop(writer);
        assert!(matches!(Shard::open(&path), Err(DataError::Corrupt { .. })));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_told_as_such() {
        let mut writer = ShardWriter::create("/dev/full".into(), 10).unwrap();
        let error = (0..3).find_map(|_| writer.append(&vec![0; WRITE_BYTES], 1).err()).unwrap();
        assert!(matches!(error, DataError::DiskFull { .. }), "{error}");
        assert!(error.to_string().contains("free disk space"), "{error}");
    }
}
