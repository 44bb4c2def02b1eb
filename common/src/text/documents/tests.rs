//! Tests of reading: formats, bounds, damage.

use std::{
    fs,
    io::Write,
    sync::atomic::{AtomicUsize, Ordering},
};

use proptest::prelude::*;

use super::{
    super::{
        parse::{Parsed, STRETCH_BYTES_MAX, parse, parts},
        source::{TEXT_KEY, list},
    },
    *,
};

/// Everything that is read of one file: stretches of text, and faults as "line: reason".
pub(in super::super) struct Found {
    texts: Vec<String>,
    pub(in super::super) faults: Vec<String>,
}

pub(in super::super) fn read_bounded(name: &str, bytes: &[u8], piece_bytes_max: usize) -> Found {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), bytes).unwrap();
    let listing = list(folder.path(), 0, TEXT_KEY).unwrap();
    let mut reader = Reader::new(&listing.files, &|| false);
    reader.piece_bytes_max = piece_bytes_max;
    let mut found = Found { texts: Vec::new(), faults: Vec::new() };
    for piece in reader.by_ref() {
        let piece = piece.unwrap();
        assert!(piece.bytes() <= piece_bytes_max + 1 || matches!(piece.content, Content::Fault(_)));
        match parse(piece.content, "text") {
            Ok(Parsed { text, stretches, .. }) => {
                found.texts.extend(stretches.into_iter().map(|stretch| text[stretch.range].to_owned()));
            }
            Err(reason) => found.faults.push(format!("{}: {reason}", piece.line.unwrap_or_default())),
        }
    }
    assert_eq!(reader.bytes_read(), bytes.len() as u64);
    found
}

