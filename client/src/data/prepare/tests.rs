//! Tests of preparing as a whole: the split, the cache, determinism, cancellation.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::Path,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use super::{
    super::{
        documents::PIECE_BYTES_MAX,
        mixture::Share,
        parse::{self, STRETCH_BYTES_MAX},
        stats::SplitStats,
    },
    *,
};

struct Site {
    folder: tempfile::TempDir,
    held_out_fraction: f64,
}

impl Site {
    fn new(held_out_fraction: f64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("text")).unwrap();
        Self { folder, held_out_fraction }
    }

    /// One with 300 lines in two files.
    fn with_lines(held_out_fraction: f64) -> Self {
        let site = Self::new(held_out_fraction);
        site.write("a.jsonl", lines(0..200));
        site.write("b.jsonl", lines(200..300));
        site
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.text().join(name), content).unwrap();
    }

    fn text(&self) -> PathBuf {
        self.folder.path().join("text")
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("state/cache")
    }

    fn request(&self) -> PrepareRequest {
        PrepareRequest {
            sources: vec![Source::new(self.text())],
            cache: self.cache(),
            tokenizer: Tokenizer::byte(),
            held_out_fraction: self.held_out_fraction,
            vocabulary_size: 257,
        }
    }

    fn prepare(&self) -> Result<Dataset, DataError> {
        prepare(&self.request(), &|_| {}, &|| false)
    }

    /// Names in the cache's folder, without the lock.
    fn cached(&self) -> Vec<String> {
        let names = fs::read_dir(self.cache())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name != "lock").collect();
        names.sort();
        names
    }

    fn cached_file(&self, dataset: &Dataset, name: &str) -> PathBuf {
        self.cache().join(dataset.cache_key.to_string()).join(name)
    }
}

fn lines(range: std::ops::Range<u32>) -> String {
    range.map(|line| format!("{{\"text\": \"document {line}\"}}\n")).collect()
}

/// The training text of the only source.
fn train(dataset: &Dataset) -> &Shard {
    &dataset.train.parts()[0].shard
}

fn tokens(shard: &Shard) -> Vec<i64> {
    let mut out = Vec::new();
    shard.copy(0..shard.tokens(), &mut out).unwrap();
    out
}

/// The documents of a shard of the byte tokenizer.
fn texts(shard: &Shard) -> Vec<String> {
    let tokens = tokens(shard);
    let mut texts: Vec<String> = tokens
        .split(|token| *token == 256)
        .map(|ids| String::from_utf8(ids.iter().map(|id| u8::try_from(*id).unwrap()).collect()).unwrap())
        .collect();
    assert_eq!(texts.pop().as_deref(), Some(""), "a shard ends with the end-of-text token");
    texts
}

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
    let (long, short) = (long_text(0, 60_000), "a short text");
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
    for stretch in parse::parts(&long, STRETCH_BYTES_MAX) {
        assert!(stretch.ends_with("\n\n") || long.ends_with(stretch));
        let digest = blake3::hash(stretch.as_bytes());
        let is_held_out = u64::from_le_bytes(digest.as_bytes()[..8].try_into().unwrap()) < u64::MAX / 5;
        let rest = if is_held_out { &mut from_held_out } else { &mut from_train };
        *rest = rest.strip_prefix(stretch).unwrap();
        stretches.push(is_held_out);
    }
    assert_eq!((from_train, from_held_out), ("", ""));
    assert!(stretches.len() > 15 && stretches.contains(&true), "{stretches:?}");
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

#[test]
fn a_tokenizer_larger_than_the_model_is_refused_before_anything_is_read() {
    let site = Site::with_lines(0.2);
    let request = PrepareRequest { vocabulary_size: 256, ..site.request() };
    let error = prepare(&request, &|_| {}, &|| false).unwrap_err();
    assert!(matches!(error, DataError::Vocabulary { tokenizer: 257, model: 256 }), "{error}");
}

#[test]
fn large_vocabularies_are_stored_wider() {
    let site = Site::with_lines(0.2);
    let narrow = site.prepare().unwrap();
    let wide =
        prepare(&PrepareRequest { vocabulary_size: 70_000, ..site.request() }, &|_| {}, &|| false).unwrap();
    assert_ne!(narrow.cache_key, wide.cache_key);
    assert_eq!(tokens(train(&narrow)), tokens(train(&wide)));
    assert_eq!(tokens(&narrow.held_out), tokens(&wide.held_out));
}

