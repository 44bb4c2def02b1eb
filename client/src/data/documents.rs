//! Reading files: what documents are in them.
//!
//! A `.txt` file is cut into documents of at most [`TXT_DOCUMENT_BYTES_MAX`]; every line of a `.jsonl` file is
//! a document, `{"text": "..."}` (other fields are allowed, and the source may name another for the text), and
//! so is every row of a `.parquet` file.
//!
//! Files stream: never more than [`PIECE_BYTES_MAX`] of one is held. Nothing that a file contains is fatal:
//! what cannot be used comes out as a fault with its place. A `.txt` file (or, where it is longer than a
//! piece, that piece) with a fault is skipped whole; of a damaged `.jsonl` or `.parquet` file the good lines and
//! rows are kept.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::{
    mixture::Source,
    rows::{Row, Rows},
    source::{Compression, Format, SourceFile},
};

/// Most bytes of one file held at a time, uncompressed. A longer line of a `.jsonl` file is skipped; a longer
/// `.txt` file is read in several pieces.
pub const PIECE_BYTES_MAX: usize = 64 << 20;
/// Longest document made of a `.txt` file, in bytes. Documents are held out one by one, by content: this makes
/// enough of them even of a site's few large files (about one per 16 KiB) that the held-out text is close to
/// its fraction. A file is cut after a blank line where there is one.
pub const TXT_DOCUMENT_BYTES_MAX: usize = 16 << 10;
/// Read from disk at a time.
const READ_BYTES: usize = 1 << 16;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// A part of a file as it was read, to be parsed on any thread.
#[derive(Debug)]
pub(super) struct Piece {
    /// Index in the listing.
    pub(super) file: usize,
    /// Line or row in the file from 1, where it has such.
    pub(super) line: Option<u64>,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
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
    pub(super) fn bytes(&self) -> usize {
        match &self.content {
            Content::Text(bytes) | Content::JsonLine(bytes) | Content::Row(bytes) => bytes.len(),
            Content::Fault(reason) => reason.len(),
        }
    }
}

/// Reads files one after the other, piece by piece.
pub(super) struct Reader<'a> {
    /// What the files' `source` counts in.
    sources: &'a [Source],
    files: &'a [SourceFile],
    next_file: usize,
    open: Option<OpenFile>,
    /// Bytes taken from disk of the open file, counted below its decompressor.
    bytes_of_open: Arc<AtomicU64>,
    bytes_before: u64,
    piece_bytes_max: usize,
}

enum OpenFile {
    Text {
        stream: Box<dyn BufRead + Send>,
        /// What was read of the next piece of a long file.
        carry: Vec<u8>,
    },
    Lines {
        stream: Box<dyn BufRead + Send>,
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

impl<'a> Reader<'a> {
    pub(super) fn new(sources: &'a [Source], files: &'a [SourceFile]) -> Self {
        Self {
            sources,
            files,
            next_file: 0,
            open: None,
            bytes_of_open: Arc::default(),
            bytes_before: 0,
            piece_bytes_max: PIECE_BYTES_MAX,
        }
    }

    /// Bytes on disk that have been dealt with.
    pub(super) fn bytes_read(&self) -> u64 {
        // Of a .parquet file some bytes are read twice.
        let of_open =
            self.open.as_ref().and(self.next_file.checked_sub(1)).map_or(0, |file| self.files[file].bytes);
        self.bytes_before + self.bytes_of_open.load(Ordering::Relaxed).min(of_open)
    }

    fn open_next(&mut self) -> Option<io::Result<()>> {
        let file = self.files.get(self.next_file)?;
        self.next_file += 1;
        let bytes = Arc::clone(&self.bytes_of_open);
        let key = &self.sources[file.source].text_key;
        Some(File::open(&file.path).and_then(|open| OpenFile::new(file, open, bytes, key)).map(|open| {
            self.open = Some(open);
        }))
    }

    fn close(&mut self) {
        self.open = None;
        self.bytes_before += self.files[self.next_file - 1].bytes;
        self.bytes_of_open.store(0, Ordering::Relaxed);
    }
}

impl Iterator for Reader<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        loop {
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
                Ok(Some(content)) => return Some(Piece { file, line, content }),
                Ok(None) => self.close(),
                Err(error) => {
                    self.close();
                    let content = Content::Fault(format!("cannot be read on: {error}"));
                    return Some(Piece { file, line, content });
                }
            }
        }
    }
}

