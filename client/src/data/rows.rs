//! The rows of a `.parquet` file: one column of text, page by page.
//!
//! Memory is the pages that the rows read ahead lie in, and the column's dictionary where it has one. The
//! parquet library panics on some damaged files; that ends the file here, and nothing else.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parquet::{
    basic::Type,
    column::reader::{ColumnReaderImpl, get_column_reader, get_typed_column_reader},
    data_type::{ByteArray, ByteArrayType},
    errors::ParquetError,
    file::{
        reader::{ChunkReader, FileReader, Length},
        serialized_reader::SerializedFileReader,
    },
};

/// Rows taken from a page at a time.
const ROWS_AHEAD: usize = 32;
/// Column names listed where the one that is wanted is missing.
const COLUMNS_LISTED_MAX: usize = 16;
/// Read from disk at a time where the length is not known.
const READ_BYTES: u64 = 1 << 16;

/// One row's text; nothing where it is null.
pub(super) type Row = Option<Vec<u8>>;

/// The text column of an open file.
pub(super) struct Rows {
    file: SerializedFileReader<Counted>,
    column: usize,
    /// Row group that comes after `values`.
    next_group: usize,
    values: Option<ColumnReaderImpl<ByteArrayType>>,
    ahead: VecDeque<Option<ByteArray>>,
}

impl Rows {
    /// Opens a file whose text is in the column `key`; `bytes_read` counts what is read of it.
    pub(super) fn open(file: File, bytes_read: Arc<AtomicU64>, key: &str) -> io::Result<Self> {
        guarded(|| {
            let length = file.metadata()?.len();
            let file = SerializedFileReader::new(Counted { file: Arc::new(file), length, bytes_read })?;
            let column = column(&file, key)?;
            Ok(Self { file, column, next_group: 0, values: None, ahead: VecDeque::new() })
        })
    }

    /// The next row; nothing at the end. After an error the file cannot be read on.
    pub(super) fn next_row(&mut self) -> io::Result<Option<Row>> {
        if self.ahead.is_empty() {
            guarded(|| self.read_ahead())?;
        }
        Ok(self.ahead.pop_front().map(|row| row.map(|text| text.data().to_vec())))
    }

    /// Leaves nothing ahead at the end of the file only.
    fn read_ahead(&mut self) -> Result<(), ParquetError> {
        loop {
            if let Some(values) = &mut self.values {
                let (mut levels, mut texts) = (Vec::new(), Vec::new());
                let (rows, ..) = values.read_records(ROWS_AHEAD, Some(&mut levels), None, &mut texts)?;
                if rows > 0 {
                    self.ahead = in_rows(rows, &levels, texts);
                    return Ok(());
                }
            }
            if self.next_group == self.file.num_row_groups() {
                return Ok(());
            }
            let pages = self.file.get_row_group(self.next_group)?.get_column_page_reader(self.column)?;
            let schema = self.file.metadata().file_metadata().schema_descr_ptr();
            self.values = Some(get_typed_column_reader(get_column_reader(schema.column(self.column), pages)));
            self.next_group += 1;
        }
    }
}

/// Texts where they are defined; a column that cannot be null has no levels.
fn in_rows(rows: usize, levels: &[i16], texts: Vec<ByteArray>) -> VecDeque<Option<ByteArray>> {
    let mut texts = texts.into_iter();
    (0..rows).map(|row| if levels.get(row) == Some(&0) { None } else { texts.next() }).collect()
}

/// The index of the text column.
fn column(file: &SerializedFileReader<Counted>, key: &str) -> Result<usize, ParquetError> {
    let columns = file.metadata().file_metadata().schema_descr().columns();
    let Some(index) = columns.iter().position(|column| column.path().string() == key) else {
        let names = columns.iter().take(COLUMNS_LISTED_MAX).map(|column| column.path().string());
        let names = names.collect::<Vec<_>>().join(", ");
        return Err(ParquetError::General(format!("it has no column {key:?}; there are {names}")));
    };
    let column = &columns[index];
    if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 || column.max_def_level() > 1
    {
        return Err(ParquetError::General(format!("its column {key:?} does not hold one text for each row")));
    }
    Ok(index)
}

/// Turns the library's errors and panics into errors in our words; its own may quote what it read.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> io::Result<T> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(ParquetError::General(reason))) => Err(io::Error::other(reason)),
        Ok(Err(error)) => Err(io::Error::other(format!("not a whole parquet file: {error}"))),
        Err(_) => Err(io::Error::other("not a whole parquet file")),
    }
}

/// A file that is read at given places, never past its end.
struct Counted {
    file: Arc<File>,
    length: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Length for Counted {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Counted {
    type T = io::BufReader<FileFrom>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let from = FileFrom { file: self.file.clone(), at: start, bytes_read: self.bytes_read.clone() };
        #[allow(clippy::cast_possible_truncation)] // a constant
        Ok(io::BufReader::with_capacity(READ_BYTES as usize, from))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        // Before memory is asked for: a damaged file may name any length.
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(ParquetError::EOF("it ends early".to_owned()));
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start)?;
        self.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(bytes.into())
    }
}

/// A file from a given place on.
struct FileFrom {
    file: Arc<File>,
    at: u64,
    bytes_read: Arc<AtomicU64>,
}

impl io::Read for FileFrom {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.at)?;
        self.at += count as u64;
        self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