pub(in super::super) fn check(name: &str, bytes: &[u8], texts: &[&str], faults: &[&str]) {
    let found = read_bounded(name, bytes, 64);
    assert_eq!(found.texts, texts, "{name}");
    assert_eq!(found.faults.len(), faults.len(), "{:?}", found.faults);
    for (found, expected) in found.faults.iter().zip(faults) {
        assert!(found.contains(expected), "{found:?} has no {expected:?}");
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

const LINES: &[u8] = b"{\"text\": \"one\"}\n{\"id\": 7, \"text\": \"tw\\u00f6\\n\"}\n\n{\"text\": \"\"}\r\n{\"text\": \"last\"}";

#[test]
fn every_format_gives_its_documents() {
    let lines = ["one", "twö\n", "last"];
    check("a.jsonl", LINES, &lines, &[]);
    check("a.jsonl.gz", &gzip(LINES), &lines, &[]);
    check("a.jsonl.zst", &zstd::encode_all(LINES, 1).unwrap(), &lines, &[]);
    check("a.txt", "Grüße\n".as_bytes(), &["Grüße\n"], &[]);
    check("a.txt.gz", &gzip(b"text"), &["text"], &[]);
    check("a.txt.zst", &zstd::encode_all(&b"text"[..], 1).unwrap(), &["text"], &[]);
    check("a.txt", b"", &[], &[]);
}

#[test]
fn the_text_may_have_another_name() {
    let of = |key: &str, line: &str| parse(Content::JsonLine(line.into()), key).map(|parsed| parsed.text);
    assert_eq!(of("body", "{\"text\": 5, \"body\": \"one\", \"x\": [{}]}"), Ok("one".to_owned()));
    assert_eq!(of("body", "{\"text\": \"one\"}"), Err("not an object with a string \"body\"".to_owned()));
    assert_eq!(of("a b", "{\"a \\u0062\": \"one\"}"), Ok("one".to_owned()));
}

#[test]
fn members_and_frames_in_a_row_are_all_read() {
    check("a.txt.gz", &[gzip(b"one "), gzip(b"two")].concat(), &["one two"], &[]);
    let frame = |text: &[u8]| zstd::encode_all(text, 1).unwrap();
    check("a.txt.zst", &[frame(b"one "), frame(b"two")].concat(), &["one two"], &[]);
}

#[test]
fn a_byte_order_mark_is_not_text() {
    check("a.txt", b"\xEF\xBB\xBFtext", &["text"], &[]);
    check("a.jsonl", b"\xEF\xBB\xBF{\"text\": \"one\"}", &["one"], &[]);
}

#[test]
fn what_is_not_text_is_skipped_with_its_reason() {
    check("a.txt", b"PDF\0\x01", &[], &["0: not text: a NUL at byte 3"]);
    check("a.txt", b"caf\xE9 ol\xE9", &[], &["0: not UTF-8 at byte 3"]);
    check("a.txt.gz", b"not gzip at all", &[], &["0: cannot be read on"]);
    check("a.txt.zst", b"not zstd at all", &[], &["0: cannot be read on"]);
}

#[test]
fn bad_lines_are_skipped_and_the_others_kept() {
    let lines = b"{\"text\": \"one\"}\n{\"text\": 5}\n{\"words\": 1}\n[\n\"secret\"\n{\"text\": \"\xFF\"}\n{\"text\": \"two\"}\n";
    check(
        "a.jsonl",
        lines,
        &["one", "two"],
        &[
            "2: not an object with",
            "3: not an object with",
            "4: not an object with",
            "5: not an object with",
            "6: not JSON",
        ],
    );
    assert!(read_bounded("a.jsonl", lines, 64).faults.iter().all(|fault| !fault.contains("secret")));
}

#[test]
fn a_truncated_archive_gives_its_whole_lines_only() {
    let many: String =
        (0..5_000).map(|line| format!("{{\"text\": \"line {line} {}\"}}\n", line * 7919 % 1000)).collect();
    let archives = [
        ("a.jsonl.gz", gzip(many.as_bytes())),
        ("a.jsonl.zst", zstd::encode_all(many.as_bytes(), 1).unwrap()),
    ];
    for (name, archive) in archives {
        let found = read_bounded(name, &archive, 64);
        assert_eq!((found.texts.len(), found.faults.len()), (5_000, 0), "{name}");
        let found = read_bounded(name, &archive[..archive.len() - 500], 64);
        assert!(found.texts.len() < 5_000, "{name}");
        assert!(found.texts.iter().all(|text| text.starts_with("line ")));
        assert_eq!(found.faults.len(), 1, "{:?}", found.faults);
        assert!(found.faults[0].contains("cannot be read on"), "{:?}", found.faults);
    }
    check("a.txt.gz", &gzip(b"text")[..12], &[], &["0: cannot be read on"]);
}

#[test]
fn a_line_that_is_too_long_is_skipped_without_being_held() {
    let line = |length: usize| format!("{{\"text\": \"{}\"}}", "x".repeat(length - 12));
    let lines = [line(64), line(65), line(1_000_000), line(20)].join("\n");
    check(
        "a.jsonl",
        lines.as_bytes(),
        &[&"x".repeat(52), &"x".repeat(8)],
        &["2: the line is longer than 64 bytes", "3: the line is longer than 64 bytes"],
    );
    // The last line of a file, just as long.
    check("a.jsonl", line(64).as_bytes(), &[&"x".repeat(52)], &[]);
    check("a.jsonl", line(65).as_bytes(), &[], &["1: the line is longer"]);
}

/// A line that is skipped, blank lines, a text: all far longer than what is read between two questions.
#[test]
fn reading_is_cancelled_within_a_piece() {
    let long = vec![b'x'; 1 << 20];
    let files = [
        ("a.jsonl", long.clone()),
        ("a.jsonl.gz", gzip(&long)),
        ("a.jsonl.zst", zstd::encode_all(&long[..], 1).unwrap()),
        ("b.jsonl", vec![b'\n'; 1 << 20]),
        ("a.txt", long),
    ];
    for (name, bytes) in files {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), bytes).unwrap();
        let listing = list(folder.path(), 0, TEXT_KEY).unwrap();
        let read = |stop: usize| {
            let asked = AtomicUsize::new(0);
            let cancelled = || asked.fetch_add(1, Ordering::Relaxed) == stop;
            let mut reader = Reader::new(&listing.files, &cancelled);
            if name.contains("jsonl") {
                reader.piece_bytes_max = 64;
            }
            let is_cancelled = reader.take_while(Result::is_ok).count() == 0;
            (is_cancelled, asked.into_inner())
        };
        assert!(read(usize::MAX).1 >= (1 << 20) / READ_BYTES, "{name}");
        for stop in [0, 1, 7] {
            assert_eq!(read(stop), (true, stop + 1), "{name}");
        }
    }
}