impl OpenFile {
    fn new(file: &SourceFile, open: File, bytes: Arc<AtomicU64>, text_key: &str) -> io::Result<Self> {
        if file.format == Format::Parquet {
            return Ok(Self::Rows { rows: Box::new(Rows::open(open, bytes, text_key)?), row: 0 });
        }
        let raw = BufReader::with_capacity(READ_BYTES, Counted { file: open, bytes });
        let stream: Box<dyn BufRead + Send> = match file.compression {
            Compression::None => Box::new(raw),
            Compression::Gzip => {
                Box::new(BufReader::with_capacity(READ_BYTES, flate2::bufread::MultiGzDecoder::new(raw)))
            }
            Compression::Zstd => {
                Box::new(BufReader::with_capacity(READ_BYTES, zstd::Decoder::with_buffer(raw)?))
            }
        };
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
        Some(text) => Content::Row(text),
    }
}

/// Where to end a part of at most `bytes_max` of a longer text: after the last blank line in its second half,
/// else after the last line there, else after the last space there, else between two characters.
fn cut_point(bytes: &[u8], bytes_max: usize) -> usize {
    let half = bytes_max / 2;
    let mut after_line = None;
    for position in (half..bytes_max).rev().filter(|position| bytes[*position] == b'\n') {
        after_line.get_or_insert(position + 1);
        let before = &bytes[..position];
        if before.strip_suffix(b"\r").unwrap_or(before).ends_with(b"\n") {
            return position + 1;
        }
    }
    let after_space =
        || bytes[half..bytes_max].iter().rposition(|byte| *byte == b' ').map(|at| half + at + 1);
    let between_characters = || (half + 1..=bytes_max).rev().find(|at| bytes[*at] & 0xC0 != 0x80);
    after_line.or_else(after_space).or_else(between_characters).unwrap_or(bytes_max)
}

/// Cuts a text into consecutive parts of at most `bytes_max` (at least 8).
pub(super) fn parts(text: &str, bytes_max: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = if rest.len() > bytes_max { cut_point(rest.as_bytes(), bytes_max) } else { rest.len() };
        let (part, tail) = rest.split_at(end);
        rest = tail;
        (!part.is_empty()).then_some(part)
    })
}

/// A text and the documents in it.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) text: String,
    pub(super) documents: Vec<Document>,
}

/// Where a document lies, and what identifies it.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) range: Range<usize>,
    /// The first 64 bits of its BLAKE3, uniform over documents.
    pub(super) digest: u64,
}

/// The documents of a piece, or why it has to be skipped. `text_key` names the field of a line that is the text.
pub(super) fn parse(content: Content, text_key: &str) -> Result<Parsed, String> {
    let (text, document_bytes_max) = match content {
        Content::Fault(reason) => return Err(reason),
        Content::Text(bytes) => (parse_text(bytes)?, TXT_DOCUMENT_BYTES_MAX),
        Content::JsonLine(bytes) => (parse_json_line(&bytes, text_key)?, usize::MAX),
        Content::Row(bytes) => (parse_text(bytes)?, usize::MAX),
    };
    let mut start = 0;
    let documents = parts(&text, document_bytes_max)
        .map(|part| {
            let range = start..start + part.len();
            start = range.end;
            Document { range, digest: first_bits(blake3::hash(part.as_bytes())) }
        })
        .collect();
    Ok(Parsed { text, documents })
}

fn first_bits(hash: blake3::Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn parse_text(mut bytes: Vec<u8>) -> Result<String, String> {
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    // `contains` is vectorised in every profile, `position` is not.
    if bytes.contains(&0) {
        let at = bytes.iter().take_while(|byte| **byte != 0).count();
        return Err(format!("not text: a NUL at byte {at} (a binary file, or UTF-16: convert it to UTF-8)"));
    }
    String::from_utf8(bytes).map_err(|error| {
        format!("not UTF-8 at byte {}: convert it to UTF-8", error.utf8_error().valid_up_to())
    })
}

/// The reasons are in our own words: serde's quote the line, and content belongs in no report.
fn parse_json_line(bytes: &[u8], text_key: &str) -> Result<String, String> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let text = JsonLine { text_key }.deserialize(&mut json).and_then(|text| json.end().map(|()| text));
    text.map_err(|error| match error.classify() {
        serde_json::error::Category::Data => format!("not an object with a string {text_key:?}"),
        _ => format!("not JSON (column {})", error.column()),
    })
}

/// An object of which one field's string is wanted. Nothing is kept of the other fields.
struct JsonLine<'a> {
    text_key: &'a str,
}

impl<'de> DeserializeSeed<'de> for JsonLine<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for JsonLine<'_> {
    type Value = String;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<String, A::Error> {
        let mut text = None;
        while let Some(is_text) = fields.next_key_seed(IsKey(self.text_key))? {
            if is_text {
                text = Some(fields.next_value()?);
            } else {
                fields.next_value::<IgnoredAny>()?;
            }
        }
        text.ok_or_else(|| A::Error::custom("the text is missing"))
    }
}

/// Whether a field's name is the one that is looked for.
struct IsKey<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a field's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<bool, E> {
        Ok(name == self.0)
    }
}

#[cfg(test)]
mod tests;
