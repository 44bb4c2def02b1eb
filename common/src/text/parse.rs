//! What a piece of a file says: its text, and the stretches of it that are held out or trained on one by one.

use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::documents::Content;

/// Longest stretch of a `.txt` file that is held out or trained on as one, in bytes. A shorter file is one stretch;
/// a longer one is cut after blank lines where there are such. Held-out text is thus close to its fraction even of
/// a site's few large files, and is still dozens of windows long wherever it lies among text that is trained on.
pub const STRETCH_BYTES_MAX: usize = 64 << 10;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The text of a piece.
#[derive(Debug)]
pub struct Parsed {
    /// The text.
    pub text: String,
    /// Identifies the text: the first 64 bits of its BLAKE3.
    pub digest: u64,
    /// All of the text, in its order; none if it is empty.
    pub stretches: Vec<Stretch>,
}

/// A part of a text that is held out or trained on as one.
#[derive(Debug)]
pub struct Stretch {
    /// Where it lies in the text.
    pub range: Range<usize>,
    /// The first 64 bits of its BLAKE3, uniform over stretches.
    pub digest: u64,
}

/// The text of a piece. `text_key` names the field of a line that is the text.
///
/// # Errors
/// Why it has to be skipped, in words.
pub fn parse(content: Content, text_key: &str) -> Result<Parsed, String> {
    let (text, stretch_bytes_max) = match content {
        Content::Fault(reason) => return Err(reason),
        Content::Text(bytes) => (parse_text(bytes)?, STRETCH_BYTES_MAX),
        Content::JsonLine(bytes) => (parse_json_line(&bytes, text_key)?, usize::MAX),
        Content::Row(bytes) => (parse_text(bytes)?, usize::MAX),
    };
    let mut start = 0;
    let stretches: Vec<Stretch> = parts(&text, stretch_bytes_max)
        .map(|part| {
            let range = start..start + part.len();
            start = range.end;
            Stretch { range, digest: digest(part) }
        })
        .collect();
    let digest = if let [only] = &stretches[..] { only.digest } else { digest(&text) };
    Ok(Parsed { text, digest, stretches })
}

fn digest(text: &str) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(text.as_bytes()).as_bytes();
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

/// Where to end a part of at most `bytes_max` of a longer text: after the last blank line in its second half,
/// else after the last line there, else after the last space there, else between two characters.
pub(super) fn cut_point(bytes: &[u8], bytes_max: usize) -> usize {
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
pub fn parts(text: &str, bytes_max: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = if rest.len() > bytes_max { cut_point(rest.as_bytes(), bytes_max) } else { rest.len() };
        let (part, tail) = rest.split_at(end);
        rest = tail;
        (!part.is_empty()).then_some(part)
    })
}
