//! The pages of a column, none larger than it may be: a damaged file may claim any size for a page, and some writers
//! make pages of a gigabyte.
//!
//! The library shows no page's size before it has made room for it. So the beginning of each page's header is read
//! here as well, as it passes, and its word is checked before the page itself is read. What is not bounded by that
//! word: a page compressed with gzip (at most about a thousand times its compressed size, which is bounded), and the
//! number of texts that a page in one of the delta encodings claims.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parquet::{
    column::page::{Page, PageMetadata, PageReader},
    errors::ParquetError,
    file::{
        metadata::ColumnChunkMetaData,
        reader::{ChunkReader, Length},
        serialized_reader::SerializedPageReader,
    },
};

use super::RowsError;

/// Read from disk at a time where the length is not known.
const READ_BYTES: usize = 1 << 16;
/// Bytes before each text in a dictionary: its length (Encodings.md of the parquet format, "Plain").
const LENGTH_BYTES: usize = 4;
/// Thrift's compact protocol: the field after the one before, an `i32`.
const NEXT_FIELD_I32: u8 = 0x15;

/// A file that is read at given places, never past its end; clones share it.
#[derive(Clone)]
pub(super) struct Counted {
    file: Arc<File>,
    length: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Counted {
    pub(super) fn new(file: File, bytes_read: Arc<AtomicU64>) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), length, bytes_read })
    }
}

impl Length for Counted {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Counted {
    type T = BufReader<FileFrom>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let from = FileFrom { file: self.file.clone(), at: start, bytes_read: self.bytes_read.clone() };
        Ok(BufReader::with_capacity(READ_BYTES, from))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        // Before memory is asked for: a damaged file may name any length.
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(RowsError::Damaged.into());
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start)?;
        self.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(bytes.into())
    }
}

/// A file from a given place on.
pub(super) struct FileFrom {
    file: Arc<File>,
    at: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Read for FileFrom {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The pages of one column in one row group.
pub(super) struct Pages(SerializedPageReader<PageFile>);

impl Pages {
    pub(super) fn new(
        file: &Counted,
        chunk: &ColumnChunkMetaData,
        page_bytes_max: u64,
    ) -> Result<Self, ParquetError> {
        let file = PageFile { file: file.clone(), page_bytes_max, claimed: Arc::default() };
        // The number of rows is asked for only together with the places of the pages.
        Ok(Self(SerializedPageReader::new(Arc::new(file), chunk, 0, None)?))
    }
}

impl Iterator for Pages {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        let page = self.0.get_next_page()?;
        if page.as_ref().is_some_and(|page| !is_possible(page)) {
            return Err(RowsError::Damaged.into());
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        self.0.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.0.skip_next_page()
    }
}

/// Whether a dictionary has room for as many texts as it claims: the library makes room for them all.
fn is_possible(page: &Page) -> bool {
    let Page::DictionaryPage { buf, num_values, .. } = page else { return true };
    buf.len() / LENGTH_BYTES >= *num_values as usize
}

/// A file of which the library reads nothing but pages: a header through [`ChunkReader::get_read`], then the page
/// through [`ChunkReader::get_bytes`].
struct PageFile {
    file: Counted,
    page_bytes_max: u64,
    /// The size that the header read last claims for its page, decompressed; less than 0 if it is not one.
    claimed: Arc<AtomicI64>,
}

impl Length for PageFile {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for PageFile {
    type T = Header;

    fn get_read(&self, start: u64) -> Result<Header, ParquetError> {
        Ok(Header { bytes: self.file.get_read(start)?, claimed: Some(self.claimed.clone()) })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let claimed = self.claimed.load(Ordering::Relaxed);
        let Ok(claimed) = u64::try_from(claimed) else { return Err(RowsError::Damaged.into()) };
        let bytes = claimed.max(length as u64);
        if bytes > self.page_bytes_max {
            return Err(RowsError::Page { bytes, bytes_max: self.page_bytes_max }.into());
        }
        self.file.get_bytes(start, length)
    }
}

/// A page's header while it is read.
struct Header {
    bytes: BufReader<FileFrom>,
    /// Where its claim is noted, by the first reading.
    claimed: Option<Arc<AtomicI64>>,
}

impl Read for Header {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(claimed) = self.claimed.take() {
            claimed.store(claimed_bytes(self.bytes.fill_buf()?).unwrap_or(-1), Ordering::Relaxed);
        }
        self.bytes.read(buffer)
    }
}

/// The second field of a page's header, `uncompressed_page_size`, behind the first, its `type` (parquet.thrift, in
/// Thrift's compact protocol: a byte that says which field, then a zigzag number of 7 bits a byte).
fn claimed_bytes(header: &[u8]) -> Option<i64> {
    let mut bytes = header.iter();
    let mut field = || {
        if bytes.next() != Some(&NEXT_FIELD_I32) {
            return None;
        }
        let mut number = 0u64;
        for shift in (0..35).step_by(7) {
            let byte = *bytes.next()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                let magnitude = i64::try_from(number >> 1).ok()?;
                return Some(if number & 1 == 0 { magnitude } else { -1 - magnitude });
            }
        }
        None
    };
    field().and_then(|_| field())
}

#[cfg(test)]
mod tests {
    use parquet::basic::Encoding;
    use proptest::prelude::*;

    use super::*;

    fn varint(value: i32) -> Vec<u8> {
        let mut number = u64::from(((value << 1) ^ (value >> 31)).cast_unsigned());
        let mut bytes = Vec::new();
        while number >= 0x80 {
            bytes.push(u8::try_from(number & 0x7F).unwrap() | 0x80);
            number >>= 7;
        }
        bytes.push(u8::try_from(number).unwrap());
        bytes
    }

    proptest! {
        #[test]
        fn a_header_claims_what_was_written(kind in 0i32..4, size: i32, rest in prop::collection::vec(any::<u8>(), 0..9)) {
            let header = [&[0x15], &varint(kind)[..], &[0x15], &varint(size), &rest].concat();
            prop_assert_eq!(claimed_bytes(&header), Some(i64::from(size)));
        }

        #[test]
        fn what_is_no_header_claims_nothing_and_is_never_fatal(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            if let Some(claimed) = claimed_bytes(&bytes) {
                prop_assert!(bytes[0] == 0x15 && claimed < 1 << 34);
            }
        }
    }

    #[test]
    fn a_dictionary_has_no_more_texts_than_it_has_room_for() {
        let page = |bytes: usize, num_values| Page::DictionaryPage {
            buf: vec![0; bytes].into(),
            num_values,
            encoding: Encoding::PLAIN,
            is_sorted: false,
        };
        assert!(is_possible(&page(8, 2)) && is_possible(&page(0, 0)) && is_possible(&page(11, 2)));
        assert!(!is_possible(&page(11, 3)) && !is_possible(&page(100, u32::MAX)));
    }
}
