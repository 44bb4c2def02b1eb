//! Tests of `.parquet` files, through the reader of all files.

use std::{
    panic::{catch_unwind, set_hook, take_hook},
    sync::Mutex,
};

use proptest::prelude::*;

use super::{
    super::documents::tests::{check, read_bounded},
    guarded, hide_messages,
};

/// A file with one text column, in row groups of three rows.
fn parquet(schema: &str, rows: &[Option<&str>], compression: parquet::basic::Compression) -> Vec<u8> {
    in_groups(schema, rows, compression, 3)
}

fn in_groups(
    schema: &str,
    rows: &[Option<&str>],
    compression: parquet::basic::Compression,
    rows_per_group: usize,
) -> Vec<u8> {
    use parquet::{data_type::ByteArrayType, file};
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap();
    let properties = file::properties::WriterProperties::builder().set_compression(compression).build();
    let mut bytes = Vec::new();
    let mut writer =
        file::writer::SerializedFileWriter::new(&mut bytes, schema.into(), properties.into()).unwrap();
    for rows in rows.chunks(rows_per_group) {
        let mut group = writer.next_row_group().unwrap();
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let texts: Vec<_> =
            rows.iter().flatten().map(|text| parquet::data_type::ByteArray::from(*text)).collect();
        while let Some(mut column) = group.next_column().unwrap() {
            column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

const PARQUET: &str = "message rows { optional binary id (UTF8); optional binary text (UTF8); }";

#[test]
fn the_rows_of_a_parquet_file_are_documents() {
    use parquet::basic::{Compression, GzipLevel, ZstdLevel};
    let rows = [Some("one"), None, Some("zwei\nü"), Some(""), Some("five"), Some("six"), Some("seven")];
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
        Compression::LZ4_RAW,
    ] {
        let file = parquet(PARQUET, &rows, compression);
        check(
            "a.parquet",
            &file,
            &["one", "zwei\nü", "five", "six", "seven"],
            &["2: there is no text (null)"],
        );
    }
    let long = "x".repeat(65);
    let file = parquet(PARQUET, &[Some(&long), Some("two"), Some("a\0b")], Compression::SNAPPY);
    check("a.parquet", &file, &["two"], &["1: the text is longer than 64 bytes", "3: not text: a NUL"]);
}

#[test]
fn a_parquet_file_without_the_column_or_damaged_is_skipped_with_its_reason() {
    let compression = parquet::basic::Compression::SNAPPY;
    let other = "message rows { optional binary body (UTF8); optional binary title (UTF8); }";
    let file = parquet(other, &[Some("one")], compression);
    check(
        "a.parquet",
        &file,
        &[],
        &["0: cannot be read on: it has no column \"text\"; there are body, title"],
    );
    let good = parquet(PARQUET, &[Some("one"), Some("two")], compression);
    let damaged = "0: cannot be read on: not a whole parquet file";
    check("a.parquet", b"not parquet at all", &[], &[damaged]);
    check("a.parquet", &good[..good.len() - 9], &[], &[damaged]);
    check("a.parquet", &good[..2], &[], &[damaged]);
}

const ONLY_TEXT: &str = "message rows { optional binary text (UTF8); }";

#[test]
fn a_codec_that_is_not_read_is_named() {
    let mut file = parquet(ONLY_TEXT, &[Some("one")], parquet::basic::Compression::SNAPPY);
    // The column's name in the footer, then the field with the codec, a zigzag number: 3 is LZO, 5 is LZ4.
    let pattern = b"\x18\x04text\x15";
    let at = file.windows(pattern.len()).position(|bytes| bytes == pattern).unwrap() + pattern.len();
    assert_eq!(file[at], 2, "snappy is 1");
    for (codec, fault) in [
        (6, "0: cannot be read on: its text is compressed with LZO,"),
        (10, "0: cannot be read on: its text is compressed with LZ4 (the deprecated form),"),
    ] {
        file[at] = codec;
        check("a.parquet", &file, &[], &[fault]);
    }
}

#[test]
fn a_page_that_is_too_large_or_claims_to_be_is_refused_unread() {
    use parquet::basic::Compression;
    let texts: Vec<String> = (0..10).map(|text| format!("{text} {}", "x".repeat(58))).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let rows: Vec<Option<&str>> = texts.iter().copied().map(Some).collect();
    // Three rows of 64 bytes with their lengths are less than 512; all ten in one page are more.
    check("a.parquet", &parquet(ONLY_TEXT, &rows[..3], Compression::SNAPPY), &texts[..3], &[]);
    let one_group = in_groups(ONLY_TEXT, &rows, Compression::UNCOMPRESSED, 10);
    check("a.parquet", &one_group, &[], &["0: cannot be read on: it has a page of 640 bytes, more than 512"]);

    let mut file = parquet(ONLY_TEXT, &rows[..3], Compression::SNAPPY);
    // The first page's header: its type, then its size of two bytes.
    assert_eq!((&file[..5], file[6]), (&b"PAR1\x15"[..], 0x15));
    file[7..9].copy_from_slice(&[0xFE, 0x7F]);
    check("a.parquet", &file, &[], &["0: cannot be read on: it has a page of 8191 bytes, more than 512"]);
}

#[test]
fn no_content_is_quoted() {
    let rows = [Some("secret"), Some("secret too"), None];
    let good = parquet(ONLY_TEXT, &rows, parquet::basic::Compression::UNCOMPRESSED);
    for at in 0..good.len() {
        for byte in [0, 0x15, 0xFF] {
            let mut file = good.clone();
            file[at] = byte;
            let faults = read_bounded("a.parquet", &file, 64).faults;
            assert!(faults.iter().all(|fault| !fault.contains("secret")), "{at}: {faults:?}");
        }
    }
}

#[test]
fn a_panic_of_the_library_is_an_error_and_its_message_is_not_told() {
    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
    // The hook is there from here on, whatever other tests do.
    guarded(|| Ok(())).unwrap();
    let before = take_hook();
    set_hook(Box::new(move |info| {
        TOLD.lock().unwrap().push(info.to_string());
        before(info);
    }));
    hide_messages();
    let error = guarded::<()>(|| panic!("words of the file")).unwrap_err();
    assert_eq!(error.to_string(), "not a whole parquet file");
    assert!(catch_unwind(|| panic!("another's")).is_err());
    let told = TOLD.lock().unwrap().join("\n");
    assert!(told.contains("another's") && !told.contains("words of the file"), "{told}");
}

proptest! {
    #[test]
    fn a_damaged_parquet_file_is_never_fatal(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<prop::sample::Index>(),
        whole: bool,
    ) {
        let rows = [Some("one"), None, Some("three"), Some("three"), Some("five and more")];
        let mut bytes = parquet(PARQUET, &rows, parquet::basic::Compression::SNAPPY);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if !whole {
            bytes.truncate(cut.index(bytes.len()));
        }
        read_bounded("a.parquet", &bytes, 64);
    }
}