#[test]
fn a_long_text_is_read_in_pieces() {
    let text: String =
        (0..200).map(|line| format!("Zeile {line} – ü\n{}", if line % 3 == 0 { "\n" } else { "" })).collect();
    let found = read_bounded("a.txt", text.as_bytes(), 64);
    assert!(found.texts.len() > 40);
    assert_eq!(found.texts.concat(), text);
    assert!(found.texts[..found.texts.len() - 1].iter().all(|piece| piece.ends_with("\n\n")));
}

#[test]
fn a_long_text_has_stretches_of_bounded_length_and_one_digest() {
    let paragraph = format!("{}\n\n", "word ".repeat(100));
    let text = paragraph.repeat(400);
    let found = read_bounded("a.txt", text.as_bytes(), PIECE_BYTES_MAX);
    assert_eq!(found.texts.len(), text.len().div_ceil(STRETCH_BYTES_MAX / paragraph.len() * paragraph.len()));
    assert!(found.texts.iter().all(|stretch| stretch.ends_with("\n\n")));
    assert_eq!(found.texts.concat(), text);
    let parsed = |text: &str| parse(Content::Text(text.into()), "text").unwrap();
    let (long, other) = (parsed(&text), parsed(&(text.clone() + "more")));
    assert_eq!(long.stretches[0].digest, other.stretches[0].digest);
    assert_ne!(long.digest, other.digest);
    let short = parsed(&paragraph);
    assert_eq!((short.stretches.len(), short.stretches[0].digest), (1, short.digest));
}

#[test]
fn texts_are_cut_where_it_hurts_least() {
    for (text, expected) in [
        ("12345678", vec!["12345678"]),
        ("aaaa\n\nb\nccc", vec!["aaaa\n\n", "b\nccc"]),
        ("aaa\r\n\r\nbc de", vec!["aaa\r\n\r\n", "bc de"]),
        ("aaaaa\nbbbbb", vec!["aaaaa\n", "bbbbb"]),
        ("aaaa b ccccc", vec!["aaaa b ", "ccccc"]),
        ("aaaaaaaaaa", vec!["aaaaaaaa", "aa"]),
        ("aaaaaaaüb", vec!["aaaaaaa", "üb"]),
        // Too early to end a part there.
        ("\n\naaaaaaaaa", vec!["\n\naaaaaa", "aaa"]),
        ("", vec![]),
    ] {
        assert_eq!(parts(text, 8).collect::<Vec<_>>(), expected, "{text:?}");
    }
}

proptest! {
    #[test]
    fn parts_make_the_text_and_are_bounded(text in "(.|\n|\r\n| |ü|😀){0,200}", bytes_max in 8usize..40) {
        let found: Vec<&str> = parts(&text, bytes_max).collect();
        prop_assert_eq!(found.concat(), text.as_str());
        prop_assert!(found.iter().all(|part| !part.is_empty() && part.len() <= bytes_max));
    }

    #[test]
    fn arbitrary_bytes_are_never_fatal(bytes in prop::collection::vec(any::<u8>(), 1..300), name in 0usize..6) {
        let names = ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"];
        // The archive's magic number, so that its decoder gets to work.
        let magic = [vec![], gzip(&[])[..4].to_vec(), zstd::encode_all(&[][..], 1).unwrap()[..4].to_vec()];
        let bytes = [magic[name % 3].clone(), bytes].concat();
        read_bounded(names[name], &bytes, 64);
    }
}
