//! Tests of what is in the shards: documents, their ends, the split, what is left out.

use consort_common::text::{PIECE_BYTES_MAX, STRETCH_BYTES_MAX, parts};

use super::{super::super::stats::SplitStats, *};

#[test]
fn shards_hold_every_document_once_in_order() {
    let site = Site::with_lines(0.2);
    let dataset = site.prepare().unwrap();
    let (train, held_out) = (texts(train(&dataset)), texts(&dataset.held_out));
    assert!((30..90).contains(&held_out.len()), "{}", held_out.len());
    let number = |text: &String| text.strip_prefix("document ").unwrap().parse::<u32>().unwrap();
    let mut numbers: Vec<u32> = train.iter().map(number).collect();
    assert!(numbers.is_sorted());
    numbers.extend(held_out.iter().map(number));
    numbers.sort_unstable();
    assert_eq!(numbers, (0..300).collect::<Vec<_>>());
    let stats = dataset.stats.total();
    for (split, shard, texts) in [
        (stats.train, &dataset.train.parts()[0].shard, &train),
        (stats.held_out, &dataset.held_out, &held_out),
    ] {
        let text_bytes = texts.iter().map(|text| text.len() as u64).sum::<u64>();
        let documents = texts.len() as u64;
        assert_eq!(split, SplitStats { documents, tokens: text_bytes + documents, text_bytes });
        assert_eq!((shard.tokens(), shard.text_bytes()), (split.tokens, split.text_bytes));
    }
    assert_eq!((stats.files, stats.skipped, stats.documents()), (2, 0, 300));
    assert_eq!((stats.lengths.percentile(50), stats.lengths.max()), (13, 13));
}

#[test]
fn held_out_documents_stay_held_out_whatever_else_is_there() {
    let site = Site::with_lines(0.2);
    let before = site.prepare().unwrap();
    fs::rename(site.text().join("a.jsonl"), site.text().join("z.jsonl")).unwrap();
    site.write("m.jsonl", lines(300..500));
    let after = site.prepare().unwrap();
    let held_out = texts(&after.held_out);
    assert!(texts(&before.held_out).iter().all(|text| held_out.contains(text)));
    assert!(texts(train(&before)).iter().all(|text| !held_out.contains(text)));
}

#[test]
fn a_few_large_text_files_are_held_out_in_proportion() {
    let site = Site::new(0.1);
    for file in 0..3 {
        site.write(&format!("{file}.txt"), long_text(file, 240_000));
    }
    let stats = site.prepare().unwrap().stats.total();
    let share =
        stats.held_out.text_bytes as f64 / (stats.held_out.text_bytes + stats.train.text_bytes) as f64;
    assert!((0.05..0.15).contains(&share), "{share} of {} documents", stats.documents());
}

/// A text with a blank line now and then.
fn long_text(file: u32, lines: u32) -> String {
    (0..lines)
        .map(|line| format!("line {line} of {file}\n{}", if line % 5 == 0 { "\n" } else { "" }))
        .collect()
}

#[test]
fn a_text_file_ends_once_and_is_held_out_in_whole_stretches() {
    let site = Site::new(0.2);
    let (long, short) = (long_text(0, 200_000), "a short text");
    site.write("a.txt", &long);
    site.write("b.txt", short);
    let dataset = site.prepare().unwrap();
    // What of the long text is trained on and held out, each with one end.
    let of_long = |shard: &Shard| texts(shard).into_iter().find(|text| text.starts_with("line")).unwrap();
    let (train, held_out) = (of_long(train(&dataset)), of_long(&dataset.held_out));
    let stats = dataset.stats.total();
    assert_eq!((stats.documents(), stats.train.documents + stats.held_out.documents), (3, 3));
    let (mut from_train, mut from_held_out) = (train.as_str(), held_out.as_str());
    let mut stretches = Vec::new();
    for stretch in parts(&long, STRETCH_BYTES_MAX) {
        assert!(stretch.ends_with("\n\n") || long.ends_with(stretch));
        let digest = blake3::hash(stretch.as_bytes());
        let is_held_out = u64::from_le_bytes(digest.as_bytes()[..8].try_into().unwrap()) < u64::MAX / 5;
        let rest = if is_held_out { &mut from_held_out } else { &mut from_train };
        *rest = rest.strip_prefix(stretch).unwrap();
        stretches.push(is_held_out);
    }
    assert_eq!((from_train, from_held_out), ("", ""));
    assert!(stretches.len() > 40 && stretches.contains(&true), "{stretches:?}");
}