#[test]
fn shards_are_the_same_bytes_whatever_the_number_of_threads() {
    let site = Site::with_lines(0.2);
    // Several batches, with faults and duplicates among them.
    let text: String =
        (0..900_000).map(|line| format!("a line with the number {}\n", line % 700_000)).collect();
    site.write("long.txt", &text);
    site.write("longer.txt", text + "\n and more \u{1F600}");
    site.write("c.jsonl", "bad\n".to_owned() + &lines(100..400));
    let files_with = |threads: usize| {
        let cache = site.folder.path().join(format!("cache-{threads}"));
        let request = PrepareRequest { cache, ..site.request() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let dataset = pool.install(|| prepare(&request, &|_| {}, &|| false)).unwrap();
        let folder = request.cache.join(dataset.cache_key.to_string());
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files
            .map(|path| (path.file_name().unwrap().to_owned(), fs::read(&path).unwrap()))
            .collect::<BTreeMap<_, _>>()
    };
    let expected = files_with(1);
    assert_eq!(expected.len(), 3);
    for threads in [2, 5] {
        assert!(files_with(threads) == expected, "{threads} threads");
    }
}

/// A site with two folders; the second repeats some of the first.
fn two_sources() -> (Site, PrepareRequest) {
    let site = Site::with_lines(0.2);
    let other = site.folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let renamed = lines(250..350).replace("\"text\"", "\"body\"");
    fs::write(other.join("a.jsonl"), renamed + "{\"text\": \"of the other key\"}\n").unwrap();
    let old = Source { text_key: "body".to_owned(), share: Share::ReplayPercent(25.0), ..Source::new(other) };
    let request = PrepareRequest { sources: vec![Source::new(site.text()), old], ..site.request() };
    (site, request)
}

#[test]
fn each_source_has_its_shard_and_its_numbers_and_no_document_is_in_two() {
    let (_site, request) = two_sources();
    let dataset = prepare(&request, &|_| {}, &|| false).unwrap();
    let [first, second] = dataset.train.parts() else { panic!("two sources") };
    assert_eq!((first.name.as_str(), first.share), ("text", 0.75));
    assert_eq!((second.name.as_str(), second.share), ("other", 0.25));
    let all = [&first.shard, &second.shard, &dataset.held_out].map(texts);
    let mut documents: Vec<&String> = all.iter().flatten().collect();
    assert_eq!(documents.len(), 350);
    documents.sort();
    documents.dedup();
    assert_eq!(documents.len(), 350);

    let [of_first, of_second] = &dataset.stats.sources[..] else { panic!("two sources") };
    assert_eq!((of_first.documents(), of_first.duplicates, of_first.skipped), (300, 0, 0));
    assert_eq!((of_second.documents(), of_second.duplicates, of_second.skipped), (50, 50, 1));
    for (stats, part) in [(of_first, first), (of_second, second)] {
        assert_eq!(
            (stats.train.tokens, stats.train.text_bytes),
            (part.shard.tokens(), part.shard.text_bytes())
        );
    }
    assert_eq!(of_first.held_out.tokens + of_second.held_out.tokens, dataset.held_out.tokens());
}

#[test]
fn other_shares_find_the_same_shards() {
    let (site, mut request) = two_sources();
    let before = prepare(&request, &|_| {}, &|| false).unwrap();
    request.sources[1].share = Share::ReplayPercent(5.0);
    let after = prepare(&request, &|progress| panic!("tokenises again: {progress:?}"), &|| false).unwrap();
    assert_eq!((before.cache_key, after.train.parts()[1].share), (after.cache_key, 0.05));
    assert_ne!(before.key, after.key, "a cursor belongs to the shares as well");
    for change in [|source: &mut Source| source.name += "2", |source: &mut Source| source.text_key += "2"] {
        let mut changed = request.clone();
        change(&mut changed.sources[0]);
        assert_ne!(cache_key(&changed, &Files::list(&changed.sources).unwrap()), after.cache_key);
    }
    // Damage that the sizes do not show.
    let stats = site.cached_file(&after, "stats.json");
    let mut json: Stats = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
    json.sources.truncate(1);
    fs::write(&stats, serde_json::to_vec(&json).unwrap()).unwrap();
    assert_eq!(prepare(&request, &|_| {}, &|| false).unwrap().train.parts().len(), 2);
}

#[test]
fn sources_that_do_not_go_together_are_refused() {
    let (_site, mut request) = two_sources();
    request.sources[0].share = Share::ReplayPercent(5.0);
    let error = prepare(&request, &|_| {}, &|| false).unwrap_err();
    assert!(error.to_string().contains("all sources are replayed"), "{error}");
}

#[test]
fn a_second_start_finds_the_shards() {
    let site = Site::with_lines(0.2);
    let first = site.prepare().unwrap();
    let modified =
        |dataset| site.cached_file(dataset, "train-0.tokens").metadata().unwrap().modified().unwrap();
    let written = modified(&first);
    let second =
        prepare(&site.request(), &|progress| panic!("tokenises again: {progress:?}"), &|| false).unwrap();
    assert_eq!((first.cache_key, written), (second.cache_key, modified(&second)));
    assert_eq!(first.stats, second.stats);
    assert_eq!(tokens(train(&first)), tokens(train(&second)));
}

#[test]
fn a_change_of_the_source_or_the_request_is_noticed() {
    let site = Site::with_lines(0.2);
    let key = |request: &PrepareRequest| cache_key(request, &Files::list(&request.sources).unwrap());
    let request = site.request();
    let mut keys = vec![key(&request), key(&PrepareRequest { held_out_fraction: 0.3, ..request.clone() })];
    site.write("b.jsonl", lines(0..1));
    keys.push(key(&request));
    let file = fs::File::options().write(true).open(site.text().join("b.jsonl")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    keys.push(key(&request));
    fs::rename(site.text().join("b.jsonl"), site.text().join("c.jsonl")).unwrap();
    keys.push(key(&request));
    assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len());
}

#[test]
fn damaged_shards_are_made_anew() {
    let site = Site::with_lines(0.2);
    let dataset = site.prepare().unwrap();
    let expected = tokens(train(&dataset));
    let check = |name: &str, damage: &dyn Fn(&Path)| {
        // Under a new name: what is mapped must not change.
        let path = site.cached_file(&dataset, name);
        let content = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, content).unwrap();
        damage(&path);
        assert_eq!(tokens(train(&site.prepare().unwrap())), expected, "{name}");
        assert_eq!(site.cached().len(), 1);
    };
    check("train-0.tokens", &|path| {
        fs::File::options().write(true).open(path).unwrap().set_len(100).unwrap();
    });
    check("held_out.tokens", &|path| fs::write(path, b"").unwrap());
    check("stats.json", &|path| fs::write(path, b"{").unwrap());
    check("train-0.tokens", &|path| fs::remove_file(path).unwrap());
}

