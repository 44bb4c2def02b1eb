//! The rows of a `.parquet` file: one column of text, page by page.
//!
//! Memory is the pages that the rows read ahead lie in, and the column's dictionary where it has one, each of bounded
//! size (see `pages`). The parquet library panics on some damaged files; that ends the file here, and nothing else. Its
//! message, which may quote the file, is not printed.

mod pages;

use std::{
    cell::Cell,
    collections::VecDeque,
    fs::File,
    io,
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::{Arc, Once, atomic::AtomicU64},
};

use parquet::{
    basic::{Compression, Type},
    column::reader::{ColumnReaderImpl, get_column_reader, get_typed_column_reader},
    data_type::{ByteArray, ByteArrayType},
    errors::ParquetError,
    file::{reader::FileReader, serialized_reader::SerializedFileReader},
};

use self::pages::{Counted, Pages};

/// Rows taken from a page at a time.
const ROWS_AHEAD: usize = 32;
/// Column names listed where the one that is wanted is missing.
const COLUMNS_LISTED_MAX: usize = 16;

/// One row's text, in the page that it lies in; nothing where it is null.
pub(super) type Row = Option<ByteArray>;

/// Why a file cannot be read on, in our own words: the library's may quote what it read.
#[derive(Debug, thiserror::Error)]
enum RowsError {
    #[error(transparent)]
    System(io::Error),
    #[error("it has no column {key:?}; there are {names}")]
    NoColumn { key: String, names: String },
    #[error("its column {key:?} does not hold one text for each row")]
    NotText { key: String },
    #[error(
        "its text is compressed with {codec}, which is not read here: write it with zstd, gzip, LZ4_RAW or \
         snappy"
    )]
    Codec { codec: &'static str },
    #[error("it has a page of {bytes} bytes, more than {bytes_max}: write the file with smaller pages")]
    Page { bytes: u64, bytes_max: u64 },
    #[error("not a whole parquet file")]
    Damaged,
}

impl From<RowsError> for ParquetError {
    fn from(error: RowsError) -> Self {
        Self::External(Box::new(error))
    }
}

/// The text column of an open file.
pub(super) struct Rows {
    file: SerializedFileReader<Counted>,
    /// The same file, for the pages.
    counted: Counted,
    column: usize,
    page_bytes_max: u64,
    /// Row group that comes after `values`.
    next_group: usize,
    values: Option<ColumnReaderImpl<ByteArrayType>>,
    ahead: VecDeque<Row>,
}

impl Rows {
    /// Opens a file whose text is in the column `key`; `bytes_read` counts what is read of it. A page may have
    /// `page_bytes_max`.
    pub(super) fn open(
        file: File,
        bytes_read: Arc<AtomicU64>,
        key: &str,
        page_bytes_max: u64,
    ) -> io::Result<Self> {
        guarded(|| {
            let counted = Counted::new(file, bytes_read)?;
            let file = SerializedFileReader::new(counted.clone())?;
            let column = column(&file, key)?;
            let ahead = VecDeque::new();
            Ok(Self { file, counted, column, page_bytes_max, next_group: 0, values: None, ahead })
        })
    }

    /// The next row; nothing at the end. After an error the file cannot be read on.
    pub(super) fn next_row(&mut self) -> io::Result<Option<Row>> {
        if self.ahead.is_empty() {
            guarded(|| self.read_ahead())?;
        }
        Ok(self.ahead.pop_front())
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
            let group = self.file.metadata().row_group(self.next_group);
            let chunk = group.column(self.column);
            let codec = match chunk.compression() {
                Compression::BROTLI(_) => Some("Brotli"),
                Compression::LZO => Some("LZO"),
                // Read by trying three forms, of which one grows past the size that the page claims.
                Compression::LZ4 => Some("LZ4 (the deprecated form)"),
                _ => None,
            };
            if let Some(codec) = codec {
                return Err(RowsError::Codec { codec }.into());
            }
            let pages = Pages::new(&self.counted, chunk, self.page_bytes_max)?;
            let column = get_column_reader(chunk.column_descr_ptr(), Box::new(pages));
            self.values = Some(get_typed_column_reader(column));
            self.next_group += 1;
        }
    }
}

/// Texts where they are defined; a column that cannot be null has no levels.
fn in_rows(rows: usize, levels: &[i16], texts: Vec<ByteArray>) -> VecDeque<Row> {
    let mut texts = texts.into_iter();
    (0..rows).map(|row| if levels.get(row) == Some(&0) { None } else { texts.next() }).collect()
}

/// The index of the text column.
fn column(file: &SerializedFileReader<Counted>, key: &str) -> Result<usize, RowsError> {
    let columns = file.metadata().file_metadata().schema_descr().columns();
    let Some(index) = columns.iter().position(|column| column.path().string() == key) else {
        let names = columns.iter().take(COLUMNS_LISTED_MAX).map(|column| column.path().string());
        let names = names.collect::<Vec<_>>().join(", ");
        return Err(RowsError::NoColumn { key: key.to_owned(), names });
    };
    let column = &columns[index];
    if column.physical_type() != Type::BYTE_ARRAY || column.max_rep_level() > 0 || column.max_def_level() > 1
    {
        return Err(RowsError::NotText { key: key.to_owned() });
    }
    Ok(index)
}

thread_local! {
    /// Whether this thread is in the library, so that a panic may quote what is read.
    static READING: Cell<bool> = const { Cell::new(false) };
}

/// From now on, of a panic in the library only its place is printed; others are told as before.
fn hide_messages() {
    let others = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if READING.get() {
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            eprintln!("reading a .parquet file failed at {place}: its rest is skipped");
        } else {
            others(info);
        }
    }));
}

/// Turns the library's errors and panics into errors in our words.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> io::Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(hide_messages);
    let before = READING.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    READING.set(before);
    let error = match result {
        Ok(Ok(read)) => return Ok(read),
        Ok(Err(ParquetError::External(error))) => own_words(error),
        _ => RowsError::Damaged,
    };
    Err(io::Error::other(error))
}

/// Ours as they are, and the system's; the libraries' are about what they read.
fn own_words(error: Box<dyn std::error::Error + Send + Sync>) -> RowsError {
    let error = match error.downcast::<RowsError>() {
        Ok(ours) => return *ours,
        Err(error) => error,
    };
    match error.downcast::<io::Error>() {
        Ok(system) if system.raw_os_error().is_some() => RowsError::System(*system),
        _ => RowsError::Damaged,
    }
}

#[cfg(test)]
mod tests;