#[test]
fn a_text_file_that_is_read_in_pieces_still_ends_once() {
    let site = Site::new(0.0);
    let text = "0123456789abcde\n".repeat(PIECE_BYTES_MAX / 16 + 1_000);
    site.write("a.txt", &text);
    site.write("b.txt", "another");
    let dataset = site.prepare().unwrap();
    let (shard, mut ends) = (train(&dataset), Vec::new());
    for start in (0..shard.tokens()).step_by(1 << 20) {
        let mut tokens = Vec::new();
        shard.copy(start..shard.tokens().min(start + (1 << 20)), &mut tokens).unwrap();
        ends.extend((start..).zip(tokens).filter(|(_, token)| *token == 256).map(|(at, _)| at));
    }
    let bytes = text.len() as u64;
    assert_eq!(ends, [bytes, bytes + 8]);
    assert_eq!((dataset.stats.total().documents(), dataset.stats.total().lengths.max()), (2, bytes + 1));
}

#[test]
fn a_long_text_is_a_duplicate_only_as_a_whole() {
    let site = Site::new(0.2);
    let text = long_text(0, 60_000);
    site.write("a.txt", &text);
    site.write("b.txt", &text);
    let before = site.prepare().unwrap().stats.total();
    assert_eq!((before.duplicates, before.all().text_bytes), (1, text.len() as u64));
    site.write("b.txt", text.clone() + "\nand one line");
    let after = site.prepare().unwrap();
    let stats = after.stats.total();
    assert_eq!((stats.duplicates, stats.all().text_bytes), (0, 2 * text.len() as u64 + 13));
    // What both have is on the same side of the split.
    let (train, held_out) = (texts(train(&after)), texts(&after.held_out));
    assert!(train[1].starts_with(&train[0][..train[0].len() / 2]));
    assert!(held_out[1].starts_with(&held_out[0][..held_out[0].len() / 2]));
}

#[test]
fn a_small_source_still_holds_out_a_document() {
    let site = Site::new(1e-9);
    site.write("a.jsonl", lines(0..3));
    let dataset = site.prepare().unwrap();
    let held_out = texts(&dataset.held_out);
    assert_eq!((dataset.stats.total().train.documents, held_out.len()), (2, 1));
    assert_eq!(dataset.stats.total().documents(), 3);
    let digest =
        |text: &str| u64::from_le_bytes(blake3::hash(text.as_bytes()).as_bytes()[..8].try_into().unwrap());
    assert!(texts(train(&dataset)).iter().all(|text| digest(text) > digest(&held_out[0])));
}

#[test]
fn nothing_is_held_out_where_nothing_is_asked() {
    let site = Site::new(0.0);
    site.write("a.txt", "text");
    let dataset = site.prepare().unwrap();
    assert_eq!((texts(train(&dataset)), dataset.held_out.tokens()), (vec!["text".to_owned()], 0));
}

#[test]
fn sources_without_enough_text_are_errors_that_say_what_to_do() {
    let check = |fraction: f64, files: &[(&str, &[u8])], parts: &[&str]| {
        let site = Site::new(fraction);
        for (name, content) in files {
            site.write(name, content);
        }
        let error = site.prepare().unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{error:?} has no {part:?}");
        }
        assert!(!site.cache().exists() || site.cached().is_empty());
    };
    check(0.1, &[], &["no text in", "put text there"]);
    check(0.1, &[("a.pdf", b"x")], &["found 1 other files"]);
    check(0.1, &[("a.txt", b"")], &["1 files", "empty or blank"]);
    check(0.1, &[("a.txt", b" \n"), ("b.txt", b"\0")], &["the first of 1 faults: b.txt: not text"]);
    check(
        0.1,
        &[("a.txt", b"one")],
        &["of 1 documents 1 have text to train on and 0 have held-out text", "provide more text"],
    );
    check(1.0, &[("a.txt", b"one")], &["held_out_fraction is 1"]);
    check(f64::NAN, &[("a.txt", b"one")], &["held_out_fraction is NaN"]);
}

#[test]
fn faults_duplicates_and_blanks_are_counted_and_the_rest_is_used() {
    let site = Site::new(0.2);
    site.write("a.jsonl", lines(0..20) + "\n{\"text\": \"  \\n\"}\n" + &"not json\n".repeat(150));
    site.write("b.jsonl", lines(10..30));
    site.write("c.txt", b"binary\0");
    let stats = site.prepare().unwrap().stats.sources.remove(0);
    assert_eq!((stats.documents(), stats.duplicates, stats.blank), (30, 10, 1));
    assert_eq!((stats.skipped, stats.skipped_listed.len()), (151, 100));
    assert_eq!(stats.skipped_listed[0].to_string(), "a.jsonl, line 23: not JSON (column 2)");
    assert_eq!(stats.skipped_listed[99].line, Some(122));
}