#[test]
fn cancelling_leaves_nothing() {
    let site = Site::with_lines(0.2);
    let asked = AtomicUsize::new(0);
    let total = prepare(&site.request(), &|_| {}, &|| {
        asked.fetch_add(1, Ordering::Relaxed);
        false
    });
    drop(total.unwrap());
    fs::remove_dir_all(site.cache()).unwrap();
    let total = asked.load(Ordering::Relaxed);
    assert!(total >= 300, "{total}");
    for stop in [0, 1, 150, total - 1] {
        let asked = AtomicUsize::new(0);
        let result = prepare(&site.request(), &|_| {}, &|| asked.fetch_add(1, Ordering::Relaxed) == stop);
        assert!(matches!(result, Err(DataError::Cancelled)), "{stop}");
        assert!(site.cached().is_empty(), "{stop}: {:?}", site.cached());
    }
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let site = Site::with_lines(0.2);
    let leftover = site.cache().join("preparing");
    fs::create_dir_all(&leftover).unwrap();
    fs::write(leftover.join("train-0.tokens"), b"half").unwrap();
    let dataset = site.prepare().unwrap();
    assert_eq!(site.cached(), [dataset.cache_key.to_string()]);
}

#[test]
fn the_keys_used_last_are_kept() {
    let site = Site::with_lines(0.2);
    let with = |fraction: f64| {
        prepare(&PrepareRequest { held_out_fraction: fraction, ..site.request() }, &|_| {}, &|| false)
            .unwrap()
    };
    let age = |dataset: &Dataset, hours: u64| {
        let folder = fs::File::open(site.cache().join(dataset.cache_key.to_string())).unwrap();
        folder.set_modified(SystemTime::now() - Duration::from_secs(3_600 * hours)).unwrap();
    };
    let datasets = [0.1, 0.2, 0.3, 0.4].map(with);
    for (dataset, hours) in datasets.iter().zip([9, 8, 7, 6]) {
        age(dataset, hours);
    }
    with(0.1); // used again, no longer the oldest
    let newest = with(0.5);
    let mut expected: Vec<String> = [0, 2, 3]
        .map(|index: usize| datasets[index].cache_key.to_string())
        .into_iter()
        .chain([newest.cache_key.to_string()])
        .collect();
    expected.sort();
    assert_eq!(site.cached(), expected);
    // What was removed is still mapped.
    assert!(!tokens(train(&datasets[1])).is_empty());
}

#[test]
fn two_processes_cannot_prepare_in_one_cache() {
    let site = Site::with_lines(0.2);
    let other = Cache::open(&site.cache()).unwrap();
    let error = site.prepare().unwrap_err();
    assert!(matches!(error, DataError::Busy { .. }), "{error}");
    drop(other);
    assert!(site.prepare().is_ok());
}

#[test]
fn progress_grows_to_the_end() {
    let site = Site::with_lines(0.2);
    let text: String = (0..2_000_000).map(|line| format!("the line {line}\n")).collect();
    site.write("long.txt", text);
    let last = AtomicU64::new(0);
    let reports = AtomicUsize::new(0);
    let ended = AtomicUsize::new(0);
    let dataset = prepare(
        &site.request(),
        &|progress| {
            assert!(progress.bytes_read <= progress.bytes_total);
            assert!(last.swap(progress.tokens, Ordering::Relaxed) < progress.tokens);
            reports.fetch_add(1, Ordering::Relaxed);
            ended.store(usize::from(progress.bytes_read == progress.bytes_total), Ordering::Relaxed);
        },
        &|| false,
    )
    .unwrap();
    assert_eq!(last.into_inner(), dataset.stats.total().tokens());
    assert!(reports.into_inner() >= 1);
    assert_eq!(ended.into_inner(), 1);
}
