//! Reading files: what documents are in them.
//!
//! A `.txt` file is a document; so is every line of a `.jsonl` file, `{"text": "..."}` (other fields are allowed,
//! and the source may name another for the text), and every row of a `.parquet` file.
//!
//! Files stream: never more than [`PIECE_BYTES_MAX`] of one is held; a longer `.txt` file comes in several pieces. Of a
//! `.parquet` file whole pages are held, for as long as a row of theirs is, and a dictionary: each may have
//! [`PAGE_PIECES_MAX`] times as much.
//! Nothing that a file contains is fatal: what cannot be used comes out as a fault with its place. A `.txt` file
//! (or, where it is longer than a piece, that piece) with a fault is skipped whole; of a damaged `.jsonl` or
//! `.parquet` file the good lines and rows are kept.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    parse::cut_point,
    rows::{Row, Rows},
    source::{Compression, Format, SourceFile},
};

/// Most bytes of one file held at a time, uncompressed. A longer line of a `.jsonl` file is skipped; a longer
/// `.txt` file is read in several pieces.
pub const PIECE_BYTES_MAX: usize = 64 << 20;
/// A page of a `.parquet` file may hold this many of the longest texts, which are half a gigabyte.
const PAGE_PIECES_MAX: usize = 8;
/// Read from disk at a time.
const READ_BYTES: usize = 1 << 16;

/// A part of a file as it was read, to be parsed on any thread.
#[derive(Debug)]
pub struct Piece {
    /// Index in the list of files.
    pub file: usize,
    /// Line or row in the file from 1, where it has such.
    pub line: Option<u64>,
    /// What was read.
    pub content: Content,
}

/// What a piece consists of.
#[derive(Debug)]
pub enum Content {
    /// A `.txt` file, or a part of a long one.
    Text(Vec<u8>),
    /// A line of a `.jsonl` file.
    JsonLine(Vec<u8>),
    /// The text of a row of a `.parquet` file.
    Row(Vec<u8>),
    /// Something that has to be skipped.
    Fault(String),
}

impl Piece {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.content {
            Content::Text(bytes) | Content::JsonLine(bytes) | Content::Row(bytes) => bytes.len(),
            Content::Fault(reason) => reason.len(),
        }
    }
}

/// Whoever wanted the text no longer does.
#[derive(Debug, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

/// Reads files one after the other, piece by piece.
pub struct Reader<'a> {
    files: &'a [SourceFile],
    /// Asked before each piece, and within it before each reading of some kilobytes.
    cancelled: &'a (dyn Fn() -> bool + Sync),
    next_file: usize,
    open: Option<OpenFile<'a>>,
    /// Bytes taken from disk of the open file, counted below its decompressor.
    bytes_of_open: Arc<AtomicU64>,
    bytes_before: u64,
    piece_bytes_max: usize,
}

enum OpenFile<'a> {
    Text {
        stream: Box<dyn BufRead + Send + 'a>,
        /// What was read of the next piece of a long file.
        carry: Vec<u8>,
    },
    Lines {
        stream: Box<dyn BufRead + Send + 'a>,
        line: u64,
    },
    Rows {
        rows: Box<Rows>,
        row: u64,
    },
}

struct Counted {
    file: File,
    bytes: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// A stream that ends with [`Cancelled`] where it is asked to.
struct Cancellable<'a, R> {
    stream: R,
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl<R: Read> Read for Cancellable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.cancelled)() {
            return Err(io::Error::other(Cancelled));
        }
        let end = buffer.len().min(READ_BYTES);
        self.stream.read(&mut buffer[..end])
    }
}

fn is_cancelled(error: &io::Error) -> bool {
    matches!(error.get_ref(), Some(reason) if reason.is::<Cancelled>())
}

impl<'a> Reader<'a> {
    /// Begins at the first file.
    pub fn new(files: &'a [SourceFile], cancelled: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self {
            files,
            cancelled,
            next_file: 0,
            open: None,
            bytes_of_open: Arc::default(),
            bytes_before: 0,
            piece_bytes_max: PIECE_BYTES_MAX,
        }
    }

    /// Bytes on disk that have been dealt with.
    pub fn bytes_read(&self) -> u64 {
        // Of a .parquet file some bytes are read twice.
        let of_open =
            self.open.as_ref().and(self.next_file.checked_sub(1)).map_or(0, |file| self.files[file].bytes);
        self.bytes_before + self.bytes_of_open.load(Ordering::Relaxed).min(of_open)
    }

    fn open_next(&mut self) -> Option<io::Result<()>> {
        let file = self.files.get(self.next_file)?;
        self.next_file += 1;
        let bytes = Arc::clone(&self.bytes_of_open);
        let page_bytes_max = (self.piece_bytes_max * PAGE_PIECES_MAX) as u64;
        let open = File::open(&file.path);
        let open = open.and_then(|open| match file.format {
            Format::Parquet => OpenFile::rows(open, bytes, &file.text_key, page_bytes_max),
            Format::Text | Format::JsonLines => OpenFile::stream(file, open, bytes, self.cancelled),
        });
        Some(open.map(|open| self.open = Some(open)))
    }

    fn close(&mut self) {
        self.open = None;
        self.bytes_before += self.files[self.next_file - 1].bytes;
        self.bytes_of_open.store(0, Ordering::Relaxed);
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Piece, Cancelled>;

    fn next(&mut self) -> Option<Result<Piece, Cancelled>> {
        loop {
            if (self.cancelled)() {
                return Some(Err(Cancelled));
            }
            let result = match &mut self.open {
                Some(open) => open.next_piece(self.piece_bytes_max),
                None => match self.open_next()? {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
            };
            let line = self.open.as_ref().and_then(OpenFile::line);
            let file = self.next_file - 1;
            match result {
                Ok(Some(content)) => return Some(Ok(Piece { file, line, content })),
                Ok(None) => self.close(),
                Err(error) if is_cancelled(&error) => return Some(Err(Cancelled)),
                Err(error) => {
                    self.close();
                    let content = Content::Fault(format!("cannot be read on: {error}"));
                    return Some(Ok(Piece { file, line, content }));
                }
            }
        }
    }
}

impl<'a> OpenFile<'a> {
    fn rows(file: File, bytes: Arc<AtomicU64>, text_key: &str, page_bytes_max: u64) -> io::Result<Self> {
        let rows = Box::new(Rows::open(file, bytes, text_key, page_bytes_max)?);
        Ok(Self::Rows { rows, row: 0 })
    }

    /// Of a `.txt` or `.jsonl` file.
    fn stream(
        file: &SourceFile,
        open: File,
        bytes: Arc<AtomicU64>,
        cancelled: &'a (dyn Fn() -> bool + Sync),
    ) -> io::Result<Self> {
        let raw = BufReader::with_capacity(READ_BYTES, Counted { file: open, bytes });
        let text: Box<dyn Read + Send> = match file.compression {
            Compression::None => Box::new(raw),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
            Compression::Zstd => Box::new(zstd::Decoder::with_buffer(raw)?),
        };
        // Around the decompressor: a small archive may hold a long text.
        let text = Cancellable { stream: text, cancelled };
        let stream = Box::new(BufReader::with_capacity(READ_BYTES, text));
        Ok(match file.format {
            Format::JsonLines => Self::Lines { stream, line: 0 },
            Format::Text | Format::Parquet => Self::Text { stream, carry: Vec::new() },
        })
    }

    /// Line or row of the piece that was read last.
    fn line(&self) -> Option<u64> {
        match self {
            Self::Text { .. } => None,
            Self::Lines { line: number, .. } | Self::Rows { row: number, .. } => {
                Some(*number).filter(|number| *number > 0)
            }
        }
    }

    fn next_piece(&mut self, bytes_max: usize) -> io::Result<Option<Content>> {
        match self {
            Self::Text { stream, carry } => next_text(stream, carry, bytes_max),
            Self::Lines { stream, line } => next_line(stream, line, bytes_max),
            Self::Rows { rows, row } => {
                let next = rows.next_row()?;
                *row += 1;
                Ok(next.map(|text| row_content(text, bytes_max)))
            }
        }
    }
}

fn next_text(stream: &mut dyn BufRead, carry: &mut Vec<u8>, bytes_max: usize) -> io::Result<Option<Content>> {
    let mut text = std::mem::take(carry);
    // One byte more than a piece tells a file of exactly its length from a longer one.
    let wanted = bytes_max + 1 - text.len();
    stream.take(wanted as u64).read_to_end(&mut text)?;
    if text.len() > bytes_max {
        *carry = text.split_off(cut_point(&text, bytes_max));
    }
    Ok((!text.is_empty()).then_some(Content::Text(text)))
}

fn next_line(stream: &mut dyn BufRead, number: &mut u64, bytes_max: usize) -> io::Result<Option<Content>> {
    loop {
        let mut line = Vec::new();
        *number += 1;
        stream.take(bytes_max as u64 + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        if line.len() > bytes_max && line.last() != Some(&b'\n') {
            drop(line);
            stream.skip_until(b'\n')?;
            return Ok(Some(Content::Fault(format!("the line is longer than {bytes_max} bytes"))));
        }
        if !line.trim_ascii().is_empty() {
            return Ok(Some(Content::JsonLine(line)));
        }
    }
}

fn row_content(text: Row, bytes_max: usize) -> Content {
    match text {
        None => Content::Fault("there is no text (null)".to_owned()),
        Some(text) if text.len() > bytes_max => {
            Content::Fault(format!("the text is longer than {bytes_max} bytes"))
        }
        // A copy, since the page is to be let go of.
        Some(text) => Content::Row(text.data().to_vec()),
    }
}

#[cfg(test)]
pub(super) mod tests;
